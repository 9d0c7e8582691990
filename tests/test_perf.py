"""launch/perf.py: that its smallest runs run, and what it says of wrong names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PERF = Path(__file__).parents[1] / "launch" / "perf.py"


def perf(*args):
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, str(PERF), *map(str, args)]
  return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_loss(tmp_path):
  path = tmp_path / "rows.json"
  sizes = ["--tokens=160", "--width=8", "--vocabularies=60000", "--repeats=1"]
  done = perf("loss", *sizes, f"--json={path}")
  assert done.returncode == 0, done.stderr
  rows = {r["name"]: r for r in json.loads(path.read_text())}
  for method in ("naive", "general", "fused"):
    for what in ("compile", "temporaries", "time", "rate", "masked_iid", "masked_runs"):
      assert rows[f"60000/{method}/{what}"]["value"] > 0
  assert rows["60000/general/temporaries"]["ratio_to"] == "60000/naive/temporaries"
  assert rows["60000/general/temporaries"]["ratio"] < 1 / 8
  assert rows["60000/fused/masked_runs"]["ratio_to"] == "60000/fused/time"
  assert "| 60000/fused/time |" in done.stdout


@pytest.mark.slow
def test_publish(tmp_path):
  path = tmp_path / "rows.json"
  done = perf("publish", "--layers=1", "--repeats=1", "--cpu_devices=2", f"--json={path}")
  assert done.returncode == 0, done.stderr
  rows = {r["name"]: r for r in json.loads(path.read_text())}
  assert rows["parameters"]["value"] == pytest.approx(79.7, abs=0.1)
  for layout in ("same", "tensor", "whole"):
    assert rows[f"{layout}/publish"]["value"] > 0
    assert rows[f"{layout}/publish"]["ratio_to"] == f"{layout}/copy"


@pytest.mark.slow
def test_buffer(tmp_path):
  path = tmp_path / "rows.json"
  done = perf("buffer", "--stores=sqlite", "--held=10000", "--buffer_steps=8", f"--json={path}")
  assert done.returncode == 0, done.stderr
  rows = {r["name"]: r for r in json.loads(path.read_text())}
  for name in ("large/put", "large/sample", "large/both_at_once", "small/put_p99/10000"):
    assert rows[f"sqlite/{name}"]["value"] > 0


@pytest.mark.slow
def test_server(tmp_path):
  path = tmp_path / "rows.json"
  done = perf("server", "--streams=4", "--seconds=1", "--repeats=1", f"--json={path}")
  assert done.returncode == 0, done.stderr
  rows = {r["name"]: r for r in json.loads(path.read_text())}
  assert rows["beside_clients"]["ratio_to"] == "alone" and rows["beside_clients"]["ratio"] > 0
  for name in ("streamed", "health_p50", "health_p99", "health_max"):
    assert rows[name]["value"] > 0


def test_unknown_names():
  done = perf("sampler", "--parts=equal,foo")
  assert done.returncode == 1
  assert done.stderr.startswith("error: --parts foo: no such part; known: equal, tail,")
  assert "error: name one of: step, half, sampler, decode, loss" in perf("nothing").stderr
