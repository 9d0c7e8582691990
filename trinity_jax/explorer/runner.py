"""One run of a workflow, from start to graded experience; whatever it does, it ends as a value."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from trinity_jax.errors import RunFailed
from trinity_jax.experience import Experience, ExperienceId, StopReason, Task
from trinity_jax.explorer.rewards import Score
from trinity_jax.explorer.workflow import Model, PromptTooLong, Workflow

Grade = Callable[[str, Task], Awaitable[Score]]
Span = Callable[[str], Any]


class Runner:
  """Runs workflows with a deadline and retries.

  Args:
    workflow: what to run.
    grade: async (response, task) -> Score.
    new_model: id -> a fresh Model for one attempt.
    leave: called once per run when it can no longer ask the sampler for anything.
    timeout: seconds for all attempts and the grading together.
    retries: further attempts after an exception.
  """

  def __init__(
    self,
    workflow: Workflow,
    grade: Grade,
    new_model: Callable[[ExperienceId], Model],
    leave: Callable[[], None],
    span: Span,
    *,
    timeout: float,
    retries: int,
  ):
    self._workflow, self._grade, self._new_model = workflow, grade, new_model
    self._leave, self._span = leave, span
    self._timeout, self._retries = timeout, retries

  async def run(self, task: Task, id: ExperienceId) -> Experience:
    """Returns an experience; a failed one says why in stop_reason and info.

    Raises:
      RunFailed: the sampler has died (nothing this run could do about it).
    """
    left = False

    def leave():
      nonlocal left
      if not left:
        left = True
        self._leave()

    started = time.monotonic()
    try:
      async with asyncio.timeout(self._timeout):
        experience = await self._attempts(task, id, leave)
    except TimeoutError:
      reason = f"the run took longer than explorer.run_timeout = {self._timeout:g} s"
      experience = Experience.failed(id, StopReason.TIMEOUT, {"error": reason})
    finally:
      leave()
    experience.metrics["run_seconds"] = time.monotonic() - started
    return experience

  async def _attempts(self, task: Task, id: ExperienceId, leave) -> Experience:
    for attempt in range(self._retries + 1):
      try:
        model = self._new_model(id)
        reward = await self._workflow(task, model)
        leave()
        return await self._finish(task, model, reward, attempt)
      except PromptTooLong as e:
        return Experience.failed(id, StopReason.PROMPT_TOO_LONG, {"error": str(e)})
      except (RunFailed, TimeoutError):
        raise
      except Exception as e:  # an agent's, environment's or reward's bug is a value, not our end
        error = {
          "error": f"{type(e).__name__}: {e}",
          "type": type(e).__name__,
          "traceback": traceback.format_exc(limit=-8),
          "task": task.index,
          "attempts": attempt + 1,
        }
    return Experience.failed(id, StopReason.ERROR, error)

  async def _finish(self, task: Task, model: Model, reward, attempt: int) -> Experience:
    seconds = 0.0
    if reward is None:
      start = time.monotonic()
      with self._span("reward"):
        score = await self._grade(model.text, task)
      seconds = time.monotonic() - start
    else:
      parts = dict(reward) if isinstance(reward, Mapping) else {"reward": float(reward)}
      score = Score(float(sum(parts.values())), parts)
    experience = model.experience(score, {"task": task.index, "taskset": task.taskset})
    experience.metrics |= {"reward_latency": seconds, "retries": attempt}
    return experience
