// Tab "Runs": curves and pictures of training runs.

import { ask } from "./api.js";
import { $, fill, make } from "./elements.js";

const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [320, 150, 46, 8, 8, 20];
let state = null;
let run = null;

const short = (value) => (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)
  ? value.toExponential(1) : String(Number(value.toPrecision(3))));

function tickWords(low, high) {
  const decimals = Math.max(0, Math.min(12, 1 - Math.floor(Math.log10(high - low || 1))));
  const largest = Math.max(Math.abs(low), Math.abs(high));
  return (value) => (largest >= 1e6 || decimals > 4 ? value.toExponential(1) : value.toFixed(decimals));
}

function svg(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function chart(name, points, logarithmic) {
  const usable = logarithmic && points.every(([, value]) => value > 0);
  const scaled = points.map(([step, value]) => [step, usable ? Math.log10(value) : value]);
  const steps = scaled.map(([step]) => step);
  const values = scaled.map(([, value]) => value);
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const words = usable ? short : tickWords(low, high);
  const across = (step) => LEFT + ((step - first) / (last - first || 1)) * (WIDTH - LEFT - RIGHT);
  const down = (value) => TOP + ((high - value) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  const newest = points.at(-1);
  picture.setAttribute("aria-label", `${name}: from ${short(points[0][1])} at step ${points[0][0]} to ${short(newest[1])} at step ${newest[0]}`);
  for (const value of [low, (low + high) / 2, high]) {
    const y = down(value);
    picture.append(svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y }));
    picture.append(svg("text", { x: LEFT - 5, y: y + 3.5, "text-anchor": "end" }, words(usable ? 10 ** value : value)));
  }
  picture.append(svg("text", { x: LEFT, y: HEIGHT - 5 }, first.toLocaleString("en")));
  picture.append(svg("text", { x: WIDTH - RIGHT, y: HEIGHT - 5, "text-anchor": "end" }, `step ${last.toLocaleString("en")}`));
  const path = scaled.map(([step, value], i) => `${i ? "L" : "M"}${across(step).toFixed(1)} ${down(value).toFixed(1)}`);
  picture.append(scaled.length > 1 ? svg("path", { d: path.join("") })
    : svg("circle", { cx: across(first), cy: down(values[0]), r: 3 }));
  const title = make("h2", {}, name, make("small", {}, short(newest[1])));
  return make("article", { class: "card" }, title, picture);
}

function curves() {
  const found = Object.entries(run?.curves ?? {});
  $("r-curves").replaceChildren(...found.map(([name, points]) => chart(name, points, $("r-log").checked)));
}

function samples() {
  const names = run?.pictures ?? [];
  if (!names.length) return $("r-samples").replaceChildren();
  const choice = make("select", { id: "r-picture" });
  fill(choice, names.map((name) => [name, name]));
  const picture = make("img", { alt: "" });
  const draw = () => {
    picture.src = `api/picture?${new URLSearchParams({ run: run.name, name: choice.value })}`;
    picture.alt = `Samples of the run, ${choice.value}`;
  };
  choice.addEventListener("change", draw);
  draw();
  const field = make("div", { class: "field" }, make("label", { for: "r-picture" }, "Samples"), choice);
  return $("r-samples").replaceChildren(make("div", { class: "card" }, field, picture));
}

async function draw() {
  const name = $("r-run").value;
  if (!name) return;
  const found = await ask("run", "api/run", { run: name });
  if (!found) return;
  run = found;
  const step = run.step === null ? "" : `, step ${run.step.toLocaleString("en")}`;
  const empty = Object.keys(run.curves).length ? "" : ", nothing logged yet";
  $("r-state").textContent = `${run.state ?? "no status.json"}${step}${empty}${run.message ? `: ${run.message}` : ""}`;
  curves();
  samples();
  $("r-details").hidden = !run.config;
  $("r-config").textContent = run.config;
}

async function open() {
  const found = await ask("runs", "api/runs");
  if (!found) return;
  const before = $("r-run").value;
  const names = found.runs.map((each) => each.name);
  fill($("r-run"), found.runs.map((each) => [each.name, each.name === "." ? state.about.runs : each.name]),
    names.includes(before) ? before : names[0]);
  $("r-run").disabled = names.length === 0;
  if (!names.length) {
    $("r-state").textContent = `There is no run in ${state.about.runs}; train one, or start the app with --runs DIR.`;
    return;
  }
  await draw();
}

export const runs = {
  start(shared) {
    state = shared;
    $("r-run").addEventListener("change", draw);
    $("r-reload").addEventListener("click", open);
    $("r-log").addEventListener("change", curves);
  },
  open,
};
