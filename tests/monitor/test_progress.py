"""The view on terminals, pipes and broken outputs; texts that try to steer the terminal."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from trinity_jax.monitor import text as t
from trinity_jax.monitor.metrics import lookup
from trinity_jax.monitor.progress import _CURVES, HEADLINE, Progress, Sample

ROW = {"reward/mean": 0.5, "eval/accuracy": 0.25, "loss": 1.5, "entropy": 0.7,
       "throughput/tokens_per_s": 12345.6, "staleness/mean": 0.0, "time_split/decode": 60.0,
       "time_split/train": 39.8, "time_split/other": 0.2}
EVIL = "\x1b[2J\x1b]0;owned\x07[bold red]hi[/bold red]\r\x9b31m\u202eabc\u200b\n\x00\ud800"


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def terminal(width=100, **kwargs):
  return Console(file=io.StringIO(), force_terminal=True, width=width, height=30,
                 color_system="truecolor", legacy_windows=False, **kwargs)


def pipe():
  return Console(file=io.StringIO(), force_terminal=False, width=80)


def output(console):
  return console.file.getvalue()


def visible(text):
  """What a reader sees: without rich's own colours and cursor movements."""
  return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


# --- plain ---------------------------------------------------------------------------------------


def test_plain_line_by_hand():
  clock, console = Clock(), pipe()
  view = Progress(console=console, clock=clock)
  assert view.mode == "plain"
  view.update(1, 41, ROW)
  clock.now = 3.0
  view.update(2, 41, {"reward/mean": 0.75}, [Sample("12+39=", "41", 0.0, "51")])
  clock.now = 6.0
  view.update(3, 41, {}, [Sample("12+39=", "51", 1.0, "51")])
  view.close()
  assert output(console).splitlines() == [
    "step 1/41 | reward 0.500 | held-out 0.250 | loss 1.5 | entropy 0.700 | tok/s 12.3k | stale 0"
    " | time decode 60% train 40% | eta ?",
    'step 2/41 | reward 0.750 | eta 1m57s | "12+39=" -> "41" (0)',  # 39 steps of 3 s
    'step 3/41 | eta 1m54s | "12+39=" -> "51" (1), was "41"']


def test_evaluation_after_a_step_keeps_the_pace():
  clock, console = Clock(), pipe()
  view = Progress(console=console, clock=clock)
  for step in (1, 2, 3):
    clock.now = 2.0 * step
    view.update(step, 5)
  clock.now = 7.0
  view.update(3, 5, {"eval/accuracy": 0.5})  # a row of its own, of the same step
  clock.now = 9.0
  view.update(4, 5)
  clock.now = 0.0
  view.update(1, 5)  # another stage
  lines = output(console).splitlines()
  assert [line.split("eta ")[1] for line in lines] == ["?", "6s", "4s", "4s", "2s", "?"]


def test_plain_without_total_and_none():
  console = pipe()
  view = Progress(console=console)
  view.update(5)
  assert output(console) == "step 5 | eta ?\n"
  silent = Progress("none", console=pipe())
  silent.update(1, 2, ROW)
  silent.message("x")
  silent.close()
  assert output(silent._console) == ""


def test_messages_keep_their_lines():
  console = pipe()
  Progress(console=console).message("saved\n\x1b[31mred [b]x[/b]")
  assert output(console) == "saved\n\\x1b[31mred [b]x[/b]\n"


def test_unknown_mode():
  with pytest.raises(ValueError, match="progress mode is 'fancy'"):
    Progress("fancy")


def test_names_are_documented():
  names = [n for _, group in HEADLINE for n in group] + [n for _, n, _ in _CURVES]
  assert [n for n in names if lookup(n) is None] == []


# --- live ----------------------------------------------------------------------------------------


def test_live_shows_everything():
  clock, console = Clock(), terminal()
  with Progress(console=console, title="quick [red]start", clock=clock) as view:
    assert view.mode == "live"
    for step in range(1, 11):
      clock.now = 2.0 * step
      view.update(step, 20, {**ROW, "reward/mean": step / 10},
                  [Sample("1+1=", str(step), 1.0, "2")])
    view.message("checkpoint [b]saved")
  last = visible(output(console)).split("quick")[-1]
  assert last.startswith(" [red]start  step 10/20") and "20s elapsed, 20s left" in last
  for piece in ("▁▁▂▃▄▅▆▇██", "held-out", "tok/s 12.3k", "stale 0", "decode 60%", "train 40%",
                "1+1= → 10", "reward 1", "truth 2", "was 9"):
    assert piece in last, piece
  assert "other" not in last  # rounds to nothing
  assert "checkpoint [b]saved" in visible(output(console))
  assert output(console).endswith("\x1b[?25h")  # the cursor is back


