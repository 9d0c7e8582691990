"""The multi-turn recipe as a newcomer runs it, and what chance reaches."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import launching
import pytest

from trinity_jax.explorer.environments.gym import GymEnvironment
from trinity_jax.tasks.frozen_lake import ACTIONS, generate

ROOT = Path(__file__).resolve().parents[3]


def test_random_actions_reach_next_to_nothing():
  rng, reached = random.Random(0), 0
  for row in generate("eval"):
    env = GymEnvironment(row["environment"], row["environment_args"])
    env.reset()
    for _ in range(row["max_turns"]):
      step = env.step(rng.choice(ACTIONS))
      if step.done:
        break
    reached += step.reward
  assert reached <= 5


def launch(workdir: Path, *overrides: str) -> dict:
  command = [sys.executable, "launch/main.py", "--config=configs/frozen_lake.py",
             f"--workdir={workdir}", *overrides]  # fmt: skip
  done = subprocess.run(
    command, cwd=ROOT, env=launching.environment(), timeout=2400, capture_output=True, text=True
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  return json.loads((workdir / "summary.json").read_text())


@pytest.mark.timeout(2700)
@pytest.mark.parametrize(
  "seed",
  [
    pytest.param(0, marks=pytest.mark.slow),
    pytest.param(1, marks=pytest.mark.nightly),
    pytest.param(2, marks=pytest.mark.nightly),
  ],
)
def test_learns(tmp_path, seed):
  """Imitation walks into holes; reinforcement goes round them, on maps that it never saw."""
  summary = launch(tmp_path, f"--config.seed={seed}")
  assert 0.15 <= summary["accuracy_after_sft"] <= 0.4
  assert summary["accuracy_final"] >= 0.7
  assert summary["compiles_after_warmup"] == 0


@pytest.mark.nightly
@pytest.mark.timeout(2700)
def test_rewards_without_meaning_teach_nothing(tmp_path):
  overrides = ["--config.algorithm.shuffle_rewards=True"]
  summary = launch(tmp_path, *overrides)
  assert summary["accuracy_final"] < 0.7
