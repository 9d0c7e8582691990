"""Sudoku of 4 x 4: rules, moves, ends."""

from __future__ import annotations

import pytest

from trinity_jax.errors import UserError
from trinity_jax.explorer.environments.sudoku import Sudoku, candidates, solutions

BOARD = "4213.34..124243."


def test_there_are_288_grids_and_each_obeys_the_rules():
  """Their number is known: Felgenhauer and Jarvis counted shapes of this kind."""
  grids = list(solutions("." * 16))
  assert len(grids) == len(set(grids)) == 288
  for grid in grids:
    groups = [grid[4 * i : 4 * i + 4] for i in range(4)] + [grid[i::4] for i in range(4)]
    groups += [grid[i] + grid[i + 1] + grid[i + 4] + grid[i + 5] for i in (0, 2, 8, 10)]
    assert all(sorted(g) == list("1234") for g in groups)


def test_a_game_that_is_solved():
  game = Sudoku(BOARD)
  assert game.quick and game.reset() == BOARD
  steps = [game.step(a) for a in ("2 1 1", "242", "3,1,3\n", " 4 4 1 ")]
  game.close()
  assert [s.observation for s in steps[:2]] == ["4213134..124243.", "42131342.124243."]
  assert [(s.reward, s.done) for s in steps] == [(0, False)] * 3 + [(1, True)]
  assert steps[-1].observation == "4213134231242431" and not any(s.invalid for s in steps)


@pytest.mark.parametrize(
  ("action", "told", "invalid"),
  [
    ("2 1 2", "row 2 column 1 is not 2", False),
    ("1 1 4", "row 1 column 1 is not empty", True),
    ("5 1 1", "no move '5 1 1'", True),
    ("", "no move ''", True),
    ("2111", "no move '2111'", True),
  ],
)
def test_ends_without_a_reward(action, told, invalid):
  game = Sudoku(BOARD)
  game.reset()
  step = game.step(action)
  assert (step.observation, step.reward, step.done, step.invalid) == (told, 0.0, True, invalid)


def test_candidates():
  assert candidates("4213............", 4) == ["1", "3"]  # the box has 4 and 2
  assert candidates("4213............", 4, row_only=True) == list("1234")
  assert candidates(BOARD, 4) == ["1"] and candidates(BOARD, 4, row_only=True) == ["1", "2"]


@pytest.mark.parametrize(
  ("board", "message"),
  [
    ("4213", "expected 16 characters"),
    (None, "expected 16 characters"),
    ("4213134231242431", "one of them '.'"),
    ("." * 16, "several solutions"),
    ("11" + "." * 14, "no solutions"),
  ],
)
def test_boards_that_are_none(board, message):
  with pytest.raises(UserError, match=message):
    Sudoku(board)
