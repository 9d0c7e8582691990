"""Attention in plain XLA: grouped heads without repeating keys, fp32 scores and softmax.

Axes: B rows, T row length, S slots, C cache length, H query heads, K kv heads, G = H / K,
A head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_NEVER = -1e30  # finite, so that a fully masked row, and its gradient, stay finite


def attention(
  q: jax.Array,  # [B, T, H, A]
  k: jax.Array,  # [B, T, K, A]
  v: jax.Array,  # [B, T, K, A]
  *,
  positions: jax.Array,  # i32[B, T]
  segment_ids: jax.Array,  # i32[B, T]
  window: int | None = None,
) -> jax.Array:  # [B, T, H, A]
  """See reference.attention. Needs O(B H T²) memory."""
  B, T, H, A = q.shape
  K = k.shape[2]
  q = (q * (A**-0.5)).reshape(B, T, K, H // K, A)
  scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
  age = positions[:, :, None] - positions[:, None, :]
  seen = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (age >= 0)
  if window is not None:
    seen &= age < window
  weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, _NEVER), axis=-1)
  out = jnp.einsum(
    "bkgts,bskd->btkgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
  )
  return out.astype(q.dtype).reshape(B, T, H, A)


def decode(
  q: jax.Array,  # [S, H, A]
  k: jax.Array,  # [L, S, K, C, A]
  v: jax.Array,  # [L, S, K, C, A]
  *,
  layer: jax.Array,  # i32[]
  live: int,
  positions: jax.Array,  # i32[S], position of each query = index of its own cache entry
  window: int | None = None,
) -> jax.Array:  # [S, H, A]
  """One query per slot against the entries of that slot, in one layer, up to its position."""
  S, H, A = q.shape
  K = k.shape[2]

  def entries(cache):  # [L, S, K, C, A] -> [S, K, live, A]
    return lax.dynamic_slice(cache, (layer, 0, 0, 0, 0), (1, S, K, live, A))[0]

  q = (q * (A**-0.5)).reshape(S, K, H // K, A)
  scores = jnp.einsum("skgd,skcd->skgc", q, entries(k), preferred_element_type=jnp.float32)
  age = positions[:, None] - jnp.arange(live, dtype=positions.dtype)[None, :]
  seen = age >= 0
  if window is not None:
    seen &= age < window
  weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, _NEVER), axis=-1)
  out = jnp.einsum(
    "skgc,skcd->skgd", weights.astype(v.dtype), entries(v), preferred_element_type=jnp.float32
  )
  return out.astype(q.dtype).reshape(S, H, A)