def test_time_bar_never_overflows():
  console = terminal(width=40)
  with Progress(console=console) as view:
    view.update(1, 2, {f"time_split/{c}": 20.0 for c in
                       ("prefill", "decode", "train", "publish", "reward")})
  (bar,) = {line.strip() for line in visible(output(console)).splitlines() if "█" in line}
  assert bar.count("█") == 40 - 12


@pytest.mark.parametrize("width", [1, 2, 5, 10, 19, 20, 33, 80, 1000])
@pytest.mark.parametrize("mode", ["auto", "live", "plain"])
def test_any_width(width, mode):
  console = terminal(width=width)
  with Progress(mode, console=console, title="t" * 50) as view:
    before = view.mode
    for step in range(3):
      view.update(step, 3, ROW, [Sample("p" * 500, EVIL, -1.0, "truth" * 50)] * 3)
    assert view.mode == before == ({"auto": "live" if width >= 20 else "plain"}.get(mode, mode))
  if before == "live":
    lines = visible(output(console)).replace("\r", "\n").splitlines()
    assert max(len(line) for line in lines) <= max(width, 10)


def test_values_that_are_no_numbers():
  console = terminal()
  with Progress(console=console) as view:
    view.update(1, 0, {"reward/mean": float("nan"), "loss": float("inf"), "entropy": -1e300})
    view.update(2, -5, {"reward/mean": 1e300, "loss": float("-inf")})
    view.update(1, 3, {"reward/mean": -1e300})  # steps that go back: another stage
    assert view.mode == "live"


def test_the_curve_outlives_the_row_but_plain_lines_do_not_repeat():
  console = terminal()
  with Progress(console=console) as view:
    view.update(1, 2, {"eval/accuracy": 0.125})
    view.update(2, 2, {"loss": 1.0})
  assert "held-out 0.125" in visible(output(console)).split("step 2/2")[-1]


def test_memory_is_bounded():
  view = Progress("plain", console=pipe())
  for step in range(2500):
    view.update(step, 0, {"reward/mean": 0.1}, [Sample(f"p{step}", "r")])
  assert len(view._curves["reward/mean"]) == 2000 and len(view._before) == 256


# --- outputs that break --------------------------------------------------------------------------


class Broken(io.StringIO):
  """A stream that raises from the moment `broken` is set."""

  broken = False

  def write(self, text):
    if self.broken:
      raise BrokenPipeError("gone")
    return super().write(text)


def test_closed_pipe_turns_the_output_off(caplog):
  file = Broken()
  view = Progress("plain", console=Console(file=file))
  view.update(1, 3, ROW)
  file.broken = True
  with caplog.at_level(logging.WARNING):
    view.update(2, 3, ROW)
    view.update(3, 3, ROW)
    view.message("x")
    view.close()
  assert view.mode == "none"
  assert [r.getMessage() for r in caplog.records] == [
    "progress view failed (BrokenPipeError: gone); going on with no output"]
  assert file.getvalue().count("step") == 1


def test_live_view_on_a_broken_terminal_gives_the_streams_back(caplog):
  file, streams = Broken(), (sys.stdout, sys.stderr)
  view = Progress("live", console=Console(file=file, force_terminal=True, width=80))
  view.update(1, 3, ROW)
  file.broken = True
  with caplog.at_level(logging.WARNING):
    view.update(2, 3, ROW)
  assert view.mode == "none" and (sys.stdout, sys.stderr) == streams
  assert "going on with plain output" in caplog.text and "going on with no output" in caplog.text


def test_a_bug_in_the_view_degrades_to_plain(monkeypatch, caplog):
  console, streams = terminal(), (sys.stdout, sys.stderr)
  view = Progress(console=console)
  monkeypatch.setattr(view, "_view", lambda: 1 / 0)
  with caplog.at_level(logging.WARNING):
    view.update(1, 2, ROW)
  assert view.mode == "plain" and (sys.stdout, sys.stderr) == streams
  assert "ZeroDivisionError" in caplog.text
  assert "step 1/2 | reward 0.500" in output(console)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
