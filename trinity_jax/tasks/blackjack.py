"""Blackjack in few letters: gymnasium's game, and demonstrations that play at random.

A turn shows the own sum, whether an ace counts 11 (*), and the dealer's card: "14* 6". The action
is H (hit) or S (stick). The reward is 1, 0 or -1 at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trinity_jax.errors import UserError
from trinity_jax.explorer.environments.gym import GymEnvironment, Text

_ROWS = {"sft": 10_000, "rl": 4096}
_STREAM = {"eval": 0, "sft": 1, "rl": 2}  # independent random numbers for each split
_ACTIONS = {"S": 0, "H": 1}  # gymnasium's numbers
_GAMES = 10**6  # seeds of the games of a split


def _show(env: Any, observation: Any, first: bool) -> str:
  own, dealer, ace = (int(x) for x in observation)
  return f"{own}{'*' if ace else ''} {dealer}"


def text() -> Text:
  """How the game speaks."""
  return Text(_ACTIONS, _show, invalid=-1.0)


def generate(
  split: str, *, seed: int = 0, rows: int = 0, held_out: int = 200, max_turns: int = 6
) -> list[dict[str, Any]]:
  """Returns rows for the `gym` workflow; the games of the splits have different seeds.

  Args:
    split: "rl" or "eval"; "sft": {"messages", "response"}, dialogues up to an action.
    seed: seed of everything.
    rows: rows of a training split; 0 means 10,000 for sft and 4,096 for rl.
    held_out: number of held-out games.
    max_turns: actions of a game.

  Raises:
    UserError: an argument out of its limits, or gymnasium is not installed.
  """
  if split not in _STREAM:
    raise UserError(f"blackjack split {split!r}: expected one of {', '.join(sorted(_STREAM))}")
  if rows < 0 or held_out < 1 or max_turns < 1:
    raise UserError(
      f"blackjack rows = {rows}, held_out = {held_out}, max_turns = {max_turns}: expected 0 or "
      "more, and 1 or more"
    )
  rng = np.random.default_rng([seed, _STREAM[split]])
  first = _STREAM[split] * _GAMES
  game = lambda: first + int(rng.integers(_GAMES))
  if split != "sft":
    count = held_out if split == "eval" else rows or _ROWS[split]
    return [_row(game(), max_turns) for _ in range(count)]
  out: list[dict[str, Any]] = []
  environment = GymEnvironment("Blackjack-v1", text=f"{__name__}:text")
  while len(out) < (rows or _ROWS[split]):
    out += _demonstration(environment, game(), rng, max_turns)
  return out[: rows or _ROWS[split]]


def _row(game: int, max_turns: int) -> dict[str, Any]:
  return {
    "prompt": f"blackjack, game {game}",
    "answer": "win",
    "environment": "Blackjack-v1",
    "environment_text": f"{__name__}:text",
    "seed": game,
    "max_turns": max_turns,
  }


def _demonstration(
  environment: GymEnvironment, game: int, rng: np.random.Generator, max_turns: int
) -> list[dict[str, Any]]:
  messages, out = [{"role": "user", "content": environment.reset(game)}], []
  for action in rng.choice(list(_ACTIONS), max_turns).tolist():
    out.append({"messages": list(messages), "response": action})
    step = environment.step(action)
    if step.done:
      break
    messages += [
      {"role": "assistant", "content": action},
      {"role": "user", "content": step.observation},
    ]
  return out
