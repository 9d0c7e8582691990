// The rollout viewer's page: the run, its stages, the list of rollouts, and what buttons do.

import {$, authorised, element, get, latest, number, state, takeToken, visible} from "./common.js";
import {addCurve, loadCurves} from "./curves.js";
import {drawTokens, loadRollout, moreTokens} from "./rollout.js";

const STOPS = ["stop", "length", "timeout", "error", "aborted", "prompt_too_long", "demonstration",
               "running"];
const FILTERS = ["text", "reward_min", "reward_max", "stop", "batch_min", "batch_max", "task",
                 "order"];
const PAGE = 50;

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

// --- live ---------------------------------------------------------------------------------------

// The server tells of changes on a stream. Its end is shown; the Reload button connects again.
let stream = null;
async function follow() {
  if (stream) stream.abort();
  const mine = stream = new AbortController();
  try {
    const response = await fetch("/api/changes", {headers: authorised(), signal: mine.signal});
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
    addCurve(event.target.value.trim());
    event.target.value = "";
  });
  addEventListener("hashchange", () => { takeToken(); loadAll(); follow(); });
  loadAll().then(follow);
}

start();
