// The steering pad: a place chosen on a grid is brought into a model that answered beforehand (numbers: spatialid.pad).
// Pure functions first; `start` below draws them.

/** Probability of the second answer, from its log-odds. */
export function probability(logOdds) { return 1 / (1 + Math.exp(-logOdds)); }

/** Index of a cell in reading order; null outside of the grid. */
export function cellAt(column, row, m) {
  return column >= 0 && column < m && row >= 0 && row < m ? row * m + column : null;
}

/** The cell that a key leads to from another one; the same where there is none. */
export function keyed(cell, key, m) {
  const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key] ?? [0, 0];
  return cellAt((cell % m) + dx, Math.floor(cell / m) + dy, m) ?? cell;
}

/** What is shown of a question for a cell and a layer (its index): log-odds of the second answer, before and after. */
export function answer(question, cell, layer) {
  const { before, after } = { before: question.before, after: question.after[cell][layer] };
  return { before, after, turned: before > 0 !== after > 0 };
}

/** The largest log-odds of a question, before and after, by size. */
export function reach(question) {
  return Math.max(Math.abs(question.before), ...question.after.flat().map(Math.abs));
}

/** The points of a polyline, of values in `range` into a box of `width` and `height`. */
export function polyline(values, [low, high], width, height) {
  const at = (value, k) => [k / Math.max(values.length - 1, 1) * width, (high - value) / (high - low) * height];
  return values.map((value, k) => at(value, k).map((x) => x.toFixed(1)).join(",")).join(" ");
}

/** Where sixteen IDs lie in a square box, about its middle, the farthest at its edge. */
export function placed(points, size) {
  const reach = Math.max(...points.flat().map(Math.abs));
  return points.map(([x, y]) => [size / 2 * (1 + 0.85 * x / reach), size / 2 * (1 + 0.85 * y / reach)]);
}

/** Colour of a cell: hue by column, lightness by row. */
export function colour(cell, m) {
  return `hsl(${210 - 170 * (cell % m) / (m - 1)} 70% ${30 + 35 * Math.floor(cell / m) / (m - 1)}%)`;
}

const percent = (p) => `${Math.round(100 * p)} %`;
const CURVES = { image: "#0072B2", objects: "#009E73", "last token": "#000000" };

function svg(width, height, inside, label) {
  return `<svg viewBox="-34 -8 ${width + 44} ${height + 34}" role="img" aria-label="${label}">${inside}</svg>`;
}

function axes(width, height, layers, ticks, mark) {
  const x = (k) => k / (layers.length - 1) * width;
  const down = layers.map((layer, k) => layer % 6 ? "" : `<text x="${x(k)}" y="${height + 14}">${layer}</text>`).join("");
  const across = ticks.map(([y, text]) => `<text class="y" x="-6" y="${y + 4}">${text}</text>`).join("");
  return `<rect width="${width}" height="${height}"/><line class="mark" x1="${x(mark)}" x2="${x(mark)}" y2="${height}"/>
    ${down}${across}<text x="${width / 2}" y="${height + 25}">layer</text>`;
}

function byLayer(question, cell, layers, layer) {
  const [width, height] = [300, 120], most = 1.05 * reach(question);
  const before = (1 - question.before / most) / 2 * height;
  const line = polyline(question.after[cell], [-most, most], width, height);
  const ticks = [[0, question.answers[1]], [height / 2, "0"], [height, question.answers[0]]];
  return svg(width, height, axes(width, height, layers, ticks, layer) +
    `<line class="before" x2="${width}" y1="${before}" y2="${before}"/><polyline points="${line}"/>`,
    `Log-odds of ${question.answers[1]} by the layer of the push`);
}

function whoDecides(curves, layers, layer) {
  const [width, height] = [300, 90];
  const lines = Object.entries(CURVES).map(([name, stroke]) =>
    `<polyline style="stroke:${stroke}" points="${polyline(curves[name], [0, 1], width, height)}"/>`).join("");
  return svg(width, height, axes(width, height, layers, [[0, 1], [height, 0]], layer) + lines,
    "Belief shift by layer of image, object words and last token");
}

