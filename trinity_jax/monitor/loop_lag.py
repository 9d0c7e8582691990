"""How late an event loop runs what is due: what blocks it, holds up every agent at once."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
from collections.abc import Iterator

import numpy as np

PERIOD = 0.02  # seconds between two looks
MOST = 100_000  # delays that are kept until somebody takes them


class LoopLag:
  """Measures while `running`; `take` may be called from any thread."""

  def __init__(self) -> None:
    self._delays: collections.deque[float] = collections.deque(maxlen=MOST)
    self._lock = threading.Lock()
    self._timer: asyncio.TimerHandle | None = None

  @contextlib.contextmanager
  def running(self) -> Iterator[None]:
    """Measures the running event loop."""
    loop = asyncio.get_running_loop()

    def tick(due: float) -> None:
      now = loop.time()
      with self._lock:
        self._delays.append(now - due)
      self._timer = loop.call_at(now + PERIOD, tick, now + PERIOD)

    tick(loop.time())
    try:
      yield
    finally:
      assert self._timer is not None
      self._timer.cancel()

  def take(self) -> float | None:
    """99th percentile of the delays in seconds since the last call; None when there were none."""
    with self._lock:
      delays, self._delays = self._delays, collections.deque(maxlen=MOST)
    return float(np.percentile(delays, 99)) if delays else None
