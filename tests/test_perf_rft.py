"""launch/perf.py rft: its smallest run, held against the bound."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PERF = Path(__file__).parents[1] / "launch" / "perf.py"


def perf(tmp_path, *args):
  """(the process, its rows by name)"""
  path = tmp_path / "rows.json"
  done = subprocess.run(
    [sys.executable, str(PERF), "rft", f"--json={path}", *args],
    capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  rows = json.loads(path.read_text()) if path.exists() else []
  return done, {r["name"]: r for r in rows}


def test_one_cell(tmp_path):
  plot_path = tmp_path / "plots" / "speed.png"
  done, rows = perf(
    tmp_path, "--traces=bimodal-4", "--trains=0.5", "--steps=4", "--unit=0.1", "--buffer=memory",
    f"--plot={plot_path}",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "| bimodal-4, 0.5 | one-step-off | " in done.stdout
  for schedule in ("on_policy", "one_step_off_exact", "one_step_off", "fully_async"):
    value = lambda what, s=schedule: rows[f"bimodal-4/0.5/{s}/{what}"]["value"]
    assert value("time") >= value("bound") * 0.999  # sleeps end late, never early
    assert value("trainer_idle") >= value("bound_trainer_idle") - 0.1
  assert rows["bimodal-4/0.5/on_policy/speed_up"]["value"] == 1
  assert rows["bimodal-4/0.5/fully_async/speed_up"]["value"] > 1.5
  assert rows["bimodal-4/0.5/on_policy/masked"]["value"] == 0
  assert plot_path.read_bytes()[:4] == b"\x89PNG"


def test_unknown_names(tmp_path):
  done, _ = perf(tmp_path, "--traces=bimodal-4,foo")
  assert done.returncode == 1
  assert done.stderr.startswith("error: --traces foo: no such name; known: lognormal-4, ")
