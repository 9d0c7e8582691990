"""--mode=debug: what it prints of a run that ends well, and of one that raises."""

from __future__ import annotations

import jax
import pytest

from trinity_jax.config import base_config, resolve
from trinity_jax.debugging import debug
from trinity_jax.errors import UserError
from trinity_jax.experience import StopReason

WORKFLOW = """
async def twice(task, model):
  log = [1, 2]
  for _ in range(2):
    log = [*log, *(await model.generate(log)).tolist(), 3]
  return {"first": 0.25, "second": 0.5}

async def fresh(task, model):
  for text in "ab":
    await model.chat([{"role": "user", "content": text}])
  return [0.25, 0.5]

async def broken(task, model):
  await model.generate([1, 2])
  raise KeyError("the \x1b[31mcause")
"""


def config(workflow="single_turn"):
  c = base_config()
  c.model.tiny = dict(hidden=32, layers=1, heads=2, kv_heads=2, head_dim=16, intermediate=32)
  c.taskset.generate = "trinity_jax.tasks.arithmetic:generate"
  c.taskset.generate_args, c.taskset.reward = dict(split="rl", rows=8), "arithmetic"
  c.taskset.workflow = workflow
  c.sampler.max_prompt_length, c.sampler.max_response_length, c.sampler.slots = 16, 4, 4
  c.sampler.prefill_batches, c.sampler.prompt_buckets, c.sampler.cache_buckets = (4,), (16,), (20,)
  return c


@pytest.fixture(autouse=True)
def one_device(monkeypatch, tmp_path):
  monkeypatch.setattr(jax, "devices", lambda all_of_them=jax.devices: all_of_them()[:1])
  (tmp_path / "debugged_workflows.py").write_text(WORKFLOW)
  monkeypatch.syspath_prepend(tmp_path)


def run(c, tmp_path, **kwargs):
  parts = []
  experience = debug(c, tmp_path / "run", report=parts.append, **kwargs)
  return experience, "\n".join(parts)


def test_one_turn(tmp_path):
  experience, text = run(config(), tmp_path, task=3)
  assert "task 3\n  user: " in text and "truth: " in text
  assert "was shown" in text and f"ended: {experience.stop_reason.name.lower()}" in text
  assert f"wrote {int(experience.action_mask.sum())} tokens (mean log-prob -" in text
  assert "reward: 0 (rewards/arithmetic 0)" in text


def test_turns_and_components(tmp_path):
  experience, text = run(config("debugged_workflows:twice"), tmp_path)
  assert text.count("wrote ") == 2 and text.count("was shown ") == 2
  assert experience.reward == 0.75 and "rewards/first 0.25, rewards/second 0.5" in text


@pytest.mark.slow
def test_every_token_log_of_a_run_is_shown(tmp_path):
  c = config("debugged_workflows:fresh")
  c.explorer.max_logs = 2
  experience, text = run(c, tmp_path)
  assert "--- token log 1 of 2" in text and "--- token log 2 of 2" in text
  assert "reward: 0.25" in text and "reward: 0.5" in text and experience.reward == 0.5


def test_a_workflow_that_raises(tmp_path):
  experience, text = run(config("debugged_workflows:broken"), tmp_path)
  assert experience.stop_reason is StopReason.ERROR
  assert "ended: error" in text and "KeyError" in text and "in broken" in text
  assert "\x1b" not in text, "what a model or an environment says must not control the terminal"


def test_what_cannot_be_debugged(tmp_path):
  with pytest.raises(UserError, match=r"--task=8: the taskset has the tasks 0 to 7"):
    debug(config(), tmp_path, 8)
  c = config()
  c.algorithm.name, c.taskset.generate_args = "sft", dict(split="sft")
  with pytest.raises(UserError, match="no stage of this config explores"):
    debug(resolve(c), tmp_path)
