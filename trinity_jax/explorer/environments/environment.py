"""What an environment is to an agent that writes text."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, Protocol

from trinity_jax.explorer.threads import in_thread


@dataclasses.dataclass(frozen=True)
class Step:
  """What an action led to.

  Attributes:
    observation: text for the agent's next turn.
    reward: of this action.
    done: the episode is over.
    invalid: the text was no action of this environment (it did not act).
    info: numbers for metrics.
  """

  observation: str
  reward: float = 0.0
  done: bool = False
  invalid: bool = False
  info: dict[str, float] = dataclasses.field(default_factory=dict)


class Environment(Protocol):
  """One episode's world, used by one run at a time.

  Its functions may be plain or coroutine functions. Plain ones run in a thread of their own unless
  `quick` is there and true, which promises that they neither block nor compute for long.
  """

  def reset(self) -> Any:
    """Returns the first observation, text."""

  def step(self, action: str, /) -> Any:
    """Does what the agent wrote; returns a Step."""

  def close(self) -> Any:
    """Lets go of everything; called once, also after a failure."""


def checked(step: Any) -> Step:
  """What an environment's step returned, if it is what it should be.

  Raises:
    ValueError: it is no Step, its observation no text or its reward no finite number.
  """
  if not isinstance(step, Step):
    raise ValueError(f"the environment's step returned {str(step)[:80]!r}; expected a Step")
  if not isinstance(step.observation, str):
    raise ValueError(f"the environment's observation is {type(step.observation).__name__}, no text")
  if not isinstance(step.reward, (int, float)) or not math.isfinite(step.reward):
    raise ValueError(f"the environment's reward is {step.reward!r}; expected a finite number")
  return step


async def call(environment: Environment, name: str, *args: Any) -> Any:
  """Calls a function of an environment without blocking the event loop."""
  function: Callable[..., Any] = getattr(environment, name)
  if inspect.iscoroutinefunction(function):
    return await function(*args)
  if getattr(environment, "quick", False):
    return function(*args)
  return await in_thread(function, *args)
