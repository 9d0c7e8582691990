// The rollout viewer's page. Whatever comes from a run is hostile text: it enters the document only
// as textContent, attributes set by property, and numbers; never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const DEFAULTS = ["reward/mean", "eval/accuracy", "loss", "entropy", "response_length/mean",
                  "throughput/gen_tokens_per_s"];
const STOPS = ["stop", "length", "timeout", "error", "aborted", "prompt_too_long", "demonstration",
               "running"];
const FILTERS = ["text", "reward_min", "reward_max", "stop", "batch_min", "batch_max", "task",
                 "order"];
const PAGE = 50;
const state = {stage: "", picked: false, offset: 0, curves: null, id: "", rollout: null, total: 0};
let token = "";

// --- talking to the server ----------------------------------------------------------------------

function takeToken() {
  const found = /token=([^&]+)/.exec(location.hash);
  if (found) {
    token = decodeURIComponent(found[1]);
    sessionStorage.setItem("token", token);
    history.replaceState(null, "", location.pathname);  // out of the address bar and the history
  } else {
    token = sessionStorage.getItem("token") || "";
  }
}

async function get(name, params = {}) {
  const query = new URLSearchParams();
  for (const [key, value] of Object.entries(params)) {
    if (value !== "" && value !== null && value !== undefined) query.set(key, value);
  }
  const response = await fetch(`/api/${name}?${query}`,
                               {headers: {Authorization: `Bearer ${token}`}});
  const body = await response.json();
  if (!response.ok) throw new Error(body.error || `status ${response.status}`);
  return body;
}

function show(error) {
  $("error").hidden = !error;
  $("error").textContent = error ? visible(String(error.message || error)) : "";
}

// One thing at a time: a later call of the same name makes an earlier one's answer void.
const turns = {};
async function latest(name, work) {
  const mine = turns[name] = (turns[name] || 0) + 1;
  try {
    const result = await work(() => turns[name] === mine);
    if (turns[name] === mine) show(null);
    return result;
  } catch (error) {
    if (turns[name] === mine) show(error);
    return undefined;
  }
}

// --- small helpers ------------------------------------------------------------------------------

// Control characters and those that reorder text, made visible: what is shown is what is there.
function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
    (c) => "\\u" + c.codePointAt(0).toString(16).padStart(4, "0"));
}

function element(tag, className, text) {
  const out = document.createElement(tag);
  if (className) out.className = className;
  if (text !== undefined) out.textContent = text;
  return out;
}

function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(digits)));
}

// --- the run and its stages ---------------------------------------------------------------------

async function loadRun() {
  return latest("run", async (current) => {
    const run = await get("run");
    if (!current()) return;
    $("workdir").textContent = visible(run.workdir);
    document.title = `${visible(run.workdir)}: rollouts`;
    const names = run.stages.map((s) => s.name);
    // A run goes on to its next stage; who chose one, or looks at a rollout, stays there.
    if (!names.includes(state.stage) || (!state.picked && !state.id)) {
      const withRollouts = run.stages.filter((s) => s.experiences > 0);
      state.stage = (withRollouts.length ? withRollouts : run.stages).map((s) => s.name).pop() || "";
    }
    const select = $("stage");
    select.replaceChildren(...names.map((name) => {
      const option = element("option", "", visible(name));
      option.value = name;
      return option;
    }));
    select.value = state.stage;
    const stage = run.stages.find((s) => s.name === state.stage);
    $("state").textContent = !stage ? "no stage yet" : stage.finished ? "finished" : "not finished";
    $("state").classList.toggle("live", Boolean(stage) && !stage.finished);
    $("note").hidden = !stage || !stage.note;
    $("note").textContent = stage ? stage.note : "";
  });
}

async function loadAll() {
  await loadRun();
  if (!state.stage) return;
  await Promise.all([loadCurves(), loadRows()]);
  document.body.dataset.ready = "1"; // all of the first sight is there: for who drives the page
}

// --- curves -------------------------------------------------------------------------------------

