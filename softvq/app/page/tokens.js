// Tab "Tokens": what each token paints, what it is made of, and what the picture becomes when it is changed.

import { ask, post } from "./api.js";
import { $, check, decibels, fill, make, roving, show } from "./elements.js";

const DIRECTIONS = 4;
let state = null;
let photograph = null; // whose maps are shown
let maps = null;
let selected = 0;
const edits = new Map(); // by token

function editOf(token) {
  return edits.get(token) ?? { token, kind: "keep", moves: Array(DIRECTIONS).fill(0) };
}

function isChanged(edit) {
  return edit.kind !== "keep" || edit.moves.some((move) => move !== 0);
}

function change(values) {
  const edit = { ...editOf(selected), ...values };
  if (!maps) return;
  if (isChanged(edit)) edits.set(selected, edit);
  else edits.delete(selected);
  $("maps").children[selected]?.classList.toggle("changed", isChanged(edit));
  draw();
}

async function draw() {
  const of = photograph;
  if (!of) return;
  const found = await post("edit", "api/edit", { photo: of.key, edits: [...edits.values()] });
  if (!found || photograph !== of) return;
  show("t-edited", found.picture);
  show("t-difference", found.difference);
  const count = edits.size;
  const what = count === 0 ? "From all tokens" : `${count} ${count === 1 ? "token" : "tokens"} changed`;
  $("t-caption").textContent = `${what}, ${decibels(found.psnr)}`;
  $("t-change").textContent = found.change === 0 ? "What the changes do: nothing is changed yet"
    : `What the changes do: ${(100 * found.change).toFixed(2)} % on average`;
}

function showEdit() {
  const edit = editOf(selected);
  $("t-kind").value = edit.kind;
  $("t-photograph").disabled = edit.kind !== "photograph";
  $("t-place").disabled = edit.kind !== "swap";
  if (edit.kind === "photograph") $("t-photograph").value = edit.other;
  if (edit.kind === "swap") $("t-place").value = edit.other + 1;
  [...$("t-moves").querySelectorAll("input")].forEach((slider, i) => {
    slider.value = edit.moves[i];
    slider.nextElementSibling.textContent = Number(edit.moves[i]).toFixed(1);
  });
}

// A bar is as long as its weight is to the largest, because a soft posterior may spread over thousands.
function bar(codeword, _, stage) {
  const share = `${(100 * codeword.weight).toFixed(2)} %`;
  const meter = make("meter", { min: 0, max: stage[0].weight, value: codeword.weight });
  meter.setAttribute("aria-label", `weight of codeword ${codeword.index}`);
  const row = make("div", { class: "bar" }, make("span", {}, String(codeword.index)), meter, make("span", {}, share));
  return row;
}

async function select(place) {
  if (!photograph) return;
  selected = place;
  check($("maps"), place);
  $("t-number").textContent = String(place + 1);
  showEdit();
  const found = await ask("token", "api/token", { photo: photograph.key, token: place });
  if (!found) return;
  [...$("t-moves").querySelectorAll("input")].forEach((slider, i) => {
    slider.disabled = found.coordinates[i] === undefined;
    slider.title = slider.disabled ? "" : `the token lies at ${found.coordinates[i].toFixed(2)} deviations`;
  });
  const known = found.entropy !== null;
  $("t-entropy").textContent = known
    ? `entropy ${found.entropy.toFixed(2)} of ${Math.log2(found.codebook).toFixed(0)} bits, as if ${Math.round(2 ** found.entropy)} of ${found.codebook} were equally likely`
    : " ";
  const stages = found.codewords.length
    ? found.codewords.flatMap((stage, i) => [
      ...(found.codewords.length > 1 ? [make("p", { class: "faint" }, `Stage ${i + 1}`)] : []),
      ...stage.map(bar),
    ])
    : [make("p", { class: "faint" }, "This tokenizer has no codewords.")];
  $("t-codewords").replaceChildren(...stages);
}

