"""Counts XLA compilations, so that "no compilation after the warm-up" is a number.

jax reports a duration event whose name contains `backend_compile` for every program it compiles or
loads from the persistent compilation cache; both stall the thread that asked, so both count. Small
eager operations (`jnp.zeros(3)`) are programs too.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any


class CompileCounter:
  """Compilations of this process since `start()`, as a context manager or start/close pair.

  Attributes (all safe to read from any thread):
    count: compilations seen.
    seconds: time spent in them.
    since_warmup: compilations while warm, that is after `mark_warm` and outside any stretch that
      `mark_cold` opened (a new stage compiles its own programs). 0 before the first `mark_warm`:
      look at `warm` or `ever_warm` before you claim anything with it.
    late: names of the newest programs that were compiled while warm, oldest first.
  """

  def __init__(self, *, keep: int = 32):
    self._lock = threading.Lock()
    self._started = False
    self.count = 0
    self.seconds = 0.0
    self.since_warmup = 0
    self.warm = False
    self.ever_warm = False
    self._late: deque[str] = deque(maxlen=keep)

  def start(self) -> CompileCounter:
    """Begins to listen; a second call changes nothing."""
    import jax.monitoring

    with self._lock:
      if not self._started:
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        self._started = True
    return self

  def close(self) -> None:
    """Stops listening; the numbers stay. A second call changes nothing."""
    import jax.monitoring

    with self._lock:
      if self._started:
        jax.monitoring.unregister_event_duration_listener(self._listen)
        self._started = False

  def mark_warm(self) -> None:
    """Declares that every program is compiled: from here on a compilation is late."""
    with self._lock:
      self.warm = self.ever_warm = True

  def mark_cold(self) -> None:
    """Suspends that claim until the next `mark_warm`; `since_warmup` keeps what it has."""
    with self._lock:
      self.warm = False

  @property
  def late(self) -> list[str]:
    with self._lock:
      return list(self._late)

  def metrics(self) -> dict[str, float]:
    """Returns the `compile/*` metrics."""
    with self._lock:
      return {"compile/count": self.count, "compile/seconds": self.seconds,
              "compile/after_warmup": self.since_warmup}

  def __enter__(self) -> CompileCounter:
    return self.start()

  def __exit__(self, *exc: object) -> None:
    self.close()

  def _listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
    if "backend_compile" not in event:
      return
    with self._lock:
      self.count += 1
      self.seconds += duration_secs
      if self.warm:
        self.since_warmup += 1
        self._late.append(str(kwargs.get("fun_name", "?")))
