// Draws the plots of a study with Observable Plot, and makes plots and tables interactive.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const trials = data.trials;
const byId = new Map(trials.map((trial) => [trial.id, trial]));
const scored = trials.filter((trial) => trial.js !== null);
const sortedJs = scored.map((trial) => trial.js).sort(d3.ascending);
const SYMBOLS = { complete: "circle", pruned: "times", failed: "triangle", running: "square", paused: "square" };

// ---- values as text and as places on an axis

const short = (value) =>
  value === null || value === undefined ? "–" : typeof value !== "number" ? String(value) : shortNumber(value);

function shortNumber(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size < 1e-3 || size >= 1e5) return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
  return String(Number(value.toPrecision(3)));
}

const seconds = (s) =>
  s === null ? "–" : s < 120 ? `${Number(s.toPrecision(2))} s` : s < 7200 ? `${(s / 60).toFixed(1)} min` : `${(s / 3600).toFixed(1)} h`;

// Share of a choice's room over which its trials are spread, so that they can be distinguished.
const WIDE = 0.3;

// A number in [-0.5, 0.5] that is a function of the text.
function spread(text) {
  let hash = 2166136261;
  for (const character of text) hash = Math.imul(hash ^ character.charCodeAt(0), 16777619);
  return ((hash >>> 0) % 1000) / 1000 - 0.5;
}

// The position of a trial on the axis of a setting: a number, or null if it has no such setting.
function place(axis, trial, wide) {
  const value = trial.settings[axis.name];
  if (value === null || value === undefined) return null;
  return axis.kind === "choice" ? axis.choices.indexOf(value) + wide * spread(trial.id) : value;
}

function ticksOf(axis, most) {
  if (axis.kind === "choice") return d3.range(axis.choices.length);
  if (axis.kind === "linear") return d3.ticks(axis.low, axis.high, Math.max(2, Math.min(6, most)));
  const inside = (values) => values.filter((v) => v >= axis.low * 0.999 && v <= axis.high * 1.001);
  const powers = d3.range(Math.floor(Math.log10(axis.low)), Math.ceil(Math.log10(axis.high)) + 1);
  const tens = inside(powers.map((p) => Number(`1e${p}`)));
  if (tens.length > most) return tens.filter((_, i) => i % Math.ceil(tens.length / most) === 0);
  for (const steps of [[1, 2, 5], [1, 3], [1, 5]]) {
    const finer = inside(powers.flatMap((p) => steps.map((s) => Number(`${s}e${p}`))));
    if (finer.length >= 2 && finer.length <= most) return finer;
  }
  return tens.length >= 2 ? tens : [axis.low, axis.high];
}

// The options of Plot's scale for a setting, as the search space has it.
function scaleOf(axis, width) {
  const choice = axis.kind === "choice";
  return {
    type: axis.kind === "log" ? "log" : "linear",
    domain: choice ? [-0.6, axis.choices.length - 0.4] : [axis.low, axis.high],
    ticks: ticksOf(axis, Math.max(2, Math.floor(width / 36))),
    tickFormat: choice ? (i) => fit(axis.choices[i], 16) : shortNumber,
    tickRotate: choice && crowded(axis, width) ? -32 : 0,
    inset: choice ? 0 : 6,
  };
}

// Whether the names of choices are too long to be side by side.
const crowded = (axis, width) => axis.kind === "choice" && d3.max(axis.choices, (c) => c.length) * 7 + 4 > width / axis.choices.length;
const fit = (text, most) => (text.length <= most ? text : `${text.slice(0, Math.max(2, Math.floor(most) - 1))}…`);

const shade = (js) => {
  const rank = sortedJs.length > 1 ? d3.bisectLeft(sortedJs, js) / (sortedJs.length - 1) : 0;
  return `color-mix(in oklab, var(--good) ${Math.round(100 * (1 - rank))}%, var(--bad))`;
};
const colour = (trial) => (trial.id === data.winner ? "var(--accent)" : `var(--${trial.status})`);
const last = (list) => [...list].sort((a, b) => (a.id === data.winner) - (b.id === data.winner));

function jsDomain() {
  const top = Math.max(data.baseline, d3.quantile(sortedJs, 0.95) ?? 0) * 1.04;
  return [Math.max(0, (sortedJs[0] ?? 0) * 0.9 - 0.005), top];
}
const jsScale = () => ({ domain: jsDomain(), label: "JS, bits", grid: true, ticks: 5, clamp: true, tickFormat: shortNumber });

