"""Runs of whole groups: one workflow per (task, run), each with its own model handle."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from trinity_jax.config import Config
from trinity_jax.experience import Experience, ExperienceId, StopReason, Task
from trinity_jax.explorer.adapt import ClassWorkflow
from trinity_jax.explorer.environments.process import Processes
from trinity_jax.explorer.grading import Grade, GroupGrade
from trinity_jax.explorer.runner import Ran, Runner
from trinity_jax.explorer.threads import in_thread
from trinity_jax.explorer.workflow import Model, SamplingParams, Workflow
from trinity_jax.explorer.workflows import find_workflow
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.sampler.rollout_engine import RolloutEngine
from trinity_jax.serving import OnDemand

TRAIN_STREAM = 0  # evaluation of the i-th held-out set draws from stream i + 1


class Groups:
  """Starts the runs of groups.

  Args:
    greedy_first: sample the first run of each training group greedily (a baseline).
    span: timeline.span.
  """

  def __init__(
    self,
    config: Config,
    engine: RolloutEngine,
    tokenizer: Tokenizer,
    span: Callable[[str], Any],
    *,
    greedy_first: bool = False,
  ):
    self.config = config
    self._engine, self._tokenizer, self._span = engine, tokenizer, span
    self._greedy_first = greedy_first
    self._open: set[ExperienceId] = set()
    self._server = OnDemand(config, engine, tokenizer)
    self._workflows: dict[str, Workflow] = {}
    self._processes = Processes(
      config.explorer.environment_processes,
      deadline=config.explorer.environment_deadline,
      memory_mb=config.explorer.environment_memory,
    )
    self._failures: dict[tuple[str, int], int] = {}  # task -> groups in a row that failed whole
    self._completed: tuple[int, float] = (0, 0.0)  # runs, and their seconds outside the sampler

  def runner(
    self, workflow: str, grade: Grade | GroupGrade, params: SamplingParams, stream: int
  ) -> Runner:
    """Who runs the workflow with these sampling parameters."""
    c = self.config
    if workflow not in self._workflows:  # a class keeps instances from one step to the next
      self._workflows[workflow] = find_workflow(workflow)

    def new_model(id: ExperienceId) -> Model:
      greedy = self._greedy_first and stream == TRAIN_STREAM and id.run == 0
      model = Model(
        self._engine.member((stream, *id)),
        self._tokenizer,
        id,
        c.seed,
        dataclasses.replace(params, temperature=0.0) if greedy else params,
        c.sampler.max_prompt_length,
        stream,
        priority=-1 if stream != TRAIN_STREAM and c.eval.first else 0,
      )
      model.server = self._server
      model.processes = self._processes
      return model

    return Runner(
      self._workflows[workflow],
      grade,
      new_model,
      lambda id: self._engine.member((stream, *id)).leave(),
      self._span,
      timeout=self._timeout() if stream == TRAIN_STREAM else c.explorer.run_timeout,
      retries=c.explorer.max_retries,
      retry_on=c.explorer.retry_on,
      most_logs=c.explorer.max_logs if stream == TRAIN_STREAM else 1,
    )

  def _timeout(self) -> float:
    """explorer.run_timeout, or explorer.timeout_ratio times what runs have taken so far.

    That is known after an explorer step's worth of runs, and never shorter than a second.
    """
    c, (count, seconds) = self.config.explorer, self._completed
    if not c.timeout_ratio or count < c.batch_size * c.group_size:
      return c.run_timeout
    return min(c.run_timeout, max(_SHORTEST, c.timeout_ratio * seconds / count))

  def announce(self, stream: int, groups: Sequence[Sequence[ExperienceId]]) -> None:
    """Counts runs in before they start: deterministic admission waits for all of a batch."""
    for id in (id for group in groups for id in group):
      self._engine.member((stream, *id)).enter()

  async def run(
    self, runner: Runner, task: Task, ids: Sequence[ExperienceId]
  ) -> list[Experience]:
    """The runs of one announced group, those of a run in a row; failed ones are values.

    Of a held-out task every run is one experience, its last.
    """
    name = (task.taskset, task.index)
    if not task.is_eval and self._is_quarantined(name):
      return [self._not_run(task, id) for id in ids]
    self._open.update(ids)

    async def one(id: ExperienceId) -> Ran:
      try:
        return await runner.run(task, id)
      finally:
        self._open.discard(id)

    async with asyncio.TaskGroup() as group:
      started = [group.create_task(one(id)) for id in ids]
    runs = [t.result() for t in started]
    await runner.grade_group(task, runs)
    good = [ran for ran in runs if ran.failure is None]
    if good:
      self._failures.pop(name, None)
    elif not task.is_eval:
      self._failures[name] = self._failures.get(name, 0) + 1
    for ran in good:
      count, seconds = self._completed
      self._completed = count + 1, seconds + ran.metrics["environment_seconds"]
    return [e for ran in runs for e in ran.experiences()]

  def _is_quarantined(self, name: tuple[str, int]) -> bool:
    most = self.config.explorer.quarantine
    return bool(most) and self._failures.get(name, 0) >= most

  def _not_run(self, task: Task, id: ExperienceId) -> Experience:
    self._engine.member((TRAIN_STREAM, *id)).leave()
    error = (
      f"task {task.index} of {task.taskset} failed whole in {self.config.explorer.quarantine} "
      "groups in a row (explorer.quarantine)"
    )
    return Experience.failed(id, StopReason.QUARANTINED, {"error": error, "task": task.index})

  async def aclose(self) -> None:
    """Ends what runs may have begun: a server, processes, kept instances of workflows."""
    kept = [w for w in self._workflows.values() if isinstance(w, ClassWorkflow)]
    self._workflows.clear()
    for workflow in kept:
      await workflow.close()
    await in_thread(self._server.close)
    await in_thread(self._processes.close)

  def describe(self) -> str:
    """Which runs are open, for the message of a wait that expired."""
    names = ", ".join(map(str, sorted(self._open)[:8]))
    return f"{len(self._open)} runs open (step/task/run/step): {names}; {self._engine.describe()}"


_SHORTEST = 1.0  # seconds


def group_ids(batch: int, tasks: Sequence[int], runs: int) -> list[list[ExperienceId]]:
  """Ids of a group per task number."""
  return [[ExperienceId(batch, task, run, 0) for run in range(runs)] for task in tasks]
