"""One run of a workflow, from start to graded experiences; whatever it does, it ends as values."""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar, cast

from trinity_jax.errors import RunFailed
from trinity_jax.experience import Experience, ExperienceId, StopReason, Task
from trinity_jax.explorer.grading import Grade, GroupGrade
from trinity_jax.explorer.outcome import Outcome, read_outcome
from trinity_jax.explorer.rewards import Score, response_tokens
from trinity_jax.explorer.workflow import Model, PromptTooLong, Workflow

Span = Callable[[str], Any]
T = TypeVar("T")


class _Raised(Exception):
  """Every attempt raised; the cause is what the last one raised."""

  def __init__(self, attempts: int):
    self.attempts = attempts


class Ran:
  """A run that has ended.

  Attributes:
    metrics: of the run, not of one log.
    waits: whether its response is still to be graded, with those of its group.
    failure: why nothing came of it, or None.
  """

  def __init__(self, task: Task, id: ExperienceId, most: int):
    self.task, self.id = task, id
    self.metrics: dict[str, float] = {}
    self.failure: Experience | None = None
    self.waits = False
    self._most = most
    self._model: Model | None = None
    self._outcome: Outcome = None

  @property
  def response(self) -> str:
    assert self._model is not None
    return self._model.text

  @property
  def written(self) -> int:
    """Tokens that the policy wrote in the log of the last reply."""
    assert self._model is not None
    return self._model.experience(0.0).num_actions

  def end(self, model: Model, outcome: Outcome, retries: int) -> None:
    self._model, self._outcome = model, outcome
    self.metrics["retries"] = retries

  def graded(self, score: Score, seconds: float, retries: int) -> None:
    self._outcome, self.waits = score, False
    self.metrics["reward_latency"] = seconds
    self.metrics["retries"] += retries

  def fail(self, reason: StopReason, info: dict[str, Any]) -> None:
    self.failure, self.waits = Experience.failed(self.id, reason, dict(info)), False
    self.metrics.pop("retries", None)

  def experiences(self) -> list[Experience]:
    """The latest logs, or one empty experience; the last one has the run's metrics."""
    if self.failure is not None:
      out = [self.failure]
    else:
      out = self._logs()
    out[-1].metrics |= self.metrics
    return out

  def _logs(self) -> list[Experience]:
    assert self._model is not None and self._outcome is not None and not self.waits
    info = {"task": self.task.index, "taskset": self.task.taskset}
    offered, count = self._outcome, len(self._model.logs)
    if isinstance(offered, list) and isinstance(offered[0], Experience):
      out, count = cast(list[Experience], offered)[-self._most :], len(offered)
      for e in out:
        e.info = {**info, **e.info}
    else:
      scores = cast("Score | list[Score]", offered)
      out = self._model.experiences(scores, info, most=self._most)
    self.metrics = {
      "reward_latency": 0.0, **self.metrics, "logs": count, "logs_dropped": count - len(out),
    }  # fmt: skip
    return out


class Runner:
  """Runs workflows with a deadline and retries.

  Args:
    workflow: what to run.
    grade: of each response, or of those of a group (`grade_group`).
    new_model: id -> a fresh Model for one attempt.
    leave: called once per run when it can no longer ask the sampler for anything.
    timeout: seconds for all attempts and the grading together, the sampler's part not counted:
      deterministic admission holds every run back while one hangs, and only that one may expire.
      Grading a group has as many again.
    retries: further attempts after an exception, for the workflow and for the grading. A response
      that cannot be graded is not sampled again: its keys would give the same tokens.
    retry_on: names of the exception classes (bases included) that are worth one; empty: all.
    most_logs: token logs of a run that become experiences, the latest ones.
  """

  def __init__(
    self,
    workflow: Workflow,
    grade: Grade | GroupGrade,
    new_model: Callable[[ExperienceId], Model],
    leave: Callable[[ExperienceId], None],
    span: Span,
    *,
    timeout: float,
    retries: int,
    retry_on: Collection[str] = (),
    most_logs: int = 1,
  ):
    self._workflow, self._grade, self._new_model = workflow, grade, new_model
    self._leave, self._span, self._most_logs = leave, span, most_logs
    self._timeout, self._retries, self._retry_on = timeout, retries, frozenset(retry_on)

  async def run(self, task: Task, id: ExperienceId) -> Ran:
    """Runs the workflow; with a GroupGrade what it returns may wait for `grade_group`.

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
    outside, models, ran = self._timeout, list[Model](), Ran(task, id, self._most_logs)
    try:
      with self._caught([ran]):
        async with asyncio.timeout(self._timeout) as deadline:
          await self._end(ran, models, leave, deadline)
          outside -= (deadline.when() or clock()) - clock()
    finally:
      try:
        for model in models:  # an agent that holds on to one gets no further
          await model.aclose()
      finally:
        leave()
    ran.metrics["run_seconds"] = time.monotonic() - started
    ran.metrics["environment_seconds"] = outside
    return ran

  async def grade_group(self, task: Task, runs: Sequence[Ran]) -> None:
    """Grades those runs of a task that wait for it, in one go; they fail together.

    Raises:
      RunFailed: see `run`.
    """
    waiting = [ran for ran in runs if ran.waits]
    if not waiting:
      return
    assert isinstance(self._grade, GroupGrade)
    scores, start = self._grade.scores, time.monotonic()
    responses, written = [r.response for r in waiting], [r.written for r in waiting]
    with self._caught(waiting), self._span("reward"):
      async with asyncio.timeout(self._timeout):
        found, retries = await self._attempt(lambda: scores(responses, task, written))
      for ran, score in zip(waiting, found, strict=True):
        ran.graded(score, time.monotonic() - start, retries)

  async def _end(self, ran: Ran, models: list[Model], leave, deadline: asyncio.Timeout) -> None:
    async def ask() -> tuple[Model, Outcome]:
      for earlier in models:
        await earlier.aclose()
      model = self._new_model(ran.id)
      models.append(model)
      model.in_sampler = lambda: _paused(deadline)
      returned = await self._workflow(ran.task, model)
      if not model.turns:
        raise ValueError(f"run {ran.id}: the workflow ended without a call to the model")
      return model, read_outcome(returned, ran.id, len(model.logs))

    (model, outcome), retries = await self._attempt(ask)
    leave()
    ran.end(model, outcome, retries)
    grade = self._grade
    if outcome is not None:
      return
    if isinstance(grade, GroupGrade):
      ran.waits = True
      return
    start = time.monotonic()
    with self._span("reward"), response_tokens(ran.written):
      score, more = await self._attempt(lambda: grade(ran.response, ran.task))
    ran.graded(score, time.monotonic() - start, more)

  @contextlib.contextmanager
  def _caught(self, runs: Sequence[Ran]) -> Iterator[None]:
    """Makes values of what ends runs."""
    try:
      yield
    except PromptTooLong as e:
      reason, info = StopReason.PROMPT_TOO_LONG, {"error": str(e)}
    except _Raised as e:
      reason, info = StopReason.ERROR, self._error_info(e, runs[0].task)
    except TimeoutError:
      reason = StopReason.TIMEOUT
      info = {
        "error": f"the run took longer than explorer.run_timeout = {self._timeout:g} s, its time "
        "in the sampler not counted"
      }
    else:
      return
    for ran in runs:
      ran.fail(reason, info)

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
