"""FrozenLake as text: maps that can be solved, and demonstrations that often walk into the water.

The lake is a square: S start (top left), F frozen, H hole, G goal (bottom right). A turn shows the
agent's cell as a letter (a is the start, row by row) and what lies left, down, right and up of it
(# is the wall); the first turn shows the whole map before that. The action is one letter: L, D, R
or U.

A demonstration takes the wrong action with `wrong_fraction`: right until the wall, then down,
whatever is there. Above one half, that is what imitation learns to do, and reaches the goal only
where the way happens to be free, while the right action keeps a probability for reinforcement to
find.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trinity_jax.errors import UserError

ACTIONS = "LDRU"  # in the order of gymnasium's FrozenLake: 0, 1, 2, 3
_MOVES = ((0, -1), (1, 0), (0, 1), (-1, 0))
_ROWS = {"sft": 60_000, "rl": 4096}
_STREAM = {"eval": 0, "sft": 1, "rl": 2}  # independent random numbers for each split
_FAR = 10**6  # distance of a cell from which the goal cannot be reached

Lake = tuple[str, ...]  # rows of "SFHG"


def generate(
  split: str,
  *,
  seed: int = 0,
  size: int = 4,
  frozen: float = 0.7,
  wrong_fraction: float = 0.6,
  rows: int = 0,
  held_out: int = 100,
  max_turns: int = 8,
) -> list[dict[str, Any]]:
  """Returns rows for the `gym` workflow, for "sft" dialogues up to a turn and the turn's action.

  The held-out maps are a function of (seed, size, frozen, held_out) alone, and no training split
  has one of them. Every map has a way from start to goal.

  Args:
    split: "rl" or "eval": {"prompt", "answer" (a shortest way, for people), "environment",
      "environment_args", "max_turns"}; "sft": {"messages", "response"}.
    seed: seed of everything.
    size: rows and columns, 3 to 5.
    frozen: probability of a cell to be frozen before unsolvable maps are dropped.
    wrong_fraction: probability of a demonstration's action to ignore the holes.
    rows: rows of a training split; 0 means 60,000 for sft and 4,096 for rl (maps with replacement).
    held_out: number of held-out maps, all different.
    max_turns: actions of an episode.

  Raises:
    UserError: an argument out of its limits.
  """
  _check(split, size, frozen, wrong_fraction, rows, held_out, max_turns)
  held = _held_out(seed, size, frozen, held_out)
  if split == "eval":
    return [_row(lake, max_turns) for lake in held]
  rng = np.random.default_rng([seed, _STREAM[split]])
  excluded, count = set(held), rows or _ROWS[split]
  out: list[dict[str, Any]] = []
  while len(out) < count:
    lake = _draw(rng, size, frozen)
    if lake in excluded:
      continue
    if split == "rl":
      out.append(_row(lake, max_turns))
    else:
      out += _demonstrations(lake, rng, wrong_fraction, max_turns)
  return out[:count]


def describe(lake: Sequence[str], cell: int, *, first: bool = False) -> str:
  """What a turn shows: [the map,] the agent's cell, what lies left, down, right and up of it."""
  size = len(lake)
  row, column = divmod(cell, size)
  around = "".join(_at(lake, row + r, column + c) for r, c in _MOVES)
  return ("".join(lake) if first else "") + chr(ord("a") + cell) + around


def distances(lake: Sequence[str]) -> list[int]:
  """Steps to the goal from each cell, over frozen ones; far where there is no way."""
  size = len(lake)
  out = [_FAR] * size**2
  edge, steps = [size**2 - 1], 0
  while edge:
    new = []
    for cell in edge:
      if out[cell] == _FAR:
        out[cell] = steps
        new += [n for n in _neighbours(lake, cell) if n is not None]
    edge, steps = new, steps + 1
  return out


def right_action(lake: Sequence[str], cell: int, far: Sequence[int]) -> int:
  """The action on a shortest way: right if that is one, then down, left, up."""
  options = [(_FAR if n is None else far[n]) for n in _neighbours(lake, cell)]
  return min((2, 1, 0, 3), key=lambda a: options[a])


