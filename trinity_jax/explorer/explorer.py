"""The explorer: tasks in, graded groups out, at the pace the schedule allows.

Runs on its own thread's event loop and waits for events only: a version was published, a group was
taken, dropped or failed. Errors of single runs are values; an error of the explorer itself ends the
run of the program.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Container, Coroutine, Sequence
from typing import Any, Protocol, runtime_checkable

from trinity_jax.buffer.bell import ThreadBell
from trinity_jax.buffer.record import Claim, good_runs
from trinity_jax.buffer.replay import ReplayBuffer
from trinity_jax.config import Config
from trinity_jax.errors import RunFailed
from trinity_jax.experience import Experience, Task
from trinity_jax.explorer.evaluation import Evaluation, HeldOut
from trinity_jax.explorer.grading import Grade, GroupGrade
from trinity_jax.explorer.groups import TRAIN_STREAM, Groups, group_ids
from trinity_jax.explorer.runner import Runner
from trinity_jax.explorer.workflow import SamplingParams
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.monitor.loop_lag import LoopLag
from trinity_jax.sampler.rollout_engine import RolloutEngine
from trinity_jax.schedule import Schedule
from trinity_jax.tasks.taskset import Taskset


class Versions(Protocol):
  """Where an explorer gets its weights: synchronizer.Synchronizer or publishing.SnapshotReader."""

  @property
  def version(self) -> int: ...

  @property
  def failure(self) -> BaseException | None: ...

  async def wait_for(self, version: int) -> tuple[int, Any]: ...


@runtime_checkable
class Asked(Protocol):
  """Weights that are published when somebody asks for them."""

  def ask(self) -> None: ...


class Explorer:
  """Starts one workflow per (task, run) and delivers complete groups to the buffer.

  Args:
    versions: gives weights; rings `bell` when there are new ones.
    bell: rung by the buffer too.
    taskset: training tasks.
    held_out: (config, tasks, grade) of each evaluation taskset.
    grade: of training tasks.
    span: timeline.span.
    on_eval: called with (version, metrics, some experiences) after each evaluation.
    greedy_first: sample the first run of each training group greedily (a baseline).
    evaluated: versions that need no evaluation, an earlier process having booked them.
  """

  def __init__(
    self,
    config: Config,
    *,
    engine: RolloutEngine,
    tokenizer: Tokenizer,
    schedule: Schedule,
    versions: Versions,
    buffer: ReplayBuffer | None,
    bell: ThreadBell,
    taskset: Taskset | None,
    held_out: Sequence[HeldOut],
    grade: Grade | GroupGrade | None,
    span: Callable[[str], contextlib.AbstractContextManager],
    on_eval: Callable[[int, dict[str, float], list[Experience]], None],
    greedy_first: bool = False,
    evaluated: Container[int] = (),
  ):
    self.config = config
    self._engine, self._schedule, self._versions = engine, schedule, versions
    self._buffer, self._bell, self._taskset, self._grade = buffer, bell, taskset, grade
    self._span = span
    self._groups = Groups(config, engine, tokenizer, span, greedy_first=greedy_first)
    self.evaluation = Evaluation(config, self._groups, held_out, on_eval, span, evaluated)
    self._evaluating: asyncio.Task | None = None
    self._version = -1  # last given to the sampler, which takes it at its next dispatch
    self._asked = -1  # the version that the schedule meant, the same except after a resume
    self._in_flight: set[asyncio.Task] = set()
    self._taken_over: set[asyncio.Task] = set()  # steps that other explorers had begun
    self._swapping = asyncio.Lock()
    self._next_look = 0.0
    self._later: asyncio.TimerHandle | None = None
    self._dropped = 0  # groups, when that was last asked for
    self._failure: BaseException | None = None
    self._changed = asyncio.Event()
    self._short = 0  # groups in a row
    self.short_groups = 0  # with fewer good runs than explorer.min_runs
    self.regenerated = {"same": 0, "different": 0}  # groups that were stored before a restart
    self.loop_lag = LoopLag()

  async def aclose(self) -> None:
    """Ends what runs may have begun; nothing is explored any more."""
    await self._groups.aclose()

  # --- rollouts ----------------------------------------------------------------------------------

  async def explore(self, total: int) -> None:
    """Explorer steps, as the buffer hands them out, until the trainer has done `total` steps."""
    loop = asyncio.get_running_loop()

    def ring() -> None:
      with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
        loop.call_soon_threadsafe(self._changed.set)

    unsubscribe = self._bell.subscribe(ring)
    background = [asyncio.create_task(self._beat(total))]
    if self._schedule.swaps_midway:
      background.append(asyncio.create_task(self._follow()))
    for task in background:
      task.add_done_callback(self._ended)
    try:
      with self.loop_lag.running():
        while (claim := await self._claim()) is not None and await self._admit(claim, total):
          self._start(claim)
        await self._finish_evaluation()
    finally:
      unsubscribe()
      await cancelled([*background, *self._taken_over, *self._in_flight])
    self._raise_failure()

  async def _claim(self) -> Claim | None:
    c = self.config
    assert self._buffer is not None
    return await asyncio.to_thread(self._buffer.claim, c.explorer.name, c.buffer.lease)

  async def _beat(self, total: int) -> None:
    """Shows the others that this explorer is alive, and takes over from those that are not."""
    c = self.config
    buffer = self._buffer
    assert buffer is not None
    while True:
      await asyncio.to_thread(buffer.heartbeat, c.explorer.name, c.buffer.lease)
      take_over = lambda: buffer.claim(c.explorer.name, c.buffer.lease, new=False)
      while (claim := await asyncio.to_thread(take_over)) is not None:
        self._track(self._admitted(claim, total), self._taken_over)
      await asyncio.sleep(c.buffer.lease / 4)

  async def _admitted(self, claim: Claim, total: int) -> None:
    if await self._admit(claim, total):
      self._start(claim)

  async def _admit(self, claim: Claim, total: int) -> bool:
    """Waits until an explorer step may start, its weights in the sampler; False: none is needed."""
    buffer, batch = self._buffer, claim.batch
    assert buffer is not None
    if self._schedule.asks(batch) and isinstance(self._versions, Asked):
      self._versions.ask()

    def look() -> bool | str:
      for fresh in (False, True):  # what is known already first: it can only become more
        if fresh and not self._may_look():
          break
        if fresh and buffer.finished:
          return True
        lacking = self._lacking(batch, fresh=fresh)
        least, newest = self._schedule.needs(batch, lacking), self._versions.version
        if batch - lacking <= total and newest >= least:
          return True
      if batch - lacking > total:  # the steps to come have their groups: nothing to hurry for
        return False
      return f"version {least}; the trainer's newest is {newest}"

    with self._span("wait_for_policy"):
      await self._until(look)
    if buffer.finished:
      return False
    newest, lacking = self._versions.version, self._lacking(batch)
    current = self._version if self._version >= 0 else None
    version = self._schedule.version_for(
      batch, newest, current=current, dropped_batches=lacking
    )
    await self._take(version, self._schedule.needs(batch, lacking))
    return not buffer.finished

  def _may_look(self) -> bool:
    """Whether the store may be asked now; else it will be, soon: every put of anybody rings."""
    loop = asyncio.get_running_loop()
    if loop.time() >= self._next_look:
      self._next_look = loop.time() + _LOOKS
      return True
    if self._later is None or self._later.when() < self._next_look:
      self._later = loop.call_at(self._next_look, self._changed.set)
    return False

  def _lacking(self, batch: int, *, fresh: bool = False) -> int:
    """Explorer steps by which `batch` comes earlier: others had surplus groups or lost some."""
    assert self._buffer is not None
    if fresh:
      self._dropped = self._buffer.dropped
    before = (batch - 1) * self.tasks_per_batch - self._dropped
    return batch - (before // self.config.explorer.batch_size + 1)

  @property
  def tasks_per_batch(self) -> int:
    return tasks_per_batch(self.config)

  async def _take(self, version: int, least: int) -> None:
    """Gives a version to the sampler; while that evaluates, one of at least `least` stays.

    Deterministic runs change weights between rollouts; else what is under way goes on, and
    sampler.on_swap says with which cache.
    """
    async with self._swapping:
      if version != self._asked:
        await self._swap(version, least)

  async def _swap(self, version: int, least: int) -> None:
    if self.config.explorer.deterministic:
      await self._until(lambda: not self._in_flight)
    elif self._evaluating is not None:
      if self._version >= least and not self._evaluating.done():
        return
      await self._finish_evaluation()
    if self.config.explorer.deterministic:
      await self._evaluate_passed(version)
    found, params = await self._versions.wait_for(version)
    self._asked = version
    if found <= self._version:
      return
    self._use(found, params)
    if self.evaluation.comes_due(found):
      self._evaluating = asyncio.create_task(self.evaluation.once(found))
      if self.config.explorer.deterministic:
        await self._finish_evaluation()
      else:
        self._evaluating.add_done_callback(self._ended)

  async def _evaluate_passed(self, version: int) -> None:
    """Evaluates what the trainer passes by after a kill, on groups that were stored before, while
    the first step to explore needs a later version."""
    for due in self.evaluation.missing(self._version, version):
      found, params = await self._versions.wait_for(due)
      if found == due:
        self._use(found, params)
        await self.evaluation.once(due)

  async def evaluate_last(self, version: int) -> None:
    """Evaluates the last version, and what was passed by before it."""
    if self.config.explorer.deterministic:
      await self._evaluate_passed(version)
    if self.evaluation:
      await self.evaluate_versions([version])

  async def _finish_evaluation(self) -> None:
    if self._evaluating is not None:
      await self._evaluating
      self._evaluating = None

  async def _follow(self) -> None:
    """Takes each version as it comes; evaluations keep the weights they began with."""
    while True:
      await self._until(lambda: self._versions.version > self._version)
      await self._finish_evaluation()
      await self._take(self._versions.version, self._versions.version)

  def _use(self, version: int, params: Any) -> None:
    self._engine.set_params(version, params)
    self._version = version

  # --- groups ------------------------------------------------------------------------------------

  def _start(self, claim: Claim) -> None:
    c = self.config
    assert self._taskset is not None and self._grade is not None
    count = self.tasks_per_batch
    tasks = self._taskset.at((claim.batch - 1) * count, count)
    # A step that was stored in part is sampled whole: its tokens depend on what runs beside them.
    numbers = range(count) if c.explorer.deterministic else claim.tasks
    params = SamplingParams(
      c.sampler.temperature, c.sampler.max_response_length, c.sampler.top_p, c.sampler.top_k
    )
    runner = self._groups.runner(c.taskset.workflow, self._grade, params, TRAIN_STREAM)
    ids = group_ids(claim.batch, numbers, c.explorer.group_size)
    self._groups.announce(TRAIN_STREAM, ids)
    for number, group in zip(numbers, ids):
      self._track(self._group(runner, tasks[number], group), self._in_flight)

  def _track(self, coroutine: Coroutine[Any, Any, None], among: set[asyncio.Task]) -> None:
    """Runs it beside; its error ends the explorer, the explorer's end ends it."""
    started = asyncio.create_task(coroutine)
    among.add(started)
    started.add_done_callback(among.discard)
    started.add_done_callback(self._ended)

  async def _group(self, runner: Runner, task: Task, ids) -> None:
    assert self._buffer is not None
    group = await self._groups.run(runner, task, ids)
    found = await self._buffer.put(group)
    if found in self.regenerated:
      self.regenerated[found] += 1
    self._count_short(group)

  def _count_short(self, group: Sequence[Experience]) -> None:
    """Others take the place of short groups; that has to end where there are only such.

    Raises:
      RunFailed: no group of explorer.max_failed_steps steps had enough good runs.
    """
    c = self.config.explorer
    if good_runs(group) >= c.min_runs:
      self._short = 0
      return
    self.short_groups += 1
    self._short += 1
    if self._short >= c.max_failed_steps * self.tasks_per_batch:
      why = next((e.info["error"] for e in group if "error" in e.info), "no error was recorded")
      raise RunFailed(
        f"{self._short} groups in a row had fewer than {c.min_runs} good runs (explorer.min_runs); "
        f"the last of them: {why}"
      )

  def _ended(self, task: asyncio.Task) -> None:
    """The first error ends the explorer; those that it causes are not news."""
    if not task.cancelled() and task.exception() is not None and self._failure is None:
      self._failure = task.exception()
    self._changed.set()

  def _raise_failure(self) -> None:
    for failure in (self._failure, self._versions.failure):
      if failure is not None:
        raise failure

  async def _until(self, look: Callable[[], bool | str]) -> None:
    """Waits for events until `look` says True.

    Args:
      look: else says what is waited for and how far that is, or False: others' deadlines end it.

    Raises:
      RunFailed: sync.timeout has passed since `look` last said something new.
    """
    timeout, clock = self.config.sync.timeout, asyncio.get_running_loop().time
    said, end = None, 0.0
    while True:
      self._changed.clear()
      self._raise_failure()
      if (now := look()) is True:
        return
      if now != said:
        said, end = now, clock() + timeout
      left = end - clock() if said else None
      if left is not None and left <= 0:
        raise RunFailed(f"the explorer waited {timeout:.0f} s (sync.timeout) for {said}")
      with contextlib.suppress(TimeoutError):  # not wait_for: it may lose a cancellation
        async with asyncio.timeout(left):
          await self._changed.wait()

  # --- evaluation --------------------------------------------------------------------------------

  async def evaluate_versions(self, versions: Sequence[int]) -> None:
    """Evaluates each version as it is published (a newer one when it is no longer kept)."""
    for version in versions:
      found, params = await self._versions.wait_for(version)
      if found < self._version:
        continue  # a newer one has taken its place already
      if found > self._version:
        self._use(found, params)
      await self.evaluation.once(found)

  def describe(self) -> str:
    """Which runs are open, for the message of a wait that expired."""
    return self._groups.describe()


_LOOKS = 0.02  # seconds between looks into the store while waiting


async def cancelled(tasks) -> None:
  """Cancels tasks and waits until they have ended."""
  for task in tasks:
    task.cancel()
  await asyncio.gather(*tasks, return_exceptions=True)


def tasks_per_batch(config: Config) -> int:
  """Tasks of an explorer step: explorer.batch_size and what over_rollout adds."""
  c = config.explorer
  return c.batch_size + round(c.batch_size * c.over_rollout)