@pytest.mark.parametrize("mode", ["auto", "live", "plain"])
def test_terminals_without_unicode(encoding, mode):
  raw = io.BytesIO()
  file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
  view = Progress(mode, console=Console(file=file, force_terminal=True, width=80))
  view.update(1, 2, ROW, [Sample("π=\n", "3 → ✓", 1.0)])
  view.message("π")
  assert view.mode == "plain" and raw.getvalue().startswith(b"step 1/2") and b"?" in raw.getvalue()


def test_surrogates_reach_a_utf8_stream():
  raw = io.BytesIO()
  view = Progress(console=Console(file=io.TextIOWrapper(raw, encoding="utf-8", write_through=True)))
  view.update(1, 2, {}, [Sample(EVIL, EVIL)])
  assert view.mode == "plain" and b"\\ud800" in raw.getvalue()


# --- texts that steer ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [terminal, pipe])
def test_injection(make):
  console, plain = make(), make()
  for where, sample in ((console, Sample(EVIL, EVIL, 1.0, EVIL)),
                        (plain, Sample("p", "r", 1.0, "t"))):
    with Progress(console=where) as view:
      view.update(1, 2, ROW, [sample])
      view.update(2, 2, ROW, [sample._replace(response=sample.response + "!")])
      view.message(EVIL if where is console else "m")
  evil, tame = output(console), output(plain)
  for char in "\x07\x9b\x00\u202e\u200b\ud800":
    assert char not in evil
  # Only rich's own sequences remain: the same kinds as for a harmless sample.
  kinds = [set(re.findall(r"\x1b(?:\[[0-9;?]*[A-Za-z]|.)", o)) for o in (evil, tame)]
  assert kinds[0] <= kinds[1] | {"\x1b[2m", "\x1b[0m", "\x1b[2;3m", "\x1b[32m"}
  assert "\x1b[2J" not in evil and "\x1b]" not in evil
  assert "[bold red]hi[/bold red]" in visible(evil)  # markup is shown, not obeyed


def test_sanitize_by_hand():
  assert t.sanitize("a\tb\nc\x1b[0m") == "a b⏎c\\x1b[0m"
  assert t.sanitize("\u202e\u2028\ud800\u200d") == "\\u202e\\u2028\\ud800\\u200d"
  assert t.sanitize("é" + "\u0301" * 50 + "x") == "é\u0301\u0301x"
  assert t.sanitize("abcdef", 4) == "abc…" and t.sanitize("abcd", 4) == "abcd"
  assert t.sanitize("ab\x1b", 4) == "ab…"  # an escape is not cut in the middle
  assert t.sanitize("日本[b]") == "日本[b]" and t.sanitize(None) == "None"
  assert t.sanitize("a", 0) == ""


@given(st.text(), st.integers(0, 60))
def test_sanitize_is_printable_and_short(text, limit):
  safe = t.sanitize(text, limit)
  assert len(safe) <= limit
  assert all(c.isprintable() or not c.isascii() for c in safe)
  assert not re.search("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069"
                       "\ud800-\udfff]", safe)


@pytest.mark.parametrize("values, width, expected", [
  ([], 5, ""), ([1], 0, ""), ([0, 1], 9, "▁█"), ([3, 3, 3], 3, "▁▁▁"),
  ([0, 0, 7, 7], 2, "▁█"), ([float("nan"), 1, 2], 3, " ▁█"), ([float("nan")], 3, " "),
  ([float("inf"), 0], 2, " ▁"), (list(range(8)), 8, "▁▂▃▄▅▆▇█")])
def test_sparkline(values, width, expected):
  assert t.sparkline(values, width) == expected


@pytest.mark.parametrize("value, expected", [
  (0, "0"), (0.5, "0.500"), (0.00123, "1.2e-03"), (1, "1"), (12.345, "12.3"), (1234.5, "1234"),
  (12345, "12.3k"), (-2.5e6, "-2.5M"), (3e9, "3.0G"), (float("nan"), "nan"), (1e300, "1.0e+300")])
def test_number(value, expected):
  assert t.number(value) == expected


@pytest.mark.parametrize("seconds, expected", [
  (0, "0s"), (59.4, "59s"), (60, "1m00s"), (3599.6, "1h00m"), (7380, "2h03m"), (273600, "3d04h"),
  (-1, "?"), (float("inf"), "?"), (float("nan"), "?")])
def test_duration(seconds, expected):
  assert t.duration(seconds) == expected
