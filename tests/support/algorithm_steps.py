"""A random optimizer step as plain lists, and the same step laid out as padded or packed arrays.

Positions that are no action tokens hold whatever would hurt most when read.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

TOKEN_NAMES = (
  "logprob", "old_logprob", "ref_logprob", "teacher_logprob", "prox_logprob", "prox_entropy",
  "expected_score", "values", "token_rewards", "log_weight", "returns",
)  # fmt: skip
POISON = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30])


@dataclasses.dataclass
class Step:
  """N sequences; `action` and `tokens[name]` hold one 1-D array per sequence."""

  sequences: dict[str, np.ndarray]
  action: list[np.ndarray]
  tokens: dict[str, list[np.ndarray]]
  num_groups: int

  @property
  def count(self) -> int:
    return len(self.action)


def random_step(seed: int, count: int = 14, num_groups: int = 6, longest: int = 9) -> Step:
  """Few groups, so some have one member; some sequences are invalid, some without action."""
  rng = np.random.default_rng(seed)
  valid = rng.random(count) < 0.85
  group = rng.integers(0, num_groups - 1, count)  # the last group is always empty
  run = rng.integers(0, 3, count)
  step = np.zeros(count, np.int64)
  for i in range(count):
    step[i] = np.sum((group[:i] == group[i]) & (run[:i] == run[i]))
  order = rng.permutation(count)  # turns do not come in order
  sequences = {
    "rewards": rng.integers(0, 3, count) * 0.5,
    "group_ids": group, "run_ids": run, "step_ids": step * 2,  # with gaps
    "state_ids": rng.integers(-1, 2, count),
    "step_rewards": rng.integers(0, 3, count) * 0.5,
    "baselines": rng.integers(0, 3, count) * 0.5,
  }  # fmt: skip
  sequences = {k: v[order] for k, v in sequences.items()} | {"valid": valid}
  for k in ("rewards", "step_rewards", "baselines"):
    sequences[k] = np.where(valid, sequences[k], POISON[rng.integers(0, 5, count)])
  lengths = rng.integers(1, longest + 1, count)
  action = [rng.random(n) < 0.7 for n in lengths]
  tokens = {name: [-rng.exponential(size=n) for n in lengths] for name in TOKEN_NAMES}
  for name in ("values", "token_rewards", "log_weight", "returns"):
    tokens[name] = [rng.normal(size=n) for n in lengths]
  tokens["prox_entropy"] = [rng.exponential(size=n) for n in lengths]
  return Step(sequences, action, tokens, num_groups)


def spread(step: Step, places: list[tuple[int, int]], shape: tuple[int, ...], seed: int = 0):
  """Token arrays of `shape` with sequence i at (row, start) = places[i] of the flattened rows."""
  rng = np.random.default_rng(seed)
  flat = (int(np.prod(shape[:-1])), shape[-1])
  mask = np.zeros(flat, bool)
  index = rng.integers(-9, 99, flat).astype(np.int32)
  out = {name: POISON[rng.integers(0, 5, flat)] for name in step.tokens}
  for i, (row, start) in enumerate(places):
    at = np.s_[row, start : start + len(step.action[i])]
    mask[at], index[at] = step.action[i], i
    for name, arrays in step.tokens.items():
      out[name][at] = np.where(step.action[i], arrays[i], out[name][at])
  out = {k: v.reshape(shape) for k, v in out.items()}
  return out | {"mask": mask.reshape(shape), "sequence_index": index.reshape(shape)}


def padded(step: Step, longest: int = 9) -> tuple[dict[str, Any], list[tuple[int, int]]]:
  """One sequence per row, [N, longest]."""
  places = [(i, longest - len(a)) for i, a in enumerate(step.action)]  # left-padded
  return spread(step, places, (step.count, longest)), places


def packed(step: Step, seed: int = 1) -> tuple[dict[str, Any], list[tuple[int, int]]]:
  """[M, B, T] = [3, 4, 21]: sequences in random order, several per row."""
  rng = np.random.default_rng(seed)
  free = np.zeros(12, int)
  places: list[Any] = [None] * step.count
  for i in rng.permutation(step.count):
    row = int(rng.choice(np.flatnonzero(free + len(step.action[i]) <= 21)))
    places[i] = (row, int(free[row]))
    free[row] += len(step.action[i])
  return spread(step, places, (3, 4, 21), seed), places


def gather(x: Any, places: list[tuple[int, int]], step: Step) -> list[np.ndarray]:
  """The action tokens of each sequence of a token array."""
  x = np.asarray(x).reshape(-1, np.shape(x)[-1])
  return [x[row, start : start + len(a)][a] for (row, start), a in zip(places, step.action)]


def actions(step: Step, name: str) -> list[np.ndarray]:
  """The action tokens of each sequence of `tokens[name]`."""
  return [x[a] for x, a in zip(step.tokens[name], step.action)]
