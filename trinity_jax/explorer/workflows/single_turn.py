"""One prompt, one response, graded by the taskset's reward."""

from __future__ import annotations

from trinity_jax.experience import Task
from trinity_jax.explorer.workflow import Model


async def single_turn(task: Task, model: Model) -> None:
  """Asks once; returning None has the response graded."""
  await model.chat(task.messages)
