"""Sudoku of 4 x 4, a cell a turn.

The agent is shown the board row by row, "." for an empty cell, and writes row, column and value:
"2 3 4" (or 234). A value that is not the solution's ends the game, as does text that is no move.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from trinity_jax.errors import UserError
from trinity_jax.explorer.environments.environment import Step

SIDE = 4
_MOVE = re.compile(r"\s*([1-4])[\s,]*([1-4])[\s,]*([1-4])\s*")


class Sudoku:
  """One board; see environment.Environment. Solving it is worth 1, nothing else anything.

  Args:
    board: 16 characters, row by row: 1 to 4, or "." for an empty cell.

  Raises:
    UserError: it is no such board, is full, or has no or several solutions.
  """

  quick = True

  def __init__(self, board: str):
    if not isinstance(board, str) or not re.fullmatch(r"[1-4.]{16}", board) or "." not in board:
      raise UserError(f"sudoku board {board!r}: expected 16 characters of 1234., one of them '.'")
    found = [s for s, _ in zip(solutions(board), range(2))]
    if len(found) != 1:
      raise UserError(
        f"sudoku board {board!r}: it has {'several' if found else 'no'} solutions; expected one"
      )
    self._board, self._solution = board, found[0]

  def reset(self) -> str:
    return self._board

  def step(self, action: str, /) -> Step:
    """Fills a cell."""
    move = _MOVE.fullmatch(action)
    if move is None:
      return Step(f"no move {action[:20]!r}", done=True, invalid=True)
    row, column, value = move.groups()
    cell = SIDE * (int(row) - 1) + int(column) - 1
    if self._board[cell] != ".":
      return Step(f"row {row} column {column} is not empty", done=True, invalid=True)
    if self._solution[cell] != value:
      return Step(f"row {row} column {column} is not {value}", done=True)
    self._board = filled(self._board, cell, value)
    solved = self._board == self._solution
    return Step(self._board, float(solved), solved)

  def close(self) -> None:
    pass


def filled(board: str, cell: int, value: str) -> str:
  """The board with a value in a cell."""
  return board[:cell] + value + board[cell + 1 :]


def candidates(board: str, cell: int, *, row_only: bool = False) -> list[str]:
  """Values that neither the cell's row nor, unless row_only, its column or 2 x 2 box has."""
  row, column = divmod(cell, SIDE)
  top, left = row - row % 2, column - column % 2
  seen = set(board[row * SIDE : (row + 1) * SIDE])
  if not row_only:
    seen |= set(board[column::SIDE])
    seen |= {board[r * SIDE + c] for r in (top, top + 1) for c in (left, left + 1)}
  return [v for v in "1234" if v not in seen]


def solutions(board: str) -> Iterator[str]:
  """Every way to fill the empty cells, in the order of the values; given ones that break the rules
  have none."""
  if any(v != "." and v not in candidates(filled(board, i, "."), i) for i, v in enumerate(board)):
    return
  yield from _solutions(board)


def _solutions(board: str) -> Iterator[str]:
  cell = board.find(".")
  if cell < 0:
    yield board
    return
  for value in candidates(board, cell):
    yield from _solutions(filled(board, cell, value))