// A constant array channel prevents Plot from taking colours for categories.
const literal = (of) => ({ value: of, scale: null });
const named = (trial) => `trial ${trial.id}`;

function plot(width, options) {
  return Plot.plot({
    width, marginTop: 26, marginRight: 14, marginBottom: 34, marginLeft: 46,
    style: { fontSize: "12px", fontFamily: "inherit", background: "none", overflow: "visible" },
    ...options,
  });
}

const dots = (list, x, y, more = {}) =>
  Plot.dot(last(list), {
    x, y, r: literal((d) => (d.id === data.winner ? 6 : list.length > 150 ? 3 : 4)),
    fill: literal(colour), stroke: "var(--card)", strokeWidth: 1, ariaLabel: named, ...more,
  });
const baseline = () => [
  Plot.ruleY([data.baseline], { stroke: "currentColor", strokeOpacity: 0.55, strokeDasharray: "3,4" }),
];

// The pixels of dots, which are used to find the dot closest to the pointer.
const pixels = (svg, list, x, y) => {
  const sx = svg.scale("x"), sy = svg.scale("y");
  return list.map((d) => ({ id: d.id, x: sx.apply(x(d)), y: sy.apply(y(d)) })).filter((p) => isFinite(p.x) && isFinite(p.y));
};

// ---- the plots: each takes a width and returns an SVG and the points that the pointer can hit

