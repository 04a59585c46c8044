"use strict";
/* One chart: axes, curves, a crosshair with values, zoom by dragging. Draws SVG into a <figure> at the figure's own width. */

const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes, parent, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function html(name, attributes, parent, text) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function shortNumber(value) {
  if (value === null || !isFinite(value)) return "–";
  const size = Math.abs(value);
  for (const [unit, name] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit && size < 1e15) return `${+(value / unit).toPrecision(4)}${name}`;
  }
  if (size !== 0 && (size < 1e-3 || size >= 1e15)) return (+value.toPrecision(3)).toExponential();
  return `${+value.toPrecision(4)}`;
}

function shortTime(seconds) {
  const s = Math.round(seconds);
  const [h, m] = [Math.floor(s / 3600), Math.floor(s / 60) % 60];
  return h ? `${h}h ${String(m).padStart(2, "0")}m` : m ? `${m}m ${String(s % 60).padStart(2, "0")}s` : `${s}s`;
}

/* Round values within [low, high], about as many as asked for; base 60 for seconds. */
function ticks(low, high, count, time) {
  const raw = (high - low) / Math.max(1, count);
  if (!(raw > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(raw));
  const steps = time && raw > 1
    ? [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800, 604800]
    : [1, 2, 2.5, 5, 10].map((digit) => digit * power);
  const step = steps.find((one) => one >= raw) || steps[steps.length - 1];
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(Math.abs(at) < step * 1e-6 ? 0 : at);
  return found;
}

function logTicks(low, high, count) {
  for (const digits of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 7]]) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const digit of digits) {
        const value = digit * 10 ** power;
        if (value >= low && value <= high) found.push(value);
      }
    }
    if (found.length >= 3) {
      const every = Math.ceil(found.length / count);
      return found.filter((_, index) => index % every === 0);
    }
  }
  return ticks(low, high, count);
}

/* A mean with the weights of a bell around each step: it lags behind nothing. Its width is the window, less at the beginning. */
function smoothed(steps, values, window) {
  if (!(window > 0) || steps.length < 5) return values;
  return steps.map((step, index) => {
    const width = Math.min(window, Math.max(step * 0.15, (steps[1] - steps[0]) * 0.5));
    let [sum, weights] = [0, 0];
    const visit = (k) => {
      const far = (steps[k] - step) / width;
      if (Math.abs(far) > 3) return false;
      if (values[k] !== null) {
        const weight = Math.exp(-far * far / 2);
        sum += weight * values[k];
        weights += weight;
      }
      return true;
    };
    for (let k = index; k >= 0 && visit(k); k--);
    for (let k = index + 1; k < steps.length && visit(k); k++);
    return weights ? sum / weights : null;
  });
}

class Chart {
  /* state: what all charts share, {runs, hidden: Set, smoothing, against, colour(series), name(series)}. */
  constructor(figure, chart, state) {
    Object.assign(this, { figure, chart, state, zoom: null });
    this.log = Boolean(chart.log);
    const head = html("figcaption", {}, figure);
    html("span", { class: "title" }, head, chart.title);
    if (chart.unit) html("span", { class: "unit" }, head, chart.unit);
    this.buttons = html("span", { class: "tools" }, head);
    this.logButton = this.button("log", "logarithmic or linear", () => { this.log = !this.log; this.draw(); });
    this.button("svg", "save as SVG", () => this.save());
    this.key = html("div", { class: "keys" }, figure);
    this.plot = html("div", { class: "plot" }, figure);
    this.tip = html("div", { class: "tip", hidden: "" }, this.plot);
    this.plot.addEventListener("pointermove", (event) => this.hover(event));
    this.plot.addEventListener("pointerleave", () => this.leave());
    this.plot.addEventListener("pointerdown", (event) => this.grab(event));
    this.plot.addEventListener("pointerup", (event) => this.drop(event));
    this.plot.addEventListener("pointercancel", () => { this.from = null; this.leave(); });
    this.plot.addEventListener("dblclick", () => { this.zoom = null; this.draw(); });
    new ResizeObserver(() => { if (this.plot.clientWidth !== this.width) this.draw(); }).observe(this.plot);
  }

  button(text, title, act) {
    const made = html("button", { type: "button", title, "aria-label": `${this.chart.title}: ${title}` }, this.buttons, text);
    made.addEventListener("click", act);
    return made;
  }

  axis() {
    return this.chart.x === "time" ? "time" : this.state.against;
  }

