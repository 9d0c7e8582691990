"""A replay buffer in PostgreSQL: explorers and trainers of several hosts share it.

Needs SQLAlchemy and psycopg 3 (pip install "trinity_jax[postgres]").
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import selectors
import threading
import time
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError

from trinity_jax.buffer.bell import ThreadBell
from trinity_jax.buffer.database import Database
from trinity_jax.buffer.storage_sql import SqlStore
from trinity_jax.errors import RunFailed, UserError

MOST_DELAY = 5.0  # seconds between two attempts to listen again


class PostgresBell(ThreadBell):
  """Wakes the threads of every process that listens on a channel of the database.

  Listens on a connection of its own, without a poll; when it is cut, it connects again and rings,
  since rings may have been missed meanwhile.

  Args:
    url: psycopg's connection string.
    channel: an identifier of at most 63 bytes.
    place: the database, for messages.
    patience: seconds to keep trying to ring when the connection is cut.

  Raises:
    RunFailed: the database cannot be reached.
  """

  def __init__(self, url: str, channel: str, place: str, patience: float = 60.0):
    super().__init__()
    import psycopg

    self._psycopg = psycopg
    self._url, self._channel, self._place, self._patience = url, channel, place, patience
    self._wake, self._closing = os.pipe(), threading.Event()
    self._sender: Any = None
    self._sending = threading.Lock()
    try:
      listener = self._listen()
    except psycopg.Error as e:
      raise RunFailed(f"{place}: {' '.join(str(e).split())}") from e
    self._thread = threading.Thread(
      target=self._run, args=(listener,), name="buffer-bell", daemon=True
    )
    self._thread.start()

  def _listen(self) -> Any:
    connection = self._psycopg.connect(self._url, autocommit=True)
    connection.execute(f'LISTEN "{self._channel}"'.encode())
    return connection

  def _run(self, listener: Any) -> None:
    delay = 0.02
    while not self._closing.is_set():
      try:
        if listener is None:
          listener = self._listen()
          self.ring_here()
        delay = 0.02
        self._hear(listener)
      except (self._psycopg.Error, OSError):
        if listener is not None:
          listener.close()
          listener = None
        self._closing.wait(delay)  # back-off: nothing tells when the server is back
        delay = min(2 * delay, MOST_DELAY)
    if listener is not None:
      listener.close()

  def _hear(self, listener: Any) -> None:
    """Rings at each notification until the bell closes; raises when the connection is cut."""
    pgconn = listener.pgconn
    with selectors.DefaultSelector() as selector:
      selector.register(pgconn.socket, selectors.EVENT_READ)
      selector.register(self._wake[0], selectors.EVENT_READ)
      while not self._closing.is_set():
        selector.select()
        pgconn.consume_input()
        heard = False
        while pgconn.notifies() is not None:
          heard = True
        if heard:
          self.ring_here()

  def ring(self) -> None:
    """Wakes every process; one round trip to the server, which may be starting again.

    Raises:
      RunFailed: it could not be reached for `patience` seconds.
    """
    self.ring_here()
    end, delay = time.monotonic() + self._patience, 0.02
    with self._sending:
      while not self._closing.is_set():
        try:
          if self._sender is None:
            self._sender = self._psycopg.connect(self._url, autocommit=True)
          self._sender.execute(f'NOTIFY "{self._channel}"')
          return
        except self._psycopg.Error as e:
          if self._sender is not None:
            self._sender.close()
            self._sender = None
          if time.monotonic() + delay > end:
            what = " ".join(str(e).split())
            raise RunFailed(f"{self._place}: not reached for {self._patience:.0f} s: {what}") from e
        self._closing.wait(delay)  # back-off: nothing tells when the server is back
        delay = min(2 * delay, 1.0)

  def close(self) -> None:
    if self._closing.is_set():
      return
    self._closing.set()
    os.write(self._wake[1], b"\0")
    self._thread.join(10)
    with self._sending, contextlib.suppress(self._psycopg.Error):
      if self._sender is not None:
        self._sender.close()
    for end in self._wake:
      os.close(end)


class PostgresStore(SqlStore):
  """SqlStore whose transactions notify the others when they are committed."""

  def __init__(self, database: Database, bell: PostgresBell, channel: str):
    self._notify = sa.text(f'NOTIFY "{channel}"')
    super().__init__(database, bell)

  def _tell(self, connection: sa.Connection) -> None:
    connection.execute(self._notify)

  def _ring(self) -> None:
    self.bell.ring_here()  # the others hear of it from the transaction itself


def open_postgres(url: str, *, patience: float, namespace: str) -> PostgresStore:
  """See `open_store`."""
  try:
    parsed = sa.make_url(url).set(drivername="postgresql+psycopg")
  except (ArgumentError, ValueError) as e:
    raise UserError(f"buffer store: not a PostgreSQL URL ({e})") from e
  place = f"{parsed.render_as_string(hide_password=True).replace('+psycopg', '')} ({namespace})"
  dsn = parsed.set(drivername="postgresql").render_as_string(hide_password=False)
  channel = "buffer_" + hashlib.blake2b(namespace.encode(), digest_size=16).hexdigest()
  bell = PostgresBell(dsn, channel, place, patience)
  try:
    return PostgresStore(
      Database(parsed, place, patience=patience, namespace=namespace), bell, channel
    )
  except BaseException:  # its listening thread would outlive the attempt
    bell.close()
    raise
