"""Runs of several token logs, from the workflow to the weights."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from launching import launcher, write_recipe

from trinity_jax.library import Session
from trinity_jax.models import hf
from trinity_jax.monitor.writers import read_jsonl
from trinity_jax.run import run


async def asks_again(task, model):
  """Run r begins r + 1 dialogues and answers them all alike."""
  for i in range(model.id.run + 1):
    await model.chat([{"role": "user", "content": f"{task.index % 10}+{i}="}])
  return float(model.id.run % 2)


def config(tmp_path, monkeypatch, **more):
  monkeypatch.setitem(sys.modules, "workflows_of_logs", sys.modules[__name__])
  model = hf.write_tiny_checkpoint(
    tmp_path / "model", hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, intermediate=32
  )
  c = launcher().load_config(str(write_recipe(tmp_path / "recipe.py", model)))
  c.taskset.workflow = "workflows_of_logs:asks_again"
  c.update_from_flattened_dict(more)
  return c


@pytest.mark.slow
def test_every_log_of_a_run_is_trained_on(tmp_path, monkeypatch):
  """Sampler and trainer agree on the log-probs of all; the groups that differ teach."""
  c = config(tmp_path, monkeypatch, **{"explorer.max_logs": 3})
  with Session(c) as s:
    for step in (1, 2):
      assert s.publish() == step - 1
      for group in s.rollout(s.taskset.next_batch(2)):
        assert [(e.id.run, e.id.step) for e in group] == [
          (run, i) for run, logs in enumerate((1, 2, 3, 3)) for i in range(logs)
        ]
        assert group[-1].metrics["logs_dropped"] == 1
        assert s.put(group) == "stored"
      found = s.buffer.sample(2, step, deadline=60)
      assert len(found) == 18
      row = s.trainer.step(found)
      assert row["logprob_diff/max"] < 1e-4 and row["grad_norm"] > 0
      assert row["group/effective_batch_size"] == 18 and row["groups_zero_std"] == 0
      # Two runs with 1 and two with 0: +-0.866 whatever the number of their logs.
      np.testing.assert_allclose(row["advantages/max"], 3**0.5 / 2, rtol=1e-4)
      np.testing.assert_allclose(row["advantages/min"], -(3**0.5) / 2, rtol=1e-4)
      s.buffer.commit(step)


@pytest.mark.slow
def test_a_whole_run_through_the_launchers_config(tmp_path, monkeypatch):
  c = config(tmp_path, monkeypatch, **{"explorer.max_logs": 4, "explorer.min_runs": 4})
  run(c, tmp_path / "work")
  rows = [r for r in read_jsonl(tmp_path / "work" / "metrics.jsonl") if "loss" in r]
  assert [r["step"] for r in rows] == [1, 2]
  for r in rows:
    assert r["rollout/count"] == 8 and r["rollout/logs"] == 2.5 and r["rollout/logs_dropped"] == 0
    assert r["queue/short_groups"] == 0 and r["queue/dropped_groups"] == 0
    assert r["group/count"] == 2 and r["group/effective_batch_size"] == 20
