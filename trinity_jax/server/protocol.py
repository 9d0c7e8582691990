"""What clients of OpenAI's API send, checked field by field.

What this server cannot honour is refused by name and never dropped silently: penalties, biases and
formats would make log-probs those of another distribution than the policy's.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

MOST_CHOICES, MOST_STOPS, MOST_MESSAGES, MOST_TOOLS = 64, 16, 4096, 256
MOST_NAME = 256  # characters of a session's
_SEED = 2**63
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_ROLES = ("system", "developer", "user", "assistant", "tool")
# Change nothing of what is sampled.
_WITHOUT_EFFECT = frozenset(
  ("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
)
# Accepted with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  "frequency_penalty": (0,),
  "presence_penalty": (0,),
  "repetition_penalty": (1,),
  "logit_bias": ({},),
  "top_logprobs": (0,),
  "response_format": ({"type": "text"},),
  "modalities": (["text"],),
  "echo": (False,),
  "best_of": (1,),
  "suffix": ("",),
}


class ApiError(Exception):
  """An answer in OpenAI's error form."""

  def __init__(self, status: int, message: str, *, param: str | None = None, code: str = ""):
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, message, param, code

  def body(self) -> dict[str, Any]:
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
    kinds |= {429: "rate_limit_error"}
    kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
    error = {"message": self.message, "type": kind, "param": self.param, "code": self.code or None}
    return {"error": error}


def bad(param: str, value: Any, expected: str) -> ApiError:
  """A field that is not what it must be."""
  shown = repr(value)
  shown = shown if len(shown) <= 60 else shown[:57] + "..."
  return ApiError(400, f"{param} = {shown}: expected {expected}", param=param)


@dataclasses.dataclass(frozen=True)
class Ask:
  """A checked request for one or more choices.

  Attributes:
    messages, tools: of a chat; None and () for a completion.
    prompts: of a completion, text or token ids each.
    limit: most tokens of each choice; None: as many as there may be. limit_name: its field.
    temperature, top_p, top_k, min_p: None where the client leaves it to the server.
    parse: whether text that calls tools becomes tool calls.
    single_call: one tool call per reply.
    logprobs, token_ids: whether the answer has them.
  """

  n: int
  stream: bool
  usage: bool
  limit: int | None
  temperature: float | None
  top_p: float | None
  top_k: int | None
  min_p: float | None
  seed: int | None
  stop: tuple[str, ...]
  logprobs: bool
  token_ids: bool
  messages: list[dict[str, Any]] | None = None
  tools: tuple[dict[str, Any], ...] = ()
  prompts: tuple[str | tuple[int, ...], ...] = ()
  parse: bool = True
  single_call: bool = False
  limit_name: str = "max_tokens"

  @property
  def prompt_name(self) -> str:
    """The field that holds the prompt."""
    return "prompt" if self.messages is None else "messages"

  @property
  def sampling(self) -> list[str]:
    """Names of the sampling parameters that the client set."""
    return [k for k in ("temperature", "top_p", "top_k", "min_p") if getattr(self, k) is not None]

  @property
  def size(self) -> int:
    """Characters (or ids) to be made a prompt, about."""
    chat = (self.messages, self.tools) if self.messages else ()
    return len(json.dumps(chat)) + sum(map(len, self.prompts))


def parse_json(data: bytes) -> dict[str, Any]:
  """A request's body as an object.

  Raises:
    ApiError: not JSON, not an object, or text that no encoding can carry.
  """

  def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")

  try:
    body = json.loads(data, parse_constant=refuse)
    json.dumps(body, ensure_ascii=False, allow_nan=False).encode()  # half a surrogate pair, 1e999
  except (ValueError, RecursionError) as e:
    raise ApiError(400, f"the body is not JSON: {type(e).__name__}: {e}") from e
  if not isinstance(body, dict):
    raise ApiError(400, f"the body is a JSON {type(body).__name__}: expected an object")
  return body


