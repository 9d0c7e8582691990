"""The quickstart by a trainer and two explorers, one of which is killed for good."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import launching
import pytest

from trinity_jax.monitor.writers import read_jsonl

ROOT = Path(__file__).parents[1]


@pytest.mark.nightly
@pytest.mark.parametrize("killed", ["", "one"])
def test_two_explorers_learn_as_well(tmp_path, killed):
  workdir, log = tmp_path / "run", tmp_path / "log"

  def start(*flags):
    command = [
      sys.executable, "launch/main.py", "--config=configs/quickstart.py", f"--workdir={workdir}",
      "--config.explorer.deterministic=False", "--config.sync.style=trainer_driven",
      "--config.buffer.lease=5", "--config.monitor.tensorboard=False", *flags,
    ]  # fmt: skip
    with log.open("ab") as out:
      return subprocess.Popen(
        command, cwd=ROOT, env=launching.environment(), stdout=out, stderr=out
      )

  names = ("one", "two")
  processes = {n: start("--mode=explore", f"--config.explorer.name={n}") for n in names}
  processes["trainer"] = start("--mode=train")
  rows = lambda: [r for r in read_jsonl(workdir / "grpo/metrics.jsonl") if "loss" in r]
  try:
    if killed:
      end = time.monotonic() + 600
      while not (workdir / "grpo/metrics.jsonl").exists() or len(rows()) < 8:
        assert processes["trainer"].poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.05)
      processes.pop(killed).kill()
    for name, process in processes.items():
      assert process.wait(900) == 0, (name, log.read_text()[-3000:])
  finally:
    for process in processes.values():
      process.kill()
  assert [r["step"] for r in rows()] == list(range(1, 26))
  evaluated = {}
  for file in (workdir / "grpo/explorers").glob("*/metrics.jsonl"):
    evaluated |= {r["step"]: r["eval/accuracy"] for r in read_jsonl(file)}
  print({step: evaluated[step] for step in sorted(evaluated)})
  assert evaluated[25] >= 0.9
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["accuracy_final"] == evaluated[25]
  assert 0.15 <= summary["accuracy_after_sft"] <= 0.65
  assert max(r["staleness/max"] for r in rows()) <= 1