async function loadCurves() {
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

// --- the list -----------------------------------------------------------------------------------

function filters() {
  const form = $("filters");
  return Object.fromEntries(FILTERS.map((name) => [name, form.elements[name].value]));
}

async function loadRows() {
  return latest("rows", async (current) => {
    const found = await get("rollouts", {stage: state.stage, ...filters(), offset: state.offset,
                                         limit: PAGE});
    if (!current()) return;
    if (state.offset && state.offset >= found.total) {
      state.offset = 0;
      loadRows();
      return;
    }
    state.total = found.total;
    const all = found.searched === found.candidates;
    $("count").textContent = `${found.total} rollouts` +
      (all ? "" : ` so far: text of ${found.searched} of ${found.candidates} searched in the time`);
    $("rows").replaceChildren(...found.rows.map(rowElement));
    const end = found.offset + found.rows.length;
    $("place").textContent = found.total ? `${found.offset + 1}–${end} of ${found.total}` : "";
    $("previous").disabled = found.offset === 0;
    $("next").disabled = end >= found.total;
  });
}

function rowElement(row) {
  const out = element("tr", row.id === state.id ? "chosen" : "");
  out.dataset.id = row.id;
  out.tabIndex = 0;
  const cells = [row.id, number(row.reward), row.stop_reason, row.version < 0 ? "–" : row.version,
                 row.prompt, row.reply];
  out.append(...cells.map((cell) => element("td", "", visible(String(cell)))));
  const open = () => loadRollout(row.id);
  out.addEventListener("click", open);
  out.addEventListener("keydown", (event) => { if (event.key === "Enter") open(); });
  return out;
}

// --- one rollout --------------------------------------------------------------------------------

async function loadRollout(id) {
  return latest("rollout", async (current) => {
    const found = await get("rollout", {stage: state.stage, id});
    if (!current()) return;
    state.id = id;
    state.rollout = found;
    for (const row of $("rows").children) row.classList.toggle("chosen", row.dataset.id === id);
    drawRollout();
  });
}

function drawRollout() {
  const e = state.rollout;
  $("empty").hidden = true;
  $("detail").hidden = false;
  $("detail-id").textContent = `Rollout ${e.id}`;
  const facts = {
    reward: number(e.reward), "ended by": e.stop_reason, source: e.source,
    tokens: `${e.num_tokens}, ${e.num_actions} by the policy`,
    versions: e.all_versions.join(", ") || "–", "sum of log-probs": number(e.sum_logprob),
    temperature: number(e.temperature),
    components: Object.entries(e.metrics).filter(([k]) => k.startsWith("rewards/"))
      .map(([k, v]) => `${k.slice(8)} ${number(v)}`).join(", ") || "–",
  };
  $("facts").replaceChildren(...Object.entries(facts).flatMap(
    ([key, value]) => [element("dt", "", key), element("dd", "", visible(String(value)))]));
  drawGroup(e);
  $("messages").replaceChildren(...e.messages.map(messageElement));
  $("raw").textContent = visible(
    JSON.stringify({metrics: e.metrics, info: e.info, extras: e.extras}, null, 2));
  drawTokens();
}

function drawGroup(e) {
  const out = $("group");
  out.replaceChildren("Group: ");
  for (const row of e.group) {
    const button = element("button", "", `${row.id.split("/").slice(2).join("/")}: ${number(row.reward)}`);
    button.disabled = row.id === e.id;
    button.title = visible(row.reply);
    button.addEventListener("click", () => loadRollout(row.id));
    out.append(button, " ");
  }
}

function messageElement(message) {
  const role = String(message.role);
  const known = ["system", "user", "assistant", "tool"].includes(role) ? role : "";
  const out = element("div", `message ${known}`);
  const {role: _, content, ...rest} = message;
  const text = typeof content === "string" ? content : JSON.stringify(content ?? null);
  const more = Object.keys(rest).length ? "\n" + JSON.stringify(rest) : "";
  out.append(element("b", "", visible(role)), element("div", "", visible(text + more)));
  return out;
}

function colour(name, value, low, high) {
  if (value === null || value === undefined) return "";
  if (name === "logprobs") {  // white at 0, red from -5 nats
    const t = Math.min(Math.max(-value / 5, 0), 1);
    return `rgb(255, ${Math.round(255 - 130 * t)}, ${Math.round(255 - 150 * t)})`;
  }
  if (name === "versions") return value < 0 ? "" : `hsl(${(value * 67) % 360} 75% 84%)`;
  if (name === "action") return value ? "#d3f5db" : "#eef1f4";
  if (name === "mixed") return value ? "#ffd8b5" : "";
  const t = Math.min(Math.abs(value) / Math.max(Math.abs(low), Math.abs(high), 1e-12), 1);
  const fade = Math.round(255 - 110 * t);
  return value >= 0 ? `rgb(${fade}, 245, ${fade})` : `rgb(255, ${fade}, ${fade})`;
}

function drawTokens() {
  const e = state.rollout, t = e.tokens, name = $("colour").value, values = t[name];
  const finite = (values || []).filter((v) => typeof v === "number");
  const low = finite.reduce((a, b) => Math.min(a, b), 0);
  const high = finite.reduce((a, b) => Math.max(a, b), 0);
  const out = [];
  let block = null, kind = null;
  for (let i = 0; i < t.ids.length; i++) {
    if (t.action[i] !== kind) {
      kind = t.action[i];
      block = element("div", `turn ${kind ? "action" : "context"}`);
      block.append(element("i", "", kind ? "policy" : "context (not in the loss)"));
      out.push(block);
    }
    block.append(tokenElement(t, i, name, values, low, high));
  }
  $("tokens").replaceChildren(...out);
  drawLegend(name, values, low, high);
  const end = e.first + t.ids.length;
  $("more").hidden = end >= e.num_tokens;
  $("token-note").textContent =
    (end < e.num_tokens ? `Tokens 1–${end} of ${e.num_tokens}. ` : "") +
    (t.text ? "" : "No tokenizer found: ids are shown; name one with --tokenizer.");
}

function tokenElement(t, i, name, values, low, high) {
  const text = t.text ? visible(t.text[i]) : `⟨${t.ids[i]}⟩`;
  const out = element("span", t.mixed && t.mixed[i] ? "tok mixed" : "tok");
  out.textContent = text.replace(/\n/g, "⏎\n") || "⋯";  // ⋯: part of the character before
  const lines = [`token ${t.ids[i]} at ${state.rollout.first + i}`];
  if (t.action[i]) {
    lines.push(`log-prob ${number(t.logprobs[i])} (p = ${number(Math.exp(t.logprobs[i]), 3)})`,
               `version ${t.versions[i]}`);
  }
  for (const key of ["token_rewards", "advantages"]) {
    if (t[key]) lines.push(`${key.replace("_", " ")} ${number(t[key][i])}`);
  }
  if (t.mixed && t.mixed[i]) lines.push("context of more than one version");
  out.title = lines.join("\n");
  if (values && (t.action[i] || name === "action")) {
    out.style.backgroundColor = colour(name, values[i], low, high);
  }
  return out;
}

function drawLegend(name, values, low, high) {
  const marks = [];
  const mark = (text, value) => {
    const out = element("span", "", text);
    out.style.backgroundColor = colour(name, value, low, high);
    marks.push(out);
  };
  if (!values) {
    marks.push(element("span", "", "not recorded for this rollout"));
  } else if (name === "logprobs") {
    for (const v of [0, -1, -2.5, -5]) mark(v === -5 ? "≤ −5" : String(v).replace("-", "−"), v);
  } else if (name === "versions") {
    const all = state.rollout.all_versions;
    for (const v of all.slice(0, 12)) mark(`version ${v}`, v);
    if (all.length > 12) marks.push(element("span", "", `and ${all.length - 12} more`));
  } else if (name === "action") {
    mark("written by the policy", true);
    mark("context", false);
  } else if (name === "mixed") {
    mark("context of more than one version", true);
  } else {
    for (const v of [low, high]) mark(number(v), v);
  }
  $("legend").replaceChildren(...marks);
}

async function moreTokens() {
  return latest("rollout", async (current) => {
    const e = state.rollout;
    const found = await get("rollout", {stage: state.stage, id: e.id,
                                        first: e.first + e.tokens.ids.length});
    if (!current()) return;
    for (const [key, values] of Object.entries(found.tokens)) {
      if (values && e.tokens[key]) e.tokens[key] = e.tokens[key].concat(values);
    }
    drawTokens();
  });
}

// --- live ---------------------------------------------------------------------------------------

// The server tells of changes on a stream. Its end is shown; the Reload button connects again.
let stream = null;
async function follow() {
  if (stream) stream.abort();
  const mine = stream = new AbortController();
  try {
    const response = await fetch("/api/changes", {headers: {Authorization: `Bearer ${token}`},
                                                  signal: mine.signal});
    if (!response.ok) throw new Error((await response.json()).error);
    $("live").textContent = "following";
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const {done, value} = await reader.read();
      if (done) throw new Error("the viewer has ended");
      const lines = (text + value).split("\n");
      text = lines.pop();
      if (lines.some((line) => JSON.parse(line).changed)) await loadAll();
    }
  } catch (error) {
    if (mine === stream) $("live").textContent = `not following: ${visible(String(error.message))}`;
  }
}

