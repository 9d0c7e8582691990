"""An environment that goes wrong on purpose, by seed: for tests of everything around it.

What happens to an episode, and in which of its steps, is a function of its seed alone.
"""

from __future__ import annotations

import asyncio
import bisect
import collections
import dataclasses
import itertools
import os
import random
import signal
import threading
import time
from typing import Any

from trinity_jax.errors import UserError
from trinity_jax.explorer.environments.environment import Step

FATES = ("raises", "hangs", "dies", "slow", "garbage")
_SLOWER = 20  # times


@dataclasses.dataclass(frozen=True)
class Rates:
  """Probabilities of what may happen to an episode; slow is 20 times, dies kills its process."""

  raises: float = 0.05
  hangs: float = 0.05
  dies: float = 0.02
  slow: float = 0.10
  garbage: float = 0.01

  def __post_init__(self):
    values = dataclasses.astuple(self)
    if min(values) < 0 or sum(values) > 1:
      raise UserError(f"flaky environment {self}: expected probabilities with a sum of at most 1")


CALM = Rates(0, 0, 0, 0, 0)


class Fate:
  """What becomes of one episode: `name` ("" for nothing) in its step `turn`."""

  def __init__(self, seed: int, rates: Rates, turns: int):
    rng = random.Random(seed)
    edges = [*itertools.accumulate(dataclasses.astuple(rates))]
    self.name = (*FATES, "")[bisect.bisect(edges, rng.random())]
    self.turn = rng.randrange(turns)


class Flaky:
  """Answers "turn i" after `seconds`, `turns` times, unless its fate is another. It blocks.

  Args:
    seed: of its fate.
    turns: steps of an episode.
    seconds: each step takes.
    rates: fields of Rates.
    own_process: it may kill the process that it is in.
  """

  def __init__(
    self,
    seed: int,
    *,
    turns: int = 4,
    seconds: float = 0.0,
    rates: dict[str, float] | None = None,
    own_process: bool = False,
  ):
    self.fate = Fate(seed, Rates() if rates is None else Rates(**rates), turns)
    if self.fate.name == "dies" and not own_process:
      raise UserError("flaky environment: `dies` needs a process of its own (own_process=True)")
    self._turns, self._turn = turns, 0
    self._seconds = seconds * (_SLOWER if self.fate.name == "slow" else 1)

  def reset(self) -> str:
    self._turn = 0
    return "turn 0"

  def step(self, action: str, /) -> Any:
    """Simulates the time that a step takes, then does what its fate says."""
    time.sleep(self._seconds)
    if self._due("hangs"):
      threading.Event().wait()
    return self._answer()

  def close(self) -> None:
    pass

  def _due(self, name: str) -> bool:
    return self.fate.name == name and self.fate.turn == self._turn

  def _answer(self) -> Any:
    if self._due("raises"):
      raise ConnectionError("the environment's server went away")
    if self._due("dies"):
      os.kill(os.getpid(), signal.SIGKILL)
    if self._due("garbage"):
      return Step("\x00\ufffd" * 50, reward=float("nan"))
    self._turn += 1
    return Step(f"turn {self._turn}", float(self._turn == self._turns), self._turn == self._turns)


class AsyncFlaky(Flaky):
  """`Flaky` as coroutines: its time costs neither a thread nor the event loop's."""

  async def reset(self) -> str:
    return super().reset()

  async def step(self, action: str, /) -> Any:
    await asyncio.sleep(self._seconds)
    if self._due("hangs"):
      await asyncio.get_running_loop().create_future()
    return self._answer()

  async def close(self) -> None:
    pass


@dataclasses.dataclass
class Episodes:
  """A workflow of flaky episodes in processes of their own, whose attempts have fates of their own.

  Attributes:
    rates, turns, seconds: see Flaky.
    attempts: of each episode (its task's index) so far.
  """

  rates: Rates
  turns: int = 4
  seconds: float = 0.0
  attempts: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)

  async def __call__(self, task: Any, model: Any) -> Any:
    """The run's reward; see workflows.environment."""
    from trinity_jax.explorer.workflows.environment import environment

    seed = _seed(task.index, self.attempts[task.index])
    self.attempts[task.index] += 1
    args = {
      "seed": seed, "turns": self.turns, "seconds": self.seconds, "own_process": True,
      "rates": dataclasses.asdict(self.rates),
    }  # fmt: skip
    row = {"environment": f"{__name__}:Flaky", "environment_args": args, "own_process": True}
    return await environment(dataclasses.replace(task, raw=row), model)

  def fates(self, episode: int, attempts: int) -> list[str]:
    """What becomes of an episode that may be tried so often: a fate an attempt, until one ends."""
    out = []
    for attempt in range(attempts):
      out.append(Fate(_seed(episode, attempt), self.rates, self.turns).name)
      if out[-1] in ("", "slow"):
        break
    return out


def _seed(episode: int, attempt: int) -> int:
  return episode * 100 + attempt
