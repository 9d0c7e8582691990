"""SIGTERM: finish the step, save, and leave with a code that launchers restart on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

EXIT_CODE = 75  # EX_TEMPFAIL: nothing is wrong, run the same command again


class Preempted(Exception):
  """The run was asked to end; what it had done is saved, and the same command continues it."""


class Preemption:
  """Whether this process was asked to end, and who is to be told."""

  def __init__(self):
    self.requested = False
    self._callbacks: list[Callable[[], None]] = []

  def request(self) -> None:
    """Asks the run to end. Callbacks run on a thread of their own: a signal may come while the
    main thread holds any lock."""
    self.requested = True
    callbacks = tuple(self._callbacks)
    threading.Thread(target=lambda: [f() for f in callbacks], name="preemption").start()

  @contextlib.contextmanager
  def telling(self, callback: Callable[[], None]) -> Iterator[None]:
    """Calls `callback` when the run is asked to end."""
    self._callbacks.append(callback)
    try:
      yield
    finally:
      self._callbacks.remove(callback)

  @contextlib.contextmanager
  def on_signals(self) -> Iterator[None]:
    """SIGTERM requests the end; a second one ends the process at once. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
      yield  # a notebook's or a test's thread: whoever owns the process handles its signals
      return
    before = signal.getsignal(signal.SIGTERM)

    def handle(number, frame):
      signal.signal(signal.SIGTERM, before)
      self.request()

    signal.signal(signal.SIGTERM, handle)
    try:
      yield
    finally:
      signal.signal(signal.SIGTERM, before)
