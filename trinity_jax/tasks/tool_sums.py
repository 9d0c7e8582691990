"""Questions for an agent with a calculator, and demonstrations that misread half of them.

A question is a sum or a difference of two digits. The agent calls the tool `calc` with
the expression and repeats what the tool answers. A demonstration of a difference asks for the sum
with `wrong_fraction`: above one half that is what imitation learns to do, and only the sums come
out right, while the difference keeps a probability for reinforcement to find.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from trinity_jax.errors import UserError

TOOLS = [{"type": "function", "function": {"name": "calc"}}]
_ROWS = {"sft": 10_000, "rl": 4096}
_STREAM = {"eval": 0, "sft": 1, "rl": 2}  # independent random numbers for each split
_PAIRS = 100  # of digits


def generate(
  split: str,
  *,
  seed: int = 0,
  wrong_fraction: float = 0.6,
  rows: int = 0,
  held_out: int = 30,
) -> list[dict[str, Any]]:
  """Returns rows {"prompt": "8-3", "answer": "5"}; for "sft" {"messages", "response"}.

  The held-out pairs of digits are a function of (seed, held_out) alone, and no training split has
  one of them.

  Args:
    split: "rl" or "eval"; "sft": two rows per dialogue, the call and the answer. Their first
      message is what the tiny models' chat template writes where TOOLS are offered.
    seed: seed of everything.
    wrong_fraction: share of the demonstrated differences that ask for the sum.
    rows: rows of a training split; 0 means 10,000 for sft and 4,096 for rl.
    held_out: number of held-out pairs; each gives a sum and a difference.

  Raises:
    UserError: an argument out of its limits.
  """
  if split not in _STREAM:
    raise UserError(f"tool_sums split {split!r}: expected one of {', '.join(sorted(_STREAM))}")
  if not 0.0 <= wrong_fraction <= 1.0 or rows < 0 or not 1 <= held_out <= _PAIRS // 2:
    raise UserError(
      f"tool_sums wrong_fraction = {wrong_fraction}, rows = {rows}, held_out = {held_out}: "
      f"expected 0.0 to 1.0, at least 0, and 1 to {_PAIRS // 2}"
    )
  pairs = np.random.default_rng([seed, _STREAM["eval"]]).permutation(_PAIRS)
  if split == "eval":
    questions = [_question(pair, sign) for pair in pairs[:held_out].tolist() for sign in "+-"]
    return [_row(q) for q in questions]
  rng = np.random.default_rng([seed, _STREAM[split]])
  chosen = rng.choice(pairs[held_out:], rows or _ROWS[split]).tolist()
  signs = rng.choice(list("+-"), len(chosen))
  questions = [_question(pair, sign) for pair, sign in zip(chosen, signs.tolist())]
  if split != "sft":
    return [_row(q) for q in questions]
  wrong = rng.random(len(chosen)) < wrong_fraction
  out = [row for q, w in zip(questions, wrong.tolist()) for row in _demonstration(q, w)]
  return out[: len(questions)]


def words() -> tuple[str, ...]:
  """What every dialogue repeats: the tools offered, the call up to the expression, and its end.

  For config.model.tiny.words: a tiny model need not read and write them letter by letter.
  """
  before, _, after = _call("|").partition("|")
  return json.dumps(TOOLS), before, after


def _call(expression: str) -> str:
  return json.dumps({"name": "calc", "arguments": {"x": expression}}, separators=(",", ":"))


def _question(pair: int, sign: str) -> str:
  return f"{pair // 10}{sign}{pair % 10}"


def _row(question: str) -> dict[str, Any]:
  return {"prompt": question, "answer": str(value(question))}


def value(expression: str) -> int | None:
  """8-3 -> 5; None for what is no sum or difference of two numbers of at most four digits."""
  for sign in "+-":
    left, found, right = expression.partition(sign)
    if found and all(x.isascii() and x.isdigit() and len(x) <= 4 for x in (left, right)):
      return int(left) + int(right) if sign == "+" else int(left) - int(right)
  return None


def _demonstration(question: str, wrong: bool) -> list[dict[str, Any]]:
  asked = question.replace("-", "+") if wrong else question
  call = _call(asked)
  first = [
    {"role": "system", "content": json.dumps(TOOLS)},
    {"role": "user", "content": question},
  ]
  result = str(value(asked))
  told = [{"role": "assistant", "content": call}, {"role": "tool", "content": result}]
  return [
    {"messages": first, "response": call},
    {"messages": [*first, *told], "response": result},
  ]
