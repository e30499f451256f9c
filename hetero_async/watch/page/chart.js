"use strict";
// Drawing: lines, bars and lanes, from arrays of numbers. It knows nothing of runs. Text only ever becomes a text node.

const SVG = "http://www.w3.org/2000/svg";

function make(name, attributes = {}, ...children) {
  const element = name.includes(":") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const byId = (id) => document.getElementById(id);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const clamp = (value, least, most) => Math.min(most, Math.max(least, value));

// --- numbers for people ---

function scaled(value, units, base = 1000) {
  let size = Math.abs(value), unit = 0;
  while (size >= base * 0.9995 && unit < units.length - 1) { size /= base; unit += 1; }
  const digits = size >= 100 || (unit === 0 && Number.isInteger(value)) ? 0 : size >= 10 ? 1 : 2;
  return (value < 0 ? "−" : "") + size.toFixed(digits) + units[unit];
}
const short = (value) => scaled(value, ["", " k", " M", " G", " T"]);
const bytes = (value) => scaled(value, [" B", " kB", " MB", " GB", " TB", " PB"]);
const rate = (value) => `${bytes(value)}/s`;
const whole = (value) => Math.round(value).toLocaleString("en");
const trimmed = (text) => text.replace(/\.(\d*?)0+(?=\s|$)/, (_, digits) => digits ? `.${digits}` : "");
const percent = (value) => `${(100 * value).toFixed(value < 0.0995 || value > 0.9949 ? 1 : 0)} %`;
const figure = (value) => Math.abs(value) >= 1000 || (value && Math.abs(value) < 0.001) ? value.toExponential(2) : value.toFixed(3);

function duration(seconds) {
  const [s, m, h, d] = [seconds % 60, (seconds / 60) % 60, (seconds / 3600) % 24, seconds / 86400].map(Math.floor);
  if (d) return h ? `${d} d ${h} h` : `${d} d`;
  if (h) return m ? `${h} h ${m} min` : `${h} h`;
  if (m) return s && m < 10 ? `${m} min ${s} s` : `${m} min`;
  return `${Math.max(0, s)} s`;
}

// Places for ticks at round values; `steps` beyond the decimal ones: of time.
const SECONDS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 432000, 864000, 2592000, 7776000];
function ticks(least, most, count, steps) {
  const wanted = (most - least) / Math.max(1, count) || 1;
  let step = steps?.find((one) => one >= wanted);
  if (!step) {
    const power = 10 ** Math.floor(Math.log10(wanted));
    step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= wanted * 0.999);
  }
  const places = [];
  for (let i = Math.ceil(least / step - 1e-9); i * step <= most + step * 1e-9; i += 1) places.push(i * step);
  return places;
}

// --- tooltips ---

function tip(event, text) {
  const box = byId("tip");
  box.hidden = !text;
  if (!text) return;
  box.textContent = text;
  const { width, height } = box.getBoundingClientRect();
  box.style.left = `${clamp(event.clientX + 14, 4, innerWidth - width - 4)}px`;
  box.style.top = `${event.clientY + 16 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 16}px`;
}

function hover(element, told) {
  element.onpointermove = (event) => {
    const box = element.getBoundingClientRect();
    tip(event, told(event.clientX - box.left, event.clientY - box.top, box));
  };
  element.onpointerleave = () => tip(null, "");
}

// --- lines ---

