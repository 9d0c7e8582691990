"""The replay buffer in SQLite and PostgreSQL: experiences a second, and how times grow with it.

Large: experiences of 4096 tokens with every field, groups of 8, one optimizer step of 8 groups at a
time, a checkpoint every 4 steps; memory_growth is that of the last quarter. Small: groups of 8
experiences of 64 tokens, one group at a time, into and out of stores that hold 10,000 and --held
experiences and have settled (vacuum, checkpoint), in turns; p99 over 1000 calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags
from benchmark import Row

from trinity_jax.buffer.record import Store, describe_group
from trinity_jax.buffer.replay import ReplayBuffer
from trinity_jax.buffer.store import open_store
from trinity_jax.experience import Experience, ExperienceId
from trinity_jax.monitor.summary import rss_mb

HELD = flags.DEFINE_integer(
  "held", 1_000_000, "Experiences of `buffer`, small.", lower_bound=10_000
)
STEPS = flags.DEFINE_integer(
  "buffer_steps", 60, "Optimizer steps of `buffer`, large.", lower_bound=8
)
STORES = flags.DEFINE_list("stores", ["sqlite", "postgresql"], "Stores of `buffer`.")
STORE_DIR = flags.DEFINE_string("store_dir", None, "Folder on the disk to measure; else temporary.")

GROUP, TASKS, CALLS, BASE = 8, 8, 1000, 10_000


def bench_buffer() -> list[Row]:
  rows = []
  for kind in STORES.value:
    with _place(kind) as place:
      if place is None:
        continue
      url, directory = place
      rows += _large(kind, url, directory)
      rows += _small(kind, url, directory)
  return rows


@contextlib.contextmanager
def _place(kind: str) -> Iterator[tuple[str, Path] | None]:
  """(URL, folder) of an empty store; None where there is no server."""
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(tempfile.TemporaryDirectory(dir=STORE_DIR.value))
    if kind != "postgresql":
      yield kind, Path(folder)
      return
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
    postgres = importlib.import_module("postgres")
    if reason := postgres.missing():
      print(f"postgresql: not measured, {reason}")
      yield None
      return
    yield stack.enter_context(postgres.server()).url, Path(folder)


def experience(id: ExperienceId, length: int) -> Experience:
  """An experience with every field; a quarter of it is the prompt."""
  rng = np.random.default_rng(tuple(id))
  mask = np.arange(length) >= length // 4
  floats = lambda: rng.standard_normal(length, np.float32)
  return Experience(
    tokens=rng.integers(0, 150_000, length),
    action_mask=mask,
    logprobs=np.where(mask, -np.abs(floats()), 0),
    versions=np.where(mask, id.batch, -1),
    id=id,
    reward=float(rng.random()),
    mixed=np.zeros(length, bool),
    token_rewards=floats(),
    advantages=floats(),
    messages=[{"role": "user", "content": "?" * length}, {"role": "assistant", "content": "!"}],
    metrics={"rewards/accuracy": 1.0},
    info={"task": id.task},
  )


def _group(batch: int, task: int, length: int) -> list[Experience]:
  return [experience(ExperienceId(batch, task, run, 0), length) for run in range(GROUP)]


# --- large ----------------------------------------------------------------------------------------


def _large(kind: str, url: str, directory: Path) -> list[Row]:
  store = open_store(url, directory, namespace="large")
  buffer = ReplayBuffer(store, capacity=10**9, order="id", tasks_per_step=TASKS)
  steps, n = STEPS.value, STEPS.value * TASKS * GROUP
  groups = [[_group(b, t, 4096) for t in range(TASKS)] for b in range(4)]
  rows = [Row(f"{kind}/large/bytes", len(groups[0][0][0].to_bytes()), "B")]
  memory = []

  async def put(first: int, last: int) -> None:
    for batch in range(first, last + 1):
      await asyncio.gather(*(buffer.put(_renamed(g, batch)) for g in groups[batch % 4]))

  def sample(first: int, last: int) -> None:
    for step in range(first, last + 1):
      buffer.sample(TASKS, step, 60)
      if step % 4 == 0:
        buffer.commit(step)
      memory.append(rss_mb() or 0.0)

  start = time.perf_counter()
  asyncio.run(put(1, steps))
  put_time = time.perf_counter() - start
  start = time.perf_counter()
  sample(1, steps)
  sample_time = time.perf_counter() - start
  trainer = threading.Thread(target=sample, args=(steps + 1, 2 * steps))
  start = time.perf_counter()
  trainer.start()
  asyncio.run(put(steps + 1, 2 * steps))
  trainer.join()
  both = time.perf_counter() - start
  store.close()
  return [
    *rows,
    Row(f"{kind}/large/put", n / put_time, "experiences/s"),
    Row(f"{kind}/large/sample", n / sample_time, "experiences/s"),
    Row(f"{kind}/large/both_at_once", n / both, "experiences/s"),
    Row(f"{kind}/large/memory_growth", memory[-1] - memory[steps + steps // 2], "MB"),
  ]


def _renamed(group: list[Experience], batch: int) -> list[Experience]:
  for e in group:
    e.id = e.id._replace(batch=batch)
  return group


# --- small ----------------------------------------------------------------------------------------


def _small(kind: str, url: str, directory: Path) -> list[Row]:
  sizes = (BASE, HELD.value)
  stores = {n: open_store(url, directory / str(n), namespace=f"small{n}") for n in sizes}
  buffers = {
    n: ReplayBuffer(s, capacity=10**9, order="ready", tasks_per_step=TASKS)
    for n, s in stores.items()
  }
  template = _group(1, 0, 64)
  count = {n: _fill(buffer, template, n // GROUP) for n, buffer in buffers.items()}
  for store in stores.values():
    _settle(store)
  seconds: dict[tuple[str, int], list[float]] = {
    (w, n): [] for w in ("put", "sample") for n in sizes
  }
  for i in range(CALLS):  # in turns, so that the machine's load is shared
    for n, buffer in buffers.items():
      start = time.perf_counter()
      asyncio.run(_put_one(buffer, template, count[n] + i))
      between = time.perf_counter()
      buffer.sample(1, i + 1, 60)
      seconds["put", n].append(between - start)
      seconds["sample", n].append(time.perf_counter() - between)
  for store in stores.values():
    store.close()
  rows = []
  for (what, n), times in seconds.items():
    base = seconds[what, BASE]
    for name, of in (("p99", lambda x: float(np.percentile(x, 99))), ("median", np.median)):
      row = Row(f"{kind}/small/{what}_{name}/{n}", 1e3 * float(of(times)), "ms")
      if n != BASE:
        row.ratio_to, row.ratio = f"{kind}/small/{what}_{name}/{BASE}", float(of(times) / of(base))
      rows.append(row)
  return rows


def _settle(store: Store) -> None:
  """Finishes what the database does in the background for the rows it was filled with at once."""
  from trinity_jax.buffer.storage_sql import SqlStore

  assert isinstance(store, SqlStore)
  engine = store.database.engine.execution_options(isolation_level="AUTOCOMMIT")
  postgres = store.database.postgres
  with engine.connect() as connection:
    for statement in ("VACUUM ANALYZE", "CHECKPOINT") if postgres else ("PRAGMA wal_checkpoint",):
      connection.exec_driver_sql(statement)


async def _put_one(buffer: ReplayBuffer, template: list[Experience], i: int) -> None:
  await buffer.put(_numbered(template, i))


def _numbered(template: list[Experience], i: int) -> list[Experience]:
  for e in template:
    e.id = e.id._replace(batch=1 + i // TASKS, task=i % TASKS)
  return template


def _fill(buffer: ReplayBuffer, template: list[Experience], groups: int) -> int:
  """Stores so many groups, many per transaction; returns how many."""
  import copy

  for first in range(0, groups, 128):
    numbers = range(first, min(first + 128, groups))
    batch = [describe_group(copy.deepcopy(_numbered(template, i))) for i in numbers]
    buffer.store.put(batch, buffer.rules)
  return groups
