"""What attention means, written for reading: one query against all keys, in the input's precision.

Axes: B rows, T row length, S slots, C cache length, H query heads, K kv heads, A head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(
  q: jax.Array,  # [B, T, H, A]
  k: jax.Array,  # [B, T, K, A]
  v: jax.Array,  # [B, T, K, A]
  *,
  positions: jax.Array,  # i32[B, T]
  segment_ids: jax.Array,  # i32[B, T]
  window: int | None = None,
) -> jax.Array:  # [B, T, H, A]
  """softmax(q kᵀ / sqrt(A)) v over keys of the same segment that are not in the future.

  With a window, key j is seen from i when 0 <= position_i - position_j < window. Rows of padding
  (segment 0) are finite and mean nothing.
  """
  group = q.shape[2] // k.shape[2]
  k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
  age = positions[:, :, None] - positions[:, None, :]
  seen = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (age >= 0)
  if window is not None:
    seen &= age < window
  scores = jnp.einsum("bthd,bshd->bhts", q, k) / jnp.sqrt(jnp.asarray(q.shape[-1], q.dtype))
  weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
  return jnp.einsum("bhts,bshd->bthd", weights, v)