// `lines`: {name, color, x: [], y: [], fill?, isStep?}, y null where there is a gap. `marks`: {x, color, text}.
function drawLines(element, lines, { xText, yText, xSteps, least, marks = [], xMost, xLeast, empty, settle } = {}) {
  const seen = lines.filter((line) => line.y.some((y) => y !== null));
  if (!seen.length) return drawNothing(element, empty);
  const { width, height } = element.getBoundingClientRect();
  const xs = seen.flatMap((line) => [line.x[0], line.x[line.x.length - 1]]);
  const [x0, x1] = [xLeast ?? Math.min(...xs), xMost ?? Math.max(...xs)];
  let [y0, y1] = limits(seen, least, settle);
  const edge = { left: 46, right: 14, top: 12, bottom: 22 };
  const X = (x) => edge.left + ((x - x0) / (x1 - x0 || 1)) * (width - edge.left - edge.right);
  const Y = (y) => edge.top + (1 - (y - y0) / (y1 - y0 || 1)) * (height - edge.top - edge.bottom);
  const svg = make("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  for (const y of ticks(y0, y1, 5)) {
    svg.append(make("svg:line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: Y(y), y2: Y(y) }));
    svg.append(make("svg:text", { x: edge.left - 8, y: Y(y) + 4, "text-anchor": "end" }, trimmed(yText(y))));
  }
  drawAxis(svg, { x0, x1, X, y: height - 5, width, edge, xText, xSteps });
  for (const mark of marks.filter(({ x }) => x >= x0 && x <= x1)) {
    const at = { x1: X(mark.x), x2: X(mark.x), y1: edge.top - 4, y2: height - edge.bottom };
    const line = make("svg:line", { class: "mark", stroke: mark.color, ...at });
    line.append(make("svg:title", {}, mark.text));
    svg.append(line);
  }
  const clip = `clip-${element.id}`;
  const inside = { x: edge.left, y: edge.top - 2, width: Math.max(0, width - edge.left - edge.right + 2), height: height - edge.top - edge.bottom + 4 };
  svg.append(make("svg:clipPath", { id: clip }, make("svg:rect", inside)));
  for (const line of seen) {
    const path = pathOf(line, X, Y);
    if (line.fill && path) {
      const ends = [X(line.x[line.x.length - 1]), X(line.x[0])];
      const area = `${path}L${ends[0]},${Y(y0)}L${ends[1]},${Y(y0)}Z`;
      if (!line.y.includes(null)) svg.append(make("svg:path", { d: area, fill: line.color, "fill-opacity": 0.1, "clip-path": `url(#${clip})` }));
    }
    svg.append(make("svg:path", { class: "line", d: path, stroke: line.color, "clip-path": `url(#${clip})` }));
  }
  if (seen.length > 1) drawLegend(svg, seen, edge, width);
  element.replaceChildren(svg);
  hover(svg, (px, py, box) => {
    const x = x0 + ((px * width / box.width - edge.left) / (width - edge.left - edge.right)) * (x1 - x0);
    if (x < x0 - (x1 - x0) * 0.02) return "";
    const told = seen.map((line) => {
      const place = nearest(line.x, x), y = line.y[place];
      return y === null ? "" : `${line.name}  ${(line.text ?? yText)(y)}`;
    });
    return [xText(clamp(x, x0, x1), true), ...told.filter(Boolean)].join("\n");
  });
}

function drawNothing(element, why) {
  element.replaceChildren(make("div", { class: "empty" }, why ?? "nothing yet"));
}

function limits(lines, least, settle) {
  const all = lines.flatMap((line) => line.y.filter((y) => y !== null)).sort((a, b) => a - b);
  const high = settle && all.length > 40 ? all[Math.floor(all.length * 0.97)] : all[all.length - 1];
  const low = least ?? all[0];
  const room = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  return [least ?? low - room, high + room];
}

function drawAxis(svg, { x0, x1, X, y, width, edge, xText, xSteps }) {
  for (const x of ticks(x0, x1, Math.max(2, Math.floor((width - edge.left) / 100)), xSteps)) {
    const at = X(x), anchor = at < edge.left + 12 ? "start" : at > width - 30 ? "end" : "middle";
    svg.append(make("svg:text", { x: at, y, "text-anchor": anchor }, trimmed(xText(x))));
  }
}

function drawLegend(svg, lines, edge, width) {
  let x = width - edge.right;
  for (const line of [...lines].reverse()) {
    const label = make("svg:text", { class: "label", x, y: edge.top + 2, "text-anchor": "end" }, line.name);
    label.style.fill = line.color;
    svg.append(label);
    x -= 7.2 * line.name.length + 14;
  }
}

function pathOf({ x, y, isStep }, X, Y) {
  let path = "", open = false;
  for (let i = 0; i < x.length; i += 1) {
    if (y[i] === null) { open = false; continue; }
    const at = Y(y[i]).toFixed(1);
    if (!open) path += `M${X(x[i]).toFixed(1)},${at}`;
    else path += isStep ? `V${at}H${X(x[i]).toFixed(1)}` : `L${X(x[i]).toFixed(1)},${at}`;
    open = true;
  }
  return path;
}

function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle; else high = middle;
  }
  return value - sorted[low] < sorted[high] - value ? low : high;
}