const charts = {
  progress(width) {
    const end = d3.max(data.steps, (step) => step.t) ?? 1;
    const [unit, name] = end < 180 ? [1, "seconds"] : end < 10800 ? [60, "minutes"] : [3600, "hours"];
    const x = (d) => d.t / unit, y = (d) => d.js;
    const svg = plot(width, {
      height: height(width), x: { label: `${name} since the first trial began →`, grid: false, ticks: Math.max(3, width / 90) }, y: jsScale(),
      marks: [
        ...baseline(),
        Plot.line(data.steps, { x, y, curve: "step-after", stroke: "var(--accent)", strokeWidth: 2.5 }),
        dots(scored, x, y),
      ],
    });
    return { svg, points: pixels(svg, scored, x, y) };
  },

  curves(width) {
    const rows = last(scored).flatMap((trial) => trial.curve.map(([epoch, js]) => ({ trial, id: trial.id, epoch, js })));
    const ends = last(scored).map((trial) => ({ trial, id: trial.id, epoch: trial.curve.at(-1)[0], js: trial.curve.at(-1)[1] }));
    const most = d3.max(rows, (row) => row.epoch) ?? 1;
    const x = (d) => d.epoch, y = (d) => d.js, of = literal((d) => colour(d.trial));
    const svg = plot(width, {
      height: height(width),
      x: { label: "epochs →", ticks: most <= 10 ? d3.range(1, most + 1) : Math.max(3, width / 70), tickFormat: shortNumber },
      y: jsScale(),
      marks: [
        ...baseline(),
        Plot.line(rows, {
          x, y, z: "id", stroke: of, ariaLabel: named, strokeOpacity: scored.length > 60 ? 0.4 : 0.85,
          strokeWidth: (d) => (d.id === data.winner ? 2.8 : 1.3),
        }),
        Plot.dot(ends, {
          x, y, symbol: (d) => SYMBOLS[d.trial.status], r: literal((d) => (d.id === data.winner ? 5 : 3.2)),
          stroke: of, strokeWidth: 1.6, fill: literal((d) => (d.trial.status === "pruned" ? "none" : colour(d.trial))), ariaLabel: named,
        }),
      ],
    });
    return { svg, points: pixels(svg, rows, x, y) };
  },

  parallel(width) {
    const axes = [...data.axes, { name: "JS, bits", kind: "linear", low: jsDomain()[0], high: jsDomain()[1], choices: [] }];
    const upright = width > 760; // else the axes lie one below the other, so that their names can be read
    const at = (axis, trial) => {
      const js = axis.name === "JS, bits";
      const value = js ? Math.min(trial.js, axis.high) : place(axis, trial, WIDE);
      return value === null ? null : share(axis, value);
    };
    const rows = last(d3.sort(scored, (trial) => -trial.js)).flatMap((trial) =>
      axes.map((axis, i) => ({ trial, id: trial.id, i, at: at(axis, trial) })).filter((row) => row.at !== null));
    const marks = axes.flatMap((axis, i) => ticksOf(axis, 4).map((value) => ({
      i, at: share(axis, value), text: axis.kind === "choice" ? fit(axis.choices[value], upright ? 12 : 40 / axis.choices.length) : shortNumber(value),
    })));
    const names = axes.map((axis, i) => ({ i, name: shortName(axis.name) }));
    const stroke = literal((d) => (d.id === data.winner ? "var(--accent)" : shade(d.trial.js)));
    const wide = (d) => (d.id === data.winner ? 3 : 1.2), halo = { stroke: "var(--card)", strokeWidth: 5, fill: "currentColor" };
    const lines = { z: "id", stroke, strokeWidth: wide, ariaLabel: named, strokeOpacity: scored.length > 100 ? 0.35 : 0.8 };
    const svg = upright
      ? plot(width, {
          height: 400, marginTop: 40, marginBottom: 14, marginLeft: 36, marginRight: 64, axis: null,
          x: { domain: [0, axes.length - 1] }, y: { domain: [0, 1] },
          marks: [
            Plot.ruleX(names, { x: "i", stroke: "currentColor", strokeOpacity: 0.35 }),
            Plot.line(rows, { x: "i", y: "at", ...lines }),
            Plot.text(marks, { x: "i", y: "at", text: "text", dx: 5, textAnchor: "start", ...halo, fontSize: 11 }),
            Plot.text(names, { x: "i", y: 1, dy: -12, text: "name", lineAnchor: "bottom", fontWeight: 600, fontSize: 11, lineWidth: width / axes.length / 12 }),
          ],
        })
      : plot(width, {
          height: 62 * axes.length + 10, marginTop: 30, marginBottom: 24, marginLeft: 18, marginRight: 18, axis: null,
          y: { domain: [axes.length - 1, 0] }, x: { domain: [0, 1] },
          marks: [
            Plot.ruleY(names, { y: "i", stroke: "currentColor", strokeOpacity: 0.35 }),
            Plot.line(rows, { y: "i", x: "at", ...lines }),
            Plot.text(marks, { y: "i", x: "at", text: "text", dy: 10, ...halo, fontSize: 11 }),
            Plot.text(names, { y: "i", x: 0, text: "name", dy: -11, dx: -14, textAnchor: "start", fontWeight: 600, ...halo }),
          ],
        });
    const points = pixels(svg, rows, (d) => (upright ? d.i : d.at), (d) => (upright ? d.at : d.i));
    return { svg, points: between(points) };
  },

  importance(width) {
    const list = data.importances, percent = (v) => `${Math.round(100 * v)} %`;
    const svg = plot(width, {
      height: 34 + 30 * list.length, marginTop: 4, marginLeft: Math.min(150, width * 0.36), marginRight: 24,
      x: { domain: [0, Math.max(0.05, d3.max(list, (d) => Math.max(d.high, d.chance)))], ticks: Math.max(3, width / 110), tickFormat: percent, label: "share in the variation that all settings explain →", grid: true },
      y: { domain: list.map((d) => d.name), label: null, tickSize: 0 },
      marks: [
        Plot.axisY({ tickSize: 0, label: null, tickFormat: shortName }),
        Plot.barX(list, { x: "mean", y: "name", fill: "var(--complete)", insetTop: 5, insetBottom: 5, rx: 3 }),
        Plot.ruleY(list, { y: "name", x1: "low", x2: "high", stroke: "currentColor", strokeWidth: 1.5, marker: "tick" }),
        Plot.dot(list, { y: "name", x: "chance", symbol: "diamond", r: 4, fill: "var(--accent)" }),
      ],
    });
    return { svg, points: [] };
  },

  simplex(width) {
    const corners = data.losses, n = corners.length;
    const list = scored.filter((trial) => Object.keys(trial.loss).length);
    const angle = (i) => (2 * Math.PI * i) / n - Math.PI / 2 - (n === 2 ? Math.PI / 2 : 0);
    const corner = corners.map((name, i) => ({ name, x: Math.cos(angle(i)), y: -Math.sin(angle(i)) }));
    const sum = (trial, key) => d3.sum(corner, (c) => c[key] * (trial.loss[c.name] ?? 0));
    const x = (d) => sum(d, "x"), y = (d) => sum(d, "y"), side = Math.min(width, 460);
    const svg = plot(width, {
      height: n === 2 ? 120 : side, axis: null, aspectRatio: 1, margin: 34, marginTop: 30,
      x: { domain: [-(1.1 * width) / side, (1.1 * width) / side] }, y: { domain: n === 2 ? [-0.25, 0.25] : [-1.1, 1.1] },
      marks: [
        Plot.line([...corner, corner[0]], { x: "x", y: "y", stroke: "currentColor", strokeOpacity: 0.35 }),
        Plot.link(n > 3 ? corner : [], { x1: 0, y1: 0, x2: "x", y2: "y", stroke: "currentColor", strokeOpacity: 0.12 }),
        dots(list, x, y, { r: literal((d) => (d.id === data.winner ? 8 : 5.5)), fill: literal((d) => shade(d.js)), stroke: literal((d) => (d.id === data.winner ? "var(--accent)" : "var(--card)")), strokeWidth: (d) => (d.id === data.winner ? 3 : 1) }),
        Plot.text(corner, { x: (c) => c.x * (n === 2 ? 1 : 1.14), y: (c) => c.y * 1.14, dy: n === 2 ? -18 : 0, text: "name", fontWeight: 600, fontSize: 13 }),
      ],
    });
    return { svg, points: pixels(svg, list, x, y) };
  },

  cost(width) {
    const { key, name } = data.costs[Number(document.getElementById("cost").value)];
    const list = scored.filter((trial) => trial[key]), x = (d) => d[key], y = (d) => d.js;
    const front = data.fronts[key].map((id) => byId.get(id)).sort((a, b) => a[key] - b[key]);
    const [low, high] = d3.extent(list, x), log = high > 8 * low;
    const axis = { kind: log ? "log" : "linear", low: low * (log ? 0.9 : 1), high: high * (log ? 1.1 : 1), choices: [] };
    const flat = low === high ? { domain: [0.5 * low, 1.5 * low], ticks: [low] } : { ticks: ticksOf(axis, Math.floor(width / 70)) };
    const svg = plot(width, {
      height: height(width), y: jsScale(),
      x: { type: axis.kind, label: `${name} →`, inset: 8, tickFormat: shortNumber, ...flat },
      marks: [
        ...baseline(),
        Plot.line(front, { x, y, stroke: "var(--accent)", strokeOpacity: 0.7, strokeWidth: 2, curve: data.costs[Number(document.getElementById("cost").value)].key === "images_per_second" ? "step-before" : "step-after" }),
        dots(list, x, y),
      ],
    });
    return { svg, points: pixels(svg, list, x, y) };
  },

  slice(width, element) {
    const axis = data.axes[Number(element.dataset.axis)];
    const list = scored.filter((trial) => place(axis, trial, 0) !== null);
    const x = (d) => place(axis, d, WIDE), y = (d) => d.js;
    const low = crowded(axis, width - 46) ? 16 + 3.6 * Math.min(16, d3.max(axis.choices, (c) => c.length)) : 26;
    const svg = plot(width, {
      height: 176 + low, marginLeft: 34, marginRight: 12, marginBottom: low, marginTop: 24,
      x: { label: null, ...scaleOf(axis, width - 46) }, y: { ...jsScale(), ticks: 4 },
      marks: [...baseline(), dots(list, x, y, { r: literal((d) => (d.id === data.winner ? 5.5 : 3.5)) })],
    });
    return { svg, points: pixels(svg, list, x, y) };
  },

  calibration(width, element) {
    const { bins, name } = data.analysis.classes[Number(element.dataset.class)];
    const most = Math.min(1, Math.max(0.2, d3.max(bins, (b) => Math.max(b.x, b.y + b.error)) * 1.05));
    const svg = plot(width, {
      height: width, marginLeft: 30, marginRight: 8, marginBottom: 24, marginTop: 6,
      x: { domain: [0, most], ticks: 2, label: null }, y: { domain: [0, most], ticks: 3, label: null, grid: true }, r: { range: [2, 7], domain: [0, d3.max(bins, (b) => b.count)] },
      marks: [
        Plot.line([[0, 0], [most, most]], { stroke: "currentColor", strokeOpacity: 0.4, strokeDasharray: "3,4" }),
        Plot.ruleX(bins, { x: "x", y1: (b) => Math.max(0, b.y - b.error), y2: (b) => Math.min(most, b.y + b.error), stroke: "var(--complete)" }),
        Plot.line(bins, { x: "x", y: "y", stroke: "var(--complete)" }),
        Plot.dot(bins, { x: "x", y: "y", r: "count", fill: "var(--complete)", stroke: "var(--card)", title: (b) => `${name}: ${b.count} predictions near ${short(b.x)}, mean target ${short(b.y)}` }),
      ],
    });
    return { svg, points: [] };
  },

  confusion(width) {
    const names = data.analysis.classes.map((c) => c.name);
    const cells = data.analysis.confusion_KK.flatMap((row, i) => row.map((n, j) => ({ truth: names[i], guess: names[j], n, share: n / Math.max(1, d3.sum(row)) })));
    const side = Math.min(width, 640), small = width < 500;
    const svg = plot(width, {
      height: side, marginLeft: small ? 94 : 104, marginBottom: small ? 84 : 96, marginRight: Math.max(8, width - side + 8), marginTop: 6,
      x: { domain: names, label: null }, y: { domain: names, label: null },
      marks: [
        Plot.axisX({ tickRotate: -60, tickSize: 0, label: null }), Plot.axisY({ tickSize: 0, label: null }),
        Plot.cell(cells, { x: "guess", y: "truth", inset: 0.75, rx: 2, fill: literal((c) => `color-mix(in oklab, var(--complete) ${Math.round(100 * c.share)}%, var(--cell))`), title: (c) => `${c.n} of ${c.truth} predicted as ${c.guess} (${Math.round(100 * c.share)} %)` }),
        Plot.text(cells.filter((c) => c.n), { x: "guess", y: "truth", text: "n", fontSize: small ? 9 : 11, fill: literal((c) => (c.share > 0.45 ? "var(--card)" : "var(--ink)")) }),
      ],
    });
    return { svg, points: [] };
  },

  entropy(width) {
    const bins = data.analysis.entropy;
    const svg = plot(width, {
      // If it is beside the confusion, it has the same height.
      height: innerWidth > 900 ? Math.min(width, 640) : height(width), x: { label: "entropy of the target, bits →", inset: 10 },
      y: { label: "mean JS, bits", grid: true, zero: true, ticks: 5 },
      marks: [
        Plot.areaY(bins, { x: "x", y1: (b) => b.y - b.error, y2: (b) => b.y + b.error, fill: "var(--complete)", fillOpacity: 0.18 }),
        Plot.line(bins, { x: "x", y: "y", stroke: "var(--complete)", strokeWidth: 2 }),
        Plot.dot(bins, { x: "x", y: "y", r: 4, fill: "var(--complete)", stroke: "var(--card)", title: (b) => `${b.count} images: JS ${short(b.y)} ± ${short(b.error)} bits` }),
      ],
    });
    return { svg, points: [] };
  },
};

