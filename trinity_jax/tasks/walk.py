"""A walk along a line, rewarded step by step: an environment of our own as users write theirs.

The agent is shown where it is and where the goal is ("3>7") and writes + or -. Each step is worth
0.1 where it comes nearer and -0.1 where it does not, and arriving 1 more, so what a turn was worth
is known at once. Anything else costs 1 and ends the walk. Demonstrations step at random.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trinity_jax.errors import UserError
from trinity_jax.explorer.environments.environment import Step

LENGTH = 10  # positions 0 to 9
_ROWS = {"sft": 20_000, "rl": 4096}
_STREAM = {"eval": 0, "sft": 1, "rl": 2}  # independent random numbers for each split
_MOVES = {"+": 1, "-": -1}


class Walk:
  """One walk; see environments.environment.Environment.

  Args:
    start, goal: positions, different ones.
  """

  quick = True

  def __init__(self, start: int, goal: int):
    self._at, self._goal = start, goal

  def reset(self) -> str:
    return self._shown()

  def step(self, action: str, /) -> Step:
    move = _MOVES.get(action.strip())
    if move is None:
      return Step(f"no action {action[:20]!r}", -1.0, done=True, invalid=True)
    nearer = (self._goal > self._at) == (move > 0)
    self._at = min(max(self._at + move, 0), LENGTH - 1)
    there = self._at == self._goal
    return Step(self._shown(), (0.1 if nearer else -0.1) + there, there)

  def close(self) -> None:
    pass

  def _shown(self) -> str:
    return f"{self._at}>{self._goal}"


def generate(
  split: str,
  *,
  seed: int = 0,
  rows: int = 0,
  held_out: int = 20,
  max_turns: int = 12,
  own_process: bool = False,
) -> list[dict[str, Any]]:
  """Returns rows for the `environment` workflow.

  The held-out pairs of start and goal are a function of (seed, held_out) alone, and neither the
  dialogues of "sft" nor the walks of "rl" begin with one of them.

  Args:
    split: "rl" or "eval"; "sft": {"messages", "response"}, dialogues up to a step.
    seed: seed of everything.
    rows: rows of a training split; 0 means 20,000 for sft and 4,096 for rl.
    held_out: number of held-out pairs.
    max_turns: steps of a walk.
    own_process: each environment lives in a process of its own.

  Raises:
    UserError: an argument out of its limits.
  """
  if split not in _STREAM:
    raise UserError(f"walk split {split!r}: expected one of {', '.join(sorted(_STREAM))}")
  if rows < 0 or max_turns < 1 or not 1 <= held_out <= 45:
    raise UserError(
      f"walk rows = {rows}, max_turns = {max_turns}, held_out = {held_out}: expected at least 0, "
      "at least 1, and 1 to 45"
    )
  pairs = [(a, b) for a in range(LENGTH) for b in range(LENGTH) if a != b]
  order = np.random.default_rng([seed, _STREAM["eval"]]).permutation(len(pairs))

  def make(i: int) -> dict[str, Any]:
    start, goal = pairs[i]
    return _row(start, goal, max_turns, own_process)

  if split == "eval":
    return [make(i) for i in order[:held_out]]
  rng, count = np.random.default_rng([seed, _STREAM[split]]), rows or _ROWS[split]
  if split == "rl":
    return [make(i) for i in rng.choice(order[held_out:], count)]
  out: list[dict[str, Any]] = []
  while len(out) < count:
    out += _demonstration(pairs[rng.choice(order[held_out:])], rng)
  return out[:count]


def _row(start: int, goal: int, max_turns: int, own_process: bool) -> dict[str, Any]:
  return {
    "prompt": f"{start}>{goal}",
    "answer": ("+" if goal > start else "-") * abs(goal - start),
    "environment": f"{__name__}:Walk",
    "environment_args": {"start": start, "goal": goal},
    "own_process": own_process,
    "max_turns": max_turns,
  }


def _demonstration(pair: tuple[int, int], rng: np.random.Generator) -> list[dict[str, Any]]:
  """One row per step of a random walk, four at most."""
  walk, out = Walk(*pair), []
  messages = [{"role": "user", "content": walk.reset()}]
  for action in rng.choice(list(_MOVES), 4).tolist():
    out.append({"messages": list(messages), "response": action})
    step = walk.step(action)
    if step.done:
      break
    messages += [
      {"role": "assistant", "content": action},
      {"role": "user", "content": step.observation},
    ]
  return out
