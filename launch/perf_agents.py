"""Agents: many episodes at once, each waiting for its environment most of the time.

Episodes of a few turns wait log-normally long for their environment and then ask the model; run by
the explorer's own Groups and Runner, once beside a sampler that answers at once and once beside a
real one with a tiny model. Against them the same episodes in batches with a barrier. `steady` is
the rate until the last episode begins: an explorer goes on with the next step's, and the wait for
the longest of all belongs to the end of a run.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from absl import flags
from benchmark import Row
from perf_rft import Instant, episode

EPISODES = flags.DEFINE_integer("episodes", 5000, "Episodes of `agents`.", lower_bound=1)
CONCURRENT = flags.DEFINE_integer("concurrent", 500, "Of them at once.", lower_bound=1)
LATENCY = flags.DEFINE_float("latency", 1.0, "Mean seconds of an episode's waits.", lower_bound=0)

SIGMA = 1.0  # of the log-normal
TOKENS = 4  # of a real response; a simulated one has 1


def config() -> Any:
  from trinity_jax.config import base_config, resolve

  c = base_config()
  c.model.tiny = dict(hidden=128, layers=3, heads=4, kv_heads=2, head_dim=32, intermediate=384)
  c.taskset.path = "unused"
  c.taskset.workflow = f"{episode.__module__}:{episode.__name__}"
  c.explorer.deterministic = False
  c.sampler.max_prompt_length, c.sampler.max_response_length = 28, TOKENS
  c.sampler.slots = 256
  c.sampler.prefill_batches, c.sampler.prompt_buckets = (64,), (28,)
  c.sampler.cache_buckets = (32,)
  return resolve(c)


@contextlib.contextmanager
def real_engine(c: Any):
  """(running sampler of a tiny random model, its tokenizer)."""
  import jax
  import jax.numpy as jnp

  from trinity_jax import build
  from trinity_jax.launch_order import LaunchOrder
  from trinity_jax.models import hf, sharding
  from trinity_jax.models.tokenizer import Tokenizer
  from trinity_jax.run import first_model

  with tempfile.TemporaryDirectory() as folder:
    path = first_model(c, Path(folder))
    model, meshes = hf.load_config(path), build.make_meshes(c, jax.devices()[:1])
    engine = build.make_engine(c, model, meshes, LaunchOrder(meshes.train), tokenizer_dir=path)
    engine.start()
    layout = sharding.param_shardings(model, meshes.train)
    engine.set_params(0, hf.load(path, dtype=jnp.float32, shardings=layout)[0])
    try:
      yield engine, Tokenizer.load(path)
    finally:
      engine.close()


def tasks(count: int, mean: float) -> list[Any]:
  from trinity_jax.experience import Task

  rng = random.Random(0)
  seconds = [rng.lognormvariate(0.0, SIGMA) for _ in range(count)]
  scale = mean * count / sum(seconds)
  return [Task(i, (), raw={"seconds": s * scale}) for i, s in enumerate(seconds)]


async def at_once(run: Callable[[int], Awaitable[None]], count: int, most: int) -> float:
  """The next one begins when any has ended; returns the episodes a second until the last begins."""
  places, start = asyncio.Semaphore(most), time.perf_counter()
  last = start

  async def one(i: int) -> None:
    nonlocal last
    async with places:
      last = time.perf_counter()
      await run(i)

  await asyncio.gather(*map(one, range(count)))
  return max(count - most, 0) / (last - start)


async def in_batches(run: Callable[[int], Awaitable[None]], count: int, most: int) -> float:
  """The next ones begin when all have ended."""
  start = time.perf_counter()
  for first in range(0, count, most):
    await asyncio.gather(*map(run, range(first, min(first + most, count))))
  return count / (time.perf_counter() - start)


def measure(
  engine: Any, tokenizer: Any, how: Callable[..., Awaitable[float]]
) -> tuple[float, float, float]:
  """Returns (episodes a second, what `how` returned, p99 of the event loop's lag in seconds)."""
  from trinity_jax.explorer.groups import TRAIN_STREAM, Groups, group_ids
  from trinity_jax.explorer.workflow import SamplingParams
  from trinity_jax.monitor.loop_lag import LoopLag

  c, count = config(), EPISODES.value
  groups = Groups(c, engine, tokenizer, lambda _: contextlib.nullcontext())

  async def grade(response: str, task: Any) -> Any:
    raise AssertionError("episodes bring their own rewards")

  runner = groups.runner(c.taskset.workflow, grade, SamplingParams(1.0, TOKENS), TRAIN_STREAM)
  work, ids, lag = tasks(count, LATENCY.value), group_ids(1, range(count), 1), LoopLag()

  async def run(i: int) -> None:
    groups.announce(TRAIN_STREAM, [ids[i]])
    (found,) = await groups.run(runner, work[i], ids[i])
    assert not found.stop_reason.failed, found.info

  async def main() -> tuple[float, float]:
    with lag.running():
      start = time.perf_counter()
      rate = await how(run, count, CONCURRENT.value)
      return count / (time.perf_counter() - start), rate

  return *asyncio.run(main()), lag.take() or 0.0


def bench_agents() -> list[Row]:
  rows: list[Row] = []
  with real_engine(config()) as (sampler, tokenizer):
    for name, engine in (("simulated", Instant()), ("real", sampler)):
      barrier, _, _ = measure(engine, tokenizer, in_batches)
      rate, steady, lag = measure(engine, tokenizer, at_once)
      rows += [
        Row(f"{name}/barrier", barrier, "episodes/s"),
        Row(f"{name}/at_once", rate, "episodes/s", f"{name}/barrier", rate / barrier),
        Row(f"{name}/steady", steady, "episodes/s", f"{name}/barrier", steady / barrier),
        Row(f"{name}/loop_lag_p99", 1e3 * lag, "ms"),
      ]
  return rows
