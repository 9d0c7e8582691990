"""The recipes of agents run: their last stage, small, and their demonstrations fit the limits."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from judge_server import JudgeServer

from trinity_jax.config import resolve
from trinity_jax.config_schema import SamplerConfig
from trinity_jax.experience import ExperienceId
from trinity_jax.explorer.environments import sandbox
from trinity_jax.models.tokenizer import Tokenizer, write_byte_tokenizer
from trinity_jax.monitor.writers import read_jsonl
from trinity_jax.run import run
from trinity_jax.tasks.demonstrations import given
from trinity_jax.tasks.taskset import load_taskset

ROOT = Path(__file__).resolve().parents[1]
RECIPES = [
  ("blackjack",), ("step_wise",), ("step_wise", "processes"), ("retrieval",), ("tool_use",),
  ("tool_use", "python"), ("sudoku",), ("sql",),
]  # fmt: skip


def recipe(name: str, *args: str) -> Any:
  spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*args)


def small(c: Any) -> Any:
  """The recipe's last stage with the smallest model: two steps of eight runs."""
  if c.stages:
    last = c.stages[-1]
    c.stages = ()
    for key in ("algorithm", "taskset.generate_args"):
      c.update_from_flattened_dict({key: last[key]}) if "." in key else c[key].update(last[key])
  c.model.tiny = dict(
    hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, intermediate=32, max_positions=1024,
    words=c.model.tiny.get("words", ()),
  )  # fmt: skip
  c.monitor.progress, c.monitor.tensorboard = "none", False
  c.eval.tasksets, c.eval.interval, c.trainer.save_hf = (), 0, "never"
  c.explorer.batch_size = 8 if c.algorithm.name == "reinforceplusplus" else 2
  c.explorer.group_size = 8 // c.explorer.batch_size
  c.sampler.slots, c.sampler.prefill_batches = 8, (8,)
  c.sampler.prompt_buckets = (c.sampler.max_prompt_length,)
  c.sampler.cache_buckets = (c.sampler.max_prompt_length + c.sampler.max_response_length,)
  c.trainer.total_steps, c.trainer.save_interval, c.trainer.rows_per_micro = 2, 2, 8
  return resolve(c)


def steps_of(folder: Path) -> list[dict]:
  return [r for r in read_jsonl(next(folder.glob("**/metrics.jsonl"))) if "loss" in r]


@pytest.mark.slow
@pytest.mark.parametrize("names", RECIPES, ids=":".join)
def test_it_runs(tmp_path, names):
  if "python" in names and (why := sandbox.available()):
    pytest.skip(why)
  run(small(recipe(*names)), tmp_path)
  rows = steps_of(tmp_path)
  assert [r["step"] for r in rows] == [1, 2]
  assert all(r["rollout/count"] == 8 and r["rollout/errored"] == 0 for r in rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ruler", "rubric"])
def test_a_judge_gives_the_rewards(tmp_path, kind):
  """The judge likes the attempts by their order, and says yes to the first criterion only."""

  def answer(prompt: str, _: int) -> str:
    if kind == "rubric":
      return json.dumps({"met": [True, False]})
    count = len(set(re.findall(r"<<attempt (\d+) ", prompt)))
    return json.dumps({"scores": [{"id": i + 1, "score": 1 / (i + 1)} for i in range(count)]})

  with JudgeServer(answer) as judge:
    c = recipe("judge", kind)
    c.taskset.reward_args.base_url = judge.base_url
    run(small(c), tmp_path)
  rows = steps_of(tmp_path)
  assert [r["step"] for r in rows] == [1, 2] and all(r["rollout/errored"] == 0 for r in rows)
  if kind == "ruler":
    assert len(judge.requests) == 4  # one look at each group of two steps
    assert all(r["reward/max"] == 1.0 and r["reward/min"] <= 0.5 for r in rows)
  else:
    assert len(judge.requests) == 16
    assert all(r["reward/mean"] == pytest.approx(0.25) for r in rows)


@pytest.mark.parametrize("names", RECIPES, ids=":".join)
def test_demonstrations_fit(tmp_path, names):
  """None is longer than the recipe's limits, which it would be refused for in the middle."""
  c = recipe(*names)
  words = c.model.tiny.get("words", ())
  write_byte_tokenizer(tmp_path, vocab_size=320, max_length=1024, words=words)
  tokenizer = Tokenizer.load(tmp_path)
  stage = c.stages[0]
  c.taskset.messages_key = stage["taskset.messages_key"]
  c.taskset.generate_args = dict(stage["taskset.generate_args"], rows=300)
  config = resolve(c)
  limits = SamplerConfig(
    max_prompt_length=c.sampler.max_prompt_length,
    max_response_length=c.sampler.max_response_length,
  )
  longest = 0
  for i, task in enumerate(load_taskset(config.taskset).tasks):
    (e,) = given("demonstrations", task, tokenizer, ExperienceId(1, i, 0, 0), limits)
    longest = max(longest, len(e.tokens))
  (row,) = c.trainer.row_lengths
  assert longest <= row == limits.max_prompt_length + limits.max_response_length
