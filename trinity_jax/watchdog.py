"""Ends a run in which nothing goes on any more, and says who holds it up.

Progress is a span of the timeline that ends, in any thread: a dispatch of the sampler, a graded
answer, a train step. Waits with deadlines of their own usually end first; this is for what hangs
where no deadline can reach, such as a device program or a native call.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from trinity_jax.errors import RunFailed
from trinity_jax.monitor.timeline import Timeline

EXIT_CODE = 3
# Files of the standard library, and of watchdog, in which threads wait.
_WAITING = (
  "threading.py", "selectors.py", "queue.py", "concurrent/futures/_base.py",
  "concurrent/futures/thread.py", "inotify_c.py",
)  # fmt: skip


class Watchdog:
  """Watches a timeline from a thread of its own, between `start` and `stop`.

  Args:
    deadline: seconds without progress.
    report: file that gets the stacks of all threads.
    on_stall: called with what to raise; everyone who waits should fail with it.
    grace: seconds after which a process that still has not ended is ended hard (None: another
      deadline, between 10 s and a minute).
  """

  def __init__(
    self,
    timeline: Timeline,
    deadline: float,
    report: Path,
    on_stall: Callable[[RunFailed], None],
    *,
    grace: float | None = None,
  ):
    self._timeline, self._deadline, self._report = timeline, deadline, report
    self._on_stall = on_stall
    self._grace = min(max(deadline, 10.0), 60.0) if grace is None else grace
    self._stopped = threading.Event()
    self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

  def __enter__(self) -> Watchdog:
    self._began = time.monotonic()
    self._thread.start()
    return self

  def __exit__(self, *exc: object) -> None:
    self._stopped.set()
    self._thread.join()

  def _run(self) -> None:
    while not self._stopped.wait(max(self._left(), 0.01)):
      if self._left() > 0:
        continue
      message = self._describe()
      with self._report.open("w") as file:
        file.write(message + "\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
      self._on_stall(RunFailed(f"{message}; stacks of all threads: {self._report}"))
      if not self._stopped.wait(self._grace):
        print(f"error: {message}; the process did not end by itself", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)
      return

  def _left(self) -> float:
    """Seconds until the run counts as stalled."""
    last = self._timeline.last_progress()
    idle = time.monotonic() - self._began
    if last is not None:
      idle = min(idle, last[1])
    return self._deadline - idle

  def _describe(self) -> str:
    last = self._timeline.last_progress()
    what = f"the last thing that ended was {last[0]}" if last else "nothing has ended yet"
    return (
      f"no progress for {self._deadline:.0f} s (monitor.stall): {what}. "
      f"{'; '.join(thread_states())}"
    )


def thread_states() -> list[str]:
  """What each thread is at: those that do something, or are stuck in it, before those that wait."""
  frames, busy, waiting = sys._current_frames(), [], []
  for thread in threading.enumerate():
    frame = frames.get(thread.ident or 0)
    if frame is None or thread is threading.current_thread():
      continue
    stack = traceback.extract_stack(frame)
    ours = [f for f in stack if "trinity_jax" in f.filename or "kernels" in f.filename]
    place = (ours or stack)[-1]
    where = f"{Path(place.filename).name}:{place.lineno} {place.name}"
    if stack[-1].filename.endswith(_WAITING):
      waiting.append(f"{thread.name} waits in {where}")
    else:
      busy.append(f"{thread.name} is in {where}")
  return busy + waiting
