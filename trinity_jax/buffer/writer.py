"""One thread that writes groups: puts in flight share transactions, a full buffer holds some back.

The thread lives while something is to be written or held back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from trinity_jax.buffer.bell import ThreadBell
from trinity_jax.buffer.record import Group, Outcome
from trinity_jax.errors import RunFailed

MOST_GROUPS = 16  # per transaction


class Put:
  """A group on its way; `done` gives its outcome."""

  def __init__(self, group: Group):
    self.group = group
    self.done: Future[Outcome] = Future()
    self.abandoned = False  # who waited was cancelled

  def finish(self, outcome: Outcome | BaseException) -> None:
    if isinstance(outcome, BaseException):
      self.done.set_exception(outcome)
    else:
      self.done.set_result(outcome)


class Writer:
  """Writes what is submitted, in id order among what waits.

  Args:
    write: writes groups in one transaction; None as the outcome of one that has to wait.
    bell: rings when one that had to wait may be tried again.
  """

  def __init__(self, write: Callable[[Sequence[Group]], list[Outcome | None]], bell: ThreadBell):
    self._write, self._bell = write, bell
    self._changed = threading.Condition()
    self._new: list[Put] = []
    self._held: list[Put] = []
    self._rung = False
    self._alive = False
    self._closed: BaseException | None = None

  def submit(self, group: Group) -> Put:
    put = Put(group)
    put.done.set_running_or_notify_cancel()  # `abandoned` cancels, not the future
    with self._changed:
      if self._closed is not None:
        put.finish(_ended(self._closed))
        return put
      self._new.append(put)
      self._changed.notify_all()
      if not self._alive:
        self._alive = True
        threading.Thread(target=self._run, name="buffer-writer", daemon=True).start()
    return put

  def abandon(self, put: Put) -> None:
    """Forgets a put that is not being written."""
    with self._changed:
      put.abandoned = True
      self._changed.notify_all()

  def close(self, error: BaseException) -> None:
    """Fails what waits, now and later; a transaction that runs is finished."""
    with self._changed:
      self._closed = error
      waiting, self._new, self._held = self._new + self._held, [], []
      self._changed.notify_all()
    for put in waiting:
      put.finish(_ended(error))

  def _run(self) -> None:
    unsubscribe = self._bell.subscribe(self._ring)
    try:
      while (puts := self._next()) is not None:
        self._try(puts)
    finally:
      unsubscribe()

  def _ring(self) -> None:
    with self._changed:
      self._rung = True
      self._changed.notify_all()

  def _next(self) -> list[Put] | None:
    """What to try next; waits while everything is held back, None when there is nothing left."""
    with self._changed:
      while True:
        self._new = [p for p in self._new if not p.abandoned]
        self._held = [p for p in self._held if not p.abandoned]
        if self._rung:
          self._rung = False
          self._new, self._held = self._held + self._new, []
        if self._new:
          self._new.sort(key=lambda p: p.group.key)
          puts, self._new = self._new[:MOST_GROUPS], self._new[MOST_GROUPS:]
          return puts
        if not self._held:
          self._alive = False
          return None
        self._changed.wait()

  def _try(self, puts: list[Put]) -> None:
    try:
      outcomes = self._write([p.group for p in puts])
    except BaseException as e:  # handed to those who wait for these groups
      for put in puts:
        put.finish(e)
      return
    held = []
    for put, outcome in zip(puts, outcomes):
      if outcome is None:
        held.append(put)
      else:
        put.finish(outcome)
    with self._changed:
      if self._closed is None:
        self._held += held
        return
    for put in held:
      put.finish(_ended(self._closed))


def _ended(error: BaseException) -> RunFailed:
  return RunFailed("the replay buffer is closed", error)