function listMaps() {
  const buttons = maps.maps.map((address, place) => {
    const share = (100 * maps.shares[place]).toFixed(1);
    const label = `Token ${place + 1}, changes ${share} % of the pixels most`;
    const button = make("button", { type: "button", role: "radio", "aria-label": label, title: label },
      make("img", { src: address, alt: "" }), make("span", {}, String(place + 1)));
    button.addEventListener("click", () => select(place));
    return button;
  });
  $("maps").replaceChildren(...buttons);
}

function placeholders() {
  const count = state.about.tokenizer.tokens;
  if ($("maps").children.length === count) return;
  const empty = Array.from({ length: count }, () => make("button", { type: "button", role: "radio", disabled: "" }));
  $("maps").replaceChildren(...empty);
}

async function open() {
  const chosen = state.photographs[state.chosen];
  const pairs = state.photographs.map((each) => [each.key, each.name]);
  const before = $("t-photograph").value;
  fill($("t-photograph"), pairs, pairs.some(([key]) => key === before) ? before : pairs.at(1)?.[0]);
  if (!chosen || chosen.key === photograph?.key) return;
  [photograph, maps] = [chosen, null];
  edits.clear();
  $("maps").setAttribute("aria-busy", "true");
  show("t-original", chosen.picture); // small, until the maps bring a larger one
  $("t-original").alt = `${chosen.name}, the original photograph`;
  draw(); // first, because the maps take seconds
  const found = await ask("maps", "api/maps", { photo: chosen.key });
  if (photograph !== chosen) return;
  if (!found) {
    photograph = null; // so that opening the tab again asks again
    return;
  }
  maps = found;
  listMaps();
  $("maps").setAttribute("aria-busy", "false");
  show("t-original", maps.original);
  show("t-owners", maps.owners);
  await select(selected);
}

function moves() {
  const rows = Array.from({ length: DIRECTIONS }, (_, i) => {
    const slider = make("input", { type: "range", min: -5, max: 5, step: 0.1, value: 0, "aria-label": `direction ${i + 1}` });
    slider.addEventListener("input", () => {
      const values = [...$("t-moves").querySelectorAll("input")].map((each) => Number(each.value));
      slider.nextElementSibling.textContent = Number(slider.value).toFixed(1);
      change({ moves: values });
    });
    return make("label", {}, String(i + 1), slider, make("output", {}, "0.0"));
  });
  $("t-moves").append(...rows);
}

function replaced() {
  const kind = $("t-kind").value;
  const most = state.about.tokenizer.tokens;
  const place = Math.min(most, Math.max(1, Math.round(Number($("t-place").value)) || 1));
  const other = { photograph: $("t-photograph").value, swap: place - 1 }[kind];
  change({ kind, other });
  showEdit();
}

export const tokens = {
  start(shared) {
    state = shared;
    $("t-place").max = state.about.tokenizer.tokens;
    placeholders();
    moves();
    for (const id of ["t-kind", "t-photograph", "t-place"]) $(id).addEventListener("change", replaced);
    roving($("maps"), () => getComputedStyle($("maps")).gridTemplateColumns.split(" ").length, select);
    $("t-reset").addEventListener("click", () => {
      change({ kind: "keep", other: undefined, moves: Array(DIRECTIONS).fill(0) });
      showEdit();
    });
    $("t-reset-all").addEventListener("click", () => {
      edits.clear();
      for (const button of $("maps").children) button.classList.remove("changed");
      showEdit();
      draw();
    });
    $("t-owners").addEventListener("click", (event) => {
      if (!maps) return;
      const box = event.target.getBoundingClientRect();
      const rows = maps.owner.length;
      const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
      const column = Math.floor(((event.clientX - box.left) / box.width) * rows);
      select(maps.owner[Math.min(row, rows - 1)][Math.min(column, rows - 1)]);
    });
  },
  open,
};
