"""The explorer: tasks in, graded groups out, at the pace the schedule allows.

Runs on its own thread's event loop. Errors of single runs are values; an error of the explorer
itself ends the run of the program.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import numpy as np

from trinity_jax.buffer.replay import ReplayBuffer
from trinity_jax.config import Config, TasksetConfig
from trinity_jax.experience import Experience, ExperienceId, StopReason, Task
from trinity_jax.explorer.runner import Grade, Runner
from trinity_jax.explorer.workflow import Model, SamplingParams, find_workflow
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.sampler.rollout_engine import RolloutEngine
from trinity_jax.schedule import Schedule
from trinity_jax.synchronizer import Synchronizer
from trinity_jax.tasks.taskset import Taskset

TRAIN_STREAM = 0  # evaluation of the i-th held-out set draws from stream i + 1


class Explorer:
  """Starts one workflow per (task, run) and delivers complete groups to the buffer.

  Args:
    taskset: training tasks, its cursor where the run starts or resumes.
    held_out: (config, tasks, grade) of each evaluation taskset.
    grade: async (response, task) -> reward components, for training tasks.
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
    synchronizer: Synchronizer,
    buffer: ReplayBuffer,
    taskset: Taskset | None,
    held_out: Sequence[tuple[TasksetConfig, Sequence[Task], Grade]],
    grade: Grade | None,
    span: Callable[[str], contextlib.AbstractContextManager],
    on_eval: Callable[[int, dict[str, float], list[Experience]], None],
    greedy_first: bool = False,
    evaluated: Container[int] = (),
  ):
    self.config = config
    self._engine, self._tokenizer = engine, tokenizer
    self._schedule, self._synchronizer, self._buffer = schedule, synchronizer, buffer
    self._taskset, self._held_out, self._grade = taskset, held_out, grade
    self._span, self._on_eval, self._evaluated = span, on_eval, evaluated
    self._greedy_first = greedy_first
    self._evaluated_here: set[int] = set()
    self._version = -1  # last given to the sampler, which takes it at its next dispatch
    self._asked = -1  # the version that the schedule meant, the same except after a resume
    self._open: set[ExperienceId] = set()
    self._in_flight: set[asyncio.Task] = set()

  @property
  def evaluates(self) -> bool:
    """Whether there is anything held out."""
    return bool(self._held_out)

  async def explore(self, first: int, last: int) -> None:
    """Explorer steps first..last (from 1), then waits for everything in flight."""
    for step in range(first, last + 1):
      await self._pull(self._schedule.version_for(step))
      group = self._start_batch(step)
      self._in_flight |= group
      await self._raise_early_failures()
    await self._drain()

  async def _pull(self, version: int) -> None:
    """Waits for a version; swaps it in when everything started under the old one has ended."""
    if version == self._asked:
      return
    await self._drain()
    with self._span("wait_for_policy"):
      found, params = await self._synchronizer.wait_for(version)
    self._asked = version
    self._use(found, params)
    every = self.config.eval.interval
    if every and found % every == 0 and (found > 0 or self.config.eval.on_start):
      await self._evaluate_once(found)

  def _use(self, version: int, params: Any) -> None:
    self._engine.set_params(version, params)
    self._version = version

  async def _drain(self) -> None:
    while self._in_flight:
      done, self._in_flight = await asyncio.wait(
        self._in_flight, return_when=asyncio.FIRST_EXCEPTION
      )
      for task in done:
        task.result()

  async def _raise_early_failures(self) -> None:
    done = {t for t in self._in_flight if t.done()}
    self._in_flight -= done
    for task in done:
      task.result()

  def _start_batch(self, step: int) -> set[asyncio.Task]:
    c = self.config
    assert self._taskset is not None and self._grade is not None
    tasks = self._taskset.next_batch(c.explorer.batch_size)
    params = SamplingParams(
      c.sampler.temperature, c.sampler.max_response_length, c.sampler.top_p, c.sampler.top_k
    )
    runner = self._runner(c.taskset.workflow, self._grade, params, TRAIN_STREAM)
    ids = _group_ids(step, len(tasks), c.explorer.group_size)
    self._announce(TRAIN_STREAM, ids)
    groups = {
      asyncio.create_task(self._group(runner, task, group)) for task, group in zip(tasks, ids)
    }
    for group in groups:  # the first error ends the explorer; the others' are not news
      group.add_done_callback(lambda t: t.cancelled() or t.exception())
    return groups

  def _announce(self, stream: int, groups: Sequence[Sequence[ExperienceId]]) -> None:
    """Counts runs in before they start: deterministic admission waits for all of a batch."""
    for id in (id for group in groups for id in group):
      self._engine.member((stream, *id)).enter()

  async def _group(self, runner: Runner, task: Task, ids: Sequence[ExperienceId]) -> None:
    await self._buffer.put(await self._runs(runner, task, ids))

  async def _runs(self, runner: Runner, task: Task, ids: Sequence[ExperienceId]):
    self._open.update(ids)

    async def one(id: ExperienceId) -> Experience:
      try:
        return await runner.run(task, id)
      finally:
        self._open.discard(id)

    async with asyncio.TaskGroup() as runs:
      started = [runs.create_task(one(id)) for id in ids]
    return [t.result() for t in started]

  def _runner(self, workflow: str, grade: Grade, params: SamplingParams, stream: int) -> Runner:
    c = self.config

    def new_model(id: ExperienceId) -> Model:
      greedy = self._greedy_first and stream == TRAIN_STREAM and id.run == 0
      return Model(
        self._engine.member((stream, *id)),
        self._tokenizer,
        id,
        c.seed,
        dataclasses.replace(params, temperature=0.0) if greedy else params,
        c.sampler.max_prompt_length,
        stream,
        priority=-1 if stream != TRAIN_STREAM and c.eval.first else 0,
      )

    return Runner(
      find_workflow(workflow),
      grade,
      new_model,
      lambda id: self._engine.member((stream, *id)).leave(),
      self._span,
      timeout=c.explorer.run_timeout,
      retries=c.explorer.max_retries,
    )

  async def evaluate(self, version: int) -> dict[str, float]:
    """Runs every held-out task under the sampler's current weights; reports and returns metrics."""
    c, metrics, shown = self.config, {}, []
    params = SamplingParams(c.eval.temperature, c.sampler.max_response_length)
    with self._span("eval"):
      for i, (taskset, tasks, grade) in enumerate(self._held_out):
        runner = self._runner(taskset.workflow, grade, params, TRAIN_STREAM + 1 + i)
        ids = _group_ids(version, len(tasks), c.eval.runs)
        self._announce(TRAIN_STREAM + 1 + i, ids)
        groups = await asyncio.gather(
          *(self._runs(runner, task, group) for task, group in zip(tasks, ids))
        )
        metrics |= eval_metrics(taskset.name, groups, main=i == 0)
        shown += [g[0] for g in groups[:2]]
    metrics["eval/count"] = float(sum(len(t) for _, t, _ in self._held_out))
    self._on_eval(version, metrics, shown)
    return metrics

  async def evaluate_versions(self, versions: Sequence[int]) -> None:
    """Evaluates each version as it is published (a newer one when it is no longer kept)."""
    for version in versions:
      found, params = await self._synchronizer.wait_for(version)
      if found < self._version:
        continue  # a newer one has taken its place already
      self._use(found, params)
      await self._evaluate_once(found)

  async def _evaluate_once(self, version: int) -> None:
    if self.evaluates and version not in self._evaluated and version not in self._evaluated_here:
      self._evaluated_here.add(version)
      await self.evaluate(version)

  def describe(self) -> str:
    """Which runs are open, for the message of a wait that expired."""
    names = ", ".join(map(str, sorted(self._open)[:8]))
    return f"{len(self._open)} runs open (step/task/run/step): {names}; {self._engine.describe()}"