// --- bars ---

// `bars`: [label, count]
function drawColumns(element, bars, fill, told) {
  const total = bars.reduce((sum, [, count]) => sum + count, 0);
  if (!total) return drawNothing(element, "no delta merged yet");
  const { width, height } = element.getBoundingClientRect();
  const most = Math.max(...bars.map(([, count]) => count)), slot = (width - 8) / Math.max(bars.length, 4);
  const svg = make("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  bars.forEach(([label, count], place) => {
    const x = 4 + place * slot, tall = count ? Math.max(2, (height - 42) * count / most) : 0;
    const wide = Math.min(slot * 0.72, 56);
    const bar = make("svg:rect", { x: x + (slot - wide) / 2, y: height - 22 - tall, width: wide, height: tall, rx: 2, fill });
    bar.append(make("svg:title", {}, told(label, count, total)));
    svg.append(bar, make("svg:text", { x: x + slot / 2, y: height - 6, "text-anchor": "middle" }, label));
    if (slot >= 34 && count) svg.append(make("svg:text", { x: x + slot / 2, y: height - 28 - tall, "text-anchor": "middle" }, percent(count / total)));
  });
  svg.append(make("svg:line", { class: "grid", x1: 0, x2: width, y1: height - 21.5, y2: height - 21.5 }));
  element.replaceChildren(svg);
}

// --- lanes ---

// Rows of a canvas, each with one column a slot: a letter's colour, or shares of several colours one upon the other.
function drawLanes(canvas, rows, columns, { x0, x1, colors, background }) {
  const ratio = Math.min(devicePixelRatio || 1, 2), width = Math.round(canvas.clientWidth * ratio);
  const tall = rows.reduce((sum, row) => sum + row.height + row.gap, 0) - (rows[rows.length - 1]?.gap ?? 0);
  canvas.style.height = `${tall}px`;
  canvas.width = width;
  canvas.height = Math.round(tall * ratio);
  const paint = canvas.getContext("2d");
  const X = (x) => Math.round(((x - x0) / (x1 - x0 || 1)) * width);
  let top = 0;
  for (const row of rows) {
    const y = Math.round(top * ratio), height = Math.round(row.height * ratio);
    paint.fillStyle = background;
    paint.fillRect(0, y, width, height);
    for (let i = 0; i < columns.from.length; i += 1) {
      const [left, right] = [X(columns.from[i]), Math.max(X(columns.to[i]), X(columns.from[i]) + 1)];
      if (right < 0 || left > width) continue;
      if (row.lane) {
        const fill = colors[row.lane[i]];
        if (fill) { paint.fillStyle = fill; paint.fillRect(left, y, right - left, height); }
      } else drawShares(paint, row.shares[i], colors, left, right - left, y, height);
    }
    top += row.height + row.gap;
  }
}

function drawShares(paint, shares, colors, left, wide, y, height) {
  const total = shares.reduce((sum, share) => sum + share, 0);
  let from = y;
  shares.forEach((share, place) => {
    if (!share || !total) return;
    const tall = height * share / total;
    paint.fillStyle = colors[place];
    paint.fillRect(left, from, wide, Math.max(1, tall));
    from += tall;
  });
}
