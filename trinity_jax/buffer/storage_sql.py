"""Groups in SQLite or PostgreSQL: they survive the process, and several processes share them.

Needs SQLAlchemy. Selections use the indices of `schema`; counts are kept, never counted. Locks are
taken in one order, rows of groups before rows of numbers, so that transactions cannot wait for one
another in a circle; those that only add groups lock numbers first, which nobody who holds them
follows up with a group that exists.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa

from trinity_jax.buffer.bell import ThreadBell
from trinity_jax.buffer.checkpoints_sql import CHUNK, Connection, Counts, SqlCheckpoints, is_group
from trinity_jax.buffer.database import Database
from trinity_jax.buffer.record import Group, Key, Outcome, Rules, Stats, Status
from trinity_jax.buffer.rewards import rewarded
from trinity_jax.buffer.schema import COUNTS, EXPERIENCES, GROUPS, NUMBERS, USES, migrate
from trinity_jax.buffer.staleness import NEVER
from trinity_jax.errors import UserError
from trinity_jax.experience import Experience, ExperienceId


class SqlStore(SqlCheckpoints):
  """Args: database: migrated when opened; bell: rings in every process that shares it."""

  def __init__(
    self, database: Database, bell: ThreadBell, clock: Callable[[], float] | None = None
  ):
    super().__init__(database, bell, clock)
    database.write(lambda connection, _: self._open(connection))

  def _open(self, connection: Connection) -> None:
    if self.database.postgres:
      connection.execute(sa.text("SELECT pg_advisory_xact_lock(5641907235)"))  # one at a time
      schema = connection.get_execution_options()["schema_translate_map"][None]
      if schema is not None:
        connection.execute(sa.schema.CreateSchema(schema, if_not_exists=True))
    migrate(connection, self.place)

  # --- numbers -----------------------------------------------------------------------------------

  def stats(self) -> Stats:
    def read(connection: Connection) -> Stats:
      rows = connection.execute(sa.select(NUMBERS.c.name, NUMBERS.c.value))
      values = {name: value for name, value in rows}
      return Stats(*(values[name] for name in COUNTS))

    return self.database.read(read)

  # --- producers ---------------------------------------------------------------------------------

  def put(self, groups: Sequence[Group], rules: Rules) -> list[Outcome | None]:
    payloads: dict[Key, list[dict[str, object]]] = {}

    def write(connection: Connection, attempt: int) -> list[Outcome | None]:
      admitted, added = self._admit(connection, groups, rules)
      out: list[Outcome | None] = list(admitted)
      if attempt:  # an attempt of ours may have stored them: to the caller they are "stored"
        out = [("stored" if o == "same" else o) for o in admitted]
      for group in added:
        if group.key not in payloads:
          payloads[group.key] = [_experience_row(e) for e in group.experiences]
      self._store(connection, added, [r for g in added for r in payloads[g.key]], rules)
      return out

    # A ring for nothing would make the writer try those that have to wait for ever.
    return self._write_and_ring(write, changed=lambda out: "stored" in out)

  def _admit(
    self, connection: Connection, groups: Sequence[Group], rules: Rules
  ) -> tuple[list[Outcome | None], list[Group]]:
    """What becomes of each, and those to store."""
    fresh = self._number(connection, "fresh", lock=True)
    finished = self._number(connection, "finished")
    due = self._due(connection, rules) if rules.order == "id" else None
    out: list[Outcome | None] = []
    added: dict[Key, Group] = {}
    for group in groups:
      found = connection.execute(
        sa.select(GROUPS.c.digest).where(is_group(GROUPS, group.key))
      ).scalar_one_or_none()
      if found is None and group.key in added:
        found = added[group.key].digest
      if found is not None:
        out.append("same" if found == group.digest else "different")
      elif fresh < rules.capacity or finished or (due is not None and group.key <= due):
        out.append("stored")
        added[group.key] = group
        fresh += 0 if group.pending else len(group.experiences)
      else:
        out.append(None)
    return out, list(added.values())

  def _store(
    self,
    connection: Connection,
    groups: Sequence[Group],
    experiences: list[dict[str, object]],
    rules: Rules,
  ) -> None:
    if not groups:
      return
    connection.execute(GROUPS.insert(), [_group_row(g, rules) for g in groups])
    connection.execute(EXPERIENCES.insert(), experiences)
    counts: Counts[str] = Counts()
    for group in groups:
      counts[group.status.name.lower()] += 1
      counts["fresh"] += 0 if group.pending else len(group.experiences)
    self._count_batches(connection, Counts(g.key[0] for g in groups), rules)
    self._add(connection, counts)

  def give_reward(self, id: ExperienceId, reward: float, rules: Rules) -> None:
    del rules  # a priority does not depend on rewards
    at = is_group(EXPERIENCES, id.group)
    at &= (EXPERIENCES.c.run == id.run) & (EXPERIENCES.c.step == id.step)

    def write(connection: Connection, _: int) -> bool:
      group = connection.execute(
        sa.select(GROUPS.c.size, GROUPS.c.pending)
        .where(is_group(GROUPS, id.group))
        .with_for_update()
      ).one_or_none()
      data = connection.execute(sa.select(EXPERIENCES.c.data).where(at)).scalar_one_or_none()
      if group is None or data is None:
        raise UserError(f"reward for experience {id}: {self.place} does not hold it")
      given = rewarded(self._parse(id, data), reward)
      if given is None:
        return False
      connection.execute(EXPERIENCES.update().where(at).values(data=given.to_bytes()))
      if not group.pending:  # the group waits for nothing: it is to be dropped
        return True
      last = group.pending == 1
      values = {"pending": group.pending - 1} | ({"status": Status.READY} if last else {})
      connection.execute(GROUPS.update().where(is_group(GROUPS, id.group)).values(values))
      if last:
        self._add(connection, Counts({"waiting": -1, "ready": 1, "fresh": group.size}))
      return True

    self._write_and_ring(write)

  # --- the trainer -------------------------------------------------------------------------------

  def due(self, rules: Rules) -> Key:
    return self.database.read(lambda connection: self._due(connection, rules))

  def _due(self, connection: Connection, rules: Rules) -> Key:
    """The group after the last one, in id order, that was used up or dropped."""
    last: Key = (0, -1)
    for status in (Status.USED, Status.DROPPED):
      row = connection.execute(
        sa.select(GROUPS.c.batch, GROUPS.c.task)
        .where(GROUPS.c.status == status)
        .order_by(GROUPS.c.batch.desc(), GROUPS.c.task.desc())
        .limit(1)
      ).one_or_none()
      if row is not None:
        last = max(last, (row.batch, row.task))
    return max((rules.first_batch, 0), rules.after(last))

  def take(self, n: int, step: int, rules: Rules) -> list[Key]:
    ticket = uuid.uuid4().hex

    def write(connection: Connection, attempt: int) -> tuple[list[Key], bool]:
      if attempt:  # an attempt may have been committed: its groups are ours
        rows = connection.execute(
          sa.select(USES.c.batch, USES.c.task, USES.c.dropped).where(USES.c.ticket == ticket)
        ).all()
        if rows:
          return sorted((r.batch, r.task) for r in rows if not r.dropped), True
      counts: Counts[str] = Counts()
      if rules.order == "id":
        taken = self._take_in_order(connection, n, step, ticket, rules, counts)
      else:
        taken = self._take_best(connection, n, step, ticket, rules, counts)
      self._add(connection, counts)
      return taken, bool(counts)

    if not self.database.read(lambda c: self._may_take(c, n, step, rules)):
      return []
    return self._write_and_ring(write, changed=lambda out: out[1])[0]

  def _may_take(self, connection: Connection, n: int, step: int, rules: Rules) -> bool:
    """False when there is nothing to take or drop: every put rings, looking must cost little."""
    ready = self._number(connection, "ready")
    if ready >= n or (ready and self._number(connection, "fresh") >= rules.capacity):
      return True
    oldest = rules.oldest(step)
    if oldest is None or not ready:
      return False
    stale = sa.select(GROUPS.c.task).where(
      GROUPS.c.status == Status.READY, GROUPS.c.newest < oldest
    )
    return connection.execute(stale.limit(1)).first() is not None

  def _ready(self) -> sa.Select:
    """Ready groups that nobody else is taking; column names as in GROUPS."""
    return self.database.locked(sa.select(GROUPS).where(GROUPS.c.status == Status.READY))

  def _take_in_order(self, connection, n, step, ticket, rules: Rules, counts) -> list[Key]:
    due, oldest, taken = self._due(connection, rules), rules.oldest(step), []
    while len(taken) < n:
      rows = connection.execute(
        self._ready().order_by(GROUPS.c.batch, GROUPS.c.task).limit(n - len(taken))
      ).all()
      used: dict[bool, list[Any]] = {False: [], True: []}
      for row in rows:
        key = (row.batch, row.task)
        if key > due:
          break
        used[oldest is not None and row.newest < oldest].append(row)
        due = max(due, rules.after(key))
      for dropped, some in used.items():
        self._use(connection, some, step, ticket, rules, counts, dropped=dropped)
      taken += [(row.batch, row.task) for row in used[False]]
      if sum(map(len, used.values())) < len(rows) or not rows:
        break
    return taken

  def _take_best(self, connection, n, step, ticket, rules: Rules, counts) -> list[Key]:
    oldest = rules.oldest(step)
    if oldest is not None:
      stale = self._ready().where(GROUPS.c.newest < oldest)
      rows = connection.execute(stale.order_by(GROUPS.c.newest)).all()
      self._use(connection, rows, step, ticket, rules, counts, dropped=True)
    order: list[Any] = [GROUPS.c.batch, GROUPS.c.task]
    if rules.order == "priority":
      order.insert(0, GROUPS.c.priority.desc())
    free = self._ready().where(GROUPS.c.free_at <= step)
    rows = connection.execute(free.order_by(*order).limit(n)).all()
    if len(rows) < n:  # wait for more to choose from, unless nobody may bring any
      fresh = self._number(connection, "fresh") + counts["fresh"]
      if fresh < rules.capacity:
        return []
    self._use(connection, rows, step, ticket, rules, counts)
    return [(row.batch, row.task) for row in rows]

  def _use(self, connection, rows, step, ticket, rules: Rules, counts, dropped=False) -> None:
    """Marks ready groups as used or dropped by a step."""
    if not rows:
      return
    changes, uses_of = [], []
    for row in rows:
      key, uses = (row.batch, row.task), row.uses + (not dropped)
      status = Status.READY
      if dropped or uses >= rules.max_uses:
        status = Status.DROPPED if dropped else Status.USED
      changes.append({
        "of_batch": row.batch, "of_task": row.task, "status": status, "uses": uses,
        "free_at": rules.free_at(step), "ended_at": None if status is Status.READY else step,
        "priority": rules.priority(key, row.version, uses),
      })  # fmt: skip
      uses_of.append({"batch": row.batch, "task": row.task, "at": step, "ticket": ticket,
                      "dropped": dropped, "masked": 0})  # fmt: skip
      counts["ready"] -= 1
      counts[status.name.lower()] += 1
      if not row.uses:
        counts["fresh"] -= row.size
    update = GROUPS.update().where(
      GROUPS.c.batch == sa.bindparam("of_batch"), GROUPS.c.task == sa.bindparam("of_task")
    )
    names = ("status", "uses", "free_at", "ended_at", "priority")
    connection.execute(update.values({name: sa.bindparam(name) for name in names}), changes)
    connection.execute(USES.insert(), uses_of)

  def load(self, keys: Sequence[Key]) -> list[list[Experience]]:
    def read(connection: Connection) -> list[list[tuple[ExperienceId, bytes]]]:
      found: dict[Key, list[tuple[ExperienceId, bytes]]] = {key: [] for key in keys}
      key = sa.tuple_(EXPERIENCES.c.batch, EXPERIENCES.c.task)
      for start in range(0, len(keys), CHUNK):
        rows = connection.execute(
          sa.select(EXPERIENCES)
          .where(key.in_(keys[start : start + CHUNK]))
          .order_by(EXPERIENCES.c.run, EXPERIENCES.c.step)
        )
        for r in rows:
          found[r.batch, r.task].append((ExperienceId(r.batch, r.task, r.run, r.step), r.data))
      return [found[key] for key in keys]

    if not keys:
      return []
    return [[self._parse(id, data) for id, data in rows] for rows in self.database.read(read)]

  def _parse(self, id: ExperienceId, data: bytes) -> Experience:
    try:
      found = Experience.from_bytes(data)
    except UserError as e:
      raise UserError(
        f"{self.place}: experience {id} (explorer step/task/run/step): {e}; restore the store from "
        "a copy, or delete it and sample again"
      ) from e
    if found.id != id:
      raise UserError(f"{self.place}: experience {id} is damaged: its record says {found.id}")
    return found

  def note_masked(self, step: int, masked: dict[Key, int]) -> None:
    def write(connection: Connection, _: int) -> None:
      counts: Counts[str] = Counts()
      for key, count in masked.items():
        at = is_group(USES, key) & (USES.c.at == step) & (USES.c.masked == 0)
        done = connection.execute(USES.update().where(at).values(masked=count))
        counts["masked"] += count * done.rowcount
      self._add(connection, counts)

    self.database.write(write)


def _group_row(group: Group, rules: Rules) -> dict[str, object]:
  return {
    "batch": group.key[0],
    "task": group.key[1],
    "status": group.status,
    "size": len(group.experiences),
    "pending": group.pending,
    "version": group.version,
    "newest": min(group.newest, NEVER),
    "priority": rules.priority(group.key, group.version, 0),
    "uses": 0,
    "free_at": 0,
    "ended_at": None,
    "payload": True,
    "digest": group.digest,
  }


def _experience_row(experience: Experience) -> dict[str, object]:
  id = ExperienceId(*map(int, experience.id))  # databases know no numpy numbers
  return {
    "batch": id.batch, "task": id.task, "run": id.run, "step": id.step,
    "data": experience.to_bytes(),
  }  # fmt: skip
