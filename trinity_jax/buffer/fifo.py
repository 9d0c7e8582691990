"""Fifo, replaced by ReplayBuffer: complete groups in, experiences of one step out, in id order.

A group is put whole (failed runs included, as empty experiences), so the number of experiences is
known and the order can be that of the ids, whatever the order of arrival: what a synchronous run
trains on does not depend on the clock. Storage in memory.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
import time
from collections.abc import Callable, Sequence

from trinity_jax.errors import RunFailed
from trinity_jax.experience import Experience


class Fifo:
  """FIFO by (explorer step, task), bounded by experiences, thread-safe.

  Args:
    capacity: most experiences held; `put` waits while a group does not fit.
    tasks_per_step: tasks of each explorer step: which group comes next is then known.
    first_step: explorer step whose groups come first (after a resume: not 1).
  """

  def __init__(self, capacity: int, tasks_per_step: int, first_step: int = 1):
    self._capacity = capacity
    self._tasks = tasks_per_step
    self._next = (first_step, 0)
    self._held: list[tuple[tuple[int, int], int, list[Experience]]] = []
    self._count = 0
    self._serial = 0
    self._changed = threading.Condition()
    self._space: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
    self._closed: BaseException | None = None

  def __len__(self) -> int:
    """Experiences held."""
    with self._changed:
      return self._count

  async def put(self, group: Sequence[Experience]) -> None:
    """Takes one task's runs; waits (without blocking the event loop) while the buffer is full.

    The group that is due next is always taken, or a full buffer of later groups would wait for
    it for ever.
    """
    name = group[0].id.group
    while True:
      with self._changed:
        if self._closed is not None:
          raise RunFailed("the replay buffer is closed") from self._closed
        if self._count + len(group) <= self._capacity or name == self._next:
          self._insert(name, list(group))
          return
        waiter = (asyncio.get_running_loop(), asyncio.Event())
        self._space.append(waiter)
      try:
        await waiter[1].wait()
      finally:
        with self._changed:  # a cancelled producer's loop may be gone when somebody wakes it
          self._space = [w for w in self._space if w is not waiter]

  def _insert(self, name, group) -> None:
    if name < self._next or any(name == held for held, _, _ in self._held):
      raise ValueError(f"group {name} was put twice")
    heapq.heappush(self._held, (name, self._serial, group))
    self._serial += 1
    self._count += len(group)
    self._changed.notify_all()

  def _take_due(self, n: int, out: list[Experience]) -> None:
    """Moves groups that are due into `out` until it holds n experiences."""
    while len(out) < n and self._held and self._held[0][0] == self._next:
      _, _, group = heapq.heappop(self._held)
      out.extend(group)
      self._count -= len(group)
      step, task = self._next
      self._next = (step, task + 1) if task + 1 < self._tasks else (step + 1, 0)

  def sample(
    self, n: int, deadline: float, describe: Callable[[], str] = lambda: ""
  ) -> list[Experience]:
    """The next n experiences in id order (whole groups); blocks until they are there.

    Args:
      n: a multiple of the group size.
      deadline: seconds to wait.
      describe: called when the wait expires; says what the producers are doing.

    Raises:
      RunFailed: the wait expired (says which group is missing) or the buffer was closed.
    """
    out: list[Experience] = []
    end = time.monotonic() + deadline
    while True:
      with self._changed:
        self._take_due(n, out)
        self._wake_producers()
        if len(out) >= n:
          return out
        if self._closed is not None:
          raise RunFailed("the replay buffer was closed while the trainer waited") from self._closed
        left = end - time.monotonic()
        if left <= 0:
          raise RunFailed(
            f"the trainer waited {deadline:.0f} s (sync.timeout) for {n} experiences and has "
            f"{len(out)}: group {self._next} (explorer step, task) is missing, {self._count} later "
            f"ones are here. {describe()}"
          )
        self._changed.wait(left)

  def _wake_producers(self) -> None:
    waiting, self._space = self._space, []
    for loop, event in waiting:
      loop.call_soon_threadsafe(event.set)

  def close(self, error: BaseException) -> None:
    """Fails everyone who waits, now and later."""
    with self._changed:
      self._closed = error
      self._wake_producers()
      self._changed.notify_all()
