"""Chaos: episodes whose environments raise, hang, die, are slow or talk nonsense, beside calm ones.

Every environment lives in a process of its own and every reply comes from a real sampler with a
tiny model; the runs are the explorer's own Groups and Runner. What fails is tried once more; what
becomes of each attempt is a function of its seed, so each failure can be accounted for.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import gc
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from absl import flags
from benchmark import Row
from perf_agents import at_once, real_engine

EPISODES = flags.DEFINE_integer("chaos_episodes", 2000, "Episodes of `chaos`.", lower_bound=1)
CONCURRENT = flags.DEFINE_integer("chaos_concurrent", 256, "Of them at once.", lower_bound=1)
SECONDS = flags.DEFINE_float("chaos_step", 0.02, "Seconds of an environment's step.", lower_bound=0)
HUNG = flags.DEFINE_float("chaos_deadline", 2.0, "Seconds after which one hangs.", lower_bound=0.1)

TURNS, RETRIES = 4, 1
episodes: Any = None  # environments.flaky.Episodes of the measurement under way


async def episode(task: Any, model: Any) -> Any:
  return await episodes(task, model)


def config() -> Any:
  from trinity_jax.config import base_config, resolve

  c = base_config()
  c.model.tiny = dict(hidden=128, layers=3, heads=4, kv_heads=2, head_dim=32, intermediate=384)
  c.taskset.path = "unused"
  c.taskset.workflow = f"{__name__}:{episode.__name__}"
  c.explorer.deterministic = False
  c.explorer.max_retries = RETRIES
  c.explorer.environment_processes = CONCURRENT.value
  c.explorer.environment_deadline = HUNG.value
  c.sampler.max_prompt_length, c.sampler.max_response_length = 64, 4
  c.sampler.slots = 256
  c.sampler.prefill_batches, c.sampler.prompt_buckets = (64,), (16, 64)
  c.sampler.cache_buckets = (68,)
  return resolve(c)


@dataclasses.dataclass
class Result:
  """How the episodes of one measurement ended.

  Attributes:
    rate: episodes a second, from the first's start to the last's end.
    busy_rate: the same until nine out of ten had ended: without the wait for the last slow ones.
    completed: episodes with a reward.
    errors: exception -> episodes whose last attempt ended with it.
    retries: attempts beyond the first.
  """

  rate: float
  busy_rate: float
  completed: int
  errors: collections.Counter[str]
  retries: int


ENDS = {
  "raises": "EnvironmentRaised", "hangs": "EnvironmentHung", "dies": "EnvironmentDied",
  "garbage": "ValueError",
}  # fmt: skip


def check(result: Result, rates: Any) -> None:
  """Ends the program unless every episode ended as its seeds say."""
  count = EPISODES.value
  fates = [episodes.fates(i, RETRIES + 1) for i in range(count)]
  errors = collections.Counter(ENDS[f[-1]] for f in fates if f[-1] in ENDS)
  retries = sum(len(f) - 1 for f in fates)
  if (result.errors, result.retries) != (errors, retries):
    sys.exit(f"error: {rates}: {result}; by the seeds {errors} and {retries} retries")
  if result.completed + errors.total() != count:
    sys.exit(f"error: {result.completed} + {errors.total()} episodes ended, of {count}")


def measure(engine: Any, tokenizer: Any, rates: Any) -> Result:
  from trinity_jax.explorer.environments.flaky import CALM, Episodes
  from trinity_jax.explorer.groups import Groups

  c, count, most = config(), EPISODES.value, CONCURRENT.value
  groups = Groups(c, engine, tokenizer, lambda _: contextlib.nullcontext())
  one, found, ends = runs_of(groups, c), [], []

  async def run(i: int) -> None:
    found.extend(await one(i))
    ends.append(time.perf_counter())

  async def main() -> float:
    global episodes
    async with contextlib.aclosing(groups):
      episodes = Episodes(CALM, TURNS, SECONDS.value)
      await at_once(run, most, most)  # starts the processes
      found.clear()
      ends.clear()
      episodes = Episodes(rates, TURNS, SECONDS.value)
      start = time.perf_counter()
      await at_once(run, count, most)
      return start

  start = asyncio.run(main())
  failed = [e for e in found if e.stop_reason.failed]
  nine = 9 * count // 10
  return Result(
    count / (ends[-1] - start),
    nine / (ends[nine - 1] - start),
    len(found) - len(failed),
    collections.Counter(str(e.info.get("type", e.stop_reason.name)) for e in failed),
    episodes.attempts.total() - count,
  )


def runs_of(groups: Any, c: Any) -> Callable[[int], Awaitable[list[Any]]]:
  """Episode number -> its group of one run."""
  from trinity_jax.experience import Task
  from trinity_jax.explorer.groups import TRAIN_STREAM, group_ids
  from trinity_jax.explorer.workflow import SamplingParams

  async def grade(response: str, task: Any) -> Any:
    raise AssertionError("episodes bring their own rewards")

  params = SamplingParams(1.0, c.sampler.max_response_length)
  runner = groups.runner(c.taskset.workflow, grade, params, TRAIN_STREAM)

  async def run(i: int) -> list[Any]:
    (ids,) = group_ids(1, [i], 1)
    groups.announce(TRAIN_STREAM, [ids])
    return await groups.run(runner, Task(i, ()), ids)

  return run


def kept(engine: Any) -> dict[str, int]:
  """What this process holds: threads, file descriptors, processes, MiB, slots."""
  import psutil

  gc.collect()
  own = psutil.Process()
  return {
    "threads": threading.active_count(),
    "descriptors": own.num_fds(),
    "processes": len(own.children(recursive=True)),
    "memory": own.memory_info().rss >> 20,
    "slots": int(engine.metrics()["sampler/running"]),
  }


def bench_chaos() -> list[Row]:
  from trinity_jax.explorer.environments.flaky import CALM, Rates

  with real_engine(config()) as (sampler, tokenizer):
    calm = measure(sampler, tokenizer, CALM)
    check(calm, CALM)
    before = kept(sampler)
    chaos = measure(sampler, tokenizer, Rates())
    check(chaos, Rates())
    after = kept(sampler)
  rows = [
    Row("calm/rate", calm.rate, "episodes/s"),
    Row("chaos/rate", chaos.rate, "episodes/s", "calm/rate", chaos.rate / calm.rate),
    Row("calm/busy_rate", calm.busy_rate, "episodes/s"),
    Row(
      "chaos/busy_rate", chaos.busy_rate, "episodes/s", "calm/busy_rate",
      chaos.busy_rate / calm.busy_rate,
    ),
    Row("chaos/completed", chaos.completed, "episodes"),
    Row("chaos/tried_again", chaos.retries, "attempts"),
    *(Row(f"chaos/failed/{k}", v, "episodes") for k, v in sorted(chaos.errors.items())),
    *(Row(f"chaos/more_{k}", after[k] - before[k], "MiB" if k == "memory" else k) for k in after),
  ]  # fmt: skip
  return rows
