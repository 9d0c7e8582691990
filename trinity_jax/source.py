"""Where a stage's experiences come from: rollouts of the policy, or demonstrations.

A source owns the explorer's thread. Its error is handed to whoever waits: the trainer at the
buffer, or the end of the stage.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trinity_jax.buffer.recorded import Recorded
from trinity_jax.buffer.replay import ReplayBuffer
from trinity_jax.errors import RunFailed
from trinity_jax.experience import Experience
from trinity_jax.experience import Source as ExperienceSource
from trinity_jax.explorer.evaluation import is_due
from trinity_jax.explorer.explorer import Explorer
from trinity_jax.explorer.metrics import rollout_metrics
from trinity_jax.explorer.rewards import grading_counts
from trinity_jax.monitor.metrics import reduce_metrics
from trinity_jax.sampler.rollout_engine import RolloutEngine

if TYPE_CHECKING:
  from trinity_jax.stage import Stage


class Source:
  """Where a stage's experiences come from, and the explorer thread beside it."""

  def __init__(
    self,
    stage: Stage,
    explorer: Explorer | None = None,
    engine: RolloutEngine | None = None,
    buffer: ReplayBuffer | None = None,
  ):
    self.stage, self.explorer, self.engine, self.buffer = stage, explorer, engine, buffer
    self._thread: threading.Thread | None = None
    self._error: BaseException | None = None
    self._loop: asyncio.AbstractEventLoop | None = None
    self._main: asyncio.Task | None = None
    self._stats: dict[str, float] = {}
    self._verdicts: dict[str, float] = {}

  def sample(self) -> list[Experience] | None:
    """The next optimizer step's experiences; None where another process was asked to end."""
    raise NotImplementedError

  def explore(self) -> Coroutine[Any, Any, None]:
    """What the explorer's thread runs."""
    raise NotImplementedError

  def metrics(self, experiences: Sequence[Experience]) -> dict[str, float]:
    return {}

  def start(self) -> None:
    self._thread = threading.Thread(target=self._run, name="explorer", daemon=True)
    self._thread.start()

  def _run(self) -> None:
    async def main():
      self._loop, self._main = asyncio.get_running_loop(), asyncio.current_task()
      try:
        await self.explore()
      finally:
        if self.explorer is not None:
          await self.explorer.aclose()

    try:
      asyncio.run(main())
    except BaseException as e:  # handed to the trainer, which waits on the buffer or on finish()
      self._error = e
      if self.buffer is not None:
        self.buffer.close(e)

  def finish(self) -> None:
    """Lets explorers end, and waits until that of this process has done its last evaluation."""
    if self.buffer is not None:
      self.buffer.finish()
    if self._thread is None:
      return
    timeout = self.stage.config.sync.timeout
    self._thread.join(timeout)
    if self._thread.is_alive():
      assert self.explorer is not None
      raise RunFailed(
        f"the explorer did not end within {timeout:.0f} s (sync.timeout) after the last step: "
        f"{self.explorer.describe()}"
      )
    if self._error is not None:
      raise RunFailed("the explorer failed after the last step") from self._error

  def fail(self, error: BaseException) -> None:
    """Wakes everyone who waits for the trainer."""
    self.stage.synchronizer.close(error)
    if self.buffer is not None:
      self.buffer.close(error)

  def close(self) -> None:
    if self._thread is not None and self._thread.is_alive():
      if self._loop is not None and self._main is not None:
        with contextlib.suppress(RuntimeError):  # the loop has closed by itself meanwhile
          self._loop.call_soon_threadsafe(self._main.cancel)
      self._thread.join(30)


