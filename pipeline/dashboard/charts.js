// Line charts of our own: SVG, redrawn in place while a stage is at work.

import { el, svg, figure, words } from "/dom.js";

const HEIGHT = 190;
const EDGE = { left: 52, right: 10, top: 8, bottom: 22 };
const COLOURS = 8;
const DOTTED = 40; // a curve of no more points shows each

/** A chart whose lines can be changed; `element` stands in the page. */
export class Chart {
  constructor(title) {
    this.title = title;
    this.lines = [];
    this.options = {};
    this.image = svg("svg", { class: "plot", role: "img", "aria-label": words(title) });
    this.legend = el("div", { class: "legend" });
    this.tip = el("div", { class: "tip", hidden: "" });
    this.latest = el("span", { class: "latest" });
    this.element = el(
      "figure", { class: "chart" },
      el("figcaption", {}, el("span", { class: "name" }, words(title)), this.latest),
      el("div", { class: "frame" }, this.image, this.tip), this.legend,
    );
    this.image.addEventListener("pointermove", (event) => this.point(event));
    this.image.addEventListener("pointerdown", (event) => this.point(event));
    this.image.addEventListener("pointerleave", () => this.leave());
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.image);
  }

  /** Takes other lines ({name, colour, x, y}) and options ({log, smooth}) and draws them. */
  update(lines, options) {
    const state = JSON.stringify([lines, options]);
    if (state === this.state) return;
    this.state = state;
    this.options = options;
    this.lines = lines.map((line) => ({ ...line, shown: shown(line, options) }));
    const single = lines.length === 1;
    this.latest.textContent = single ? figure(lines[0].y.at(-1)) : "";
    this.legend.replaceChildren(...(single ? [] : lines.map(entry)));
    this.draw();
  }

  draw() {
    const width = this.image.clientWidth;
    if (!width || !this.lines.length) return;
    this.scale = scales(this.lines, width, this.options.log);
    this.image.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.cursor = svg("line", { class: "cursor", y1: EDGE.top, y2: HEIGHT - EDGE.bottom, hidden: "" });
    this.image.replaceChildren(
      ...axes(this.scale, width), ...this.lines.flatMap((line) => this.drawn(line)), this.cursor,
    );
  }

  drawn(line) {
    const { x, y } = this.scale;
    const place = (values) => line.x
      .map((step, i) => (y.has(values[i]) ? `${x.at(step).toFixed(1)},${y.at(values[i]).toFixed(1)}` : ""))
      .filter(Boolean);
    const colour = `c${line.colour % COLOURS}${line.colour >= COLOURS ? " dashed" : ""}`;
    const parts = [];
    if (this.options.smooth) {
      parts.push(svg("polyline", { class: `line faint ${colour}`, points: place(line.y).join(" ") }));
    }
    const places = place(line.shown);
    parts.push(svg("polyline", { class: `line ${colour}`, points: places.join(" ") }));
    if (places.length <= DOTTED) {
      parts.push(...places.map((pair) => {
        const [cx, cy] = pair.split(",");
        return svg("circle", { class: `dot ${colour}`, cx, cy, r: 2.2 });
      }));
    }
    return parts;
  }

  /** Shows the values at the step nearest to the pointer. */
  point(event) {
    if (!this.scale) return;
    const box = this.image.getBoundingClientRect();
    const wanted = this.scale.x.back(event.clientX - box.left);
    const found = this.lines.map((line) => nearest(line.x, wanted));
    const steps = this.lines.map((line, i) => line.x[found[i]]);
    const step = steps.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
    const at = this.scale.x.at(step);
    this.cursor.removeAttribute("hidden");
    this.cursor.setAttribute("x1", at);
    this.cursor.setAttribute("x2", at);
    this.tip.replaceChildren(
      el("div", { class: "soft" }, `step ${figure(step)}`),
      ...this.lines.map((line, i) => el(
        "div", {}, swatch(line), `${line.name ? `${line.name} ` : ""}${figure(line.y[found[i]])}`,
        steps[i] === step ? "" : el("span", { class: "soft" }, ` at ${figure(steps[i])}`),
      )),
    );
    this.tip.hidden = false;
    const left = at > box.width / 2 ? at - this.tip.offsetWidth - 10 : at + 10;
    this.tip.style.left = `${Math.max(0, left)}px`;
  }

  leave() {
    this.tip.hidden = true;
    this.cursor?.setAttribute("hidden", "");
  }
}

