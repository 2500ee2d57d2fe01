// Elements and words. Whatever a run holds enters the page as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

/** Returns an element; attributes whose value is null are left out, functions are listeners. */
export function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** Returns an element of an SVG image. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** Returns a value in about five letters, as the report writes it. */
export function figure(value) {
  if (value === null || value === undefined) return "-";
  if (typeof value !== "number" || !Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  if (size > 0 && size < 0.001) return value.toExponential(1);
  const digits = size < 10 ? 3 : size < 100 ? 2 : size < 1000 ? 1 : 0;
  const style = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return value.toLocaleString("en-US", style);
}

/** Returns a figure's name as words. */
export function words(name) {
  return name.replaceAll("_", " ");
}

/** Returns a length of time, as in 3 min. */
export function duration(seconds) {
  if (seconds < 0.1) return `${Math.max(1, Math.round(seconds * 1000))} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

/** Returns how long ago a moment was. */
export function ago(then, now) {
  return then ? `${duration(Math.max(1, now - then))} ago` : "";
}
