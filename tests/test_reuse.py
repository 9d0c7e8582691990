"""A run that trains on its groups more than once, by priority."""

from __future__ import annotations

import collections

import jax
import pytest
import sqlalchemy as sa

from trinity_jax.buffer.schema import USES
from trinity_jax.buffer.store import open_store
from trinity_jax.config import base_config, resolve
from trinity_jax.monitor.writers import read_jsonl
from trinity_jax.run import run

STEPS, GROUPS = 8, 4


@pytest.mark.parametrize("priority", ["linear_decay", "decay_limit_randomization"])
def test_groups_are_used_twice_and_not_more(tmp_path, monkeypatch, priority):
  monkeypatch.setattr(jax, "devices", lambda all_of_them=jax.devices: all_of_them()[:1])
  c = base_config()
  c.model.tiny = dict(hidden=32, layers=1, heads=2, kv_heads=2, head_dim=16, intermediate=32)
  c.monitor.progress, c.monitor.tensorboard = "none", False
  c.taskset.generate = "trinity_jax.tasks.arithmetic:generate"
  c.taskset.generate_args, c.taskset.reward = dict(split="rl", rows=64), "arithmetic"
  c.sampler.max_prompt_length, c.sampler.max_response_length, c.sampler.slots = 9, 4, 16
  c.sampler.prefill_batches, c.sampler.prompt_buckets, c.sampler.cache_buckets = (8,), (9,), (13,)
  c.explorer.batch_size, c.explorer.group_size, c.explorer.deterministic = GROUPS, 4, False
  c.trainer.row_lengths, c.trainer.rows_per_micro, c.trainer.total_steps = (13,), 16, STEPS
  c.sync.style, c.sync.max_staleness = "trainer_driven", 4
  c.buffer.priority, c.buffer.max_uses, c.buffer.cool_down = priority, 2, 1
  run(resolve(c), tmp_path)
  rows = [r for r in read_jsonl(tmp_path / "metrics.jsonl") if "loss" in r]
  assert [r["step"] for r in rows] == list(range(1, STEPS + 1))
  assert max(r["staleness/max"] for r in rows) <= 4
  store = open_store("sqlite", tmp_path)
  columns = USES.c.batch, USES.c.task, USES.c.at
  found = store.database.read(
    lambda connection: connection.execute(sa.select(*columns).where(~USES.c.dropped)).all()
  )
  store.close()
  uses: dict = collections.defaultdict(list)
  for batch, task, step in found:
    uses[batch, task].append(step)
  assert sum(map(len, uses.values())) == STEPS * GROUPS
  assert max(map(len, uses.values())) == 2, "nothing was used again"
  for steps in uses.values():
    assert len(set(steps)) == len(steps) and max(steps) - min(steps) >= len(steps) - 1
