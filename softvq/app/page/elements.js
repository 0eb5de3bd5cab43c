// Small things that several tabs need.

export const $ = (id) => document.getElementById(id);

export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

export function show(id, address) {
  if (address) $(id).src = address;
  else $(id).removeAttribute("src");
}

export function fill(select, pairs, chosen) {
  select.replaceChildren(...pairs.map(([value, text]) => make("option", { value }, text)));
  if (chosen !== undefined) select.value = chosen;
}

export const decibels = (value) => (value === null ? "equal" : `${value.toFixed(2)} dB`);

// Makes buttons with role=radio one stop of the keyboard, with arrow keys among them. columns() is how many stand in a row.
export function roving(group, columns, choose) {
  group.addEventListener("keydown", (event) => {
    const buttons = [...group.children];
    const place = buttons.indexOf(document.activeElement);
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() };
    let next = place + (steps[event.key] ?? 0);
    if (event.key === "Home") next = 0;
    if (event.key === "End") next = buttons.length - 1;
    if (place < 0 || next === place || !buttons[next]) return;
    event.preventDefault();
    buttons[next].focus();
    choose(next);
  });
}

export function check(group, place) {
  [...group.children].forEach((button, i) => {
    button.setAttribute("aria-checked", String(i === place));
    button.tabIndex = i === place ? 0 : -1;
  });
}
