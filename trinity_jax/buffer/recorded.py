"""Reads the groups of a run that kept them (buffer.keep), to train on them again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from trinity_jax.buffer.record import FILE
from trinity_jax.errors import UserError
from trinity_jax.experience import Experience


def find(path: str | Path) -> Path:
  """The file of a run's buffer, given it or its folder.

  Raises:
    UserError: there is none.
  """
  file = Path(path) / FILE if Path(path).is_dir() else Path(path)
  if not file.is_file():
    raise UserError(
      f"config.buffer.replay = {str(path)!r}: there is no {file.name}; name the folder of a "
      "run's stage that was run with buffer.keep=True"
    )
  return file


class Recorded:
  """The groups of a SQLite buffer, in id order; the file is not changed.

  Args:
    path: buffer.sqlite, or a folder that holds one.

  Raises:
    UserError: there is none, or it holds no experiences any more.
  """

  def __init__(self, path: str | Path):
    import sqlalchemy as sa

    from trinity_jax.buffer.schema import EXPERIENCES, GROUPS

    self.path = find(path)
    self._sa, self._table = sa, EXPERIENCES
    self._engine = sa.create_engine(f"sqlite:///file:{self.path.absolute()}?mode=ro&uri=true")
    with self._engine.connect() as connection:
      found = connection.execute(
        sa.select(GROUPS.c.batch, GROUPS.c.task)
        .where(GROUPS.c.payload, GROUPS.c.size > 0)
        .order_by(GROUPS.c.batch, GROUPS.c.task)
      )
      self.keys = [(batch, task) for batch, task in found]
    if not self.keys:
      raise UserError(
        f"config.buffer.replay: {self.path} holds no experiences; they are deleted when they have "
        "been trained on, unless the run has buffer.keep=True"
      )

  def __len__(self) -> int:
    """Groups."""
    return len(self.keys)

  def groups(self, first: int, count: int) -> list[list[Experience]]:
    """`count` groups from place `first` on, from the start again after the last.

    The versions that sampled the tokens are another run's: they are all -1 (unknown).
    """
    out = []
    table, sa = self._table, self._sa
    with self._engine.connect() as connection:
      for place in range(first, first + count):
        batch, task = self.keys[place % len(self.keys)]
        rows = connection.execute(
          sa.select(table.c.data)
          .where(table.c.batch == batch, table.c.task == task)
          .order_by(table.c.run, table.c.step)
        )
        out.append([_foreign(Experience.from_bytes(data)) for (data,) in rows])
    return out

  def close(self) -> None:
    self._engine.dispose()


def _foreign(experience: Experience) -> Experience:
  return dataclasses.replace(experience, versions=np.full(len(experience.tokens), -1, np.int32))
