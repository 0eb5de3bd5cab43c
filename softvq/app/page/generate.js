// Tab "Generate": a new picture, shown while it is sampled.

import { cancel, stream } from "./api.js";
import { $, fill, show } from "./elements.js";

function values() {
  $("g-guidance-value").textContent = Number($("g-guidance").value).toFixed(1);
  $("g-steps-value").textContent = $("g-steps").value;
}

function each(event) {
  show("g-picture", event.picture);
  $("g-progress").max = event.steps;
  $("g-progress").value = event.done ? event.steps : event.step;
  const [label, seed] = [$("g-class").value, $("g-seed").value];
  if (event.done) {
    $("g-caption").textContent = `${label ? `${label}, ` : ""}seed ${seed}, ${event.steps} steps, ${event.seconds.toFixed(1)} s`;
    $("g-picture").alt = `A generated picture${label ? ` of ${label}` : ""}`;
  } else {
    $("g-caption").textContent = `Step ${event.step} of ${event.steps}`;
  }
}

async function go() {
  if (!$("g-form").reportValidity()) return;
  $("g-stop").disabled = false;
  $("g-caption").textContent = "Waiting for the first step";
  $("g-progress").value = 0;
  const query = {
    class: $("g-class").value || "0",
    seed: $("g-seed").value,
    guidance: $("g-guidance").value,
    steps: $("g-steps").value,
  };
  const mine = ++turn;
  const ended = await stream("generate", "api/generate", query, each);
  if (mine !== turn) return;
  $("g-stop").disabled = true;
  if (!ended) $("g-caption").textContent = "Stopped";
}

let turn = 0;

export const generate = {
  start(state) {
    const generator = state.about.generator;
    if (!generator) {
      for (const element of $("g-form").elements) element.disabled = true;
      $("g-caption").textContent = "The app was started without a generator; start it with --generator MODEL.";
      return;
    }
    fill($("g-class"), generator.classes.map((name) => [name, name]));
    $("g-class").disabled = generator.classes.length === 0;
    Object.assign($("g-guidance"), { max: Math.min(10, generator.most_guidance), disabled: generator.most_guidance <= 1 });
    $("g-guidance").value = generator.guidance;
    Object.assign($("g-steps"), { max: Math.min(100, generator.most_steps) });
    $("g-steps").value = generator.steps;
    values();
    for (const id of ["g-guidance", "g-steps"]) $(id).addEventListener("input", values);
    $("g-form").addEventListener("submit", (event) => {
      event.preventDefault();
      go();
    });
    $("g-next").addEventListener("click", () => {
      $("g-seed").value = Number($("g-seed").value) + 1;
      go();
    });
    $("g-stop").addEventListener("click", () => cancel("generate"));
  },
  open() {},
};
