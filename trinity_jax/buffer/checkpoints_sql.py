"""What a checkpoint means for uses, in a database; the part of SqlStore that resumes.

Needs SQLAlchemy.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import sqlalchemy as sa

from trinity_jax.buffer.claims_sql import SqlClaims
from trinity_jax.buffer.record import Key, Rules, Status
from trinity_jax.buffer.schema import EXPERIENCES, GROUPS, NUMBERS, USES
from trinity_jax.buffer.storage_memory import deleted
from trinity_jax.errors import UserError

CHUNK = 64  # groups per transaction when many are deleted or taken back

Connection = sa.Connection
Counts = collections.Counter


def is_group(table: sa.Table, key: Key) -> sa.ColumnElement[bool]:
  return (table.c.batch == key[0]) & (table.c.task == key[1])


class SqlCheckpoints(SqlClaims):
  """Uses up to a checkpoint are final, later ones are forgotten on resume."""

  def _add(self, connection: Connection, counts: Counts[str]) -> None:
    for name in sorted(n for n, v in counts.items() if v):
      connection.execute(
        NUMBERS.update().where(NUMBERS.c.name == name).values(value=NUMBERS.c.value + counts[name])
      )

  def untake(self, keys: Sequence[Key], step: int, rules: Rules) -> None:
    self._forget(keys, step - 1, rules)

  def _forget(self, keys: Sequence[Key], step: int, rules: Rules) -> None:
    """Undoes the uses after `step` of these groups."""
    for i in range(0, len(keys), CHUNK):
      part = keys[i : i + CHUNK]
      self._write_and_ring(lambda c, _, part=part: self._forget_some(c, part, step, rules))

  def _forget_some(
    self, connection: Connection, keys: Sequence[Key], step: int, rules: Rules
  ) -> None:
    counts: Counts[str] = Counts()
    for key in keys:
      row = connection.execute(
        sa.select(GROUPS).where(is_group(GROUPS, key)).with_for_update()
      ).one()
      uses = connection.execute(sa.select(USES).where(is_group(USES, key))).all()
      later = [u for u in uses if u.at > step]
      if not later:
        continue
      kept = [u for u in uses if u.at <= step]
      connection.execute(USES.delete().where(is_group(USES, key) & (USES.c.at > step)))
      values = {
        "status": Status.READY,
        "uses": len(kept),
        "free_at": max((rules.free_at(u.at) for u in kept), default=0),
        "ended_at": None,
        "priority": rules.priority(key, row.version, len(kept)),
      }
      connection.execute(GROUPS.update().where(is_group(GROUPS, key)).values(values))
      counts[Status(row.status).name.lower()] -= 1
      counts["ready"] += 1
      counts["masked"] -= sum(u.masked for u in later)
      counts["fresh"] += row.size * ((not kept) - (not row.uses and row.status == Status.READY))
    self._add(connection, counts)

  def commit(self, step: int, rules: Rules) -> None:
    def note(connection: Connection, _: int) -> None:
      connection.execute(
        NUMBERS.update()
        .where((NUMBERS.c.name == "committed") & (NUMBERS.c.value < step))
        .values(value=step)
      )

    self.database.write(note)
    while not rules.keep and self.database.write(lambda c, _: self._delete_some(c, step)):
      pass

  def _delete_some(self, connection: Connection, step: int) -> bool:
    """Deletes experiences that no step will use again; returns whether there may be more."""
    rows = connection.execute(
      sa.select(GROUPS.c.batch, GROUPS.c.task)
      .where(GROUPS.c.payload & (GROUPS.c.ended_at <= step))
      .order_by(GROUPS.c.ended_at)
      .limit(CHUNK)
    ).all()
    for row in rows:
      key = (row.batch, row.task)
      connection.execute(EXPERIENCES.delete().where(is_group(EXPERIENCES, key)))
      connection.execute(GROUPS.update().where(is_group(GROUPS, key)).values(payload=False))
    return len(rows) == CHUNK

  def restore(self, step: int, rules: Rules) -> None:
    def later(connection: Connection, _: int) -> tuple[list[Key], int, int]:
      # A server may still be committing what a trainer that was killed asked for. Every use ends by
      # changing numbers: with all of them locked, none is under way.
      connection.execute(sa.select(NUMBERS).order_by(NUMBERS.c.name).with_for_update()).all()
      keys = sa.select(USES.c.batch, USES.c.task).where(USES.c.at > step).distinct()
      lost = connection.execute(
        sa.select(sa.func.count())
        .select_from(GROUPS)
        .where(sa.not_(GROUPS.c.payload) & (GROUPS.c.ended_at > step))
      ).scalar_one()
      found = [(r.batch, r.task) for r in connection.execute(keys)]
      return found, lost, self._number(connection, "committed")

    keys, lost, committed = self.database.write(later)
    if lost:
      raise UserError(deleted(self.place, step, committed))
    self._forget(keys, step, rules)

    def note(connection: Connection, _: int) -> None:
      for name, value in (("committed", step), ("finished", 0)):
        connection.execute(NUMBERS.update().where(NUMBERS.c.name == name).values(value=value))

    self._write_and_ring(note)
    self.commit(step, rules)
