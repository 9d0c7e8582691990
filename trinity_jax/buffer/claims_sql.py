"""Which explorer runs which step, in a database; the part of SqlStore that explorers see.

Needs SQLAlchemy.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import sqlalchemy as sa

from trinity_jax.buffer.bell import ThreadBell
from trinity_jax.buffer.database import Database
from trinity_jax.buffer.record import Claim, Rules
from trinity_jax.buffer.schema import BATCHES, GROUPS, NUMBERS

T = TypeVar("T")


class SqlClaims:
  """Claims of explorer steps, with leases by the clock that all processes share."""

  def __init__(self, database: Database, bell: ThreadBell, clock: Callable[[], float] | None):
    self.bell = bell
    self.database, self._clock = database, clock

  @property
  def place(self) -> str:
    return self.database.place

  def close(self) -> None:
    self.bell.close()
    self.database.close()

  def _ring(self) -> None:
    self.bell.ring()

  def _tell(self, connection: sa.Connection) -> None:
    """Within a transaction: what makes its commit ring elsewhere, where a database can do that."""

  def _write_and_ring(
    self,
    function: Callable[[sa.Connection, int], T],
    changed: Callable[[T], bool] = lambda out: True,
  ) -> T:
    def write(connection: sa.Connection, attempt: int) -> T:
      out = function(connection, attempt)
      if changed(out):
        self._tell(connection)
      return out

    out = self.database.write(write)
    if changed(out):
      self._ring()
    return out

  def _now(self, connection: sa.Connection) -> float:
    return self._clock() if self._clock else self.database.now(connection)

  def _number(self, connection: sa.Connection, name: str, lock: bool = False) -> int:
    query = sa.select(NUMBERS.c.value).where(NUMBERS.c.name == name)
    return connection.execute(query.with_for_update() if lock else query).scalar_one()

  def _count_batches(self, connection: sa.Connection, new: Counter[int], rules: Rules) -> None:
    """Books groups that were stored: {batch: how many}."""
    for batch, count in sorted(new.items()):
      insert = self.database.insert(BATCHES).values(
        batch=batch, stored=count, open=count < rules.tasks_per_step, expires=0.0
      )
      total = BATCHES.c.stored + count
      connection.execute(
        insert.on_conflict_do_update(
          index_elements=["batch"],
          set_={"stored": total, "open": total < rules.tasks_per_step},
        )
      )

  def claim(self, owner: str, lease: float, rules: Rules, new: bool) -> Claim | None:
    ticket = uuid.uuid4().hex

    def write(connection: sa.Connection, attempt: int) -> Claim | None:
      batch = None
      if attempt:  # an attempt may have been committed
        mine = sa.select(BATCHES.c.batch).where(BATCHES.c.open & (BATCHES.c.ticket == ticket))
        batch = connection.execute(mine).scalar_one_or_none()
      if batch is None:
        if self._number(connection, "finished"):
          return None
        batch = self._claim(connection, owner, ticket, lease, rules, new)
      if batch is None:
        return None
      stored = self._held(connection, batch)
      return Claim(batch, tuple(t for t in range(rules.tasks_per_step) if t not in stored))

    return self.database.write(write)

  def _claim(self, connection, owner, ticket, lease, rules: Rules, new: bool) -> int | None:
    now = self._now(connection)
    values = {"owner": owner, "ticket": ticket, "expires": now + lease}
    free = sa.select(BATCHES.c.batch).where(
      BATCHES.c.open & (BATCHES.c.owner.is_(None) | (BATCHES.c.expires < now))
    )
    free = self.database.locked(free.order_by(BATCHES.c.batch).limit(1))
    batch = connection.execute(free).scalar_one_or_none()
    if batch is not None:
      connection.execute(BATCHES.update().where(BATCHES.c.batch == batch).values(values))
      return batch
    while new:
      last = connection.execute(sa.select(sa.func.max(BATCHES.c.batch))).scalar_one_or_none()
      batch = max(rules.first_batch, (last or 0) + 1)
      insert = self.database.insert(BATCHES).values(batch=batch, stored=0, open=True, **values)
      insert = insert.on_conflict_do_nothing().returning(BATCHES.c.batch)
      if connection.execute(insert).scalar_one_or_none() is not None:
        return batch
    return None

  def heartbeat(self, owner: str, lease: float) -> None:
    def write(connection: sa.Connection, _: int) -> None:
      connection.execute(
        BATCHES.update()
        .where(BATCHES.c.open & (BATCHES.c.owner == owner))
        .values(expires=self._now(connection) + lease)
      )

    self.database.write(write)

  def release(self, owner: str) -> None:
    def write(connection: sa.Connection, _: int) -> None:
      mine = BATCHES.c.open & (BATCHES.c.owner == owner)
      connection.execute(BATCHES.update().where(mine).values(owner=None))

    self._write_and_ring(write)

  def held(self, batch: int) -> set[int]:
    return self.database.read(lambda connection: self._held(connection, batch))

  def _held(self, connection: sa.Connection, batch: int) -> set[int]:
    return set(
      connection.execute(sa.select(GROUPS.c.task).where(GROUPS.c.batch == batch)).scalars()
    )

  def claimed(self, rules: Rules) -> int:
    """Groups of live claims that are not stored."""

    def read(connection: sa.Connection) -> int:
      live = BATCHES.c.open & BATCHES.c.owner.is_not(None)
      live &= BATCHES.c.expires >= self._now(connection)
      rows = connection.execute(sa.select(BATCHES.c.stored).where(live)).scalars()
      return sum(rules.tasks_per_step - stored for stored in rows)

    return self.database.read(read)

  def finish(self) -> None:
    self._write_and_ring(
      lambda connection, _: connection.execute(
        NUMBERS.update().where(NUMBERS.c.name == "finished").values(value=1)
      )
    )

  @property
  def finished(self) -> bool:
    return bool(self.database.read(lambda connection: self._number(connection, "finished")))
