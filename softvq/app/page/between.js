// Tab "Between": the straight line between the latents of two photographs.

import { ask } from "./api.js";
import { $, fill, show } from "./elements.js";

let state = null;

function refill() {
  const pairs = state.photographs.map((photograph) => [photograph.key, photograph.name]);
  const keys = pairs.map(([key]) => key);
  for (const [id, standard] of [["b-first", 0], ["b-last", Math.min(4, keys.length - 1)]]) {
    const before = $(id).value;
    fill($(id), pairs, keys.includes(before) ? before : keys[standard]);
  }
}

async function draw() {
  const share = $("b-share").value;
  $("b-value").textContent = `${share} %`;
  const [first, last] = [$("b-first").value, $("b-last").value];
  if (!first || !last) return;
  const found = await ask("between", "api/between", { first, last, share: share / 100 });
  if (!found) return;
  show("b-start", found.first);
  show("b-picture", found.picture);
  show("b-end", found.last);
  $("b-start-caption").textContent = `From ${$("b-first").selectedOptions[0].text}`;
  $("b-end-caption").textContent = `To ${$("b-last").selectedOptions[0].text}`;
  $("b-picture").alt = `${share} % of the way between the two photographs`;
}

export const between = {
  start(shared) {
    state = shared;
    for (const id of ["b-first", "b-last"]) $(id).addEventListener("change", draw);
    $("b-share").addEventListener("input", draw);
  },
  open() {
    refill();
    draw();
  },
};