class Rollouts(Source):
  """Experiences sampled by the policy."""

  _failed_steps = 0  # in a row

  def explore(self) -> Coroutine[Any, Any, None]:
    stage, explorer = self.stage, self.explorer
    assert explorer is not None
    total = stage.config.trainer.total_steps

    async def go():
      await explorer.explore(total)
      await explorer.evaluate_last(total)

    return go()

  def sample(self) -> list[Experience]:
    assert self.buffer is not None
    c, step = self.stage.config, self.stage.trainer.step_number + 1
    describe = self.explorer.describe if self.explorer else lambda: ""
    try:
      found = self.buffer.sample(c.explorer.batch_size, step, c.sync.timeout, describe)
    except RunFailed:
      if self._error is not None:
        raise self._error from None  # its own traceback, not the news of it
      raise
    if c.sampler.release and self.engine is not None:
      self.engine.release()
    self._failed_steps = 0 if any(e.num_actions for e in found) else self._failed_steps + 1
    if self._failed_steps >= self.stage.config.explorer.max_failed_steps:
      raise RunFailed(
        f"every run failed in {self._failed_steps} steps in a row (explorer.max_failed_steps); of "
        f"the last {len(found)}: {failures(found)}"
      )
    return found + self._experts()

  def _experts(self) -> list[Experience]:
    """Demonstrations beside the rollouts, in groups of their own (mixed training)."""
    stage = self.stage
    if stage.experts is None:
      return []
    tasks = stage.experts.next_batch(stage.config.experts.batch_size)
    step = stage.trainer.step_number + 1
    return stage.given("demonstrations", tasks, step, stage.config.explorer.batch_size)

  def metrics(self, experiences: Sequence[Experience]) -> dict[str, float]:
    rollouts = [e for e in experiences if e.source is ExperienceSource.ROLLOUT]
    out = rollout_metrics(rollouts, self.stage.config.explorer.group_size)
    assert self.buffer is not None
    stats = self.buffer.stats()
    out["queue/depth"] = stats["ready"]
    out["queue/dropped_groups"] = stats["dropped"]
    out["staleness/masked_tokens"] = stats["masked_tokens"]
    if self.engine is not None and self.explorer is not None:
      out["queue/regenerated"] = self.explorer.regenerated["same"]
      out["queue/regenerated_otherwise"] = self.explorer.regenerated["different"]
      out["queue/short_groups"] = self.explorer.short_groups
      if (lag := self.explorer.loop_lag.take()) is not None:
        out["event_loop_lag/p99"] = lag
      now = self.engine.stats
      out |= sampler_metrics({k: v - self._stats.get(k, 0) for k, v in now.items()})
      out |= self.engine.metrics()
      self._stats = now
      out |= self._new_verdicts()
    return out

  def _new_verdicts(self) -> dict[str, float]:
    """What the math grader said since the last step; a failing grader shows here."""
    c = self.stage.config
    if "math" not in c.taskset.reward.split("+"):
      return {}
    now = {f"grader/{k}": float(v) for k, v in grading_counts(c.explorer.reward_workers).items()}
    new = {k: v - self._verdicts.get(k, 0.0) for k, v in now.items()}
    self._verdicts = now
    return new


class Offline(Source):
  """Experiences that are there before the run; the explorer only evaluates."""

  def explore(self) -> Coroutine[Any, Any, None]:
    c, start = self.stage.config, self.stage.start
    total = c.trainer.total_steps
    due = [v for v in range(start, total) if is_due(c.eval, v)]
    assert self.explorer is not None
    return self.explorer.evaluate_versions([*due, total])

  def sample(self) -> list[Experience]:
    if self._error is not None:
      raise self._error
    return self.read(self.stage.trainer.step_number + 1)

  def read(self, step: int) -> list[Experience]:
    """The experiences of a step."""
    raise NotImplementedError


class Demonstrations(Offline):
  """Read from the taskset: demonstrations, plain texts or preference pairs."""

  def read(self, step: int) -> list[Experience]:
    stage = self.stage
    return stage.given(
      stage.algorithm.data, stage.taskset.next_batch(stage.tasks_per_step), step
    )

  def metrics(self, experiences: Sequence[Experience]) -> dict[str, float]:
    return reduce_metrics([e.metrics for e in experiences])


class Recording(Offline):
  """Groups of another run's buffer, in its order, over and over."""

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self._recorded = Recorded(self.stage.config.buffer.replay)

  def read(self, step: int) -> list[Experience]:
    count = self.stage.config.explorer.batch_size
    found = self._recorded.groups((step - 1) * count, count)
    # Ids are of this run: one that was read before in this step would be another group.
    return [
      dataclasses.replace(e, id=e.id._replace(batch=step, task=i))
      for i, group in enumerate(found)
      for e in group
    ]

  def metrics(self, experiences: Sequence[Experience]) -> dict[str, float]:
    return rollout_metrics(experiences, self.stage.config.explorer.group_size)

  def close(self) -> None:
    super().close()
    self._recorded.close()


def sampler_metrics(new: Mapping[str, float]) -> dict[str, float]:
  """What a sampler did since the last step, from the differences of its counters."""
  out = {k: new[n] for k, n in (("sampler/decode_steps", "decode_steps"),) if n in new}

  def share(name: str, part: float, whole: float) -> None:
    if whole > 0:
      out[name] = part / whole

  if "slot_steps" in new:  # a remote engine does not know
    sampling = new["prefill_seconds"] + new["decode_seconds"]
    share("sampler/slot_occupancy", new["busy_slot_steps"], new["slot_steps"])
    prompts = new["reused_tokens"] + new["prompt_tokens"]
    share("sampler/prefix_cache_hit_rate", new["reused_tokens"], prompts)
    share("sampler/host_share", new["host_seconds"], sampling + new["host_seconds"])
    share("throughput/gen_tokens_per_s", new["sampled_tokens"], sampling)
    if "roofline_seconds" in new:
      share("sampler/roofline", new["roofline_seconds"], new["decode_seconds"])
  return out


def failures(experiences: Sequence[Experience]) -> str:
  """Why runs failed: how many of each stop reason, and the first error's text."""
  count = collections.Counter(e.stop_reason.name.lower() for e in experiences)
  first = next((e.info["error"] for e in experiences if "error" in e.info), "no error was recorded")
  return f"{', '.join(f'{n} {reason}' for reason, n in count.most_common())}; {first}"