function grid(points, cell, m) {
  const at = placed(points, 220), line = (cells) => `<polyline class="wire" points="${
    cells.map((k) => at[k].map((x) => x.toFixed(1)).join(",")).join(" ")}"/>`;
  const index = [...Array(m).keys()];
  const wires = index.map((i) => line(index.map((j) => i * m + j)) + line(index.map((j) => j * m + i))).join("");
  const dots = at.map(([x, y], k) =>
    `<circle cx="${x}" cy="${y}" r="${k === cell ? 9 : 5}" fill="${colour(k, m)}"/>`).join("");
  return svg(220, 220, wires + dots, "The sixteen IDs on their axes");
}

/** Draws the pad into `root` and keeps it up to date. `data` is pad.json, `folder` where its pictures are. */
export function start(root, data, folder) {
  const m = data.cells, state = { scene: 0, kind: "left_right", cell: 0, layer: data.layers.indexOf(data.layer) };
  const one = (name) => root.querySelector(`[data-pad=${name}]`);
  const scenes = data.scenes.map((scene, k) => `<option value="${k}">${scene.subject} and ${scene.object}</option>`);
  root.innerHTML = `<div class="pad-choices"><label>picture <select data-pad="scene">${scenes.join("")}</select></label>
    <label>question <select data-pad="kind"><option value="left_right">left or right</option>
    <option value="above_below">above or below</option></select></label></div>
    <div class="pad-panels"><div><div class="pad-picture" data-pad="picture"></div><p data-pad="place"></p></div>
    <div><p class="pad-question" data-pad="question"></p><div data-pad="answers" aria-live="polite"></div>
    <div data-pad="line"></div></div><div data-pad="grid"></div><div data-pad="curves"></div></div>
    <label class="pad-layer">layer <input type="range" min="0" max="${data.layers.length - 1}" data-pad="layer">
    <output data-pad="number"></output></label>`;
  const cells = [...Array(m * m).keys()].map((k) => {
    const button = document.createElement("button");
    button.setAttribute("aria-label", `column ${k % m + 1}, row ${Math.floor(k / m) + 1}`);
    button.onclick = () => choose(k);
    button.onpointerenter = (event) => { if (event.buttons) choose(k); };
    button.onkeydown = (event) => {
      if (event.key.startsWith("Arrow")) { event.preventDefault(); choose(keyed(k, event.key, m)).focus(); }
    };
    one("picture").append(button);
    return button;
  });
  one("picture").style.setProperty("--cells", m);
  function choose(cell) { state.cell = cell; draw(); return cells[cell]; }
  function draw() {
    const scene = data.scenes[state.scene], question = scene.questions[state.kind];
    const { before, after, turned } = answer(question, state.cell, state.layer), [first, second] = question.answers;
    one("picture").style.backgroundImage = `url("${folder}${scene.picture}")`;
    cells.forEach((button, k) => {
      button.className = [k === state.cell && "here", k === scene.cell && "true"].filter(Boolean).join(" ");
      button.tabIndex = k === state.cell ? 0 : -1;
    });
    one("place").textContent = `The ${scene.subject} is in the dashed cell; its word is given the round one.`;
    one("question").textContent = question.text;
    const most = reach(question), bar = (name, odds) => `<div class="pad-bar"><span>${name}</span>
      <input type="range" disabled min="${-most}" max="${most}" step="any" value="${odds}" aria-label="log-odds, ${name}">
      <span>${first} ${percent(probability(-odds))}, ${second} ${percent(probability(odds))}</span></div>`;
    one("answers").innerHTML = bar("as seen", before) + bar("moved", after) + `<p>${turned ? "The answer turns." : "&nbsp;"}</p>`;
    one("line").innerHTML = byLayer(question, state.cell, data.layers, state.layer);
    one("grid").innerHTML = grid(data.grid[state.layer], state.cell, m);
    const now = Object.keys(CURVES).map((name) =>
      `<span class="pad-key" style="--curve:${CURVES[name]}">${name} ${data.curves[name][state.layer].toFixed(2)}</span>`);
    one("curves").innerHTML = whoDecides(data.curves, data.layers, state.layer) + `<p>${now.join(", ")}</p>`;
    one("layer").value = state.layer;
    one("number").textContent = data.layers[state.layer];
  }
  one("scene").onchange = (event) => { state.scene = Number(event.target.value); draw(); };
  one("kind").onchange = (event) => { state.kind = event.target.value; draw(); };
  one("layer").oninput = (event) => { state.layer = Number(event.target.value); draw(); };
  choose(data.scenes[0].cell);
}
