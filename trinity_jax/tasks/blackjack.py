"""Blackjack in few letters: gymnasium's game, and demonstrations that are often reckless.

A turn shows the own sum, whether an ace counts 11 (*), and the dealer's card: "14* 6". The action
is H (hit) or S (stick). The reward is 1, 0 or -1 at the end.

A demonstration hits whatever is below 21 with `reckless_fraction`: above one half that is what
imitation learns to do, while the sensible action keeps a probability for reinforcement to find.
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
  split: str,
  *,
  seed: int = 0,
  reckless_fraction: float = 0.6,
  rows: int = 0,
  held_out: int = 1000,
  max_turns: int = 6,
) -> list[dict[str, Any]]:
  """Returns rows for the `gym` workflow; the games of the splits have different seeds.

  Args:
    split: "rl" or "eval"; "sft": {"messages", "response"}, dialogues up to an action.
    seed: seed of everything.
    reckless_fraction: probability of a demonstration's action to hit below 21, come what may.
    rows: rows of a training split; 0 means 10,000 for sft and 4,096 for rl.
    held_out: number of held-out games.
    max_turns: actions of a game.

  Raises:
    UserError: an argument out of its limits, or gymnasium is not installed.
  """
  if split not in _STREAM:
    raise UserError(f"blackjack split {split!r}: expected one of {', '.join(sorted(_STREAM))}")
  if rows < 0 or held_out < 1 or max_turns < 1 or not 0.0 <= reckless_fraction <= 1.0:
    raise UserError(
      f"blackjack rows = {rows}, held_out = {held_out}, max_turns = {max_turns}, reckless_fraction "
      f"= {reckless_fraction}: expected 0 or more, 1 or more, 1 or more, and 0.0 to 1.0"
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
    out += _demonstration(environment, game(), rng.random(max_turns) < reckless_fraction)
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


def sensible(own: int, ace: bool, dealer: int) -> str:
  """The best action where there is nothing but hit and stick (Baldwin et al., "The optimum strategy
  in blackjack", 1956, without doubling and splitting)."""
  if ace:
    return "H" if own < 18 or (own == 18 and dealer in (1, 9, 10)) else "S"
  enough = 12 if 4 <= dealer <= 6 else 13 if 2 <= dealer <= 3 else 17
  return "H" if own < enough else "S"


def _demonstration(
  environment: GymEnvironment, game: int, reckless: np.ndarray
) -> list[dict[str, Any]]:
  """One row per action, at most as many as `reckless` says how to choose."""
  shown, out = environment.reset(game), []
  messages = [{"role": "user", "content": shown}]
  for hits in reckless:
    own, dealer = shown.split()
    total, ace = int(own.rstrip("*")), own.endswith("*")
    action = ("H" if total < 21 else "S") if hits else sensible(total, ace, int(dealer))
    out.append({"messages": list(messages), "response": action})
    step = environment.step(action)
    if step.done:
      break
    shown = step.observation
    messages += [{"role": "assistant", "content": action}, {"role": "user", "content": shown}]
  return out
