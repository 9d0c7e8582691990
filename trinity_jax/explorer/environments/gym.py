"""gymnasium's environments with text for an agent: what it sees, and what its words do.

Each environment has a `Text` that says how; `TEXTS` holds those for FrozenLake, Blackjack and Taxi,
and a task can name another as "module:name".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from trinity_jax import plugins
from trinity_jax.errors import UserError, suggestion
from trinity_jax.explorer.environments.environment import Step
from trinity_jax.tasks import frozen_lake


@dataclasses.dataclass(frozen=True)
class Text:
  """How an environment speaks.

  Attributes:
    actions: what the agent writes -> gymnasium's action.
    show: (unwrapped environment, observation, first turn?) -> text.
    component: the reward component's name; "accuracy" where the return is 1 for success, else 0.
    invalid: reward of text that is no action. It ends the episode, so where rewards can be negative
      it must cost as much as the worst, or nonsense is the best that an agent can say.
    quick: its steps take microseconds, so they need no thread.
  """

  actions: Mapping[str, Any]
  show: Callable[[Any, Any, bool], str]
  component: str = "return"
  invalid: float = 0.0
  quick: bool = True


def _frozen_lake(env: Any, observation: Any, first: bool) -> str:
  lake = [b"".join(row).decode() for row in env.desc]
  return frozen_lake.describe(lake, int(observation), first=first)


def _blackjack(env: Any, observation: Any, first: bool) -> str:
  own, dealer, ace = (int(x) for x in observation)
  rules = "Blackjack. Write hit or stick. " if first else ""
  return f"{rules}You have {own}{' with a usable ace' if ace else ''}, the dealer shows {dealer}."


_TAXI_PLACES = ("red", "green", "yellow", "blue")
_TAXI_MOVES = ("south", "north", "east", "west", "pickup", "dropoff")


def _taxi(env: Any, observation: Any, first: bool) -> str:
  row, column, passenger, target = env.decode(int(observation))
  where = _TAXI_PLACES[passenger] if passenger < 4 else "in the taxi"
  rules = f"Taxi on a 5x5 grid. Write {', '.join(_TAXI_MOVES)}. " if first else ""
  if first:
    places = zip(_TAXI_PLACES, env.locs)
    rules += "".join(f"{name}: row {r} column {c}. " for name, (r, c) in places)
  return (
    f"{rules}Taxi: row {row} column {column}. Passenger: {where}. Target: {_TAXI_PLACES[target]}."
  )


_TAXI = Text({name: i for i, name in enumerate(_TAXI_MOVES)}, _taxi, invalid=-200.0)
TEXTS = {
  "FrozenLake-v1": Text(
    {name: i for i, name in enumerate(frozen_lake.ACTIONS)}, _frozen_lake, "accuracy"
  ),
  "Blackjack-v1": Text({"stick": 0, "hit": 1}, _blackjack, invalid=-1.0),
  "Taxi-v3": _TAXI,
  "Taxi-v4": _TAXI,
}


class GymEnvironment:
  """One episode of a gymnasium environment.

  Text that is no action ends the episode: nothing is guessed, and what the agent is never shown
  an answer to, it need not learn to avoid at length.

  Args:
    name: gymnasium's id.
    args: keyword arguments of gymnasium.make.
    seed: of reset; None leaves it to gymnasium.
    text: how it speaks; "" is the one in TEXTS, else "module:name" of a Text.

  Raises:
    UserError: gymnasium is not installed, or knows no such environment or arguments.
  """

  def __init__(
    self, name: str, args: Mapping[str, Any] | None = None, *, seed: int | None = 0, text: str = ""
  ):
    self.text = _text(name, text)
    self.quick = self.text.quick
    self._seed = seed
    try:
      import gymnasium
    except ImportError as e:
      raise UserError(
        f"environment {name!r}: gymnasium is not installed; pip install gymnasium"
      ) from e
    try:
      self._env = gymnasium.make(name, disable_env_checker=True, **(args or {}))
    except (gymnasium.error.Error, TypeError) as e:
      raise UserError(f"environment {name!r} with environment_args {args!r}: {e}") from e

  def reset(self, seed: int | None = None) -> str:
    """Starts the episode, of another seed if one is given."""
    observation, _ = self._env.reset(seed=self._seed if seed is None else seed)
    return self.text.show(self._env.unwrapped, observation, True)

  def step(self, action: str, /) -> Step:
    """Does the action that the agent wrote, blanks around it aside."""
    chosen = self.text.actions.get(action.strip())
    if chosen is None:
      return Step(f"no action {action[:20]!r}", self.text.invalid, done=True, invalid=True)
    observation, reward, ended, cut, _ = self._env.step(chosen)
    shown = self.text.show(self._env.unwrapped, observation, False)
    return Step(shown, float(reward), bool(ended or cut))

  def close(self) -> None:
    self._env.close()


def _text(name: str, reference: str) -> Text:
  if reference:
    text = plugins.load(reference, "environment text")
    return text if isinstance(text, Text) else text()
  if name not in TEXTS:
    raise UserError(
      f"environment {name!r} has no text{suggestion(name, TEXTS)} (or name a Text of yours as "
      "'module:name' in the row's environment_text)"
    )
  return TEXTS[name]
