"""Which of the ready groups a trainer takes first when they may be used more than once.

A priority is computed when a group is stored and after each use, so that databases keep it in an
index; it depends on nothing but the group and the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from trinity_jax.errors import UserError, suggestion


class Priority(Protocol):
  """(newest policy version of the group, its uses so far, generator) -> highest goes first."""

  def __call__(self, version: int, uses: int, rng: np.random.Generator) -> float: ...


def linear_decay(decay: float = 2.0) -> Priority:
  """version - decay * uses: fresh groups first, each use counts as `decay` versions."""
  return lambda version, uses, rng: version - decay * uses


def decay_limit_randomization(decay: float = 2.0, sigma: float = 0.0) -> Priority:
  """linear_decay plus a normal draw of standard deviation sigma; the limit is `max_uses`."""
  return lambda version, uses, rng: version - decay * uses + sigma * rng.standard_normal()


PRIORITIES: dict[str, Callable[..., Priority]] = {
  "linear_decay": linear_decay,
  "decay_limit_randomization": decay_limit_randomization,
}


def make_priority(
  priority: str | Priority, seed: int, args: Mapping[str, Any]
) -> Callable[[tuple[int, int], int, int], float]:
  """(group, version, uses) -> priority, with a generator per (seed, group, uses).

  Raises:
    UserError: an unknown name, or arguments it does not take.
  """
  function: Any = priority
  if isinstance(priority, str):
    if priority not in PRIORITIES:
      raise UserError(f"replay priority {priority!r}: unknown{suggestion(priority, PRIORITIES)}")
    try:
      function = PRIORITIES[priority](**args)
    except TypeError as e:
      raise UserError(
        f"replay priority {priority!r}: arguments {dict(args)} do not fit: {e}"
      ) from e
  return lambda key, version, uses: float(
    function(version, uses, np.random.default_rng((seed, *key, uses)))
  )
