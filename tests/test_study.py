"""Algorithms by their names, from one SFT checkpoint: what the table promises is learned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PART = ("ppo", "cpt")  # what no recipe's test trains: a critic, plain text


def study(name, workdir, *flags, timeout):
  env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
  command = [sys.executable, "launch/study.py", name, f"--workdir={workdir}", *flags]
  done = subprocess.run(
    command, cwd=ROOT, env=env | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    timeout=timeout,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
  return json.loads((workdir / f"{name}.json").read_text())


@pytest.mark.slow
def test_a_part_of_the_table_learns(tmp_path):
  flags = ("--seeds=0", f"--only={','.join(PART)}")
  rows = study("algorithms", tmp_path, *flags, timeout=2400)
  print(rows)
  assert [r["algorithm"] for r in rows] == list(PART)
  assert all(r["learned"] for r in rows)


@pytest.mark.nightly
def test_the_table_learns(tmp_path):
  """Three seeds each, and once with the advantages' sign turned: then accuracy falls."""
  from trinity_jax.algorithms import TABLE

  rows = study("algorithms", tmp_path, timeout=6 * 3600)
  assert [r["algorithm"] for r in rows] == list(TABLE)
  assert all(r["learned"] for r in rows)


@pytest.mark.nightly
def test_staleness(tmp_path):
  """Every loss learns from fresh data; what old data do is reported, not asserted."""
  rows = study("staleness", tmp_path, timeout=6 * 3600)
  middle = {(r["loss"], r["staleness"]): sorted(r["after"])[1] for r in rows}
  assert len(middle) == 16 and (tmp_path / "staleness.png").stat().st_size > 0
  assert all(middle[loss, 0] >= rows[0]["before"] + 0.1 for loss, _ in middle)


@pytest.mark.nightly
def test_schedules(tmp_path):
  """Three seeds each: asynchrony may cost a little at equal samples, not the learning."""
  rows = study("schedules", tmp_path, timeout=6 * 3600)
  assert [r["schedule"] for r in rows][0] == "on_policy" and len(rows) == 4
  for row in rows:
    assert sorted(row["after"])[1] >= row["before"] + 0.2, row
  assert min(rows[-1]["staleness"]) > 0, "fully asynchronous runs train on older tokens"
