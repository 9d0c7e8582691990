"""A database that is cut, locked or full: transactions that are tried again, errors that name it.

Needs SQLAlchemy; imported by the database stores only.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError

from trinity_jax.errors import RunFailed, UserError

T = TypeVar("T")
Verdict = Literal["again", "full", "damaged", "failed"]

BUSY = 60.0  # seconds that SQLite waits for another process's transaction
PAGE = 16384  # bytes; large pages make large experiences cheap
CHECKPOINT = 4000  # pages in the log before it is merged: small groups rewrite the same pages


class Database:
  """Runs functions of a connection as transactions.

  A function may run more than once: its second argument counts the attempts before this one, any of
  which may have been committed although its answer was lost.

  Args:
    url: of SQLAlchemy.
    place: for messages; no password in it.
    durability: "process" (SQLite's synchronous=NORMAL: safe when a process is killed) or "power"
      (FULL: synced at each transaction).
    patience: seconds to keep trying when the connection is cut.
    namespace: PostgreSQL schema of the tables.
  """

  def __init__(
    self,
    url: sa.URL,
    place: str,
    *,
    durability: Literal["process", "power"] = "process",
    patience: float = 60.0,
    namespace: str | None = None,
  ):
    self.place, self._patience = place, patience
    self.postgres = url.get_backend_name() == "postgresql"
    if self.postgres:
      self.engine = sa.create_engine(
        url,
        pool_size=8,
        connect_args={"cursor_factory": _binary_cursor()},
        execution_options={"schema_translate_map": {None: namespace}},
      )
    else:
      self.engine = sa.create_engine(url, connect_args={"timeout": BUSY})
      event.listen(self.engine, "connect", lambda c, _: _prepare_sqlite(c, durability))
      event.listen(self.engine, "begin", _begin_sqlite)
    self._writing = threading.Lock() if not self.postgres else contextlib.nullcontext()
    self._closed = threading.Event()

  def insert(self, table: sa.Table) -> Any:
    """An INSERT that can say ON CONFLICT."""
    return (postgresql.insert if self.postgres else sqlite.insert)(table)

  def locked(self, select: Any) -> Any:
    """Rows that nobody else has locked (SQLite has one writer at a time anyway)."""
    return select.with_for_update(skip_locked=True) if self.postgres else select

  def write(self, function: Callable[[sa.Connection, int], T]) -> T:
    """Runs a transaction that writes; durable when it returns.

    Raises:
      RunFailed: the disk is full, or the database could not be reached for `patience` seconds.
      UserError: the database is damaged.
    """
    with self._writing:
      return self._run(function, True)

  def read(self, function: Callable[[sa.Connection], T]) -> T:
    """Runs a transaction that only reads; raises as `write`."""
    return self._run(lambda connection, _: function(connection), False)

  def _run(self, function: Callable[[sa.Connection, int], T], writes: bool) -> T:
    end, delay, attempt = time.monotonic() + self._patience, 0.02, 0
    while True:
      try:
        with self.engine.connect() as connection:
          connection.execution_options(writes=writes)
          with connection.begin():
            return function(connection, attempt)
      except DBAPIError as e:
        verdict = judge(e)
        if verdict != "again" or self._closed.is_set() or time.monotonic() + delay > end:
          raise self._error(e, verdict) from e
      self._closed.wait(delay)  # back-off: the other side needs time, nothing tells us when
      delay, attempt = min(2 * delay, 1.0), attempt + 1

  def _error(self, error: DBAPIError, verdict: Verdict) -> Exception:
    what = " ".join(str(error.orig).split())
    if verdict == "full":
      return RunFailed(
        f"{self.place}: cannot be written ({what}); is the disk full? Free some space and start "
        "again: what was accepted is there and can be read"
      )
    if verdict == "damaged":
      return UserError(f"{self.place}: is damaged or no database ({what}); restore it from a copy")
    if verdict == "again":
      return RunFailed(f"{self.place}: not reached for {self._patience:.0f} s: {what}")
    return RunFailed(f"{self.place}: {what}")

  def now(self, connection: sa.Connection) -> float:
    """Seconds since the epoch by the clock that all processes share."""
    if self.postgres:
      return float(
        connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one()
      )
    return time.time()

  def close(self) -> None:
    self._closed.set()
    self.engine.dispose()


def _binary_cursor() -> Any:
  """psycopg's cursor that asks for results in binary: as text, payloads have twice their size."""
  import psycopg

  class BinaryCursor(psycopg.Cursor):
    def __init__(self, *args: Any, **kwargs: Any):
      super().__init__(*args, **kwargs)
      self.format = psycopg.pq.Format.BINARY

  return BinaryCursor


def _prepare_sqlite(connection: Any, durability: str) -> None:
  connection.isolation_level = None  # transactions begin where we say
  cursor = connection.cursor()
  level = {"process": "NORMAL", "power": "FULL"}[durability]
  pragmas = (
    f"page_size={PAGE}",
    "journal_mode=WAL",
    f"synchronous={level}",
    f"wal_autocheckpoint={CHECKPOINT}",
    "cache_size=-16384",
    f"journal_size_limit={CHECKPOINT * PAGE}",
  )
  for pragma in pragmas:
    cursor.execute(f"PRAGMA {pragma}")
  cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
  # A transaction that will write must say so first: one that read before cannot wait for the lock.
  writes = connection.get_execution_options().get("writes")
  connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def judge(error: DBAPIError) -> Verdict:
  """What an error of SQLite or PostgreSQL means for the transaction."""
  cause: Any = error.orig
  code = getattr(cause, "sqlite_errorcode", None)
  if code is not None:
    by_code: dict[int, Verdict] = {5: "again", 6: "again", 13: "full", 10: "full",
                                   11: "damaged", 26: "damaged"}  # fmt: skip
    return by_code.get(code & 0xFF, "failed")
  state = getattr(cause, "sqlstate", None) or ""
  if state in ("53100", "58030"):  # disk_full, io_error
    return "full"
  # Cut, shutting down, too many connections, serialisation failure, deadlock; or no answer at all.
  again = error.connection_invalidated or state[:2] in ("08", "57") or state in (
    "53300", "40001", "40P01")  # fmt: skip
  if again or (not state and type(cause).__name__ == "OperationalError"):
    return "again"
  return "damaged" if state[:2] == "XX" else "failed"


def sqlite_url(path: str | os.PathLike[str]) -> sa.URL:
  return sa.URL.create("sqlite", database=str(Path(path).absolute()))