class Fields:
  """Takes fields out of a body; `end` refuses what nobody asked for."""

  def __init__(self, body: Mapping[str, Any]):
    self._left = {k: v for k, v in body.items() if v is not None}

  def take(self, name: str) -> Any:
    return self._left.pop(name, None)

  def number(self, name: str, low: float, high: float, *, above: bool = False) -> float | None:
    x = self.take(name)
    fine = x is None or (isinstance(x, int | float) and not isinstance(x, bool))
    if not fine or (x is not None and not (low < x <= high if above else low <= x <= high)):
      raise bad(name, x, f"a number {'above' if above else 'from'} {low:g} up to {high:g}")
    return None if x is None else float(x)

  def integer(self, name: str, low: int, high: int) -> int | None:
    x = self.take(name)
    if isinstance(x, float) and math.isfinite(x) and x == int(x):
      x = int(x)
    if x is not None and (not isinstance(x, int) or isinstance(x, bool) or not low <= x <= high):
      raise bad(name, x, f"an integer from {low} to {high}")
    return x

  def flag(self, name: str, default: bool = False) -> bool:
    x = self.take(name)
    if x is not None and not isinstance(x, bool):
      raise bad(name, x, "true or false")
    return default if x is None else x

  def end(self) -> None:
    for name in _WITHOUT_EFFECT:
      self._left.pop(name, None)
    for name, value in self._left.items():
      if name not in _NEUTRAL:
        raise ApiError(400, f"{name}: this server does not know this parameter", param=name)
      if value not in _NEUTRAL[name] or isinstance(value, bool) != isinstance(
        _NEUTRAL[name][0], bool
      ):
        only = " or ".join(json.dumps(v) for v in _NEUTRAL[name])
        raise bad(name, value, f"{only}: this server supports nothing else")


def _common(f: Fields) -> dict[str, Any]:
  stop = f.take("stop")
  stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
  if (
    not isinstance(stops, list)
    or len(stops) > MOST_STOPS
    or not all(isinstance(s, str) and 1 <= len(s) <= 256 for s in stops)
  ):
    raise bad("stop", stop, f"a string or up to {MOST_STOPS} of them, 1 to 256 characters each")
  stream, options = f.flag("stream"), f.take("stream_options")
  if options is not None and not isinstance(options, dict):
    raise bad("stream_options", options, "an object")
  within = Fields(options or {})
  usage = within.flag("include_usage")
  within.flag("include_obfuscation")
  within.end()
  limits = [f.integer(name, 1, 2**31 - 1) for name in ("max_tokens", "max_completion_tokens")]
  if None not in limits and limits[0] != limits[1]:
    raise bad("max_completion_tokens", limits[1], f"max_tokens = {limits[0]}, or only one of them")
  return {
    "n": f.integer("n", 1, MOST_CHOICES) or 1,
    "stream": stream,
    "usage": usage or not stream,
    "limit": next((x for x in limits if x is not None), None),
    "limit_name": "max_completion_tokens" if limits[0] is None else "max_tokens",
    "temperature": f.number("temperature", 0, 2),
    "top_p": f.number("top_p", 0, 1, above=True),
    "top_k": f.integer("top_k", 0, 2**31 - 1),
    "min_p": f.number("min_p", 0, 1),
    "seed": f.integer("seed", -_SEED, _SEED - 1),
    "stop": tuple(stops),
    "token_ids": f.flag("return_token_ids"),
  }


def read_chat(body: Mapping[str, Any]) -> Ask:
  """Checks a request of /v1/chat/completions.

  Raises:
    ApiError: names the field.
  """
  f = Fields(body)
  messages, tools = f.take("messages"), f.take("tools")
  choice, parallel = f.take("tool_choice"), f.flag("parallel_tool_calls", True)
  common, logprobs = _common(f), f.flag("logprobs")
  f.end()
  if not isinstance(messages, list) or not 1 <= len(messages) <= MOST_MESSAGES:
    raise bad("messages", messages, f"a list of 1 to {MOST_MESSAGES} messages")
  if tools is not None and (not isinstance(tools, list) or len(tools) > MOST_TOOLS):
    raise bad("tools", tools, f"a list of at most {MOST_TOOLS} tools")
  if choice not in (None, "auto", "none"):
    raise bad("tool_choice", choice, "'auto' or 'none': a model's reply is never forced here")
  return Ask(
    messages=[_message(m, f"messages[{i}]") for i, m in enumerate(messages)],
    tools=tuple(_tool(t, f"tools[{i}]") for i, t in enumerate(tools or ())),
    parse=choice != "none",
    single_call=not parallel,
    logprobs=logprobs,
    **common,
  )


