// Curves of a stage's metrics.

import {$, element, get, latest, number, state, visible} from "./common.js";

const DEFAULTS = ["reward/mean", "eval/accuracy", "loss", "entropy", "response_length/mean",
                  "throughput/gen_tokens_per_s"];

export async function loadCurves() {
  return latest("curves", async (current) => {
    const names = state.curves || DEFAULTS;
    const found = await get("curves", {stage: state.stage, names: names.join(",")});
    if (!current()) return;
    $("metrics").replaceChildren(...found.names.map((name) => {
      const option = element("option");
      option.value = name;
      return option;
    }));
    const drawn = names.filter((name) => state.curves || found.series[name].length);
    $("curves").replaceChildren(...drawn.map((name) => figure(name, found.series[name])));
  });
}

const SVG = "http://www.w3.org/2000/svg";
function svg(tag, attributes, text) {
  const out = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) out.setAttribute(key, value);
  if (text !== undefined) out.textContent = text;
  return out;
}

function figure(name, points) {
  const out = element("figure");
  out.dataset.metric = name;
  const caption = element("figcaption");
  const last = points.length ? points[points.length - 1] : null;
  caption.append(element("span", "", visible(name)), element("b", "", last ? number(last[1]) : "–"));
  const close = element("button", "", "×");
  close.title = `remove ${name}`;
  close.addEventListener("click", () => {
    state.curves = (state.curves || DEFAULTS).filter((n) => n !== name);
    loadCurves();
  });
  caption.append(close);
  out.append(caption, plot(points));
  return out;
}

function plot(points) {
  const W = 230, H = 84, left = 4, right = 4, top = 12, bottom = 12;
  const out = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "img"});
  if (!points.length) {
    out.append(svg("text", {x: left, y: H / 2}, "nothing logged"));
    return out;
  }
  const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const x0 = xs[0], x1 = xs[xs.length - 1];
  const y0 = ys.reduce((a, b) => Math.min(a, b)), y1 = ys.reduce((a, b) => Math.max(a, b));
  const x = (v) => left + (W - left - right) * (x1 > x0 ? (v - x0) / (x1 - x0) : 0.5);
  const y = (v) => H - bottom - (H - top - bottom) * (y1 > y0 ? (v - y0) / (y1 - y0) : 0.5);
  const path = points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(2)} ${y(p[1]).toFixed(2)}`);
  out.append(svg("path", {d: path.join("")}));
  if (points.length < 3) {
    out.append(...points.map((p) => svg("circle", {cx: x(p[0]), cy: y(p[1]), r: 2})));
  }
  out.append(svg("text", {x: left, y: 9}, number(y1)), svg("text", {x: left, y: H - 2}, number(y0)));
  out.append(svg("text", {x: W - right, y: H - 2, "text-anchor": "end"}, `step ${x0}–${x1}`));
  return out;
}

// Beside those that are shown.
export function addCurve(name) {
  const shown = [...$("curves").children].map((f) => f.dataset.metric);
  if (name && !shown.includes(name)) {
    state.curves = [...shown, name];
    loadCurves();
  }
}