const height = (width) => Math.round(Math.min(340, Math.max(240, width * 0.55)));
const shortName = (name) => name.startsWith("loss.") ? name.replace(".", " ") : name.slice(name.lastIndexOf(".") + 1).replaceAll("_", " ").replace(/^name$/, "optimizer");

function share(axis, value) {
  const scale = axis.kind === "log" ? d3.scaleLog([axis.low, axis.high], [0, 1]) : axis.kind === "linear"
    ? d3.scaleLinear([axis.low, axis.high], [0, 1]) : d3.scaleLinear([-0.5, axis.choices.length - 0.5], [0, 1]);
  return scale(value);
}

// Also points on the lines between axes, so that a line can be hit anywhere.
function between(points) {
  const dense = [...points];
  for (let i = 1; i < points.length; i++) {
    const [a, b] = [points[i - 1], points[i]];
    if (a.id === b.id) for (const s of [0.2, 0.4, 0.6, 0.8]) dense.push({ id: a.id, x: a.x + s * (b.x - a.x), y: a.y + s * (b.y - a.y) });
  }
  return dense;
}

// ---- drawing, and the elements of a trial in every plot

const elements = new Map(); // trial -> elements of all plots and rows
const figures = [...document.querySelectorAll("[data-chart]")];
const drawn = new WeakMap();

