"""Environments of others that speak text already: ALFWorld, ScienceWorld, WebShop and their like.

They are installed and made by a function of the user's own, one for each episode:

  reset() -> observation, or (observation, info)
  step(text) -> (observation, reward, done, info) or gymnasium's (observation, reward, ended, cut,
    info)
  close(), if there is one

Their observations are text, and any text is an action: what they make of nonsense is their affair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trinity_jax import plugins
from trinity_jax.explorer.environments.environment import Step


class TextEnvironment:
  """One episode; see environment.Environment.

  Args:
    make: 'module:function' that makes the environment.
    args: its keyword arguments.
    commands: entry of `info` that lists what can be done ("admissible_commands" in ALFWorld,
      "valid" in ScienceWorld): shown below each observation. "" shows none.
    goal: said before the first observation.

  Raises:
    UserError: there is no such function.
  """

  def __init__(
    self,
    make: str,
    args: Mapping[str, Any] | None = None,
    *,
    commands: str = "",
    goal: str = "",
  ):
    self._env: Any = plugins.load(make, "environment")(**(args or {}))
    self._commands, self._goal = commands, goal

  def reset(self) -> str:
    """Starts the episode.

    Raises:
      ValueError: the observation is no text.
    """
    answer = self._env.reset()
    observation, info = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, None)
    shown = self._shown(observation, info)
    return f"{self._goal}\n{shown}" if self._goal else shown

  def step(self, action: str, /) -> Step:
    """Does what the agent wrote.

    Raises:
      ValueError: what the environment returned is not as above.
    """
    answer = self._env.step(action.strip())
    if not isinstance(answer, tuple) or len(answer) not in (4, 5):
      told = str(answer)[:80]
      raise ValueError(f"the environment's step returned {told!r}; expected 4 or 5 values")
    observation, reward, *ends, info = answer
    shown = self._shown(observation, info)
    return Step(shown, float(reward), any(map(bool, ends)))

  def close(self) -> None:
    close = getattr(self._env, "close", None)
    if close is not None:
      close()

  def _shown(self, observation: Any, info: Any) -> str:
    if not isinstance(observation, str):
      raise ValueError(
        f"the environment's observation is {type(observation).__name__}, no text; one that plays "
        "several games at once must be made to play one and return its texts"
      )
    if not self._commands:
      return observation
    if not isinstance(info, Mapping) or self._commands not in info:
      raise ValueError(f"the environment's info has no {self._commands!r}; it has {_keys(info)}")
    return f"{observation}\nPossible: {' | '.join(map(str, info[self._commands]))}"


def _keys(info: Any) -> str:
  return ", ".join(map(str, info)) if isinstance(info, Mapping) else f"type {type(info).__name__}"
