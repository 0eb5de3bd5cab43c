// The page: tabs, the photographs they share, and what each tab is told when something changes.

import { ask, post, tell } from "./api.js";
import { between } from "./between.js";
import { $, check, make, roving } from "./elements.js";
import { generate } from "./generate.js";
import { reconstruct } from "./reconstruct.js";
import { runs } from "./runs.js";
import { tokens } from "./tokens.js";

const views = { reconstruct, tokens, between, generate, runs };
const withChooser = new Set(["reconstruct", "tokens"]);
const state = { about: null, photographs: [], chosen: 0, tab: "reconstruct" };

function select(tab, focus = false) {
  state.tab = tab;
  for (const name of Object.keys(views)) {
    const button = $(`tab-${name}`);
    button.setAttribute("aria-selected", String(name === tab));
    button.tabIndex = name === tab ? 0 : -1;
    $(`panel-${name}`).hidden = name !== tab;
    if (name === tab && focus) button.focus();
  }
  $("chooser").hidden = !withChooser.has(tab);
  history.replaceState(null, "", `#${tab}`);
  $(`tab-${tab}`).scrollIntoView({ block: "nearest", inline: "nearest" });
  if (state.about) views[tab].open(state);
}

function choose(place) {
  state.chosen = place;
  check($("photographs"), place);
  const photograph = state.photographs[place];
  $("credit").textContent = photograph ? [photograph.name, photograph.size, photograph.credit].filter(Boolean).join(" · ") : "";
  if (withChooser.has(state.tab)) views[state.tab].open(state);
}

function list() {
  const buttons = state.photographs.map((photograph, place) => {
    const picture = make("img", { src: photograph.picture, alt: "" });
    const button = make("button", { type: "button", role: "radio", "aria-label": photograph.name }, picture);
    button.addEventListener("click", () => choose(place));
    return button;
  });
  $("photographs").replaceChildren(...buttons);
}

async function add(file) {
  if (!file) return;
  const found = await post("add", "api/photographs", file, { name: file.name || "photograph" });
  if (!found) return;
  state.photographs = [found, ...state.photographs.filter((each) => each.key !== found.key)];
  list();
  choose(0);
  $("photographs").scrollLeft = 0;
  if (!withChooser.has(state.tab)) views[state.tab].open(state);
}

function listenForFiles() {
  $("file").addEventListener("change", (event) => {
    add(event.target.files[0]);
    event.target.value = "";
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    add(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => add(event.clipboardData?.files[0]));
}

function listenToTabs() {
  const names = Object.keys(views);
  for (const name of names) $(`tab-${name}`).addEventListener("click", () => select(name));
  document.querySelector('[role="tablist"]').addEventListener("keydown", (event) => {
    const place = names.indexOf(state.tab);
    const next = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: names.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    select(names.at(next % names.length), true);
  });
}

async function start() {
  $("message").querySelector("button").addEventListener("click", () => tell(""));
  listenToTabs();
  listenForFiles();
  roving($("photographs"), () => 1, choose);
  const wanted = location.hash.slice(1);
  select(wanted in views ? wanted : "reconstruct");
  state.about = await ask("about", "api/about");
  if (!state.about) return;
  const { tokenizer, generator } = state.about;
  $("models").textContent = `${tokenizer.name}: ${tokenizer.size} × ${tokenizer.size} pixels as ${tokenizer.tokens} tokens`
    + (generator ? ` · ${generator.name}` : "");
  state.photographs = state.about.photographs;
  list();
  for (const view of Object.values(views)) view.start(state);
  if (state.photographs.length) choose(0);
  if (!withChooser.has(state.tab) || !state.photographs.length) views[state.tab].open(state);
}

start();
