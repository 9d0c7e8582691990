// One rollout: its facts, its group, its messages and its tokens.

import {$, element, get, latest, number, state, visible} from "./common.js";

export async function loadRollout(id) {
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

export function drawTokens() {
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

export async function moreTokens() {
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
