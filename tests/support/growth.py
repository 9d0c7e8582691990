"""How the time of some work grows with its size: what is linear, on a machine of any speed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

FACTOR = 8


def assert_linear(work: Callable[[int], Any], size: int) -> None:
  """Asserts that work(8 size) takes less than 24 times the CPU time of work(size).

  Linear work takes 8 times, quadratic work 64 times. `size` should take a millisecond or more; the
  time is this thread's alone and the least of several, so a busy machine does not matter.
  """
  assert (grown := _least(work, FACTOR * size) / _least(work, size)) < 3 * FACTOR, (
    f"{FACTOR} times the size took {grown:.1f} times the time"
  )


def _least(work: Callable[[int], Any], size: int) -> float:
  seconds = []
  gc.disable()  # a collection looks at all that the process holds, not at this work
  try:
    for _ in range(3):
      start = time.thread_time()
      work(size)
      seconds.append(time.thread_time() - start)
  finally:
    gc.enable()
  return min(seconds)
