"""Products that are too large to know, with tools that compute them.

The agent calls the tool with the product and repeats what the tool answers. A demonstration answers
from memory with `guess_fraction` instead, and gets one digit wrong: above one half that is what
imitation learns to do, while the call keeps a probability for reinforcement to find.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from trinity_jax.errors import UserError

_ROWS = {"sft": 10_000, "rl": 4096}
_STREAM = {"eval": 0, "sft": 1, "rl": 2}  # independent random numbers for each split
_CALLS = {"calculator": ("expression", "{}"), "python": ("code", "print({})")}


def generate(
  split: str,
  *,
  tool: str = "calculator",
  seed: int = 0,
  guess_fraction: float = 0.6,
  rows: int = 0,
  held_out: int = 100,
) -> list[dict[str, Any]]:
  """Returns rows {"prompt": "34*87", "answer": "2958", "tools"} for `tool_use`.

  The held-out pairs of factors are a function of (seed, held_out) alone, and no training split has
  one of them.

  Args:
    split: "rl" or "eval"; "sft": {"messages", "response"}, dialogues up to a reply. Their first
      message is what the tiny models' chat template writes where the tool is offered.
    tool: calculator or python.
    seed: seed of everything.
    guess_fraction: share of the demonstrated dialogues that do without the tool.
    rows: rows of a training split; 0 means 10,000 for sft and 4,096 for rl.
    held_out: pairs that are only asked for in "eval".

  Raises:
    UserError: an argument out of its limits.
  """
  if split not in _STREAM or tool not in _CALLS:
    raise UserError(
      f"products split {split!r}, tool {tool!r}: expected one of {', '.join(sorted(_STREAM))}, and "
      f"one of {', '.join(_CALLS)}"
    )
  if not 0.0 <= guess_fraction <= 1.0 or rows < 0 or not 1 <= held_out <= 4000:
    raise UserError(
      f"products guess_fraction = {guess_fraction}, rows = {rows}, held_out = {held_out}: expected "
      "0.0 to 1.0, at least 0, and 1 to 4000"
    )
  pairs = np.random.default_rng([seed, _STREAM["eval"]]).permutation(90 * 90)
  if split == "eval":
    return [_row(*_factors(pair), tool) for pair in pairs[:held_out].tolist()]
  rng, count = np.random.default_rng([seed, _STREAM[split]]), rows or _ROWS[split]
  chosen = [_factors(pair) for pair in rng.choice(pairs[held_out:], count).tolist()]
  if split == "rl":
    return [_row(a, b, tool) for a, b in chosen]
  guesses = rng.random(count) < guess_fraction
  wrong = [int(x) for x in rng.integers(1, 10, count)]
  out: list[dict[str, Any]] = []
  for (a, b), guess, by in zip(chosen, guesses.tolist(), wrong):
    out += _demonstration(a, b, tool, by if guess else 0)
  return out[:count]


def words(tool: str = "calculator") -> tuple[str, ...]:
  """What every dialogue repeats: the tools offered, the call up to the product, and its end.

  For config.model.tiny.words: a tiny model need not read and write them letter by letter.
  """
  from trinity_jax.explorer.environments.tools import make

  before, _, after = _call(tool, "|").partition("|")
  return json.dumps([make(tool, {}).schema]), before, after


def _call(tool: str, product: str) -> str:
  name, form = _CALLS[tool]
  return json.dumps({"name": tool, "arguments": {name: form.format(product)}})


def _factors(pair: int) -> tuple[int, int]:
  return 10 + pair // 90, 10 + pair % 90


def _row(a: int, b: int, tool: str) -> dict[str, Any]:
  return {"prompt": f"{a}*{b}", "answer": str(a * b), "tools": [tool], "max_turns": 3}


def _demonstration(a: int, b: int, tool: str, wrong_by: int) -> list[dict[str, Any]]:
  """The call and the answer, or an answer from memory whose last digit is wrong."""
  first = [
    {"role": "system", "content": words(tool)[0]},
    {"role": "user", "content": f"{a}*{b}"},
  ]
  answer = a * b
  if wrong_by:
    return [{"messages": first, "response": str(answer - answer % 10 + (answer + wrong_by) % 10)}]
  call = _call(tool, f"{a}*{b}")
  found = f"{answer}\n" if tool == "python" else str(answer)
  told = [{"role": "assistant", "content": call}, {"role": "tool", "content": found}]
  return [
    {"messages": first, "response": call},
    {"messages": [*first, *told], "response": str(answer)},
  ]
