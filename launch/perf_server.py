"""The server: what its clients cost the sampler, and how long /health takes beside them.

Generation alone: as many sequences as there are slots, each followed by another at once. Then a
client in a process of its own holds --streams of those slots as streams, so that the sampler has
equally much to do, and asks /health --probes times a second, evenly, whatever the last ones took.
Both in turns, --repeats times; a ratio is that of neighbours, and the median of them counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from benchmark import REPEATS, Row
from perf_agents import real_engine

STREAMS = flags.DEFINE_integer("streams", 64, "Open streams of `server`.", lower_bound=1)
PROBES = flags.DEFINE_integer("probes", 50, "Requests of /health a second.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 10.0, "Of each measurement of `server`.", lower_bound=1)

CLIENT = Path(__file__).with_name("server_client.py")
SLOTS = 128
PROMPT, RESPONSE = 64, 448  # tokens; a response has at least half as many
_READY = 300.0  # seconds until all streams have begun, on a busy machine too


def config() -> Any:
  from trinity_jax.config import base_config, resolve

  c = base_config()
  c.model.tiny = dict(hidden=128, layers=3, heads=4, kv_heads=2, head_dim=32, intermediate=384)
  c.taskset.path = "unused"
  c.explorer.deterministic = False
  c.sampler.max_prompt_length, c.sampler.max_response_length = PROMPT, RESPONSE
  c.sampler.slots = max(SLOTS, 2 * STREAMS.value)
  c.sampler.prefill_batches, c.sampler.prompt_buckets = (16,), (PROMPT,)
  c.sampler.cache_buckets = (PROMPT + RESPONSE,)
  return resolve(c)


class Load:
  """Sequences without stop tokens, one after the other, from the sampler's own process."""

  def __init__(self, engine: Any):
    self._engine, self._next = engine, 0

  @contextlib.asynccontextmanager
  async def running(self, count: int) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(self._go()) for _ in range(count)]
    try:
      yield
    finally:
      for task in tasks:
        task.cancel()
      await asyncio.gather(*tasks, return_exceptions=True)

  async def _go(self) -> None:
    from trinity_jax.sampler.request import Request
    from trinity_jax.sampler.sampling import request_key

    with self._engine.participant():
      while True:
        self._next += 1
        prompt = np.random.default_rng(self._next).integers(8, 200, PROMPT // 2, np.int32)
        key = request_key(0, self._next)
        limit = random.Random(self._next).randint(RESPONSE // 2, RESPONSE)
        await self._engine.generate(Request(prompt, key, (self._next,), limit, ()))


async def rate(engine: Any, seconds: float) -> float:
  """Tokens a second over about so long, by the engine's own count."""
  first, start = await _counted(engine)
  await asyncio.sleep(seconds)
  last, end = await _counted(engine)
  return (last - first) / (end - start)


async def _counted(engine: Any) -> tuple[float, float]:
  """The count and the time when it next changes, which it does once a dispatch."""
  before = engine.stats["busy_slot_steps"]
  async with asyncio.timeout(_READY):
    while (now := engine.stats["busy_slot_steps"]) == before:
      await asyncio.sleep(0.002)  # a measurement: the sampler tells nobody of its counts
  return now, time.perf_counter()


async def with_clients(engine: Any, server: Any, seconds: float) -> tuple[float, dict[str, Any]]:
  """(tokens a second, what the client's process saw)."""
  client = await asyncio.create_subprocess_exec(
    sys.executable, str(CLIENT), server.host, str(server.port), server.token, str(STREAMS.value),
    str(PROBES.value), str(RESPONSE), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    limit=2**22,
  )  # fmt: skip
  assert client.stdin is not None and client.stdout is not None
  try:
    async with asyncio.timeout(_READY):
      line = await client.stdout.readline()
    assert line == b"ready\n", line
    client.stdin.write(b"go\n")
    found = await rate(engine, seconds)
    client.stdin.write(b"stop\n")
    async with asyncio.timeout(_READY):
      seen = json.loads(await client.stdout.readline())
  finally:
    with contextlib.suppress(ProcessLookupError):
      client.kill()
    await client.wait()
  return found, seen


def bench_server() -> list[Row]:
  from trinity_jax.serving import make_server

  c = config()
  slots, streams = c.sampler.slots, STREAMS.value
  alone: list[float] = []
  beside: list[float] = []
  seen: list[dict[str, Any]] = []

  async def measure(engine: Any, server: Any) -> None:
    load = Load(engine)
    for _ in range(REPEATS.value):
      async with load.running(slots):
        await rate(engine, 1.0)  # fills the slots
        alone.append(await rate(engine, SECONDS.value))
      async with load.running(slots - streams):
        tokens, client = await with_clients(engine, server, SECONDS.value)
      beside.append(tokens)
      seen.append(client)

  with real_engine(c) as (engine, tokenizer), tokenizer_without_stops(tokenizer):
    server = make_server(c, engine, tokenizer).start()
    try:
      asyncio.run(measure(engine, server))
    finally:
      server.close()
  shares = [b / a for a, b in zip(alone, beside)]
  late = [x for s in seen for x in s["health_ms"]]
  return [
    Row("alone", statistics.median(alone), "tokens/s", minimum=min(alone)),
    Row("beside_clients", statistics.median(beside), "tokens/s", "alone",
        statistics.median(shares), minimum=min(beside)),
    Row("streamed", statistics.median(s["events"] for s in seen), "events/s"),
    Row("health_p50", float(np.percentile(late, 50)), "ms"),
    Row("health_p99", float(np.percentile(late, 99)), "ms"),
    Row("health_max", max(late), "ms"),
  ]  # fmt: skip


@contextlib.contextmanager
def tokenizer_without_stops(tokenizer: Any):
  """Streams as long as the other sequences: a random model would end each somewhere."""
  before, tokenizer.stop_ids = tokenizer.stop_ids, ()
  try:
    yield
  finally:
    tokenizer.stop_ids = before
