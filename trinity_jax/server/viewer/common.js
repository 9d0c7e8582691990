// What every part of the page uses: its state, the server, and text made safe to show. Whatever comes
// from a run is hostile text: it enters the document only as textContent, attributes set by property,
// and numbers; never as markup.

export const $ = (id) => document.getElementById(id);
export const state = {stage: "", picked: false, offset: 0, curves: null, id: "", rollout: null,
                      total: 0};
let token = "";

// --- talking to the server ----------------------------------------------------------------------

export function takeToken() {
  const found = /token=([^&]+)/.exec(location.hash);
  if (found) {
    token = decodeURIComponent(found[1]);
    sessionStorage.setItem("token", token);
    history.replaceState(null, "", location.pathname);  // out of the address bar and the history
  } else {
    token = sessionStorage.getItem("token") || "";
  }
}

export function authorised() {
  return {Authorization: `Bearer ${token}`};
}

export async function get(name, params = {}) {
  const query = new URLSearchParams();
  for (const [key, value] of Object.entries(params)) {
    if (value !== "" && value !== null && value !== undefined) query.set(key, value);
  }
  const response = await fetch(`/api/${name}?${query}`, {headers: authorised()});
  const body = await response.json();
  if (!response.ok) throw new Error(body.error || `status ${response.status}`);
  return body;
}

// One thing at a time: a later call of the same name makes an earlier one's answer void. What went
// wrong is shown until the same thing goes well.
const turns = {}, problems = {};
export async function latest(name, work) {
  const mine = turns[name] = (turns[name] || 0) + 1;
  let result, problem = "";
  try {
    result = await work(() => turns[name] === mine);
  } catch (error) {
    problem = visible(String(error.message || error));
  }
  if (turns[name] !== mine) return undefined;
  problems[name] = problem;
  const texts = new Set(Object.values(problems).filter(Boolean));
  $("error").hidden = !texts.size;
  $("error").textContent = [...texts].join("; ");
  return result;
}

// --- small helpers ------------------------------------------------------------------------------

// Control characters and those that reorder text, made visible: what is shown is what is there.
export function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
    (c) => "\\u" + c.codePointAt(0).toString(16).padStart(4, "0"));
}

export function element(tag, className, text) {
  const out = document.createElement(tag);
  if (className) out.className = className;
  if (text !== undefined) out.textContent = text;
  return out;
}

export function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(digits)));
}