function entry(line) {
  return el("span", {}, swatch(line), line.name, el("b", {}, figure(line.y.at(-1))));
}

/** Returns the coloured mark of a line. */
export function swatch(line) {
  return el("i", { class: `swatch c${line.colour % COLOURS}${line.colour >= COLOURS ? " dashed" : ""}` });
}

/** Returns a line's values, smoothed by an exponential mean that starts without a bias. */
function shown(line, { smooth }) {
  if (!smooth) return line.y;
  let mean = 0;
  let weight = 0;
  return line.y.map((value) => {
    mean = smooth * mean + (1 - smooth) * value;
    weight = smooth * weight + (1 - smooth);
    return mean / weight;
  });
}

function scales(lines, width, log) {
  const steps = lines.flatMap((line) => [line.x[0], line.x.at(-1)]);
  const values = lines.flatMap((line) => line.y).filter((value) => !log || value > 0);
  return {
    x: scale(Math.min(...steps), Math.max(...steps), EDGE.left, width - EDGE.right, false),
    y: scale(least(values), most(values), HEIGHT - EDGE.bottom, EDGE.top, log),
  };
}

const least = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
const most = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);

/** Returns how values from `low` to `high` lie between two places of the image, and its ticks. */
function scale(low, high, start, end, log) {
  if (!Number.isFinite(low)) [low, high] = [log ? 1 : 0, log ? 10 : 1];
  const to = log ? Math.log10 : (value) => value;
  let [a, b] = [to(low), to(high)];
  if (a === b) [a, b] = [a - (Math.abs(a) * 0.1 || 1), b + (Math.abs(b) * 0.1 || 1)];
  const room = (b - a) * (start > end ? 0.05 : 0); // none along the steps
  [a, b] = [a - room, b + room];
  return {
    at: (value) => start + ((to(value) - a) / (b - a)) * (end - start),
    back: (place) => a + ((place - start) / (end - start)) * (b - a),
    has: (value) => value !== undefined && (!log || value > 0),
    ticks: ticks(a, b, log),
  };
}

function ticks(a, b, log) {
  if (log && b - a >= 1) {
    const first = Math.ceil(a);
    return Array.from({ length: Math.floor(b) - first + 1 }, (_, i) => 10 ** (first + i));
  }
  const rough = (b - a) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((size) => size >= rough);
  const found = [];
  for (let n = Math.ceil(a / step); n * step <= b; n += 1) found.push(log ? 10 ** (n * step) : n * step);
  return found;
}

/** Returns the labels of ticks: short, with as many decimals as they need to differ. */
function labels(values) {
  const step = Math.abs(values[1] - values[0]) || 1;
  const size = Math.max(...values.map(Math.abs));
  if (size >= 1e7 || size < 1e-3) return values.map((value) => (value ? value.toExponential(1).replace(".0e", "e") : "0"));
  const evenly = values.every((value, i) => i === 0 || Math.abs(value - values[i - 1] - step) < step / 100);
  if (!evenly) return values.map((value) => String(Number(value.toPrecision(3))));
  if (step >= 1000) return values.map((value) => (value ? `${value / 1000}k` : "0"));
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return values.map((value) => value.toFixed(digits));
}

function axes({ x, y }, width) {
  const floor = HEIGHT - EDGE.bottom;
  const names = labels(y.ticks);
  const steps = x.ticks.filter(Number.isInteger);
  const columnNames = labels(steps);
  const rows = y.ticks.flatMap((value, i) => [
    svg("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y.at(value), y2: y.at(value) }),
    svg("text", { class: "tick", x: EDGE.left - 6, y: y.at(value) + 4, "text-anchor": "end" }, names[i]),
  ]);
  const columns = steps.map((value, i) => svg(
    "text",
    { class: "tick", x: x.at(value), y: HEIGHT - 5, "text-anchor": x.at(value) > width - 24 ? "end" : "middle" },
    columnNames[i],
  ));
  const base = svg("line", { class: "base", x1: EDGE.left, x2: width - EDGE.right, y1: floor, y2: floor });
  return [...rows, base, ...columns];
}

/** Returns the place of the number nearest to `wanted` in a rising list. */
function nearest(numbers, wanted) {
  let [low, high] = [0, numbers.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (numbers[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return low > 0 && wanted - numbers[low - 1] < numbers[low] - wanted ? low - 1 : low;
}
