"""Opens the store that a URL names."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import uuid
from pathlib import Path

from trinity_jax.buffer.bell import FileBell, ThreadBell
from trinity_jax.buffer.record import FILE, Store
from trinity_jax.buffer.storage_memory import MemoryStore
from trinity_jax.errors import UserError


def own_namespace(directory: Path) -> str:
  """A name that no other folder has; the same for every process that asks."""
  path = directory / "buffer.namespace"
  if not path.exists():
    directory.mkdir(parents=True, exist_ok=True)
    name = f"trinity_{uuid.uuid4().hex[:16]}"
    part = path.with_name(f"{path.name}.{name}")
    part.write_text(name)
    with contextlib.suppress(FileExistsError):  # another process was first
      os.link(part, path)
    part.unlink()
  return path.read_text()


def check_url(url: str) -> tuple[str, str]:
  """(kind, what follows "://") of a store that `open_store` could open; nothing is opened.

  Raises:
    UserError: another kind of URL, or a package that is missing.
  """
  kind, _, rest = url.partition("://")
  kind = kind.partition("+")[0]
  if kind not in ("memory", "sqlite", "postgresql") or (kind == "postgresql" and not rest):
    raise UserError(
      f"buffer store {url!r}: expected memory, sqlite, sqlite:///PATH or postgresql://USER@HOST/NAME"
    )
  needed = {"memory": (), "sqlite": ("sqlalchemy",), "postgresql": ("sqlalchemy", "psycopg")}[kind]
  for package in needed:
    if importlib.util.find_spec(package) is None:
      extra = "'trinity_jax[postgres]'" if package == "psycopg" else package
      raise UserError(
        f"buffer store {kind}: {package} is not installed; pip install {extra}, or set "
        "buffer.url=memory (one process, nothing survives it)"
      )
  return kind, rest


def open_store(
  url: str,
  directory: str | Path,
  *,
  durability: str = "process",
  patience: float = 60.0,
  shared: bool = True,
  namespace: str = "",
) -> Store:
  """The groups, uses and claims of one run.

  Args:
    url: "memory"; "sqlite", which is directory/buffer.sqlite; "sqlite:///path";
      "postgresql://user@host/database".
    durability: SQLite: "process" survives the kill of every process, "power" a power cut too (each
      transaction is synced to the disk).
    shared: SQLite: whether other processes are told, and heard, when something changes.
    patience: seconds to try again when the database is cut off or locked.
    namespace: PostgreSQL schema that holds the tables: runs (and stages) of one database need one
      each. Empty: one that `directory` alone has, kept in directory/buffer.namespace.

  Raises:
    UserError: another kind of URL, a store of a newer schema, a file that is no database, or a
      package that is missing.
    RunFailed: the database could not be reached.
  """
  if durability not in ("process", "power"):
    raise UserError(f"buffer durability {durability!r}: expected process or power")
  kind, rest = check_url(url)
  if kind == "memory":
    return MemoryStore()
  from trinity_jax.buffer import database
  from trinity_jax.buffer.storage_sql import SqlStore

  if kind == "postgresql":
    from trinity_jax.buffer.storage_postgres import open_postgres

    return open_postgres(
      url, patience=patience, namespace=namespace or own_namespace(Path(directory))
    )
  path = Path(rest.removeprefix("/")) if rest else Path(directory) / FILE
  path.parent.mkdir(parents=True, exist_ok=True)
  return SqlStore(
    database.Database(
      database.sqlite_url(path), str(path), durability=durability, patience=patience
    ),
    FileBell(path.with_name(path.name + ".bell")) if shared else ThreadBell(),
  )
