"""Rewards on top of the math grader: a box that must be there, a named accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trinity_jax.explorer.rewards import answers
from trinity_jax.explorer.rewards.math import WORKERS, math_reward, math_reward_async

if TYPE_CHECKING:
  from trinity_jax.experience import Task


def boxed_reward(
  response: str,
  truth: str,
  task: Task | None = None,
  *,
  scale: float = 0.1,
  workers: int = WORKERS,
) -> dict[str, float]:
  """Accuracy of what the last `\\boxed{...}` holds, and whether there is one.

  Returns:
    accuracy: 1.0 when the boxed answer equals the truth, else 0.0 (an answer outside a box counts
      for nothing). format: `scale` with a box, -`scale` without.

  Raises:
    UserError: the truth holds no answer.
  """
  text = _box(response)
  accuracy = 0.0 if text is None else math_reward(text, truth, task, workers=workers)
  return {"accuracy": accuracy, "format": -scale if text is None else scale}


async def boxed_reward_async(
  response: str,
  truth: str,
  task: Task | None = None,
  *,
  scale: float = 0.1,
  workers: int = WORKERS,
) -> dict[str, float]:
  """`boxed_reward` for coroutines."""
  text = _box(response)
  accuracy = 0.0 if text is None else await math_reward_async(text, truth, task, workers=workers)
  return {"accuracy": accuracy, "format": -scale if text is None else scale}


def accuracy_reward(
  response: str, truth: str, task: Task | None = None, *, workers: int = WORKERS
) -> dict[str, float]:
  """`math_reward` as a component named accuracy, which filters of groups look at."""
  return {"accuracy": math_reward(response, truth, task, workers=workers)}


async def accuracy_reward_async(
  response: str, truth: str, task: Task | None = None, *, workers: int = WORKERS
) -> dict[str, float]:
  """`accuracy_reward` for coroutines."""
  return {"accuracy": await math_reward_async(response, truth, task, workers=workers)}


def _box(response: str) -> str | None:
  found = answers.boxed(response)
  return None if found is None else f"\\boxed{{{found[1]}}}"
