"use strict";
/* The page: its data, what all charts share, the heat map of the looked-at matrices. */

const DATA = JSON.parse(document.getElementById("data").textContent);
const WINDOWS = [0, 0.003, 0.007, 0.015, 0.03, 0.06, 0.12];
const several = DATA.runs.length > 1;
const colourOf = (number) => `var(--c${number % 8})`;

const STATE = {
  runs: DATA.runs,
  hidden: new Set(),
  smoothing: WINDOWS[3],
  against: "step",
  colour: (series) => colourOf(series.colour !== undefined ? series.colour : several ? series.run : series.dots && series.name !== "HellaSwag" ? 1 : 0),
  name: (series) => (several ? `${DATA.runs[series.run].label}${series.dots ? `, ${series.name}` : ""}` : series.name),
  /* Seconds of a run at a step, between the steps that its clock knows. */
  seconds(run, step) {
    const { s, t } = run.clock;
    if (step <= s[0]) return t[0] * (s[0] ? step / s[0] : 1);
    const k = Math.min(Math.max(1, s.findIndex((one) => one >= step)), s.length - 1) || s.length - 1;
    if (s.length === 1 || s[k] === s[k - 1]) return t[k] || t[0];
    return t[k - 1] + (Math.min(step, s[k]) - s[k - 1]) / (s[k] - s[k - 1]) * (t[k] - t[k - 1]);
  },
};

const CHARTS = [];
for (const place of document.querySelectorAll("[data-group]")) {
  for (const figure of place.querySelectorAll("[data-chart]")) {
    CHARTS.push(new Chart(figure, DATA.groups[place.dataset.group][+figure.dataset.chart], STATE));
  }
}
const redraw = () => { for (const chart of CHARTS.concat(MAP.charts)) chart.draw(); };

/* Colours of the heat map from low to high; they grow lighter too, for eyes that do not tell the hues apart. */
const HEAT = [[43, 20, 84], [71, 47, 125], [62, 93, 141], [41, 140, 140], [74, 184, 110], [165, 219, 54], [253, 231, 96]];
function heat(part) {
  const at = Math.max(0, Math.min(1, part)) * (HEAT.length - 1);
  const k = Math.min(HEAT.length - 2, Math.floor(at));
  return `rgb(${HEAT[k].map((low, channel) => Math.round(low + (at - k) * (HEAT[k + 1][channel] - low))).join(",")})`;
}

const MAP = {
  run: 0,
  quantity: null,
  chosen: null,
  charts: [],
  linear: new Set(["cosine"]),

  start() {
    this.place = document.getElementById("map");
    if (!this.place) return;
    this.run = DATA.matrices.findIndex((found) => found.length);
    const controls = document.getElementById("map-controls");
    const names = [...new Set(DATA.matrices.flat().flatMap((matrix) => Object.keys(matrix.q)))];
    this.quantity = names[0];
    this.select(controls, "quantity", names.map((name) => [name, name]), (value) => { this.quantity = value; this.draw(); });
    const runs = DATA.runs.map((run, k) => [k, run.label]).filter(([k]) => DATA.matrices[k].length);
    if (runs.length > 1) this.select(controls, "run", runs, (value) => { this.run = +value; this.draw(); });
    this.place.closest("details").addEventListener("toggle", () => { this.draw(); redraw(); });
  },

  select(place, name, options, act) {
    const label = html("label", {}, place, `${name} `);
    const made = html("select", {}, label);
    for (const [value, text] of options) html("option", { value }, made, text);
    made.addEventListener("change", () => act(made.value));
  },

  scale(matrices) {
    const log = !this.linear.has(this.quantity);
    const put = (value) => (log ? Math.log(value) : value);
    const seen = matrices.flatMap((matrix) => matrix.q[this.quantity] || []).filter((value) => value !== null && (!log || value > 0));
    const [low, high] = [Math.min(...seen), Math.max(...seen)];
    return { low, high, part: (value) => (put(value) - put(low)) / (put(high) - put(low) || 1), known: (value) => value !== null && (!log || value > 0) };
  },

  draw() {
    const matrices = DATA.matrices[this.run].filter((matrix) => matrix.q[this.quantity]);
    this.place.textContent = "";
    const scale = this.scale(matrices);
    const table = html("div", { class: "map", role: "list" }, this.place);
    for (const matrix of matrices) {
      const row = html("button", { type: "button", class: "row", role: "listitem", "aria-pressed": this.chosen === matrix.name }, table);
      html("span", { class: "name", title: matrix.name }, row, matrix.name);
      const cells = html("span", { class: "cells" }, row);
      matrix.q[this.quantity].forEach((value, k) => {
        const known = scale.known(value);
        const title = `${matrix.name}\nstep ${matrix.s[k].toLocaleString("en")}: ${this.quantity} ${known ? shortNumber(value) : "not known"}`;
        html("i", { title, style: known ? `background: ${heat(scale.part(value))}` : "" }, cells);
      });
      html("span", { class: "last" }, row, shortNumber([...matrix.q[this.quantity]].reverse().find(scale.known) ?? null));
      row.addEventListener("click", () => { this.chosen = this.chosen === matrix.name ? null : matrix.name; this.draw(); });
    }
    this.drawScale(scale, matrices);
    this.show();
  },

  drawScale(scale, matrices) {
    const foot = html("div", { class: "scale" }, this.place);
    const steps = matrices.length ? matrices[0].s : [];
    html("span", {}, foot, `${matrices.length} matrices, steps ${steps.length ? `${steps[0].toLocaleString("en")} to ${steps[steps.length - 1].toLocaleString("en")}` : ""}; the last value on the right`);
    const ramp = html("span", { class: "ramp" }, foot);
    html("b", {}, ramp, shortNumber(scale.low));
    const stops = HEAT.map((colour) => `rgb(${colour.join(",")})`).join(",");
    html("i", { style: `background: linear-gradient(90deg, ${stops})` }, ramp);
    html("b", {}, ramp, shortNumber(scale.high));
  },

  /* The curves of the chosen matrix, of every run that looked at it. */
  show() {
    const place = document.getElementById("matrix");
    place.textContent = "";
    this.charts = [];
    if (this.chosen === null) return;
    html("h3", {}, place, this.chosen);
    const quantities = [...new Set(DATA.matrices.flat().filter((matrix) => matrix.name === this.chosen).flatMap((matrix) => Object.keys(matrix.q)))];
    for (const quantity of quantities) {
      const series = [];
      DATA.matrices.forEach((found, run) => {
        const matrix = found.find((one) => one.name === this.chosen);
        if (matrix && matrix.q[quantity]) series.push({ run, name: quantity, s: matrix.s, y: matrix.q[quantity] });
      });
      const chart = { id: quantity, title: quantity, unit: "", series, log: !this.linear.has(quantity) };
      const drawn = new Chart(html("figure", {}, place), chart, STATE);
      drawn.draw();
      this.charts.push(drawn);
    }
  },
};

MAP.start();
redraw();

for (const chip of document.querySelectorAll(".chip")) {
  chip.addEventListener("click", () => {
    const run = +chip.dataset.run;
    if (!STATE.hidden.delete(run)) STATE.hidden.add(run);
    chip.setAttribute("aria-pressed", !STATE.hidden.has(run));
    redraw();
  });
}
const smoothing = document.getElementById("smoothing");
if (smoothing) smoothing.addEventListener("input", () => { STATE.smoothing = WINDOWS[+smoothing.value]; redraw(); });
const against = document.getElementById("against");
if (against) against.addEventListener("change", () => { STATE.against = against.value; for (const chart of CHARTS) chart.zoom = null; redraw(); });
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
