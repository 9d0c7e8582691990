"""Questions about a database that is to be asked in SQL: queries, their results, "submit".

Each turn the agent writes one query and is shown the first rows of its result or what is wrong with
it. When it writes "submit" the last result is compared with the reference query's. As InterCode's
SQL environment (Yang et al., arXiv 2306.14898), with a database in memory that nothing can change.
"""

from __future__ import annotations

import collections
import contextlib
import re
import sqlite3
import time
from typing import Any

from trinity_jax.errors import UserError
from trinity_jax.explorer.environments.environment import Step

SUBMIT = "submit"
_FENCED = re.compile(r"```(?:sql)?\s*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_LONGEST_SQL, _LARGEST = 10_000, 1_000_000  # characters of a query; bytes of a value, of a result
_TICKS = 10_000  # instructions of SQLite's machine between looks at the clock
_SHOWN = 2000  # characters of a result
_UNFORESEEABLE = ("random", "randomblob")  # a run that is done again must see the same
_ALLOWED = (
  sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE,
)  # fmt: skip

Rows = list[tuple[Any, ...]]


class Sql:
  """One database and one question; see environment.Environment.

  A right submission is worth 1, nothing else anything. A run keeps the database to itself; give
  each environment a process of its own (the row's own_process), so that neither a query's time nor
  its memory is the trainer's (config.explorer.environment_memory).

  Args:
    database: SQL statements that create and fill it.
    question: what the agent is shown first; say in it what it needs to know of the tables.
    reference: query with the right result.
    ordered: the order of the rows counts.
    seconds: CPU time that a query may take.
    max_rows: rows that a result may have.
    show_rows: rows of it that the agent is shown.

  Raises:
    UserError: the statements or the reference are wrong or beyond these limits, or one of those is
      not above 0.
  """

  def __init__(
    self,
    database: str,
    question: str,
    reference: str,
    *,
    ordered: bool = False,
    seconds: float = 2.0,
    max_rows: int = 1000,
    show_rows: int = 10,
  ):
    if min(seconds, max_rows, show_rows) <= 0:
      raise UserError(
        f"sql seconds = {seconds}, max_rows = {max_rows}, show_rows = {show_rows}: expected more "
        "than 0"
      )
    self._question, self._ordered = question, ordered
    self._seconds, self._max_rows, self._show_rows = seconds, max_rows, show_rows
    self._result: Rows | None = None
    # Which thread steps is the workflow's affair; never two at a time.
    self._connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    try:
      self._connection.executescript(database)
      self._confine()
      self._reference = self._rows(reference)
    except (sqlite3.Error, ValueError) as e:
      self._connection.close()
      raise UserError(f"sql database {database[:60]!r}, reference {reference!r}: {e}") from e

  def reset(self) -> str:
    return self._question

  def step(self, action: str, /) -> Step:
    """Runs a query, or compares the last result with the reference's."""
    fenced = _FENCED.findall(action)
    query = (fenced[-1] if fenced else action).strip()
    if query.lower() == SUBMIT:
      right = self._result is not None and self._same(self._result)
      return Step("", float(right), done=True)
    self._result = None
    try:
      self._result = self._rows(query)
    except (sqlite3.Error, sqlite3.Warning, ValueError) as e:
      return Step(f"error: {e}"[:_SHOWN], invalid=True)
    return Step(self._shown(self._result))

  def close(self) -> None:
    self._connection.close()

  def _confine(self) -> None:
    """From here on nothing but reading, with bounds on texts and values."""
    self._connection.execute("pragma temp_store = memory")
    self._connection.execute("pragma query_only = on")
    self._connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, _LONGEST_SQL)
    self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LARGEST)
    self._connection.set_authorizer(_authorize)

  def _rows(self, query: str) -> Rows:
    """All rows of a query.

    Raises:
      sqlite3.Error: it is no query, not one only, not reading, or takes too long.
      ValueError: its result is too large, or it returns none because it is empty text.
    """
    end = time.thread_time() + self._seconds  # of the CPU: load must not change a reward
    self._connection.set_progress_handler(lambda: time.thread_time() > end, _TICKS)
    rows, size = [], 0
    try:
      with contextlib.closing(self._connection.execute(query)) as cursor:
        if cursor.description is None:
          raise ValueError("no query")
        for row in cursor:
          size += sum(len(v) for v in row if isinstance(v, (str, bytes)))
          if len(rows) == self._max_rows or size > _LARGEST:
            raise ValueError(
              f"the result has more than {self._max_rows} rows or {_LARGEST} characters"
            )
          rows.append(row)
    except sqlite3.OperationalError as e:
      if time.thread_time() > end:
        raise ValueError(f"the query takes more than {self._seconds:g} s") from e
      raise
    finally:
      self._connection.set_progress_handler(None, 0)
    return rows

  def _same(self, rows: Rows) -> bool:
    mine, theirs = ([tuple(map(_value, row)) for row in r] for r in (rows, self._reference))
    if self._ordered:
      return mine == theirs
    return collections.Counter(mine) == collections.Counter(theirs)

  def _shown(self, rows: Rows) -> str:
    lines = ["|".join(_text(v) for v in row) for row in rows[: self._show_rows]]
    if len(rows) > self._show_rows:
      lines.append(f"({len(rows)} rows)")
    text = "\n".join(lines) or "(no rows)"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def _authorize(action: int, _: str | None, function: str | None, *__: Any) -> int:
  allowed = action in _ALLOWED and (function or "").lower() not in _UNFORESEEABLE
  return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _value(value: Any) -> Any:
  """Floating-point sums depend on the order of the rows, which a query is free to choose."""
  return float(f"{value:.9g}") if isinstance(value, float) else value


def _text(value: Any) -> str:
  return "NULL" if value is None else value.hex() if isinstance(value, bytes) else str(value)
