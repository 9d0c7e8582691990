"""Boards of 4 x 4 that have one solution, and demonstrations that often look at the row only.

Whoever fills the first empty cell of such a board, and then the next, finds each of them decided by
its row, column and box. A demonstration instead takes the lowest value that the row lacks, with
`careless_fraction`: above one half that is what imitation learns to do, and is right by chance,
while the right value keeps a probability for reinforcement to find.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trinity_jax.errors import UserError
from trinity_jax.explorer.environments import sudoku

_ROWS = {"sft": 40_000, "rl": 4096}
_STREAM = {"eval": 0, "sft": 1, "rl": 2}  # independent random numbers for each split
_EMPTY = "." * sudoku.SIDE**2


def generate(
  split: str,
  *,
  seed: int = 0,
  blanks: int = 5,
  careless_fraction: float = 0.6,
  rows: int = 0,
  held_out: int = 200,
) -> list[dict[str, Any]]:
  """Returns rows {"prompt": board, "answer": solution} for the `environment` workflow.

  The held-out boards are a function of (seed, blanks, held_out) alone, and no training split begins
  with one of them.

  Args:
    split: "rl" or "eval"; "sft": {"messages", "response"}, dialogues up to a move.
    seed: seed of everything.
    blanks: empty cells, 1 to 8.
    careless_fraction: probability of a demonstration's value to be the lowest that the row lacks.
    rows: rows of a training split; 0 means 40,000 for sft and 4,096 for rl.
    held_out: number of held-out boards, all different.

  Raises:
    UserError: an argument out of its limits.
  """
  if split not in _STREAM:
    raise UserError(f"sudoku split {split!r}: expected one of {', '.join(sorted(_STREAM))}")
  if not 1 <= blanks <= 8 or not 0.0 <= careless_fraction <= 1.0 or rows < 0:
    raise UserError(
      f"sudoku blanks = {blanks}, careless_fraction = {careless_fraction}, rows = {rows}: expected "
      "1 to 8, 0.0 to 1.0, and 0 or more"
    )
  if not 1 <= held_out <= 1000:  # of 4,608 boards with one blank
    raise UserError(f"sudoku held_out = {held_out}: expected 1 to 1000")
  grids = list(sudoku.solutions(_EMPTY))
  held = dict[str, str]()
  rng = np.random.default_rng([seed, _STREAM["eval"]])
  while len(held) < held_out:
    board, solution = _draw(rng, grids, blanks)
    held[board] = solution
  if split == "eval":
    return [_row(*pair) for pair in held.items()]
  rng, count = np.random.default_rng([seed, _STREAM[split]]), rows or _ROWS[split]
  out: list[dict[str, Any]] = []
  while len(out) < count:
    board, solution = _draw(rng, grids, blanks)
    if board in held:
      continue
    if split == "rl":
      out.append(_row(board, solution))
    else:
      out += _demonstration(board, solution, rng.random(blanks) < careless_fraction)
  return out[:count]


def _row(board: str, solution: str) -> dict[str, Any]:
  return {
    "prompt": board,
    "answer": solution,
    "environment": "trinity_jax.explorer.environments.sudoku:Sudoku",
    "environment_args": {"board": board},
    "max_turns": board.count("."),
  }


def _draw(rng: np.random.Generator, grids: list[str], blanks: int) -> tuple[str, str]:
  """A board of which every first empty cell is decided, and its solution."""
  while True:
    solution = grids[rng.integers(len(grids))]
    board = solution
    for cell in rng.choice(len(solution), blanks, replace=False).tolist():
      board = sudoku.filled(board, cell, ".")
    cells = [i for i, value in enumerate(board) if value == "."]
    shown, decided = board, True
    for cell in cells:
      decided &= len(sudoku.candidates(shown, cell)) == 1
      shown = sudoku.filled(shown, cell, solution[cell])
    if decided:
      return board, solution


def _demonstration(board: str, solution: str, careless: np.ndarray) -> list[dict[str, Any]]:
  """One row per move, up to the one that ends the game."""
  out, messages = [], [{"role": "user", "content": board}]
  for guesses in careless:
    cell = board.index(".")
    value = sudoku.candidates(board, cell, row_only=True)[0] if guesses else solution[cell]
    move = f"{cell // sudoku.SIDE + 1}{cell % sudoku.SIDE + 1}{value}"
    out.append({"messages": list(messages), "response": move})
    if value != solution[cell]:
      break
    board = sudoku.filled(board, cell, value)
    messages += [{"role": "assistant", "content": move}, {"role": "user", "content": board}]
  return out
