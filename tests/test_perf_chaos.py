"""launch/perf.py chaos: every episode ends as its seeds say, and nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PERF = Path(__file__).parents[1] / "launch" / "perf.py"


@pytest.mark.slow
def test_chaos_is_accounted_for(tmp_path):
  """It ends with an error where counts by outcome are not those of the seeds."""
  path = tmp_path / "rows.json"
  done = subprocess.run(
    [sys.executable, str(PERF), "chaos", "--chaos_episodes=300", "--chaos_concurrent=24",
     "--chaos_deadline=10", f"--json={path}"],
    capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  rows = {r["name"]: r["value"] for r in json.loads(path.read_text())}
  failed = sum(value for name, value in rows.items() if name.startswith("chaos/failed/"))
  assert rows["chaos/completed"] + failed == 300 and failed > 0
  assert rows["chaos/tried_again"] > 20
  for name in ("threads", "descriptors", "processes", "slots"):
    assert rows[f"chaos/more_{name}"] == 0
  assert rows["chaos/more_memory"] < 100
