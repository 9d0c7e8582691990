"""The tables of a replay buffer, the same in SQLite and PostgreSQL, and their migrations.

Needs SQLAlchemy; imported by the database stores only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sqlalchemy as sa

from trinity_jax.errors import UserError

METADATA = sa.MetaData()
_key = lambda: (
  sa.Column("batch", sa.BigInteger, primary_key=True, autoincrement=False),
  sa.Column("task", sa.Integer, primary_key=True, autoincrement=False),
)

# Numbers that hold for the whole store: the schema's version, whether the trainer has finished, the
# last committed step, and counts that are kept so that nobody has to count rows.
NUMBERS = sa.Table(
  "numbers",
  METADATA,
  sa.Column("name", sa.String(32), primary_key=True),
  sa.Column("value", sa.BigInteger, nullable=False),
)

# One row per group for ever: ids, digests and uses outlive the experiences.
GROUPS = sa.Table(
  "groups",
  METADATA,
  *_key(),
  sa.Column("status", sa.SmallInteger, nullable=False),
  sa.Column("size", sa.Integer, nullable=False),  # experiences
  sa.Column("pending", sa.Integer, nullable=False),  # rewards to come
  sa.Column("version", sa.Integer, nullable=False),
  sa.Column("newest", sa.Integer, nullable=False),
  sa.Column("priority", sa.Float(53), nullable=False),
  sa.Column("uses", sa.Integer, nullable=False),
  sa.Column("free_at", sa.BigInteger, nullable=False),  # first step that may use it
  sa.Column("ended_at", sa.BigInteger),  # step that used it up or dropped it
  sa.Column("payload", sa.Boolean, nullable=False),  # whether its experiences are still there
  sa.Column("digest", sa.LargeBinary(16), nullable=False),
  sa.Index("groups_by_id", "status", "batch", "task"),
  sa.Index("groups_by_priority", "status", sa.text("priority DESC"), "batch", "task"),
  sa.Index("groups_by_newest", "status", "newest"),
  sa.Index("groups_by_end", "payload", "ended_at"),
)

EXPERIENCES = sa.Table(
  "experiences",
  METADATA,
  *_key(),
  sa.Column("run", sa.Integer, primary_key=True, autoincrement=False),
  sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
  sa.Column("data", sa.LargeBinary, nullable=False),  # Experience.to_bytes
)

# Which trainer step used or dropped which group.
USES = sa.Table(
  "uses",
  METADATA,
  *_key(),
  sa.Column("at", sa.BigInteger, primary_key=True, autoincrement=False),  # trainer step
  sa.Column("ticket", sa.String(32), nullable=False),  # of the call, to know it again
  sa.Column("dropped", sa.Boolean, nullable=False),
  sa.Column("masked", sa.Integer, nullable=False),  # stale action tokens
  sa.Index("uses_by_step", "at"),
  sa.Index("uses_by_ticket", "ticket"),
)

BATCHES = sa.Table(
  "batches",
  METADATA,
  sa.Column("batch", sa.BigInteger, primary_key=True, autoincrement=False),
  sa.Column("stored", sa.Integer, nullable=False),  # groups
  sa.Column("open", sa.Boolean, nullable=False),  # whether some are not stored
  sa.Column("owner", sa.String(255)),
  sa.Column("ticket", sa.String(32)),
  sa.Column("expires", sa.Float(53), nullable=False),  # end of the owner's lease
  sa.Index("batches_by_open", "open", "batch"),
)

COUNTS = ("ready", "waiting", "used", "dropped", "fresh", "masked")


def _create(connection: sa.Connection) -> None:
  METADATA.create_all(connection)
  if connection.dialect.name == "postgresql":  # token logs hardly compress, and trying costs most
    schema = (connection.get_execution_options().get("schema_translate_map") or {}).get(None)
    quote = connection.dialect.identifier_preparer.quote
    table = f"{quote(schema)}.{EXPERIENCES.name}" if schema else EXPERIENCES.name
    connection.execute(sa.text(f"ALTER TABLE {table} ALTER COLUMN data SET STORAGE EXTERNAL"))
  rows = [{"name": n, "value": 0} for n in ("schema", "finished", "committed", *COUNTS)]
  connection.execute(NUMBERS.insert(), rows)


# MIGRATIONS[v] brings a store from schema v to v + 1; 0 is an empty database. Append only, and
# never change one that was released: write out the SQL of later ones, METADATA moves on.
MIGRATIONS: tuple[Callable[[sa.Connection], None], ...] = (_create,)


def migrate(
  connection: sa.Connection,
  place: str,
  steps: Sequence[Callable[[sa.Connection], None]] = MIGRATIONS,
) -> None:
  """Creates the tables, or brings them to the newest schema; within the caller's transaction.

  Raises:
    UserError: a newer version of this program made them.
  """
  found = schema_version(connection)
  if found > len(steps):
    raise UserError(
      f"{place}: its schema is version {found}, this version of trinity_jax knows up to "
      f"{len(steps)}; upgrade trinity_jax, or use another store"
    )
  for step in steps[found:]:
    step(connection)
  if found < len(steps):
    connection.execute(NUMBERS.update().where(NUMBERS.c.name == "schema").values(value=len(steps)))


def schema_version(connection: sa.Connection) -> int:
  """0 where there are no tables of ours."""
  schema = (connection.get_execution_options().get("schema_translate_map") or {}).get(None)
  if not sa.inspect(connection).has_table(NUMBERS.name, schema=schema):
    return 0
  return connection.execute(
    sa.select(NUMBERS.c.value).where(NUMBERS.c.name == "schema")
  ).scalar_one()