  /* Steps of a run as positions on the axis. */
  places(number, steps) {
    const run = this.state.runs[number];
    if (this.axis() === "step") return steps;
    if (this.axis() === "tokens") return run.tokensPerStep ? steps.map((step) => step * run.tokensPerStep) : null;
    return run.clock.s.length ? steps.map((step) => this.state.seconds(run, step)) : null;
  }

  curves() {
    const found = [];
    for (const series of this.chart.series) {
      const x = this.places(series.run, series.s);
      if (!x || this.state.hidden.has(series.run)) continue;
      const last = Math.max(...this.chart.series.map((one) => one.s[one.s.length - 1]));
      const window = series.smooth ? last * this.state.smoothing : 0;
      const y = window ? smoothed(series.s, series.y, window) : series.y;
      found.push({ series, x, y, raw: window ? series.y : null, colour: this.state.colour(series) });
    }
    return found;
  }

  ranges(curves) {
    const x = this.zoom || [Math.min(...curves.map((c) => c.x[0])), Math.max(...curves.map((c) => c.x[c.x.length - 1]))];
    let seen = [];
    for (const curve of curves) {
      for (let k = 0; k < curve.x.length; k++) {
        if (curve.x[k] < x[0] || curve.x[k] > x[1]) continue;
        for (const value of [curve.y[k], curve.raw && curve.raw[k]]) {
          if (value !== null && value !== undefined && isFinite(value) && !(this.log && value <= 0)) seen.push(value);
        }
      }
    }
    if (this.chart.bigram && !this.zoom) for (const curve of curves) {
      const level = this.state.runs[curve.series.run].bigram;
      if (level) seen.push(level);
    }
    if (!seen.length) seen = [1];
    let [low, high] = [Math.min(...seen), Math.max(...seen)];
    if (this.log) {
      const pad = Math.max(0.03 * Math.log(high / low), 0.02);
      return { x, y: [low * Math.exp(-pad), high * Math.exp(pad)] };
    }
    if (this.chart.zero && low >= 0) return { x, y: [0, high * 1.06 || 1] };
    const pad = Math.max(0.05 * (high - low), 0.004 * Math.max(Math.abs(low), Math.abs(high))) || 1;
    return { x, y: [low - pad, high + pad] };
  }

  draw() {
    this.width = this.plot.clientWidth;
    if (!this.width) return;
    this.plot.querySelectorAll("svg").forEach((old) => old.remove());
    this.shown = this.curves();
    this.logButton.setAttribute("aria-pressed", this.log);
    this.drawKey();
    const [least, most] = this.chart.large ? [230, 360] : [150, 210];
    const height = Math.round(Math.max(least, Math.min(most, this.width * 0.52)));
    const svg = element("svg", { width: this.width, height, viewBox: `0 0 ${this.width} ${height}`, role: "img", "aria-label": this.chart.title });
    this.plot.prepend(svg);
    this.svg = svg;
    if (!this.shown.length) {
      element("text", { x: this.width / 2, y: height / 2, "text-anchor": "middle", class: "quiet" }, svg, "hidden, or not known against this axis");
      return;
    }
    const { x, y } = this.ranges(this.shown);
    if (x[0] === x[1]) { x[0] -= 0.5; x[1] += 0.5; }
    const box = this.box = { left: 46, right: this.width - 10, top: 8, bottom: height - 24 };
    const put = this.log ? Math.log : (value) => value;
    const [low, high] = y.map(put);
    this.px = (value) => box.left + (value - x[0]) / (x[1] - x[0]) * (box.right - box.left);
    this.py = (value) => box.bottom - (put(value) - low) / (high - low) * (box.bottom - box.top);
    this.back = (pixel) => x[0] + (pixel - box.left) / (box.right - box.left) * (x[1] - x[0]);
    this.drawAxes(svg, box, x, y, height);
    const id = `clip-${this.chart.id.replace(/[^\w-]/g, "_")}-${Math.random().toString(36).slice(2, 8)}`;
    const clip = element("clipPath", { id }, element("defs", {}, svg));
    element("rect", { x: box.left, y: box.top - 4, width: box.right - box.left, height: box.bottom - box.top + 8 }, clip);
    const body = element("g", { "clip-path": `url(#${id})` }, svg);
    for (const { level, text } of this.bigrams()) {
      const line = element("line", { x1: box.left, x2: box.right, y1: this.py(level), y2: this.py(level), class: "bigram" }, body);
      element("title", {}, line, text);
    }
    if (this.chart.marks) this.drawSkips(body, box);
    for (const curve of this.shown) this.drawCurve(body, curve);
    this.cross = element("g", { class: "cross" }, svg);
  }

