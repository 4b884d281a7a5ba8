"use strict";
// Helpers, theme and the start of the page. What a model wrote reaches the page as text nodes only, never as markup.

const DATA = JSON.parse(document.getElementById("data").textContent);

function el(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(options)) {
    if (key === "style") for (const [name, v] of Object.entries(value)) made.style.setProperty(name, v);
    else if (key === "on") for (const [name, f] of Object.entries(value)) made.addEventListener(name, f);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((c) => c !== null && c !== undefined));
  return made;
}

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const byId = (id) => document.getElementById(id);

/** A figure in three digits and at most `decimals`, with the true minus sign; "–" where there is none. */
function figure(x, signed = false, decimals = 3) {
  if (x === null || x === undefined) return "–";
  const size = Math.abs(x);
  const text = size >= 1000 ? count(size) : size >= 100 ? size.toFixed(0) : size >= 10 ? size.toFixed(1) : size.toFixed(size < 0.0995 && size > 0 ? decimals : 2);
  return (x < 0 && Number(text) !== 0 ? "−" : signed ? "+" : "") + text;
}

/** A count in three digits: 950, 12.3k, 4.56M. */
function count(x) {
  for (const [limit, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) if (x >= 0.9995 * limit) return Number((x / limit).toPrecision(3)) + unit;
  return String(Number(x.toPrecision(3)));
}

const plural = (n, one, many = one + "s") => `${n} ${n === 1 ? one : many}`;

const armColor = (i) => `var(--arm-${i % 8})`;

/** A labelled row of exclusive choices; `choose` is called with the chosen one. */
function choices(label, names, chosen, choose) {
  const group = el("div", { class: "choices", role: "group", "aria-label": label }, el("span", { class: "choices-label" }, label));
  const buttons = names.map((name) => {
    const press = () => {
      for (const b of buttons) b.setAttribute("aria-pressed", String(b === button));
      choose(name);
    };
    const button = el("button", { type: "button", "aria-pressed": String(name === chosen), on: { click: press } }, name);
    return button;
  });
  group.append(...buttons);
  return group;
}

/** A labelled drop-down list; `options` are [value, text]. */
function dropdown(label, choose) {
  const list = el("select", { on: { change: () => choose(list.value) } });
  const fill = (options, chosen) => {
    list.replaceChildren(...options.map(([value, text]) => el("option", { value, selected: value === chosen }, text)));
    list.value = chosen;
  };
  return { node: el("label", { class: "field" }, el("span", {}, label), list), fill };
}

function startTheme() {
  const button = byId("theme");
  const order = ["auto", "light", "dark"];
  let now = 0;
  button.addEventListener("click", () => {
    now = (now + 1) % order.length;
    if (now === 0) delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = order[now];
    button.textContent = `theme: ${order[now]}`;
  });
}

document.addEventListener("DOMContentLoaded", () => {
  startTheme();
  startCurves(byId("curves"));
  startLengths(byId("length-plots"));
  startLedger(byId("ledger-bars"), byId("phases"));
  startViewer(byId("viewer"));
  document.documentElement.dataset.ready = "";
});
