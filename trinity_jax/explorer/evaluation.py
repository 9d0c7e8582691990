"""Held-out evaluation of the weights that the sampler has."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Sequence
from typing import Any

from trinity_jax.config import Config, EvalConfig, TasksetConfig
from trinity_jax.experience import Experience, Task
from trinity_jax.explorer.grading import Grade, GroupGrade
from trinity_jax.explorer.groups import TRAIN_STREAM, Groups, group_ids
from trinity_jax.explorer.metrics import eval_metrics
from trinity_jax.explorer.workflow import SamplingParams

HeldOut = tuple[TasksetConfig, Sequence[Task], Grade | GroupGrade]


def is_due(config: EvalConfig, version: int) -> bool:
  """Whether a version is a multiple of eval.interval; 0 counts with eval.on_start only."""
  due = bool(config.interval) and version % config.interval == 0
  return due and (version > 0 or config.on_start)


class Evaluation:
  """Runs every held-out task under one version, once per version.

  Args:
    held_out: (config, tasks, grade) of each evaluation taskset.
    on_eval: called with (version, metrics, some experiences) after each evaluation.
    done: versions that need no evaluation, an earlier process having booked them.
    span: timeline.span.
  """

  def __init__(
    self,
    config: Config,
    groups: Groups,
    held_out: Sequence[HeldOut],
    on_eval: Callable[[int, dict[str, float], list[Experience]], None],
    span: Callable[[str], Any],
    done: Container[int] = (),
  ):
    self.config, self._groups, self._held_out = config, groups, held_out
    self._on_eval, self._span, self._done = on_eval, span, done
    self._done_here: set[int] = set()
    self._period: int | None = None  # version // eval.interval of the newest version seen

  def __bool__(self) -> bool:
    """Whether there is anything held out."""
    return bool(self._held_out)

  def comes_due(self, version: int) -> bool:
    """Whether a version that the sampler takes is to be evaluated: the first in each interval.

    Explorers that take every version see the multiples of eval.interval; those that skip versions
    evaluate the next one after it.
    """
    every = self.config.eval.interval
    if not every or not self:
      return False
    before, self._period = self._period, version // every
    if before is None:  # a start or a resume
      return is_due(self.config.eval, version)
    return self._period > before

  def missing(self, after: int, before: int) -> list[int]:
    """The multiples of eval.interval between two versions that nobody has evaluated."""
    versions = range(max(after + 1, 0), before) if self else ()
    return [v for v in versions if is_due(self.config.eval, v) and not self.has(v)]

  def has(self, version: int) -> bool:
    """Whether a version was evaluated, or is being evaluated."""
    return version in self._done or version in self._done_here

  async def once(self, version: int) -> None:
    """Evaluates a version unless that was done before."""
    if self and not self.has(version):
      self._done_here.add(version)
      await self._evaluate(version)

  async def _evaluate(self, version: int) -> None:
    c, metrics, shown = self.config, {}, []
    params = SamplingParams(c.eval.temperature, c.sampler.max_response_length)
    with self._span("eval"):
      for i, (taskset, tasks, grade) in enumerate(self._held_out):
        stream = TRAIN_STREAM + 1 + i
        runner = self._groups.runner(taskset.workflow, grade, params, stream)
        ids = group_ids(version, range(len(tasks)), c.eval.runs)
        self._groups.announce(stream, ids)
        groups = await asyncio.gather(
          *(self._groups.run(runner, task, group) for task, group in zip(tasks, ids))
        )
        metrics |= eval_metrics(taskset.name, groups, main=i == 0)
        shown += [g[0] for g in groups[:2]]
    metrics["eval/count"] = float(sum(len(t) for _, t, _ in self._held_out))
    self._on_eval(version, metrics, shown)