function draw(figure) {
  const width = Math.floor(figure.clientWidth);
  if (!width) return;
  const { svg, points } = charts[figure.dataset.chart](width, figure);
  for (const element of svg.querySelectorAll('[aria-label^="trial "]')) {
    element.dataset.t = element.getAttribute("aria-label").slice(6);
    element.classList.add(element.getAttribute("fill") === "none" || element.parentElement.getAttribute("fill") === "none" ? "line" : "dot");
  }
  svg.setAttribute("role", "img");
  figure.replaceChildren(svg);
  drawn.set(figure, { width, points });
}

function index() {
  elements.clear();
  for (const element of document.querySelectorAll("[data-t]")) {
    if (!elements.has(element.dataset.t)) elements.set(element.dataset.t, []);
    elements.get(element.dataset.t).push(element);
  }
  marked.forEach((hue, id) => paint(id, hue));
}

function nearest(figure, event) {
  const box = figure.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  let found = null, least = event.pointerType === "mouse" ? 16 ** 2 : 28 ** 2;
  for (const point of drawn.get(figure)?.points ?? []) {
    const distance = (point.x - x) ** 2 + (point.y - y) ** 2;
    if (distance < least) [found, least] = [point.id, distance];
  }
  return found;
}

// ---- hovering

const tip = document.getElementById("tip");
let hovered = null;

