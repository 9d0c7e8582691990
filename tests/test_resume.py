"""kill -9 at any moment, the same command again: as if it had never happened."""

from __future__ import annotations

import json
import random
import subprocess
import time

import pytest
from killing import ONE_STAGE, SHORT, Run, assert_as_if_never_killed

from trinity_jax.monitor.writers import read_jsonl


def test_one_kill(tmp_path):
  """In the middle of GRPO between two checkpoints."""
  whole, run = Run(tmp_path / "whole", ONE_STAGE), Run(tmp_path / "killed", ONE_STAGE)
  run.kill_when(run.after_step("grpo", 5))
  assert 5 <= run.steps("grpo")[-1] < 12 and not (run.workdir / "summary.json").exists()
  assert run.finish()["resumed"] is True
  assert whole.finish()["resumed"] is False
  rows = read_jsonl(whole.workdir / "grpo/metrics.jsonl")
  assert all(r["grad_norm"] > 0 for r in rows), "nothing was learned, so nothing was compared"
  assert_as_if_never_killed(run, whole, ("grpo",))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The run that nobody kills, and how long it took."""
  run = Run(tmp_path_factory.mktemp("whole") / "x", SHORT)
  start = time.monotonic()
  summary = run.finish()
  run.seconds = time.monotonic() - start
  assert summary["resumed"] is False and summary["compiles_after_warmup"] == 0
  return run


@pytest.mark.slow
def test_killed_in_every_phase(tmp_path, whole):
  run = Run(tmp_path / "killed", SHORT)
  run.kill_when(lambda: run.workdir.exists())
  run.kill_when(run.after_step("sft", 3))  # before the first checkpoint
  run.kill_when(run.while_saving("sft", 5))
  run.kill_when(run.after_step("sft", 12))
  run.kill_when(run.after_step("grpo", 2))
  run.kill_when(run.while_saving("grpo", 6))
  run.kill_when(run.after_step("grpo", 11))
  summary = run.finish()
  assert summary["resumed"] is True and summary["compiles_after_warmup"] == 0
  assert_as_if_never_killed(run, whole, ("sft", "grpo"))
  rows = read_jsonl(run.workdir / "grpo/metrics.jsonl")
  evaluated = [r["step"] for r in rows if "eval/accuracy" in r]
  assert evaluated == sorted(set(evaluated)) and set(evaluated) == {0, 4, 8, 12}
  assert summary["accuracy_final"] == json.loads(
    (whole.workdir / "summary.json").read_text()
  )["accuracy_final"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments(tmp_path, whole, seed):
  """Seeded delays over the length of a run; a run that was faster than its delay has ended well."""
  run, rng = Run(tmp_path / "killed", SHORT), random.Random(seed)
  for _ in range(4):
    process = run.start()
    try:
      process.wait(rng.uniform(0.1, 1.0) * whole.seconds)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
  run.finish()
  assert_as_if_never_killed(run, whole, ("sft", "grpo"))


@pytest.mark.slow
def test_a_run_that_blows_up_stops_with_its_batch_saved(tmp_path):
  """Learning rate 1e30: three non-finite steps in a row, exit code 3, the batch readable."""
  from trinity_jax.experience import Experience

  interval = '"trainer.save_interval": 5,'
  config = SHORT.replace(interval, interval + ' "optimizer.learning_rate": 1e30,')
  assert config != SHORT
  run = Run(tmp_path / "x", config)
  assert run.start().wait(900) == 3
  log = run.text()
  assert "were not finite for 3 steps in a row (trainer.max_nonfinite)" in log
  files = list((run.workdir / "sft/bad_batch").iterdir())
  assert len(files) == 32
  for file in files:
    e = Experience.from_bytes(file.read_bytes())
    assert e.num_actions > 0 and e.messages[-1]["role"] == "assistant"
