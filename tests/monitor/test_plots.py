"""The PNG: size, stages, odd inputs. That it looks good was looked at."""

from __future__ import annotations

import math
import struct
import sys

import pytest

from trinity_jax.errors import UserError
from trinity_jax.monitor import plots
from trinity_jax.monitor.writers import JsonlWriter


def write(path, rows):
  writer = JsonlWriter(path)
  for step, metrics in rows:
    writer.write(step, metrics)
  writer.close()
  return path


def size(path):
  data = path.read_bytes()
  assert data[:8] == b"\x89PNG\r\n\x1a\n"
  return struct.unpack(">II", data[16:24])


RUN = [(s, {"stage": 0, "loss": 1 / s, "throughput/train_tokens_per_s": 1e4})
       for s in range(1, 101)]
RUN += [(s, {"stage": 1, "loss": 0.0, "entropy": 0.5, "reward/mean": s / 140, "eval/accuracy": 0.5,
             "throughput/tokens_per_s": 5e3}) for s in range(101, 141)]


def test_one_file_two_stages(tmp_path):
  write(tmp_path / "m", RUN)
  had = "matplotlib.pyplot" in sys.modules
  out = plots.curves_png(tmp_path / "m", tmp_path / "a.png", title="$run$ [b]",
                         stages=["SFT", "GRPO"])
  assert out == tmp_path / "a.png" and size(out) == plots.SIZE == (1200, 500)
  assert ("matplotlib.pyplot" in sys.modules) == had  # no global figure state of ours
  found = plots._stages([tmp_path / "m"], ["SFT", "GRPO"])
  assert [(s.name, s.first, s.last) for s in found] == [("SFT", 1, 100), ("GRPO", 101, 140)]
  assert found[1].x(101) == 1.0 and found[1].x(140) == 2.0  # equal widths
  assert plots._series(found, "reward/mean")[0][0][0] == 1.0


def test_two_files_and_ranges(tmp_path):
  a = write(tmp_path / "a", [(s, {"loss": 1.0}) for s in range(5)])
  b = write(tmp_path / "b", [(s, {"reward/mean": 0.1}) for s in range(3)])
  found = plots._stages([a, b], ["SFT", "GRPO"])
  assert [(s.name, s.first, s.last) for s in found] == [("SFT", 0, 4), ("GRPO", 0, 2)]
  assert size(plots.curves_png([a, b], tmp_path / "o.png", stages=["SFT", "GRPO"])) == plots.SIZE
  found = plots._stages([a], {"x": (0, 1), "y": (2, 4), "never": (9, 9)})
  assert [(s.name, len(s.rows)) for s in found] == [("x", 2), ("y", 3)]
  assert [s.name for s in plots._stages([a], None)] == [""]
  with pytest.raises(UserError, match="1 stage names for 2 metrics files"):
    plots.curves_png([a, b], tmp_path / "o.png", stages=["SFT"])


def test_what_explorers_wrote_is_drawn_too(tmp_path):
  path = write(tmp_path / "metrics.jsonl", [(s, {"reward/mean": 0.1}) for s in (1, 2, 3)])
  for name, step in (("a", 3), ("b", 1)):
    (tmp_path / "explorers" / name).mkdir(parents=True)
    write(tmp_path / "explorers" / name / "metrics.jsonl", [(step, {"eval/accuracy": step / 4})])
  found = plots._stages([path], None)
  assert plots._series(found, "eval/accuracy") == [([0.0, 1.0], [0.25, 0.75])]
  plots.curves_png(path, tmp_path / "o.png")
  assert not list(tmp_path.glob("o.png.*"))


def test_resume_and_nonfinite(tmp_path):
  path = write(tmp_path / "m", [(1, {"loss": 5.0}), (2, {"loss": math.nan}), (1, {"loss": 6.0}),
                                (3, {"loss": math.inf, "eval/heldout/accuracy": 0.25})])
  found = plots._stages([path], None)
  assert plots._series(found, "loss") == [([0.0], [6.0])]
  assert plots._held_out(found) == "eval/heldout/accuracy"
  assert size(plots.curves_png(path, tmp_path / "o.png")) == plots.SIZE


@pytest.mark.parametrize("rows", [
  [(1, {})], [(1, {"reward/mean": -3.0})], [(0, {"entropy": 0.0, "loss": 0.0})],
  [(10**7, {"loss": 1e30}), (10**7 + 1, {"loss": -1e-30, "throughput/tokens_per_s": 0.0})]])
def test_odd_runs(tmp_path, rows):
  path = write(tmp_path / "m", rows)
  out = plots.curves_png(path, tmp_path / "o.png", stages=["a very long name" * 9])
  assert size(out) == plots.SIZE


def test_no_rows(tmp_path):
  path = write(tmp_path / "m", [])
  with pytest.raises(UserError, match="no metrics to draw"):
    plots.curves_png(path, tmp_path / "o.png")
  with pytest.raises(UserError, match="cannot read"):
    plots.curves_png(tmp_path / "absent", tmp_path / "o.png")


def test_smooth():
  assert plots._smooth([0, 3, 6, 9], 3) == [1.5, 3, 6, 7.5]
