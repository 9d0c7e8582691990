"""Small numerical helpers that every objective shares: masking, clamping, sums over sequences."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def masked(mask: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Returns floating copies of `arrays` that are 0 where `mask` is False.

  To be applied to inputs, before any `exp` or product: a NaN or inf at a masked position then
  reaches neither value nor gradient (`0 * nan` is nan, so masking a result would be too late).
  """
  mask = jnp.asarray(mask, bool)
  out = []
  for x in arrays:
    x = jnp.asarray(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    out.append(jnp.where(mask, x, jnp.zeros_like(x)))
  return tuple(out)


def clamp(
  x: jax.Array, low: jax.typing.ArrayLike, high: jax.typing.ArrayLike
) -> jax.Array:
  """Clips to [low, high] with torch's gradient: 1 inside, bounds included, 0 outside.

  (`jnp.clip` gives 0.5 at an exact bound.)
  """
  return jnp.where(x < low, low, jnp.where(x > high, high, x)).astype(x.dtype)


def sequence_sum(
  x: jax.Array, mask: jax.Array, sequence_index: jax.Array, num_sequences: int
) -> jax.Array:
  """Sums `x` (any shape X) over the masked tokens of each sequence: [N].

  `sequence_index` (X, int32) is not read where `mask` is False. A sequence without a masked token
  gets 0.
  """
  (x,) = masked(mask, x)
  mask = jnp.broadcast_to(jnp.asarray(mask, bool), x.shape)
  index = jnp.where(mask, sequence_index, num_sequences)  # out of range = dropped
  return jnp.zeros(num_sequences, x.dtype).at[index].add(x, mode="drop")


def rows(mask: jax.Array) -> tuple[jax.Array, int]:
  """Returns (sequence_index, num_sequences) of a padded array: one sequence per row of [..., T]."""
  shape = jnp.shape(mask)
  count = 1
  for n in shape[:-1]:
    count *= n
  index = jnp.arange(count, dtype=jnp.int32).reshape((*shape[:-1], 1))
  return jnp.broadcast_to(index, shape), count
