"""A replay buffer in PostgreSQL as the viewer reads it.

Needs psycopg 3 and SQLAlchemy (pip install "trinity_jax[postgres]").
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from trinity_jax.errors import RunFailed, UserError
from trinity_jax.server.viewer.stores import LONGEST_HEADER, Headers, Key

_PATIENCE = 10  # seconds for a connection, and for each statement
_FIRST = 65_536  # bytes of a record that are read at once: most headers are shorter


class PostgresStore:
  """The schema of one stage.

  Args:
    url: config.buffer.url.
    namespace: the schema's name, see buffer.store.open_store.

  Raises:
    UserError: not a URL, or a package is missing.
  """

  def __init__(self, url: str, namespace: str):
    try:
      import psycopg
      import sqlalchemy as sa
      from sqlalchemy.exc import ArgumentError
    except ImportError as e:
      raise UserError(
        f"the run's buffer is in PostgreSQL and {e.name} is not installed; "
        'pip install "trinity_jax[postgres]"'
      ) from e
    try:
      parsed = sa.make_url(url).set(drivername="postgresql")
    except (ArgumentError, ValueError) as e:
      raise UserError(f"config.buffer.url is no PostgreSQL URL ({e})") from e
    self._psycopg, self._namespace = psycopg, namespace
    self._dsn = parsed.render_as_string(hide_password=False)
    self._place = f"{parsed.render_as_string(hide_password=True)} ({namespace})"

  def exists(self) -> bool:
    return True  # only a connection tells

  @contextlib.contextmanager
  def opened(self) -> Iterator[PostgresReader]:
    errors = self._psycopg.errors
    try:
      with contextlib.closing(
        self._psycopg.connect(
          self._dsn, connect_timeout=_PATIENCE, tcp_user_timeout=_PATIENCE * 1000
        )
      ) as connection:
        connection.read_only = True
        connection.execute(f"SET statement_timeout = '{_PATIENCE}s'")
        yield PostgresReader(connection, self._psycopg.sql.Identifier(self._namespace))
    except (errors.UndefinedTable, errors.InvalidSchemaName) as e:
      raise UserError(f"{self._place}: holds no buffer of a run (yet)") from e
    except self._psycopg.Error as e:
      what = " ".join(str(e).split())
      raise RunFailed(f"{self._place}: cannot be read: {what}; does the server run?") from e


class PostgresReader:
  """Within one transaction, which only reads."""

  def __init__(self, connection: Any, schema: Any):
    self._connection, self._schema = connection, schema

  def groups(self) -> Iterable[Any]:
    return self._select("SELECT batch, task, payload, pending, version, digest FROM {}.groups")

  def headers(self, group: tuple[int, int]) -> Headers:
    found = self._select(
      f"SELECT run, step, substring(data FROM 1 FOR {_FIRST}) FROM {{}}.experiences "
      "WHERE batch = %s AND task = %s ORDER BY run, step",
      group,
    ).fetchall()
    for run, step, data in found:
      key = (*group, run, step)
      yield key, self._cut(key, data)

  def header(self, key: Key) -> bytes | None:
    data = self._data(key, f"substring(data FROM 1 FOR {_FIRST})")
    return None if data is None else self._cut(key, data)

  def record(self, key: Key) -> bytes | None:
    return self._data(key, "data")

  def _cut(self, key: Key, data: bytes) -> bytes | None:
    """The header that `data`, the beginning of a record, begins with."""
    size = int.from_bytes(data[:8], "little")
    if not 0 < size <= LONGEST_HEADER:
      return None
    whole = data if len(data) >= 8 + size else self._data(
      key, f"substring(data FROM 1 FOR {8 + size})"
    )  # fmt: skip
    return whole[8 : 8 + size] if whole and len(whole) >= 8 + size else None

  def _data(self, key: Key, what: str) -> bytes | None:
    found = self._select(
      f"SELECT {what} FROM {{}}.experiences "
      "WHERE batch = %s AND task = %s AND run = %s AND step = %s",
      key,
    ).fetchone()
    return found[0] if found else None

  def _select(self, query: Any, values: tuple[int, ...] = ()) -> Any:
    from psycopg.sql import SQL

    query = SQL(query).format(self._schema)
    return self._connection.execute(query, values, binary=True)
