"""summary.json: required keys, strict JSON, memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from trinity_jax.monitor import summary

VALUES = {
  "accuracy_after_sft": 0.4, "accuracy_final": np.float32(0.5), "wall_seconds": 9.5,
  "logprob_diff_p999": 1e-6, "logprob_diff_max": 2e-6, "compiles_after_warmup": np.int64(0),
  "peak_rss_mb": 300.0, "resumed": False, "seed": 1}


def test_write_and_read(tmp_path):
  path = summary.write_summary(tmp_path, {**VALUES, "steps": {"grpo": 40}, "best": math.nan})
  assert path == tmp_path / "summary.json" and list(tmp_path.iterdir()) == [path]
  raw = json.loads(path.read_text(), parse_constant=pytest.fail)
  assert raw["accuracy_final"] == 0.5 and raw["resumed"] is False and raw["steps"] == {"grpo": 40}
  assert raw["best"] is None and raw["nonfinite"] == {"best": "nan"}
  assert math.isnan(summary.read_summary(tmp_path)["best"])
  summary.write_summary(tmp_path, {**VALUES, "accuracy_after_sft": None})  # no SFT stage
  assert summary.read_summary(tmp_path)["accuracy_after_sft"] is None


@pytest.mark.parametrize("key", summary.REQUIRED)
def test_required(tmp_path, key):
  with pytest.raises(ValueError, match=f"summary lacks {key}"):
    summary.write_summary(tmp_path, {k: v for k, v in VALUES.items() if k != key})
  assert list(tmp_path.iterdir()) == []


def test_what_json_cannot_hold(tmp_path):
  with pytest.raises(TypeError):
    summary.write_summary(tmp_path, {**VALUES, "x": object()})
  with pytest.raises(ValueError):
    summary.write_summary(tmp_path, {**VALUES, "x": [math.nan]})
  assert list(tmp_path.iterdir()) == []


def test_worst_and_last():
  rows = [{"step": 1, "d": 2.0}, {"step": 2}, {"step": 3, "d": 5.0}, {"step": 4, "d": 1.0},
          {"step": 5, "d": None}]
  assert summary.worst(rows, "d") == 5.0 and summary.last(rows, "d") == 1.0
  assert summary.worst(rows, "e") is None and summary.last(rows, "e") is None
  assert math.isnan(summary.worst([*rows, {"d": math.nan}, {"d": 9.0}], "d"))


def test_peak_rss_sees_an_allocation_and_not_the_parent():
  code = ("from trinity_jax.monitor.summary import peak_rss_mb, rss_mb\n"
          "a = peak_rss_mb(); b = bytearray(200_000_000); b[::4096] = b'x' * len(b[::4096])\n"
          "c = peak_rss_mb(); del b; print(a, c, peak_rss_mb(), rss_mb())")
  ballast = bytearray(300_000_000)
  ballast[::4096] = b"x" * len(ballast[::4096])
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  before, after, later, now = (float(v) if v != "None" else None for v in out.stdout.split())
  assert before < 150  # ru_maxrss would say at least the parent's 300 here
  assert 190 < after - before < 260
  assert later > after - 5  # the kernel's counters are a few pages apart
  assert now is None or now < after - 150
