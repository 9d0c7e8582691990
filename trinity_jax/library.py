"""The parts of a run in your own hands, for notebooks and loops of your own.

    with Session(config) as s:
      for step in range(1, 21):
        s.publish()
        for group in s.rollout(s.taskset.next_batch(8)):
          s.put(group)
        metrics = s.trainer.step(s.buffer.sample(8, step, deadline=60))

`s.sampler.generate` takes requests of your own, through `s.wait(...)` or from a coroutine.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp

from trinity_jax import build
from trinity_jax.algorithms.algorithm import make as make_algorithm
from trinity_jax.config import Config, resolve
from trinity_jax.config_checks import check_lag, check_rows
from trinity_jax.errors import UserError
from trinity_jax.experience import Experience, Task
from trinity_jax.explorer.grading import grading
from trinity_jax.explorer.groups import TRAIN_STREAM, Groups, group_ids
from trinity_jax.explorer.rewards import make_reward
from trinity_jax.explorer.workflow import SamplingParams
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import hf, sharding
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.run import first_model
from trinity_jax.schedule import make_schedule
from trinity_jax.synchronizer import Synchronizer
from trinity_jax.trainer.trainer import Trainer

T = TypeVar("T")


class Session:
  """Trainer, sampler, buffer and tasks of a config; nothing but the sampler runs by itself.

  Args:
    config: ConfigDict or Config without stages.
    workdir: for a new model and a buffer on disk; None is a temporary folder.

  Attributes:
    trainer: `step(experiences) -> metrics`, `state`.
    sampler: `await generate(request)`.
    buffer: `sample(groups, step, deadline)`, `commit(step)`; see `put` here.
    taskset: `next_batch(n)`.
    tokenizer: of the model.

  Raises:
    UserError: a mistake in the config.
  """

  def __init__(self, config: Any, workdir: Path | str | None = None):
    self.config = c = config if isinstance(config, Config) else resolve(config)
    if c.stages:
      raise UserError("config.stages: a Session has one stage; use run.run, or a stage's config")
    self._exits = contextlib.ExitStack()
    if workdir is None:
      workdir = self._exits.enter_context(tempfile.TemporaryDirectory(prefix="trinity_jax_"))
    directory = Path(workdir).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    algorithm = make_algorithm(c.algorithm)
    check_lag(c, algorithm)
    model_path = first_model(c, directory)
    model = hf.load_config(model_path)
    meshes = build.make_meshes(c)
    check_rows(c, meshes.train)
    launch = LaunchOrder(meshes.train)
    layout = sharding.param_shardings(model, meshes.train)
    params, _ = hf.load(model_path, dtype=jnp.dtype(c.model.param_dtype), shardings=layout)
    schedule = make_schedule(c.sync)
    self.tokenizer = Tokenizer.load(model_path)
    self.taskset = build.training_taskset(c, algorithm)
    self.buffer = build.make_buffer(c, schedule, directory, 0)
    self._exits.callback(build.close_buffer, self.buffer)
    self._published = Synchronizer(
      layout,
      jnp.dtype(c.model.rollout_dtype or c.model.dtype),
      launch,
      keep=build.kept_versions(schedule),
      timeout=c.sync.timeout,
      bell=self.buffer.bell,
    )
    self.trainer = Trainer(
      c, algorithm, build.policy_of(c, model), params, meshes.train, launch, self._published.params
    )
    self.sampler = build.make_engine(c, model, meshes, launch, tokenizer_dir=model_path)
    self._exits.callback(self.sampler.close)
    self._groups = Groups(
      c, self.sampler, self.tokenizer, lambda _: contextlib.nullcontext(),
      greedy_first=algorithm.needs_greedy,
    )  # fmt: skip
    reward = make_reward(
      c.taskset.reward, c.taskset.reward_args, workers=c.explorer.reward_workers
    )
    self._grade = grading(reward)
    self._batches = 0
    # Of its own thread: a notebook has a running loop already.
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, name="session", daemon=True)

  def __enter__(self) -> Session:
    self._thread.start()
    self.sampler.start()
    return self

  def __exit__(self, *exc: object) -> None:
    self.wait(self._groups.aclose())
    self._exits.close()
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()

  def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on the session's event loop and returns its result."""
    return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

  def publish(self) -> int:
    """Gives the trainer's weights to the sampler; returns their version."""
    version = self.trainer.step_number
    if self._published.version < version:
      self._published.publish(version, self.trainer.state.params)
    self.sampler.set_params(version, self._published.params(version))
    return version

  def rollout(self, tasks: Sequence[Task]) -> list[list[Experience]]:
    """Samples and grades a group of explorer.group_size runs for each task."""
    return self.wait(self._rollout(tasks))

  async def _rollout(self, tasks: Sequence[Task]) -> list[list[Experience]]:
    c = self.config
    self._batches += 1
    params = SamplingParams(
      c.sampler.temperature, c.sampler.max_response_length, c.sampler.top_p, c.sampler.top_k
    )
    runner = self._groups.runner(c.taskset.workflow, self._grade, params, TRAIN_STREAM)
    ids = group_ids(self._batches, range(len(tasks)), c.explorer.group_size)
    self._groups.announce(TRAIN_STREAM, ids)
    return await asyncio.gather(
      *(self._groups.run(runner, task, group) for task, group in zip(tasks, ids))
    )

  def put(self, group: Sequence[Experience]) -> str:
    """Puts a group into the buffer; waits while it is full."""
    return self.wait(self.buffer.put(group))
