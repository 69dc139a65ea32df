// The values of Figure 4A at each layer: the curves of notebook 02 as they are stored, read with a pointer or keys.
// Pure functions first; `start` below draws them.
import { polyline } from "./pad.js";

/** Groups of the figure, in its order, and their colours. */
export const GROUPS = { image: "#0072B2", text: "#D55E00", objects: "#009E73", subject: "#E69F00", object: "#56B4E9",
  "relation words": "#CC79A7", "last token": "#000000" };

/** The groups of which some stored curves have values. */
export function shown(curves) { return Object.keys(GROUPS).filter((name) => curves[name]); }

/** Index of the layer nearest to a place on an axis of `n` layers: 0 is its left end, 1 its right end. */
export function nearest(share, n) { return Math.min(Math.max(Math.round(share * (n - 1)), 0), n - 1); }

/** A value with its interval, as in "0.93 [0.88, 0.96]"; a dash where there is none. */
export function reading(curve, k) {
  const at = (end) => curve[end][k].toFixed(2).replace(/^-(0\.00)$/, "$1").replace("-", "−");
  return curve.value[k] === null ? "–" : `${at("value")} [${at("low")}, ${at("high")}]`;
}

/** The least and the largest value that is drawn, never narrower than 0 to 1. */
export function range(curves) {
  const ends = shown(curves).flatMap((name) => [...curves[name].low, ...curves[name].high]);
  return [Math.min(0, ...ends), Math.max(1, ...ends)];
}

/** The points around a 95 % band: along its upper edge, and back along the lower. */
export function around(curve, limits, width, height) {
  const edge = (end) => polyline(curve[end], limits, width, height).split(" ");
  return [...edge("high"), ...edge("low").reverse()].join(" ");
}

const [WIDTH, HEIGHT] = [620, 260];

function axes(layers, limits) {
  const every = layers.length > 12 ? 5 : 1, [low, high] = limits;
  const x = (k) => k / (layers.length - 1) * WIDTH, y = (value) => (high - value) / (high - low) * HEIGHT;
  const below = layers.map((layer, k) =>
    layer % every && k ? "" : `<text x="${x(k)}" y="${HEIGHT + 22}">${layer}</text>`);
  const beside = [0, 0.5, 1].map((value) => `<line x2="${WIDTH}" y1="${y(value)}" y2="${y(value)}"/>
    <text class="y" x="-8" y="${y(value)}">${value}</text>`);
  return `<rect width="${WIDTH}" height="${HEIGHT}"/>${beside.join("")}${below.join("")}
    <text x="${WIDTH / 2}" y="${HEIGHT + 46}">layer</text><text class="x" y="-12">belief shift</text>`;
}

function drawing({ layers, fig4a: { curves } }, names) {
  const limits = range(curves);
  const drawn = names.map((name) => `<g style="--curve:${GROUPS[name]}">
    <polygon points="${around(curves[name], limits, WIDTH, HEIGHT)}"/>
    <polyline points="${polyline(curves[name].value, limits, WIDTH, HEIGHT)}"/></g>`);
  return `<svg viewBox="-46 -32 ${WIDTH + 60} ${HEIGHT + 86}" role="img" aria-label="Belief shift by layer of
    ${names.join(", ")}">${axes(layers, limits)}${drawn.join("")}<line class="at" y2="${HEIGHT}"/></svg>`;
}

const stored = (model) => fetch(`results/${model}/02_mirror_swap.json`).then((file) => file.json());

/** Draws the curves of a model into `root`; `load` gives the numbers of notebook 02 for the name of a model. */
export async function start(root, models, load = stored) {
  const choices = models.map((name) => `<option>${name}</option>`).join("");
  root.innerHTML = `<label>model <select>${choices}</select></label><div class="values-drawing"></div>
    <label class="pad-layer">layer <input type="range" min="0"><output></output></label>
    <dl class="values-numbers"></dl>`;
  const [choice, slider, number, list, place] = ["select", "input", "output", "dl", ".values-drawing"]
    .map((part) => root.querySelector(part));
  let found, names;
  function choose(k) {
    const curves = found.fig4a.curves, texts = names.map((name) => reading(curves[name], k));
    const x = k / (found.layers.length - 1) * WIDTH, line = place.querySelector(".at");
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
    slider.value = k;
    number.textContent = found.layers[k];
    const said = names.map((name, i) => `${name} ${texts[i]}`).join(", ");
    slider.setAttribute("aria-valuetext", `${found.layers[k]}: ${said}`);
    list.innerHTML = names.map((name, i) =>
      `<div><dt class="pad-key" style="--curve:${GROUPS[name]}">${name}</dt><dd>${texts[i]}</dd></div>`).join("");
  }
  function point(event) {
    const box = place.querySelector("rect").getBoundingClientRect();
    choose(nearest((event.clientX - box.left) / box.width, found.layers.length));
  }
  async function show() {
    found = await load(choice.value);
    names = shown(found.fig4a.curves);
    place.innerHTML = drawing(found, names);
    slider.max = found.layers.length - 1;
    choose(Math.max(found.layers.indexOf(found.fig4a.readings.peak.value), 0));
  }
  place.onpointermove = place.onpointerdown = point;
  slider.oninput = () => choose(Number(slider.value));
  choice.onchange = show;
  await show();
}

for (const root of globalThis.document?.querySelectorAll(".values") ?? []) start(root, root.dataset.models.split(" "));
