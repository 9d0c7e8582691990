"""A run that hangs is ended, and the culprit named."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

from trinity_jax.errors import RunFailed
from trinity_jax.monitor.timeline import Timeline
from trinity_jax.watchdog import EXIT_CODE, Watchdog, thread_states


def test_a_stall_names_the_thread_and_writes_the_stacks(tmp_path):
  timeline, told, go_on = Timeline(), threading.Event(), threading.Event()
  errors: list[RunFailed] = []

  def stuck_in_the_device():
    go_on.wait(60)

  thread = threading.Thread(target=stuck_in_the_device, name="sampler")
  thread.start()
  with timeline.span("decode"):
    pass

  def on_stall(error):
    errors.append(error)
    told.set()

  report = tmp_path / "stalled.txt"
  with Watchdog(timeline, 0.2, report, on_stall, grace=60):
    assert told.wait(30)
  go_on.set()
  thread.join()
  message = str(errors[0])
  assert "no progress for 0 s (monitor.stall)" in message
  assert "the last thing that ended was decode" in message and "sampler waits in" in message
  assert "stuck_in_the_device" in report.read_text()


def test_progress_keeps_it_quiet(tmp_path):
  timeline, errors = Timeline(), []
  with Watchdog(timeline, 0.5, tmp_path / "stalled.txt", errors.append):
    for _ in range(8):
      with timeline.span("train"):
        threading.Event().wait(0.1)
  assert not errors and not (tmp_path / "stalled.txt").exists()


def test_a_process_that_does_not_end_is_ended(tmp_path):
  """Nobody listens to the failure: the main thread hangs in a native call."""
  code = f"""
  import time
  from pathlib import Path
  from trinity_jax.monitor.timeline import Timeline
  from trinity_jax.watchdog import Watchdog
  with Watchdog(Timeline(), 0.1, Path({str(tmp_path / "stalled.txt")!r}), print, grace=0.1):
    time.sleep(60)
  """
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
  )
  assert done.returncode == EXIT_CODE and "nothing has ended yet" in done.stderr
  assert "did not end by itself" in done.stderr


def test_those_that_are_busy_come_first():
  go_on = threading.Event()

  def computes():
    while not go_on.is_set():
      sum(range(100))

  thread = threading.Thread(target=computes, name="busy one")
  thread.start()
  try:
    states = thread_states()
    assert next(i for i, s in enumerate(states) if s.startswith("busy one is in ")) < min(
      (i for i, s in enumerate(states) if " waits in " in s), default=len(states)
    )
  finally:
    go_on.set()
    thread.join()
