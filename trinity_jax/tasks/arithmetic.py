"""The quickstart's data: sums, with demonstrations that are often wrong in the same way.

A demonstration that follows the wrong rule forgets the carry out of the ones column: 27+58=75. With
a `wrong_fraction` above one half that is what imitation learns to do where there is a carry, while
the right answer keeps a probability for reinforcement to find. Sums without such a carry (55 % of
them) come out the same by both rules, so imitation alone levels off near 0.55.
"""

from __future__ import annotations

import numpy as np

from trinity_jax.errors import UserError

_ROWS = {"sft": 20_000, "rl": 4096, "text": 20_000, "preferences": 4096}
# Independent random numbers for each split.
_STREAM = {"eval": 0, "sft": 1, "rl": 2, "text": 3, "preferences": 4}


def generate(
  split: str,
  *,
  seed: int = 0,
  digits: int = 2,
  wrong_fraction: float = 0.6,
  rows: int = 0,
  held_out: int = 200,
) -> list[dict[str, str]]:
  """Returns rows {"prompt": "27+58=", "answer": "85"}, for "sft" with a "response" as well.

  The held-out pairs are a function of (seed, digits, held_out) alone. Neither training split
  contains one of them in either order of its operands.

  Args:
    split: "sft" (demonstrations), "rl" (tasks to explore), "text" ({"text": "27+58=85"}),
      "preferences" (the right answer "chosen", one wrong by the rule or else by one "rejected"), or
      "eval" (the held-out pairs).
    seed: seed of everything.
    digits: digits of each operand, 1 to 6; no leading zeros.
    wrong_fraction: share of the sft rows whose response follows the wrong rule.
    rows: rows of a training split, drawn with replacement; 0 means 20,000 for sft and text, 4,096
      for the others.
    held_out: number of held-out pairs.

  Raises:
    UserError: an argument out of its limits.
  """
  _check(split, digits, wrong_fraction, rows, held_out)
  held = _held_out(seed, digits, held_out)
  if split == "eval":
    a, b = held
    return [{"prompt": f"{x}+{y}=", "answer": str(x + y)} for x, y in zip(a.tolist(), b.tolist())]
  rng = np.random.default_rng([seed, _STREAM[split]])
  a, b = _draw_without(rng, digits, rows or _ROWS[split], _pair_key(*held))
  out = [{"prompt": f"{x}+{y}=", "answer": str(x + y)} for x, y in zip(a.tolist(), b.tolist())]
  if split == "sft":
    wrong = np.zeros(len(out), bool)
    wrong[: round(wrong_fraction * len(out))] = True
    shown = np.where(rng.permutation(wrong), wrong_sum(a, b), a + b)
    for row, response in zip(out, shown.tolist()):
      row["response"] = str(response)
  if split == "text":
    return [{"text": row["prompt"] + row["answer"]} for row in out]
  if split == "preferences":
    right, wrong = a + b, wrong_sum(a, b)
    worse = np.where(wrong == right, right + rng.choice([-1, 1], len(out)), wrong)
    for row, rejected in zip(out, worse.tolist()):
      row |= {"chosen": row["answer"], "rejected": str(rejected)}
  return out


def wrong_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns a + b without the carry out of the ones column: 27 + 58 -> 75. Any shape."""
  return a + b - 10 * (a % 10 + b % 10 >= 10)


def _check(split: str, digits: int, wrong_fraction: float, rows: int, held_out: int) -> None:
  if split not in _STREAM:
    raise UserError(f"arithmetic split {split!r}: expected one of {', '.join(sorted(_STREAM))}")
  if not 1 <= digits <= 6:
    raise UserError(f"arithmetic digits = {digits}: expected 1 to 6")
  if not 0.0 <= wrong_fraction <= 1.0:
    raise UserError(f"arithmetic wrong_fraction = {wrong_fraction}: expected 0.0 to 1.0")
  if rows < 0:
    raise UserError(f"arithmetic rows = {rows}: expected at least 0 (0 means the default)")
  low, high = _operands(digits)
  pairs = (high - low) * (high - low + 1) // 2
  if not 1 <= held_out <= pairs // 2:
    raise UserError(
      f"arithmetic held_out = {held_out}: expected 1 to {pairs // 2}, half of the {pairs} pairs of "
      f"{digits}-digit numbers; use more digits or hold out fewer"
    )


def _operands(digits: int) -> tuple[int, int]:
  return (0 if digits == 1 else 10 ** (digits - 1)), 10**digits


def _pair_key(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """One integer per unordered pair."""
  return np.minimum(a, b) * 10**7 + np.maximum(a, b)


def _held_out(seed: int, digits: int, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns `count` pairs, each different from the others in both orders: i64[count] twice."""
  rng = np.random.default_rng([seed, _STREAM["eval"]])
  low, high = _operands(digits)
  a = b = np.zeros(0, np.int64)
  while len(a) < count:  # at most half of all pairs, so a few rounds
    a = np.concatenate([a, rng.integers(low, high, count)])
    b = np.concatenate([b, rng.integers(low, high, count)])
    first = np.sort(np.unique(_pair_key(a, b), return_index=True)[1])
    a, b = a[first], b[first]
  return a[:count], b[:count]


def _draw_without(
  rng: np.random.Generator, digits: int, count: int, excluded: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Draws `count` pairs with replacement from those whose key is not excluded: i64[count] twice."""
  low, high = _operands(digits)
  a = b = np.zeros(0, np.int64)
  while len(a) < count:
    x, y = rng.integers(low, high, count), rng.integers(low, high, count)
    keep = ~np.isin(_pair_key(x, y), excluded)
    a, b = np.concatenate([a, x[keep]]), np.concatenate([b, y[keep]])
  return a[:count], b[:count]
