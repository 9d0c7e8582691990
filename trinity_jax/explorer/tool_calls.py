"""Tool calls in a model's text, and the messages that carry them.

Two families of templates. Qwen's (the Hermes form): any number of
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. Llama 3.1's: the reply is nothing but
JSON objects `{"name": ..., "parameters": {...}}`, separated by ";", perhaps after `<|python_tag|>`.
What is malformed stays text, with the reason. What a reply thinks before it answers is no part of
either, see `reasoning`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from trinity_jax.explorer import reasoning

_OPEN, _CLOSE, _PYTHON = "<tool_call>", "</tool_call>", "<|python_tag|>"


@dataclasses.dataclass(frozen=True)
class Parsed:
  """A reply taken apart.

  Attributes:
    content: the text beside the calls; the whole text where there are none.
    calls: (name, arguments as a JSON object's text) each.
    error: why a call was not understood, "" otherwise; then content is the whole text.
    reasoning: what came before the answer, "" otherwise.
  """

  content: str
  calls: tuple[tuple[str, str], ...] = ()
  error: str = ""
  reasoning: str = ""


def parse(text: str, tools: Sequence[Mapping[str, Any]]) -> Parsed:
  """Finds reasoning and, if any tools were offered, the tool calls of a reply.

  Args:
    text: beginning with the tag of reasoning, also where that was the prompt's end.
  """
  thought, answer = reasoning.split(text)
  return dataclasses.replace(_parse(answer, tools), reasoning=thought)


def _parse(text: str, tools: Sequence[Mapping[str, Any]]) -> Parsed:
  if not tools:
    return Parsed(text)
  bare = text.strip().removeprefix(_PYTHON).lstrip()
  try:
    if _OPEN in text:
      return _hermes(text)
    if bare.startswith("{"):
      return _llama(text, bare, tools)
  except (ValueError, RecursionError) as e:  # json's errors are ValueErrors
    return Parsed(text, error=f"{type(e).__name__}: {e}")
  return Parsed(text)


def _hermes(text: str) -> Parsed:
  content, *rest = text.split(_OPEN)
  calls = []
  for part in rest:
    body, closed, _ = part.partition(_CLOSE)
    if not closed:
      raise ValueError(f"{_OPEN} without {_CLOSE}")
    calls.append(_call(json.loads(body, parse_constant=_refuse), ("arguments",)))
  return Parsed(content.rstrip(), tuple(calls))


def _llama(text: str, bare: str, tools: Sequence[Mapping[str, Any]]) -> Parsed:
  """An answer in JSON is a call only when it names one of the tools."""
  decoder, calls = json.JSONDecoder(parse_constant=_refuse), []
  names = {t.get("function", t).get("name") for t in tools}
  while bare:
    value, end = decoder.raw_decode(bare)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
      return Parsed(text)
    if value["name"] not in names:
      raise ValueError(f"no tool is named {value['name']!r}")
    calls.append(_call(value, ("parameters", "arguments")))
    bare = bare[end:].lstrip()
    if bare and not bare.startswith(";"):
      raise ValueError(f"text after the call: {bare[:40]!r}")
    bare = bare[1:].lstrip()
  return Parsed("", tuple(calls))


def _call(value: Any, keys: Sequence[str]) -> tuple[str, str]:
  name = value.get("name") if isinstance(value, dict) else None
  if not isinstance(name, str) or not name:
    raise ValueError("a call is an object with a name and arguments")
  arguments = next((value[k] for k in keys if k in value), {})
  if isinstance(arguments, str):  # some models write the object as a string of JSON
    arguments = json.loads(arguments, parse_constant=_refuse)
  if not isinstance(arguments, dict):
    raise ValueError(f"arguments of {name} are not an object")
  return name, json.dumps(arguments, ensure_ascii=False)


def _refuse(constant: str) -> None:
  raise ValueError(f"{constant} is not JSON")


def message(parsed: Parsed, ids: Sequence[str]) -> dict[str, Any]:
  """The assistant's message in OpenAI's form, with `reasoning_content` where there is some."""
  out: dict[str, Any] = {"role": "assistant", "content": parsed.content}
  if parsed.reasoning:
    out["reasoning_content"] = parsed.reasoning
  if not parsed.calls:
    return out
  calls = [
    {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
    for id, (name, arguments) in zip(ids, parsed.calls)
  ]
  return {**out, "tool_calls": calls}


def call_id(*parts: int) -> str:
  """Nine letters and digits, as Mistral's template wants them, from what names the call."""
  text = ",".join(map(str, parts))
  return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()[:9]


def text_of(content: Any) -> str:
  """The text of a message's content: a string, None, or OpenAI's list of text parts."""
  if isinstance(content, list):
    return "".join(p["text"] if isinstance(p, Mapping) else str(p) for p in content)
  return content or ""


def for_template(message: Mapping[str, Any]) -> dict[str, Any]:
  """A message as templates expect it: text as a string, arguments of calls as objects."""
  out = {k: v for k, v in message.items() if v is not None}
  out["content"] = text_of(message.get("content"))
  if calls := out.pop("tool_calls", None):
    out["tool_calls"] = [
      {**call, "function": {**call["function"], "arguments": _object(call["function"])}}
      for call in calls
    ]
  return out


def canonical(message: Mapping[str, Any]) -> str:
  """Equal for messages that say the same, whatever a client's library added or left out.

  What an assistant's message says is its answer; see `reasoning_of`.
  """
  text = text_of(message.get("content"))
  return json.dumps(
    [
      message.get("role"),
      reasoning.split(text)[1] if message.get("role") == "assistant" else text,
      [[c["function"]["name"], _object(c["function"])] for c in message.get("tool_calls") or ()],
      message.get("tool_call_id"),
      message.get("name"),
    ],
    sort_keys=True,
  )


def reasoning_of(message: Mapping[str, Any]) -> str:
  """The reasoning of an assistant's message, given beside its content or in it; "" without."""
  if message.get("role") != "assistant":
    return ""
  beside = message.get("reasoning_content")
  return beside if isinstance(beside, str) else reasoning.split(text_of(message.get("content")))[0]


def _object(function: Mapping[str, Any]) -> Any:
  arguments = function.get("arguments", {})
  try:
    return json.loads(arguments) if isinstance(arguments, str) else arguments
  except (ValueError, RecursionError):
    return arguments
