"""Replay buffers as the viewer reads them: SQLite files and PostgreSQL schemas, never written to.

Connections are read-only, with one short transaction at a time, so a run that writes is never held
up. Only the beginning of a record is read where its header is all that is asked for.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from trinity_jax.errors import RunFailed, UserError

LONGEST_HEADER = 64 << 20  # bytes; safetensors' own limit is 100 MB
_BUSY = 10.0  # seconds to wait for a writer

Key = tuple[int, int, int, int]  # (batch, task, run, step)
Headers = Iterator[tuple[Key, bytes | None]]


class Reader(Protocol):
  """An open store."""

  def groups(self) -> Iterable[Any]:
    """(batch, task, payload, pending, version, digest) of every group."""
    ...

  def headers(self, group: tuple[int, int]) -> Headers:
    """Of a group's experiences, in order; see `header`."""
    ...

  def header(self, key: Key) -> bytes | None:
    """The JSON that a record begins with; None for one that is gone or damaged."""
    ...

  def record(self, key: Key) -> bytes | None:
    """All of Experience.to_bytes; None for one that is gone."""
    ...


class Store(Protocol):
  """Where a stage's rollouts are."""

  def exists(self) -> bool:
    """Whether there is something to open."""
    ...

  def opened(self) -> AbstractContextManager[Reader]:
    """Raises:
    UserError: it is no buffer of ours.
    RunFailed: it is locked for longer than a few seconds, cannot be reached, or is unreadable.
    """
    ...


class SqliteStore:
  """A file."""

  def __init__(self, path: Path):
    self.path = path

  def exists(self) -> bool:
    return self.path.is_file()

  @contextlib.contextmanager
  def opened(self) -> Iterator[SqliteReader]:
    # Where the folder is read-only too, SQLite cannot make the files it coordinates with; then
    # nobody writes either, unless there is a log that was not merged.
    path, connection = self.path, None
    try:
      try:
        connection = _connect(path, "mode=ro")
      except sqlite3.OperationalError:
        log = path.with_name(path.name + "-wal")
        if log.exists() and log.stat().st_size:
          raise
        connection = _connect(path, "mode=ro&immutable=1")
      yield SqliteReader(connection)
    except sqlite3.DatabaseError as e:
      if isinstance(e, sqlite3.OperationalError) and "no such table" not in str(e):
        raise RunFailed(f"{path}: cannot be read: {e}") from e
      raise UserError(f"{path}: is no buffer of a run ({e}), or a damaged one") from e
    finally:
      if connection is not None:
        connection.close()


def _connect(path: Path, mode: str) -> sqlite3.Connection:
  uri = f"{path.absolute().as_uri()}?{mode}"
  connection = sqlite3.connect(uri, uri=True, timeout=_BUSY, isolation_level=None)
  try:
    connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
  except BaseException:  # leaves nothing open, then goes on up
    connection.close()
    raise
  return connection


_AT = "batch = ? AND task = ? AND run = ? AND step = ?"


class SqliteReader:
  """Headers come through SQLite's incremental blob access."""

  def __init__(self, connection: sqlite3.Connection):
    self._connection = connection

  def groups(self) -> Iterable[Any]:
    return self._connection.execute(
      "SELECT batch, task, payload, pending, version, digest FROM groups"
    )

  def headers(self, group: tuple[int, int]) -> Headers:
    found = self._connection.execute(
      "SELECT rowid, run, step FROM experiences WHERE batch = ? AND task = ? ORDER BY run, step",
      group,
    ).fetchall()
    for rowid, run, step in found:
      yield (*group, run, step), self._blob(rowid)

  def header(self, key: Key) -> bytes | None:
    found = self._connection.execute(f"SELECT rowid FROM experiences WHERE {_AT}", key).fetchone()
    return self._blob(found[0]) if found else None

  def record(self, key: Key) -> bytes | None:
    found = self._connection.execute(f"SELECT data FROM experiences WHERE {_AT}", key).fetchone()
    return found[0] if found else None

  def _blob(self, rowid: int) -> bytes | None:
    try:
      with self._connection.blobopen("experiences", "data", rowid, readonly=True) as blob:
        size = int.from_bytes(blob.read(8), "little")
        return blob.read(size) if 0 < size <= min(len(blob), LONGEST_HEADER) else None
    except sqlite3.OperationalError as e:
      if "no such rowid" in str(e):  # deleted between two statements
        return None
      raise
