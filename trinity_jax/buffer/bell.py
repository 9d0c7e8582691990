"""Bells: "something changed, look again", from any thread to every thread that waits.

A waiter reads `count`, looks at the state it cares about, and waits for a count other than the one
it read: a change in between is never missed. Rings carry nothing and may be spurious.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from trinity_jax.errors import RunFailed


class ThreadBell:
  """Wakes the threads of this process."""

  def __init__(self):
    self._changed = threading.Condition()
    self._count = 0
    self._callbacks: dict[object, Callable[[], None]] = {}

  @property
  def count(self) -> int:
    """Rings so far."""
    with self._changed:
      return self._count

  def ring(self) -> None:
    """Wakes everyone who waits."""
    self.ring_here()

  def ring_here(self) -> None:
    """Wakes those of this process only."""
    with self._changed:
      self._count += 1
      self._changed.notify_all()
      callbacks = list(self._callbacks.values())
    for callback in callbacks:
      callback()

  def wait(self, seen: int, timeout: float) -> int:
    """Returns the count as soon as it is not `seen`, or after `timeout` seconds."""
    with self._changed:
      self._changed.wait_for(lambda: self._count != seen, timeout)
      return self._count

  def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
    """Calls `callback` at each ring, from any thread; it must be quick and not raise.

    An event loop's waiter passes a function that uses `loop.call_soon_threadsafe`.

    Returns:
      A function that ends the subscription.
    """
    name = object()
    with self._changed:
      self._callbacks[name] = callback

    def unsubscribe() -> None:
      with self._changed:
        self._callbacks.pop(name, None)

    return unsubscribe

  def close(self) -> None:
    """Ends what listens for other processes."""


class FileBell(ThreadBell):
  """Wakes the threads of every process of this machine that has a bell on the same folder.

  Uses the system's own file notification (watchdog: inotify, FSEvents, ...), no poll. Any file that
  is written, created, removed or renamed directly in the folder rings too.

  Raises:
    RunFailed: the system does not let us watch the folder.
  """

  def __init__(self, directory: str | os.PathLike[str]):
    super().__init__()
    from watchdog.events import (
      FileCreatedEvent,
      FileDeletedEvent,
      FileModifiedEvent,
      FileMovedEvent,
      FileSystemEvent,
      FileSystemEventHandler,
    )
    from watchdog.observers import Observer

    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    self._file = os.open(path / "bell", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    bell = self

    class Handler(FileSystemEventHandler):
      def on_any_event(self, event: FileSystemEvent) -> None:
        bell.ring_here()

    kinds: list[type[FileSystemEvent]] = [
      FileCreatedEvent, FileDeletedEvent, FileModifiedEvent, FileMovedEvent,
    ]  # fmt: skip
    self._observer = Observer()
    self._observer.daemon = True
    try:
      self._observer.schedule(Handler(), str(path), recursive=False, event_filter=kinds)
      self._observer.start()
    except OSError as e:
      os.close(self._file)
      raise RunFailed(
        f"{path}: cannot be watched for changes ({e}); on Linux the limits are "
        "fs.inotify.max_user_watches and fs.inotify.max_user_instances"
      ) from e
    self._closed = False

  def ring(self) -> None:
    super().ring()
    with self._changed:
      if not self._closed:
        os.pwrite(self._file, b"\0", 0)

  def close(self) -> None:
    with self._changed:
      if self._closed:
        return
      self._closed = True
      os.close(self._file)
    self._observer.stop()
    if threading.current_thread() is not self._observer:
      self._observer.join(10)
