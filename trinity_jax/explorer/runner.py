"""One run of a workflow, from start to graded experience; whatever it does, it ends as a value."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import traceback
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

from trinity_jax.errors import RunFailed
from trinity_jax.experience import Experience, ExperienceId, StopReason, Task
from trinity_jax.explorer.rewards import Score, response_tokens
from trinity_jax.explorer.workflow import Model, PromptTooLong, Reward, Workflow

Grade = Callable[[str, Task], Awaitable[Score]]
Span = Callable[[str], Any]
T = TypeVar("T")


class _Raised(Exception):
  """Every attempt raised; the cause is what the last one raised."""

  def __init__(self, attempts: int):
    self.attempts = attempts


class Runner:
  """Runs workflows with a deadline and retries.

  Args:
    workflow: what to run.
    grade: async (response, task) -> Score.
    new_model: id -> a fresh Model for one attempt.
    leave: called once per run when it can no longer ask the sampler for anything.
    timeout: seconds for all attempts and the grading together, the sampler's part not counted:
      deterministic admission holds every run back while one hangs, and only that one may expire.
    retries: further attempts after an exception, for the workflow and for the grading. A response
      that cannot be graded is not sampled again: its keys would give the same tokens.
    retry_on: names of the exception classes (bases included) that are worth one; empty: all.
  """

  def __init__(
    self,
    workflow: Workflow,
    grade: Grade,
    new_model: Callable[[ExperienceId], Model],
    leave: Callable[[ExperienceId], None],
    span: Span,
    *,
    timeout: float,
    retries: int,
    retry_on: Collection[str] = (),
  ):
    self._workflow, self._grade, self._new_model = workflow, grade, new_model
    self._leave, self._span = leave, span
    self._timeout, self._retries, self._retry_on = timeout, retries, frozenset(retry_on)

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
        self._leave(id)

    started, clock = time.monotonic(), asyncio.get_running_loop().time
    outside, models = self._timeout, list[Model]()
    try:
      async with asyncio.timeout(self._timeout) as deadline:
        experience = await self._graded(task, id, models, leave, deadline)
        outside -= (deadline.when() or clock()) - clock()
    except PromptTooLong as e:
      experience = Experience.failed(id, StopReason.PROMPT_TOO_LONG, {"error": str(e)})
    except _Raised as e:
      experience = Experience.failed(id, StopReason.ERROR, self._error_info(e, task))
    except TimeoutError:
      reason = (
        f"the run took longer than explorer.run_timeout = {self._timeout:g} s, its time in the "
        "sampler not counted"
      )
      experience = Experience.failed(id, StopReason.TIMEOUT, {"error": reason})
    finally:
      try:
        for model in models:  # an agent that holds on to one gets no further
          await model.aclose()
      finally:
        leave()
    experience.metrics["run_seconds"] = time.monotonic() - started
    experience.metrics["environment_seconds"] = outside
    return experience

  async def _graded(self, task: Task, id: ExperienceId, models, leave, deadline) -> Experience:
    async def ask() -> tuple[Model, Score | None]:
      for earlier in models:
        await earlier.aclose()
      model = self._new_model(id)
      models.append(model)
      model.in_sampler = lambda: _paused(deadline)
      score = read_reward(await self._workflow(task, model))
      if not model.turns:
        raise ValueError(f"run {id}: the workflow ended without a call to the model")
      return model, score

    (model, score), retries = await self._attempt(ask)
    leave()
    seconds = 0.0
    if score is None:
      start = time.monotonic()
      written = model.experience(Score(0.0, {}), {}).num_actions
      with self._span("reward"), response_tokens(written):
        score, more = await self._attempt(lambda: self._grade(model.text, task))
      seconds, retries = time.monotonic() - start, retries + more
    experience = model.experience(score, {"task": task.index, "taskset": task.taskset})
    experience.metrics |= {"reward_latency": seconds, "retries": retries}
    return experience

  async def _attempt(self, function: Callable[[], Awaitable[T]]) -> tuple[T, int]:
    """Returns what the first attempt that does not raise gives, and how many raised before it."""
    for used in range(self._retries + 1):
      try:
        return await function(), used
      except (PromptTooLong, RunFailed):
        raise
      except (Exception, asyncio.CancelledError, SystemExit) as e:
        # An agent's, environment's or reward's bug is a value, not our end.
        if _cancelled():  # by the deadline or at the end, whatever the workflow made of it
          raise asyncio.CancelledError from e
        if used == self._retries or not self._worth_another(e):
          raise _Raised(used + 1) from e
    raise AssertionError("unreachable: the last attempt returns or raises")

  def _worth_another(self, error: BaseException) -> bool:
    names = {c.__name__ for c in type(error).__mro__}
    return not self._retry_on or bool(names & self._retry_on)

  def _error_info(self, raised: _Raised, task: Task) -> dict[str, Any]:
    e = raised.__cause__
    assert e is not None
    return {
      "error": f"{type(e).__name__}: {e}",
      "type": type(e).__name__,
      "traceback": "".join(traceback.format_exception(e, limit=-8)),
      "task": task.index,
      "attempts": raised.attempts,
    }


@contextlib.contextmanager
def _paused(deadline: asyncio.Timeout) -> Iterator[None]:
  """Stops a deadline's clock."""
  now = asyncio.get_running_loop().time
  until = deadline.when()
  if until is None or deadline.expired():
    yield
    return
  left = until - now()
  deadline.reschedule(None)
  try:
    yield
  finally:
    deadline.reschedule(now() + left)


def _cancelled() -> bool:
  """Whether this task was cancelled; else a CancelledError is one that its own code let out."""
  task = asyncio.current_task()
  return task is not None and task.cancelling() > 0


def read_reward(reward: Reward) -> Score | None:
  """Checks what a workflow returned: a number, a dict of components (summed) or None.

  Raises:
    ValueError: anything else, or a number that is not finite.
  """
  if reward is None:
    return None
  returned: Mapping[str, Any] = reward if isinstance(reward, Mapping) else {"reward": reward}
  parts: dict[str, float] = {}
  for name, value in returned.items():
    try:
      parts[name] = float(value)
    except (TypeError, ValueError):
      parts[name] = math.nan
    if not math.isfinite(parts[name]):
      raise ValueError(
        f"the workflow returned {name} = {value!r}; expected a finite number, a dict of them, or "
        "None to have the response graded"
      )
  return Score(math.fsum(parts.values()), parts)
