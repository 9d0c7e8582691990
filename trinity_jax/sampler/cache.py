"""Shapes of the key/value cache and the lengths programs are compiled for."""

from __future__ import annotations

from trinity_jax.errors import UserError


def buckets(longest: int, declared: tuple[int, ...] = (), smallest: int = 16) -> tuple[int, ...]:
  """Ascending lengths up to `longest`: the declared ones, or powers of two from `smallest`.

  Raises:
    UserError: declared lengths that do not reach `longest`, or are not positive.
  """
  if declared:
    if min(declared) < 1 or max(declared) < longest:
      raise UserError(f"buckets {declared} must be positive and reach {longest}; add {longest}")
    return tuple(sorted({min(n, longest) for n in declared}))
  out, n = [], smallest
  while n < longest:
    out.append(n)
    n *= 2
  return (*out, longest)


def bucket_for(length: int, choices: tuple[int, ...]) -> int:
  """The smallest choice that holds `length`."""
  for n in choices:
    if n >= length:
      return n
  raise UserError(f"length {length} exceeds the largest compiled length {choices[-1]}")
