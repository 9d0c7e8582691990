"""In which order the tasks of a taskset come.

A selector is a pure function (seed, epoch, size) -> order of that epoch, so a cursor of one integer
says everything there is to say about the past, and a resumed run goes on exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trinity_jax.errors import UserError, suggestion

Selector = Callable[[int, int, int], np.ndarray]


def sequential(seed: int, epoch: int, size: int) -> np.ndarray:
  """Row order, every epoch. Returns i64[size]."""
  del seed, epoch
  return np.arange(size)


def shuffle(seed: int, epoch: int, size: int) -> np.ndarray:
  """Another permutation each epoch, from numpy's default_rng([seed, epoch]). Returns i64[size]."""
  return np.random.default_rng([seed, epoch]).permutation(size)


SELECTORS: dict[str, Selector] = {"sequential": sequential, "shuffle": shuffle}


def resolve(name: str) -> Selector:
  """Returns the selector of that name. Raises UserError if there is none."""
  if name not in SELECTORS:
    raise UserError(f"selector {name!r} does not exist{suggestion(name, SELECTORS)}")
  return SELECTORS[name]


def select(selector: Selector, seed: int, size: int, position: int, count: int) -> np.ndarray:
  """Returns the row indices at places position ... position + count - 1 of the endless stream.

  Epoch follows epoch without a gap: place p is place p % size of epoch p // size.

  Args:
    selector: gives each epoch's order.
    seed: the selector's seed.
    size: rows of the taskset, at least 1.
    position: first place, from 0.
    count: number of places.

  Returns:
    i64[count].
  """
  parts, end = [np.zeros(0, np.int64)], position + count
  while position < end:
    epoch, offset = divmod(position, size)
    part = selector(seed, epoch, size)[offset : offset + end - position]
    parts.append(part)
    position += len(part)
  return np.concatenate(parts)
