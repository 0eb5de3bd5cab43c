// Tab "Reconstruct": a photograph from its first tokens.

import { ask } from "./api.js";
import { $, decibels, show } from "./elements.js";

let state = null;

async function draw() {
  const photograph = state.photographs[state.chosen];
  $("count-value").textContent = $("count").value;
  if (!photograph) return;
  const tokens = $("count").value;
  const found = await ask("reconstruct", "api/reconstruct", { photo: photograph.key, tokens });
  if (!found) return;
  for (const name of ["original", "copy", "difference", "error"]) show(name, found[name]);
  $("original").alt = `${photograph.name}, the original photograph`;
  $("copy").alt = `${photograph.name}, reconstructed from ${tokens} tokens`;
  $("copy-caption").textContent = `Reconstruction from ${tokens} tokens`;
  $("psnr").textContent = decibels(found.psnr);
  $("ratio").textContent = `${found.ratio.toFixed(1)} : 1`;
  $("bytes").textContent = `${found.bytes.toLocaleString("en")} bytes`;
}

export const reconstruct = {
  start(shared) {
    state = shared;
    const { tokens, fewest } = state.about.tokenizer;
    const slider = $("count");
    Object.assign(slider, { min: fewest, max: tokens, value: tokens, disabled: fewest === tokens });
    slider.value = tokens;
    slider.addEventListener("input", draw);
  },
  open: draw,
};