function hover(id, event) {
  if (id !== hovered) {
    for (const element of elements.get(hovered) ?? []) element.classList.remove("hover");
    for (const element of elements.get(id) ?? []) element.classList.add("hover");
    hovered = id;
    if (id) fillTip(byId.get(id));
  }
  tip.hidden = !id;
  if (!id) return;
  const { width, height } = tip.getBoundingClientRect(), room = document.documentElement.clientWidth;
  tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, room - width - 8))}px`;
  tip.style.top = `${event.clientY + height + 24 > innerHeight ? Math.max(8, event.clientY - height - 14) : event.clientY + 14}px`;
}

function fillTip(trial) {
  const head = document.createElement("b");
  head.textContent = `trial ${trial.id}${trial.id === data.winner ? ", the winner" : ""}`;
  const state = document.createElement("span");
  state.className = `status ${trial.status}`;
  state.textContent = trial.status;
  const list = document.createElement("dl");
  const rows = [["JS, bits", trial.js === null ? "–" : trial.js.toFixed(4)], ["epochs", short(trial.epochs)], ["time", seconds(trial.seconds)]];
  for (const axis of data.axes) if (trial.settings[axis.name] !== null && trial.settings[axis.name] !== undefined) rows.push([axis.name, short(trial.settings[axis.name])]);
  for (const [key, value] of rows) {
    const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
    dt.textContent = key;
    dd.textContent = value;
    list.append(dt, dd);
  }
  tip.replaceChildren(head, state, list);
}

// ---- marking

const marked = new Map(); // trial -> number of its colour
const chips = document.getElementById("chips");

function paint(id, hue) {
  for (const element of elements.get(id) ?? []) {
    element.classList.toggle("marked", hue !== undefined);
    if (hue === undefined) element.style.removeProperty("--mark");
    else element.style.setProperty("--mark", `var(--mark-${hue})`);
    if (hue !== undefined && element.ownerSVGElement) element.parentElement.append(element); // to the front
  }
}

function toggle(id) {
  if (!byId.has(id)) return;
  if (marked.has(id)) marked.delete(id);
  else marked.set(id, d3.range(6).find((hue) => ![...marked.values()].includes(hue)) ?? 0);
  paint(id, marked.get(id));
  document.body.classList.toggle("has-marks", marked.size > 0);
  chips.hidden = !marked.size;
  chips.replaceChildren(...[...marked].map(([trial, hue]) => chip(`${trial} · ${byId.get(trial).js?.toFixed(4) ?? "–"}`, () => toggle(trial), hue)));
  if (marked.size > 1) chips.append(chip("clear", () => [...marked.keys()].forEach(toggle)));
}

function chip(text, act, hue) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = `${text} ×`;
  if (hue !== undefined) button.style.setProperty("--mark", `var(--mark-${hue})`);
  button.addEventListener("click", act);
  return button;
}

for (const figure of figures) {
  figure.addEventListener("pointermove", (event) => hover(nearest(figure, event), event));
  figure.addEventListener("pointerdown", (event) => hover(nearest(figure, event), event)); // a finger does not hover
  figure.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hover(null, event));
  figure.addEventListener("click", (event) => {
    const id = nearest(figure, event);
    if (id) toggle(id);
  });
}

addEventListener("pointerdown", (event) => event.target.closest("[data-chart]") || hover(null, event));
addEventListener("scroll", (event) => hover(null, event), { passive: true });

// ---- tables

const SHOWN = innerWidth < 720 ? 8 : 20;

function setUp(table) {
  const body = table.tBodies[0], rows = [...body.rows], section = table.closest("section");
  const text = section.querySelector("input[type=search]"), status = section.querySelector("select.filter"), more = section.querySelector("button.more");
  let all = rows.length <= SHOWN + 5;
  const refresh = () => {
    const words = (text?.value ?? "").toLowerCase().split(/\s+/).filter(Boolean);
    const fits = [...body.rows].filter((row) => {
      const content = row.textContent.toLowerCase();
      const shown = words.every((word) => content.includes(word)) && (!status?.value || row.dataset.status === status.value);
      row.hidden = true;
      return shown;
    });
    fits.slice(0, all ? fits.length : SHOWN).forEach((row) => (row.hidden = false));
    if (more) {
      more.hidden = all || fits.length <= SHOWN;
      more.textContent = `Show all ${fits.length}`;
    }
    section.querySelector(".count")?.replaceChildren(`${fits.length} of ${rows.length}`);
  };
  const heads = [...table.querySelectorAll("th")], sorter = document.createElement("select");
  sorter.className = "sorter"; // of phones, where rows are cards without heads
  sorter.ariaLabel = "sort by";
  sorter.append(...["sort by …", ...heads.flatMap((head) => [`${head.textContent} ↑`, `${head.textContent} ↓`])].map((name) => new Option(name)));
  sorter.addEventListener("change", () => {
    const choice = sorter.selectedIndex - 1;
    if (choice < 0) return;
    heads[choice >> 1].setAttribute("aria-sort", choice % 2 ? "ascending" : "descending");
    heads[choice >> 1].querySelector("button").click();
  });
  table.before(sorter);
  heads.forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const empty = (row) => (key(row) === "" || key(row) === "–" ? 1 : 0);
      const compare = (a, b) => {
        const [p, q] = [key(a), key(b)], numbers = p !== "" && q !== "" && !isNaN(p) && !isNaN(q);
        return numbers ? p - q : String(p).localeCompare(String(q));
      };
      body.append(...[...body.rows].sort((a, b) => empty(a) - empty(b) || (up ? 1 : -1) * compare(a, b)));
      refresh();
    });
  });
  text?.addEventListener("input", refresh);
  status?.addEventListener("change", refresh);
  more?.addEventListener("click", () => ((all = true), refresh()));
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr[data-t]");
    if (row && !String(getSelection())) toggle(row.dataset.t);
  });
  body.addEventListener("pointerover", (event) => event.pointerType === "mouse" && hoverRow(event.target.closest("tr[data-t]")));
  body.addEventListener("pointerleave", () => hoverRow(null));
  refresh();
}

function hoverRow(row) {
  const id = row?.dataset.t ?? null;
  for (const element of elements.get(hovered) ?? []) element.classList.remove("hover");
  for (const element of elements.get(id) ?? []) element.classList.add("hover");
  hovered = id;
  tip.hidden = true;
}

document.querySelectorAll("table.sortable").forEach(setUp);
document.getElementById("cost")?.addEventListener("change", () => {
  draw(document.querySelector("[data-chart=cost]"));
  index();
});
document.getElementById("copy")?.addEventListener("click", async ({ target }) => {
  const settings = document.getElementById("settings");
  // With all digits, as in YAML.
  for (const line of settings.children) line.textContent = `${line.textContent.split(":")[0]}: ${line.dataset.full}\n`;
  getSelection().selectAllChildren(settings); // for a copy by hand if the browser refuses
  target.textContent = await navigator.clipboard.writeText(settings.textContent).then(() => "copied", () => "selected");
});
addEventListener("keydown", (event) => event.key === "Escape" && [...marked.keys()].forEach(toggle));

// Each plot is drawn when it first comes near the window, and again when its width changes.
const sizes = new ResizeObserver((entries) => {
  for (const { target } of entries) if (drawn.has(target) && drawn.get(target).width !== Math.floor(target.clientWidth)) draw(target);
  index();
});
const views = new IntersectionObserver((entries) => {
  const fresh = entries.filter((entry) => entry.isIntersecting && !drawn.has(entry.target));
  for (const { target } of fresh) {
    draw(target);
    sizes.observe(target);
  }
  if (fresh.length) index();
}, { rootMargin: "600px" });
figures.forEach((figure) => views.observe(figure));
addEventListener("beforeprint", () => {
  figures.filter((figure) => !drawn.has(figure)).forEach(draw);
  index();
});
index();