function start() {
  takeToken();
  const stops = $("filters").elements.stop;
  for (const name of STOPS) stops.append(element("option", "", name));
  const search = () => { state.offset = 0; loadRows(); };
  $("filters").addEventListener("submit", (event) => { event.preventDefault(); search(); });
  $("clear").addEventListener("click", () => { $("filters").reset(); search(); });
  for (const name of ["stop", "order"]) {
    $("filters").elements[name].addEventListener("change", search);
  }
  $("stage").addEventListener("change", () => {
    Object.assign(state, {stage: $("stage").value, picked: true, offset: 0, id: "", rollout: null});
    $("detail").hidden = true;
    $("empty").hidden = false;
    loadAll();
  });
  $("previous").addEventListener("click", () => {
    state.offset = Math.max(state.offset - PAGE, 0);
    loadRows();
  });
  $("next").addEventListener("click", () => { state.offset += PAGE; loadRows(); });
  $("colour").addEventListener("change", drawTokens);
  $("more").addEventListener("click", moreTokens);
  $("reload").addEventListener("click", () => { loadAll(); follow(); });
  $("defaults").addEventListener("click", () => { state.curves = null; loadCurves(); });
  $("metric").addEventListener("change", (event) => {
    const name = event.target.value.trim();
    const shown = [...$("curves").children].map((f) => f.dataset.metric);
    if (name && !shown.includes(name)) {
      state.curves = [...shown, name];
      loadCurves();
    }
    event.target.value = "";
  });
  addEventListener("hashchange", () => { takeToken(); loadAll(); follow(); });
  loadAll().then(follow);
}

start();
