"""Each offline and mixed recipe ends better than it began, as its docstring says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import launching
import pytest

from trinity_jax.monitor.writers import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def launch(config: str, workdir: Path, *flags: str) -> dict:
  command = [sys.executable, "launch/main.py", f"--config=configs/{config}",
             f"--workdir={workdir}", "--config.monitor.tensorboard=False", *flags]  # fmt: skip
  done = subprocess.run(
    command, cwd=ROOT, env=launching.environment(), timeout=1800, capture_output=True, text=True
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  return json.loads((workdir / "summary.json").read_text())


def accuracies(folder: Path) -> dict[int, float]:
  rows = read_jsonl(folder / "metrics.jsonl")
  return {r["step"]: r["eval/accuracy"] for r in rows if "eval/accuracy" in r}


def test_sft(tmp_path):
  summary = launch("sft.py", tmp_path)
  assert accuracies(tmp_path / "sft")[0] < 0.1 and summary["accuracy_final"] >= 0.95


def test_dpo(tmp_path):
  summary = launch("dpo.py", tmp_path)
  assert 0.15 <= summary["accuracy_after_sft"] <= 0.75 and summary["accuracy_final"] >= 0.95


def test_mixed(tmp_path):
  """Demonstrations teach what the policy never samples; the rollouts alone teach nothing."""
  summary = launch("mixed.py", tmp_path)
  assert 0.15 <= summary["accuracy_after_sft"] <= 0.6
  assert summary["accuracy_final"] >= summary["accuracy_after_sft"] + 0.15


def test_replay(tmp_path):
  """A recorded run teaches the checkpoint it began from, without a rollout."""
  recorded = launch(
    "quickstart.py", tmp_path / "recorded", "--config.buffer.keep=True"
  )
  summary = launch(
    "replay.py", tmp_path / "replay", f"--config.model.path={tmp_path}/recorded/sft/hf",
    f"--config.buffer.replay={tmp_path}/recorded/grpo",
  )  # fmt: skip
  assert summary["accuracy_final"] >= recorded["accuracy_after_sft"] + 0.25
  steps = [r for r in read_jsonl(tmp_path / "replay" / "metrics.jsonl") if "loss" in r]
  assert not any("sampler/decode_steps" in r for r in steps)