  drawKey() {
    this.key.textContent = "";
    const names = new Map();
    for (const series of this.chart.series) names.set(this.state.name(series), this.state.colour(series));
    const alone = this.state.runs.length === 1 && names.size > 1;
    const own = alone || this.chart.series.some((series) => series.colour !== undefined);
    if (own) for (const [name, colour] of names) {
      const one = html("span", { class: "key" }, this.key);
      html("i", { style: `background: ${colour}` }, one);
      one.append(name);
    }
    for (const { text } of this.bigrams()) {
      const one = html("span", { class: "key" }, this.key);
      html("i", { class: "dashes" }, one);
      one.append(text);
    }
  }

  drawAxes(svg, box, x, y, height) {
    const time = this.axis() === "time";
    const rows = Math.max(3, Math.round((box.bottom - box.top) / 48));
    for (const value of this.log ? logTicks(y[0], y[1], rows + 1) : ticks(y[0], y[1], rows)) {
      const at = this.py(value);
      element("line", { x1: box.left, x2: box.right, y1: at, y2: at, class: "grid" }, svg);
      element("text", { x: box.left - 6, y: at + 3.5, "text-anchor": "end", class: "tick" }, svg, shortNumber(value));
    }
    for (const value of ticks(x[0], x[1], Math.max(2, Math.floor((box.right - box.left) / 90)), time)) {
      if (this.axis() === "step" && value !== Math.round(value)) continue;
      const at = this.px(value);
      const anchor = at > box.right - 16 ? "end" : "middle";
      element("text", { x: at, y: height - 7, "text-anchor": anchor, class: "tick" }, svg, time ? shortTime(value) : shortNumber(value));
    }
    element("line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, class: "axis" }, svg);
  }

  drawCurve(body, curve) {
    const style = `stroke: ${curve.colour}`;
    const path = (values) => {
      let [text, open] = ["", false];
      for (let k = 0; k < curve.x.length; k++) {
        const value = values[k];
        if (value === null || (this.log && value <= 0)) { open = false; continue; }
        text += `${open ? "L" : "M"}${this.px(curve.x[k]).toFixed(1)} ${this.py(value).toFixed(1)}`;
        open = true;
      }
      return text;
    };
    if (curve.series.lo && !this.log) {
      const there = curve.x.map((x, k) => `${this.px(x).toFixed(1)} ${this.py(curve.series.hi[k]).toFixed(1)}`);
      const back = curve.x.map((x, k) => `${this.px(x).toFixed(1)} ${this.py(curve.series.lo[k]).toFixed(1)}`).reverse();
      element("path", { d: `M${there.concat(back).join("L")}Z`, class: "band", style: `fill: ${curve.colour}` }, body);
    }
    if (curve.raw) element("path", { d: path(curve.raw), class: "raw", style }, body);
    element("path", { d: path(curve.y), class: curve.series.dots ? "line dotted" : "line", style }, body);
    if (curve.series.dots || curve.x.length === 1) {
      const every = Math.ceil(curve.x.length / 60);
      for (let k = curve.x.length - 1; k >= 0; k -= every) {
        if (curve.y[k] === null || (this.log && curve.y[k] <= 0)) continue;
        element("circle", { cx: this.px(curve.x[k]).toFixed(1), cy: this.py(curve.y[k]).toFixed(1), r: 3, class: "dot", style: `fill: ${curve.colour}` }, body);
      }
    }
  }

  /* The bigram models' losses, highest first. Runs on the same data share a line; of several lines each names its runs. They are
     named in the key, above the plot, where no label or curve can be in the way. */
  bigrams() {
    const lines = new Map();
    for (const number of this.chart.bigram ? new Set(this.shown.map((curve) => curve.series.run)) : []) {
      const level = this.state.runs[number].bigram;
      if (!level) continue;
      const key = level.toPrecision(5);
      if (!lines.has(key)) lines.set(key, { level, runs: [] });
      lines.get(key).runs.push(this.state.runs[number].label);
    }
    const named = [...lines.values()].sort((one, other) => other.level - one.level);
    return named.map(({ level, runs }) => {
      const of = lines.size > 1 ? ` of ${runs.join(", ")}` : "";
      return { level, text: `bigram model${of} ${level.toFixed(3)}` };
    });
  }

  drawSkips(body, box) {
    this.state.runs.forEach((run, number) => {
      const places = this.state.hidden.has(number) ? null : this.places(number, run.skips);
      for (const place of places || []) {
        const at = this.px(place);
        const d = `M${at - 3} ${box.bottom - 9}l6 6m0 -6l-6 6`;
        element("path", { d, class: "skip", style: `stroke: ${this.state.colour({ run: number })}` }, body);
      }
    });
  }

  position(event) {
    return event.clientX - this.plot.getBoundingClientRect().left;
  }

  hover(event) {
    if (!this.shown || !this.shown.length || !this.cross) return;
    const x = Math.max(this.box.left, Math.min(this.box.right, this.position(event)));
    this.cross.textContent = "";
    if (this.from) {
      const [a, b] = [this.from, x].sort((one, other) => one - other);
      element("rect", { x: a, y: this.box.top, width: b - a, height: this.box.bottom - this.box.top, class: "chosen" }, this.cross);
    }
    const rows = [];
    let place = null;
    for (const curve of this.shown) {
      const k = nearest(curve.x, this.back(x));
      const pixel = this.px(curve.x[k]);
      const value = curve.raw ? curve.raw[k] : curve.y[k];
      if (value === null || pixel < this.box.left - 1 || pixel > this.box.right + 1) continue;
      if (place === null || Math.abs(pixel - x) < Math.abs(this.px(place.x) - x)) place = { x: curve.x[k], step: curve.series.s[k], run: curve.series.run };
      if (!(this.log && curve.y[k] <= 0)) element("circle", { cx: pixel, cy: this.py(curve.y[k]), r: 3.5, style: `fill: ${curve.colour}` }, this.cross);
      rows.push({ curve, value, step: curve.series.s[k], smooth: curve.raw ? curve.y[k] : null });
    }
    if (!place) return this.leave();
    const at = this.px(place.x);
    element("line", { x1: at, x2: at, y1: this.box.top, y2: this.box.bottom, class: "hair" }, this.cross);
    this.tell(rows, place, at);
  }

  tell(rows, place, at) {
    this.tip.textContent = "";
    const where = this.axis() === "time" ? shortTime(place.x) : this.axis() === "tokens" ? `${shortNumber(place.x)} tokens` : `step ${place.x.toLocaleString("en")}`;
    html("div", { class: "where" }, this.tip, where);
    for (const { curve, value, step, smooth } of rows) {
      const row = html("div", {}, this.tip);
      html("i", { style: `background: ${curve.colour}` }, row);
      html("span", {}, row, this.state.name(curve.series));
      html("b", {}, row, precise(value));
      if (smooth !== null) html("em", {}, row, `smooth ${precise(smooth)}`);
      if (step !== place.step) html("em", {}, row, `step ${step.toLocaleString("en")}`);
    }
    this.tip.hidden = false;
    const width = this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(0, Math.min(this.width - width, at + (at > this.width / 2 ? -width - 12 : 12)))}px`;
  }

  leave() {
    if (this.cross) this.cross.textContent = "";
    this.tip.hidden = true;
  }

  grab(event) {
    if (event.pointerType === "mouse" && event.button === 0 && this.box) this.from = this.position(event);
  }

  drop(event) {
    const from = this.from;
    this.from = null;
    if (from && Math.abs(this.position(event) - from) > 8) {
      const edges = [from, this.position(event)].map((pixel) => this.back(Math.max(this.box.left, Math.min(this.box.right, pixel))));
      this.zoom = edges.sort((a, b) => a - b);
      this.draw();
    }
  }

  save() {
    const style = getComputedStyle(document.documentElement);
    const copy = this.svg.cloneNode(true);
    copy.setAttribute("xmlns", SVG);
    copy.querySelectorAll(".cross").forEach((one) => one.remove());
    const rules = [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules]).map((rule) => rule.cssText).filter((text) => text.startsWith("svg "));
    const sheet = element("style", {}, null, rules.join("\n").replaceAll("svg .", "."));
    copy.prepend(sheet);
    const text = copy.outerHTML.replace(/var\((--[\w-]+)\)/g, (_, name) => style.getPropertyValue(name).trim());
    const link = html("a", { href: URL.createObjectURL(new Blob([text], { type: "image/svg+xml" })), download: `${this.chart.id.replace(/[^\w-]/g, "_")}.svg` });
    link.click();
    URL.revokeObjectURL(link.href);
  }
}

function precise(value) {
  const size = Math.abs(value);
  return size >= 1e5 || (size && size < 1e-3) ? shortNumber(value) : value.toLocaleString("en", { maximumSignificantDigits: 5 });
}

function nearest(sorted, value) {
  let [low, high] = [0, sorted.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle; else high = middle;
  }
  return Math.abs(sorted[low] - value) <= Math.abs(sorted[high] - value) ? low : high;
}