def _group_ids(batch: int, tasks: int, runs: int) -> list[list[ExperienceId]]:
  return [[ExperienceId(batch, task, run, 0) for run in range(runs)] for task in range(tasks)]


def accuracy(experience: Experience) -> float:
  """The component named accuracy, else the first reward component; 0 for a failed run."""
  rewards = {k: v for k, v in experience.metrics.items() if k.startswith("rewards/")}
  return rewards.get("rewards/accuracy", next(iter(rewards.values()), 0.0))


def eval_metrics(
  name: str, groups: Sequence[Sequence[Experience]], *, main: bool
) -> dict[str, float]:
  """Accuracy (mean over tasks and runs), pass@k and mean reward of one held-out set."""
  scores = np.array([[accuracy(e) for e in group] for group in groups])
  runs = scores.shape[1]
  out = {
    f"eval/{name}/accuracy": float(scores.mean()),
    f"eval/{name}/avg@{runs}": float(
      np.mean([[e.reward or 0.0 for e in group] for group in groups])
    ),
  }
  if runs > 1:
    out[f"eval/{name}/pass@{runs}"] = float((scores.max(axis=1) > 0).mean())
  if main:
    out["eval/accuracy"] = out[f"eval/{name}/accuracy"]
  return out


def rollout_metrics(experiences: Sequence[Experience], group_size: int) -> dict[str, float]:
  """What the rollouts of one step were like, under the names of monitor.metrics."""
  from trinity_jax.monitor.metrics import reduce_metrics, stats

  n = len(experiences)
  good = [e for e in experiences if e.num_actions]
  rewards = [e.reward for e in good if e.reward is not None]
  out = stats(rewards, "reward") if rewards else {}
  reasons = collections.Counter(e.stop_reason.name.lower() for e in experiences)
  out |= {f"stop/{k}": v / n for k, v in reasons.items()}
  out |= {
    "rollout/count": n,
    "rollout/empty": 1 - len(good) / n,
    "rollout/errored": sum(e.stop_reason is StopReason.ERROR for e in experiences) / n,
    "clip_ratio": sum(e.stop_reason is StopReason.LENGTH for e in experiences) / n,
    "aborted_ratio": sum(
      e.stop_reason in (StopReason.TIMEOUT, StopReason.ABORTED) for e in experiences
    )
    / n,
  }
  errors = collections.Counter(e.info.get("type", "unknown") for e in experiences
                               if e.stop_reason is StopReason.ERROR)  # fmt: skip
  out |= {f"error/{k}/count": v for k, v in errors.items()}
  out |= group_metrics(experiences, group_size)
  components: Sequence[Mapping[str, Any]] = [e.metrics for e in good]
  out |= reduce_metrics(
    [{k: v for k, v in m.items() if k not in ("run_seconds", "retries")} for m in components]
  )
  return out


def group_metrics(experiences: Sequence[Experience], group_size: int) -> dict[str, float]:
  """Share of groups without any difference in reward, all solved, none solved."""
  groups: dict[tuple[int, int], list[float]] = {}
  for e in experiences:
    if e.num_actions and e.reward is not None:
      groups.setdefault(e.id.group, []).append(e.reward)
  if not groups or group_size == 1:
    return {}
  flat = [len(set(g)) == 1 for g in groups.values()]
  best = max(max(g) for g in groups.values())
  return {
    "group/count": len(groups),
    "frac_reward_zero_std": float(np.mean(flat)),
    "group/solve_all": float(np.mean([min(g) >= max(best, 1e-9) for g in groups.values()])),
    "group/solve_none": float(np.mean([max(g) <= 0 for g in groups.values()])),
  }
