"""The loop in ten lines, as its docstring has it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from launching import write_recipe

from trinity_jax.errors import UserError
from trinity_jax.library import Session
from trinity_jax.models import hf


def load(path: Path):
  spec = importlib.util.spec_from_file_location("recipe", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def test_the_loop(tmp_path):
  model = hf.write_tiny_checkpoint(
    tmp_path / "model", hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, intermediate=32
  )
  config = load(write_recipe(tmp_path / "recipe.py", model))
  with Session(config) as s:
    rows = []
    for step in (1, 2):
      assert s.publish() == step - 1
      for group in s.rollout(s.taskset.next_batch(2)):
        assert len(group) == 4 and s.put(group) == "stored"
      rows.append(s.trainer.step(s.buffer.sample(2, step, deadline=60)))
      s.buffer.commit(step)
  assert [r["policy_version"] for r in rows] == [1, 2]
  assert all(r["logprob_diff/max"] < 1e-4 for r in rows)


def test_stages_are_refused(tmp_path):
  config = load(write_recipe(tmp_path / "recipe.py", "unused"))
  config.stages = ({"name": "a"}, {"name": "b"})
  with pytest.raises(UserError, match="a Session has one stage"):
    Session(config)