def _message(m: Any, where: str) -> dict[str, Any]:
  if not isinstance(m, dict):
    raise bad(where, m, "an object")
  role, content, calls = m.get("role"), m.get("content"), m.get("tool_calls")
  if role not in _ROLES:
    raise bad(f"{where}.role", role, f"one of {', '.join(_ROLES)}")
  out: dict[str, Any] = {"role": "system" if role == "developer" else role}
  if isinstance(content, list):
    out["content"] = "".join(_part(p, f"{where}.content[{i}]") for i, p in enumerate(content))
  elif isinstance(content, str) or (content is None and role == "assistant"):
    out["content"] = content or ""
  else:
    raise bad(f"{where}.content", content, "text, or a list of text parts")
  for key in ("name", "tool_call_id"):
    if m.get(key) is not None:
      out[key] = _text(m[key], f"{where}.{key}")
  if m.get("reasoning_content") is not None and role == "assistant":
    out["reasoning_content"] = _text(m["reasoning_content"], f"{where}.reasoning_content", 2**31)
  if role == "tool" and "tool_call_id" not in out:
    raise bad(f"{where}.tool_call_id", None, "the id of the call that this answers")
  if calls is not None and (not isinstance(calls, list) or role != "assistant"):
    raise bad(f"{where}.tool_calls", calls, "a list, in an assistant's message")
  if calls:
    out["tool_calls"] = [_call(c, f"{where}.tool_calls[{i}]") for i, c in enumerate(calls)]
  if m.get("function_call") is not None or m.get("audio") is not None:
    raise bad(where, m, "text and tool calls; function_call and audio are not supported")
  return out


def _text(value: Any, where: str, most: int = 4096) -> str:
  if not isinstance(value, str) or len(value) > most:
    raise bad(where, value, f"a string of at most {most} characters")
  return value


def _part(part: Any, where: str) -> str:
  if not isinstance(part, dict) or part.get("type") != "text":
    raise bad(where, part, 'a part of the form {"type": "text", "text": ...}')
  if not isinstance(part.get("text"), str):
    raise bad(f"{where}.text", part.get("text"), "a string")
  return part["text"]


def _call(call: Any, where: str) -> dict[str, Any]:
  function = call.get("function") if isinstance(call, dict) else None
  if not isinstance(function, dict) or call.get("type", "function") != "function":
    raise bad(where, call, 'a call of the form {"id", "type": "function", "function": {...}}')
  name = _text(function.get("name"), f"{where}.function.name")
  arguments = function.get("arguments", "{}")
  if not isinstance(arguments, str):
    raise bad(f"{where}.function.arguments", arguments, "an object's JSON as a string")
  out = {"type": "function", "function": {"name": name, "arguments": arguments}}
  return {"id": _text(call.get("id", ""), f"{where}.id"), **out}


def _tool(tool: Any, where: str) -> dict[str, Any]:
  function = tool.get("function") if isinstance(tool, dict) else None
  if not isinstance(function, dict) or tool.get("type") != "function":
    raise bad(where, tool, 'a tool of the form {"type": "function", "function": {...}}')
  name, checks = function.get("name"), (("description", str), ("parameters", dict))
  if not isinstance(name, str) or not _NAME.fullmatch(name):
    raise bad(f"{where}.function.name", name, "1 to 64 letters, digits, '_', '-' or '.'")
  for key, kind in checks:
    if not isinstance(function.get(key, kind()), kind | None):
      raise bad(f"{where}.function.{key}", function[key], f"a JSON {kind.__name__}")
  return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


def read_completion(body: Mapping[str, Any], vocab_size: int) -> Ask:
  """Checks a request of /v1/completions.

  Raises:
    ApiError: names the field.
  """
  f = Fields(body)
  prompt, common = f.take("prompt"), _common(f)
  logprobs = f.integer("logprobs", 0, 0)  # that of the sampled token; no alternatives
  f.end()
  expected = f"text, token ids below {vocab_size}, or a list of either"

  def ids(x: Any) -> bool:
    whole = isinstance(x, list) and bool(x)
    return whole and all(type(t) is int and 0 <= t < vocab_size for t in x)

  if isinstance(prompt, str) or ids(prompt):
    prompt = [prompt]
  if not isinstance(prompt, list) or not 1 <= len(prompt) <= MOST_CHOICES:
    raise bad("prompt", prompt, expected)
  if not all((isinstance(p, str) and p) or ids(p) for p in prompt):
    raise bad("prompt", prompt, expected)
  return Ask(
    prompts=tuple(p if isinstance(p, str) else tuple(p) for p in prompt),
    logprobs=logprobs is not None,
    **common,
  )


def read_feedback(body: Mapping[str, Any], *, reward: bool) -> tuple[str | None, float | None]:
  """Checks a request of /feedback or /commit: (session or None, reward or None)."""
  f = Fields(body)
  session = f.take("session")
  value = f.number("reward", -1e30, 1e30)
  f.end()
  if reward and value is None:
    raise bad("reward", None, "a number")
  return None if session is None else _text(session, "session", MOST_NAME), value


Read = Callable[[Mapping[str, Any]], Ask]
