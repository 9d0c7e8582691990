"""--mode=serve with server.record: traffic trains the policy that serves it.

Beside a process with --mode=train on the same folder. Sessions that clients begin by header go to
the run's replay buffer when they are committed, and each version that the trainer publishes is
served from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
from collections.abc import Callable
from pathlib import Path

from trinity_jax import build, exploring
from trinity_jax.algorithms.algorithm import make as make_algorithm
from trinity_jax.buffer.replay import ReplayBuffer
from trinity_jax.config import Config
from trinity_jax.config_checks import check_lag
from trinity_jax.errors import RunFailed, UserError, root_cause
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import hf
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.preemption import Preemption
from trinity_jax.publishing import LineageChanged, SnapshotReader
from trinity_jax.sampler.rollout_engine import RolloutEngine
from trinity_jax.schedule import make_schedule
from trinity_jax.server.collect import Collector
from trinity_jax.serving import TOKEN, announce, make_server


def serve_and_record(
  config: Config, directory: Path, preemption: Preemption, report: Callable[[str], None]
) -> None:
  """Serves until SIGTERM or an interrupt, also after the trainer has finished.

  Args:
    config: of the stage that explores.
    directory: the stage's folder, which the trainer's process shares.

  Raises:
    UserError: keys that do not go with it, an address that cannot be had.
    RunFailed: no trainer has begun within sync.timeout, or it went silent.
  """
  if config.explorer.deterministic:
    raise UserError(
      "config.server.record: clients come when they like; set explorer.deterministic=False"
    )
  check_lag(config, make_algorithm(config.algorithm))
  directory.mkdir(parents=True, exist_ok=True)
  with preemption.on_signals():
    while True:
      try:
        with contextlib.ExitStack() as stack:
          _serve(stack, config, directory, preemption, report)
        return
      except KeyboardInterrupt:
        return
      except BaseException as error:  # one kind begins a new life, all others go on up
        if not isinstance(root_cause(error), LineageChanged):
          raise
        report(f"the trainer went back to an earlier step; beginning again: {root_cause(error)}")


def buffer_of_sessions(config: Config, directory: Path) -> ReplayBuffer:
  """The stage's buffer, for sessions, of which each is a group of one run."""
  alone = dataclasses.replace(config.explorer, min_runs=0)  # with more all would be dropped
  of_sessions = dataclasses.replace(config, explorer=alone)
  return build.make_buffer(of_sessions, make_schedule(config.sync), directory, 0)


def _serve(stack, config: Config, directory: Path, preemption: Preemption, report) -> None:
  """One life of the server, until it is told to end or the trainer goes back."""
  buffer = buffer_of_sessions(config, directory)
  stack.callback(build.close_buffer, buffer)
  model_path = exploring.wait_for_start(config, directory, buffer.bell)
  meshes = build.make_sampling_meshes(config, report)
  model, launch = hf.load_config(model_path), LaunchOrder(meshes.train)
  versions = exploring.published(config, directory, model, launch, meshes.train, buffer.bell)
  buffer.release(config.explorer.name)  # what an earlier life had claimed
  tokenizer = Tokenizer.load(model_path)
  engine = build.make_engine(config, model, meshes, launch, tokenizer_dir=model_path)
  stack.callback(engine.close)
  collector = Collector(config, buffer, engine, tokenizer)
  server = make_server(config, engine, tokenizer, os.environ.get(TOKEN), collector)
  stack.callback(server.close)
  engine.start()

  async def go() -> None:
    loop, main = asyncio.get_running_loop(), asyncio.current_task()
    assert main is not None

    def stop() -> None:
      loop.call_soon_threadsafe(main.cancel)

    with preemption.telling(stop):
      first = await _take(versions, engine, 0)
      gc.collect()  # what is there when it starts is kept, a former life too
      await asyncio.to_thread(server.start)
      announce(server, model_path, report)
      async with asyncio.TaskGroup() as both:
        both.create_task(_follow(versions, engine, first, report))
        both.create_task(_keep_claims(config, buffer))

  try:
    asyncio.run(go())
  except asyncio.CancelledError:
    pass  # told to end
  finally:
    with contextlib.suppress(RunFailed):  # the reason is on its way up already
      buffer.release(config.explorer.name)


async def _take(versions: SnapshotReader, engine: RolloutEngine, least: int) -> int:
  found, params = await versions.wait_for(least)
  engine.set_params(found, params)
  return found


async def _follow(versions: SnapshotReader, engine: RolloutEngine, version: int, report) -> None:
  """Serves each version as it comes, until the trainer has published its last."""
  while True:
    try:
      version = await _take(versions, engine, max(version + 1, versions.version))
    except RunFailed:
      if not versions.finished or versions.version > version:
        raise
      report(f"the trainer has finished: version {version} stays, commits are refused")
      return


async def _keep_claims(config: Config, buffer: ReplayBuffer) -> None:
  """Tells others that what this server has claimed is still its own."""
  while True:
    await asyncio.sleep(config.buffer.lease / 4)
    await asyncio.to_thread(buffer.heartbeat, config.explorer.name, config.buffer.lease)
