"""The explorer as a process of its own: weights from snapshots, groups into a shared buffer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from trinity_jax import build
from trinity_jax.algorithms.algorithm import make as make_algorithm
from trinity_jax.buffer.bell import ThreadBell
from trinity_jax.config import Config
from trinity_jax.config_checks import check_lag
from trinity_jax.errors import RunFailed, root_cause
from trinity_jax.experience import Experience
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import hf, sharding
from trinity_jax.models.presets import ModelConfig
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.monitor.progress import Progress
from trinity_jax.monitor.timeline import Timeline
from trinity_jax.monitor.writers import FILE, make_writers, read_jsonl
from trinity_jax.preemption import Preempted, Preemption
from trinity_jax.probe import make_probe
from trinity_jax.publishing import LineageChanged, SnapshotReader
from trinity_jax.schedule import make_schedule

START = "start.json"  # written by the trainer's process: what explorers begin from


def announce(directory: Path, model: Path) -> None:
  """Tells explorers which model the stage trains, once its first weights can be waited for."""
  part = directory / f"{START}.part"
  part.write_text(json.dumps({"model": str(model)}))
  part.replace(directory / START)


def explore_stage(
  config: Config,
  directory: Path,
  timeline: Timeline,
  progress: Progress,
  preemption: Preemption,
) -> None:
  """Explores until the stage's trainer is done.

  Args:
    config: of this stage.
    directory: its folder, which the trainer's process shares.

  Raises:
    RunFailed: no trainer has begun the stage within sync.timeout, or it went silent.
    Preempted: the process was asked to end; what it had claimed is free for others.
  """
  while True:
    try:
      with contextlib.ExitStack() as stack:
        _explore(stack, config, directory, timeline, progress, preemption)
      return
    except BaseException as error:  # one kind begins a new life, all others go on up
      if not isinstance(root_cause(error), LineageChanged):
        raise
      progress.message(f"the trainer went back to an earlier step: {root_cause(error)}")


def _explore(stack, config: Config, directory: Path, timeline, progress, preemption) -> None:
  """One life of the explorer, until the trainer is done or goes back behind what it published."""
  directory.mkdir(parents=True, exist_ok=True)
  buffer = build.make_buffer(config, make_schedule(config.sync), directory, 0)
  stack.callback(build.close_buffer, buffer)
  model_path = wait_for_start(config, directory, buffer.bell)
  algorithm = make_algorithm(config.algorithm)
  check_lag(config, algorithm)
  meshes = build.make_sampling_meshes(config, progress.message)
  model, launch = hf.load_config(model_path), LaunchOrder(meshes.train)
  versions = published(config, directory, model, launch, meshes.train, buffer.bell)
  buffer.release(config.explorer.name)  # what an earlier life of this explorer had claimed
  own = directory / "explorers" / config.explorer.name
  own.mkdir(parents=True, exist_ok=True)
  # What a trainer that went back will publish again is evaluated again; the rest is there already.
  writers = make_writers(config, own, resume_step=versions.version, report=progress.message)
  stack.callback(writers.close)
  done = {row["step"] for row in read_jsonl(own / FILE)} if (own / FILE).exists() else set()
  total = config.trainer.total_steps

  def on_eval(version: int, metrics: dict[str, float], shown: Sequence[Experience]) -> None:
    writers.write(version, metrics)
    progress.update(version, total, metrics, [])

  engine = build.make_engine(config, model, meshes, launch, timeline.span, model_path)
  stack.callback(engine.close)
  explorer = build.make_explorer(
    config,
    algorithm,
    engine=engine,
    tokenizer=Tokenizer.load(model_path),
    versions=versions,
    buffer=buffer,
    bell=buffer.bell,
    taskset=build.training_taskset(config, algorithm),
    span=timeline.span,
    on_eval=on_eval,
    evaluated=_Shared(directory / "evaluated", config, done),
  )
  engine.start()
  progress.message(f"explorer {config.explorer.name}: ready")

  async def go() -> None:
    loop, main = asyncio.get_running_loop(), asyncio.current_task()
    assert main is not None

    def stop() -> None:
      loop.call_soon_threadsafe(main.cancel)

    try:
      with preemption.telling(stop):
        await explorer.explore(total)
        await explorer.evaluate_last(total)
    finally:
      await explorer.aclose()

  try:
    asyncio.run(go())
  except asyncio.CancelledError:
    raise Preempted("asked to end; other explorers take over what this one had begun") from None
  finally:
    with contextlib.suppress(RunFailed):  # the reason is on its way up already
      buffer.release(config.explorer.name)


def published(
  config: Config,
  directory: Path,
  model: ModelConfig,
  launch: LaunchOrder,
  mesh: Mesh,
  bell: ThreadBell,
) -> SnapshotReader:
  """What the stage's trainer publishes, laid out on `mesh` as the sampler takes it."""
  return SnapshotReader(
    directory / "weights",
    sharding.param_shardings(model, mesh),
    jnp.dtype(config.model.rollout_dtype or config.model.dtype),
    bell=bell,
    timeout=config.sync.timeout,
    probe=make_probe(model, launch),
    launch=launch,
  )


def wait_for_start(config: Config, directory: Path, bell: ThreadBell) -> Path:
  """The model that the stage trains, once its trainer has begun.

  Raises:
    RunFailed: that took longer than sync.timeout.
  """
  start = directory / START
  seen = bell.count
  while not start.exists():
    before, seen = seen, bell.wait(seen, config.sync.timeout)
    if seen == before and not start.exists():
      raise RunFailed(
        f"explorer {config.explorer.name} waited {config.sync.timeout:.0f} s (sync.timeout) for a "
        f"trainer to begin in {directory}; start one with --mode=train and the same --workdir"
      )
  return Path(json.loads(start.read_text())["model"])


class _Shared:
  """Versions that another explorer evaluates: who asks first has one in each eval.interval."""

  def __init__(self, directory: Path, config: Config, done: set[int]):
    directory.mkdir(parents=True, exist_ok=True)
    self._directory, self._name, self._done = directory, config.explorer.name, done
    self._every, self._last = config.eval.interval or 1, config.trainer.total_steps

  def __contains__(self, version: object) -> bool:
    if version in self._done:
      return True
    assert isinstance(version, int)
    period = "last" if version == self._last else str(version // self._every)
    file = self._directory / period
    try:
      with os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY), "w") as f:
        f.write(self._name)
      return False
    except FileExistsError:
      return file.read_text() != self._name  # its own: it was killed before the end