def wrong_action(size: int, cell: int) -> int:
  """Right until the wall, then down."""
  return 2 if cell % size < size - 1 else 1


def _at(lake: Sequence[str], row: int, column: int) -> str:
  inside = 0 <= row < len(lake) and 0 <= column < len(lake)
  return lake[row][column] if inside else "#"


def _neighbours(lake: Sequence[str], cell: int) -> list[int | None]:
  """The cell that each action leads to, None for walls and holes."""
  row, column = divmod(cell, len(lake))
  return [
    (row + r) * len(lake) + column + c if _at(lake, row + r, column + c) not in "#H" else None
    for r, c in _MOVES
  ]


def _draw(rng: np.random.Generator, size: int, frozen: float) -> Lake:
  """A map with a way from start to goal."""
  while True:
    cells = np.where(rng.random(size**2) < frozen, "F", "H")
    cells[0], cells[-1] = "S", "G"
    text = "".join(cells)
    lake = tuple(text[i : i + size] for i in range(0, size**2, size))
    if distances(lake)[0] < _FAR:
      return lake


def _held_out(seed: int, size: int, frozen: float, count: int) -> list[Lake]:
  rng = np.random.default_rng([seed, _STREAM["eval"]])
  held: dict[Lake, None] = {}
  for _ in range(100 * count):
    held[_draw(rng, size, frozen)] = None
    if len(held) == count:
      return list(held)
  raise UserError(
    f"frozen_lake held_out = {count}: there are only {len(held)} maps to be found with size = "
    f"{size}, frozen = {frozen}; hold out fewer"
  )


def _row(lake: Lake, max_turns: int) -> dict[str, Any]:
  return {
    "prompt": describe(lake, 0, first=True),
    "answer": _shortest(lake),
    "environment": "FrozenLake-v1",
    "environment_args": {"desc": list(lake), "is_slippery": False},
    "max_turns": max_turns,
  }


def _shortest(lake: Lake) -> str:
  far, cell, way = distances(lake), 0, ""
  while far[cell]:
    action = right_action(lake, cell, far)
    way, cell = way + ACTIONS[action], _neighbours(lake, cell)[action] or 0
  return way


def _demonstrations(
  lake: Lake, rng: np.random.Generator, wrong_fraction: float, max_turns: int
) -> list[dict[str, Any]]:
  """One row per turn of an episode: the dialogue so far, and the action."""
  far, size, cell, out = distances(lake), len(lake), 0, []
  messages = [{"role": "user", "content": describe(lake, 0, first=True)}]
  for wrong in rng.random(max_turns) < wrong_fraction:
    action = wrong_action(size, cell) if wrong else right_action(lake, cell, far)
    out.append({"messages": list(messages), "response": ACTIONS[action]})
    following = _neighbours(lake, cell)[action]
    if following in (None, size**2 - 1):  # neither ever walks into a wall, so None is a hole
      break
    cell = following
    messages += [
      {"role": "assistant", "content": ACTIONS[action]},
      {"role": "user", "content": describe(lake, cell)},
    ]
  return out


def _check(
  split: str, size: int, frozen: float, wrong: float, rows: int, held_out: int, turns: int
) -> None:
  if split not in _STREAM:
    raise UserError(f"frozen_lake split {split!r}: expected one of {', '.join(sorted(_STREAM))}")
  if not 3 <= size <= 5:
    raise UserError(f"frozen_lake size = {size}: expected 3 to 5 (cells are named by a letter)")
  for name, value in (("frozen", frozen), ("wrong_fraction", wrong)):
    if not 0.0 <= value <= 1.0 or (name == "frozen" and value < 0.3):
      low = 0.3 if name == "frozen" else 0.0
      raise UserError(f"frozen_lake {name} = {value}: expected {low} to 1.0")
  if rows < 0 or held_out < 1:
    raise UserError(f"frozen_lake rows = {rows}, held_out = {held_out}: expected 0 and 1 at least")
  if turns < 2 * (size - 1):
    raise UserError(
      f"frozen_lake max_turns = {turns}: the goal is {2 * (size - 1)} steps away; allow those"
    )
