"""Attention in plain XLA: grouped heads without repeating keys, fp32 scores and softmax.

Axes: B rows, T places of queries, S places of keys (T, unless the mesh splits the row), H query
heads, K kv heads, G = H / K, R = G T queries that share their keys, A head dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from .shards import shards_of

_NEVER = -1e30  # a finite "minus infinity": no row can turn into NaN


def attention(
  q: jax.Array,  # [B, T, H, A]
  k: jax.Array,  # [B, T, K, A]
  v: jax.Array,  # [B, T, K, A]
  *,
  positions: jax.Array,  # i32[B, T]
  segment_ids: jax.Array,  # i32[B, T]
  window: int | None = None,
) -> jax.Array:  # [B, T, H, A]
  """See reference.attention. O(B H T²) memory, but only while one layer is at work.

  The backward pass computes the weights again from q, k and the saved logsumexp (arXiv:2205.14135):
  nothing quadratic is kept for it, and it is faster than reading the weights back.

  On a mesh in context the compiler splits rows and heads; places that go over the axis context are
  split by hand: it would gather queries, too.
  """
  run, at = functools.partial(_attention, window), (positions, segment_ids)
  shards = shards_of(q.shape, k.shape)
  return shards.run(run, q, k, v, at) if shards.places else run(q, k, v, at, at)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(window, q, k, v, at_queries, at_keys):
  return _forward(window, q, k, v, at_queries, at_keys)[0]


def _forward(window, q, k, v, at_queries, at_keys):
  K = k.shape[2]
  rows = _rows(q * (q.shape[-1] ** -0.5), K)
  keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, A]
  scores = _scores(rows, keys, at_queries, at_keys, window)
  peak = jnp.max(scores, axis=-1, keepdims=True)
  weights = jnp.exp(scores - peak)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  mixed = _dot("bkrs,bksa->bkra", weights.astype(v.dtype), values) / total
  out = _heads(mixed.astype(q.dtype), q.shape)
  return out, (rows, keys, values, mixed, peak + jnp.log(total), at_queries, at_keys)


def _backward(window, residuals, g):
  rows, keys, values, mixed, lse, at_queries, at_keys = residuals
  g_rows = _rows(g, keys.shape[1])
  weights = jnp.exp(_scores(rows, keys, at_queries, at_keys, window) - lse)
  d_weights = _dot("bkra,bksa->bkrs", g_rows, values)
  # d softmax: w * (dw - sum(w dw)), and sum(w dw) = g . out
  inner = jnp.sum(g_rows.astype(mixed.dtype) * mixed, axis=-1, keepdims=True)
  d_scores = (weights * (d_weights - inner)).astype(g.dtype)
  d_values = _dot("bkrs,bkra->bksa", weights.astype(g.dtype), g_rows)
  d_keys = _dot("bkrs,bkra->bksa", d_scores, rows)
  d_rows = _dot("bkrs,bksa->bkra", d_scores, keys) * (g.shape[-1] ** -0.5)
  dq = _heads(d_rows.astype(rows.dtype), g.shape)
  dk, dv = d_keys.swapaxes(1, 2).astype(keys.dtype), d_values.swapaxes(1, 2).astype(values.dtype)
  return dq, dk, dv, None, None


_attention.defvjp(_forward, _backward)


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
  wide = jnp.promote_types(x.dtype, jnp.float32)
  return jnp.einsum(spec, x, y, preferred_element_type=wide)


def _rows(x: jax.Array, K: int) -> jax.Array:
  """[B, T, H, A] -> [B, K, R, A] with R = G * T: all queries that share a key are one matmul."""
  B, T, H, A = x.shape
  return x.reshape(B, T, K, H // K, A).transpose(0, 2, 3, 1, 4).reshape(B, K, H // K * T, A)


def _heads(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The inverse of _rows; `shape` is [B, T, H, A]."""
  B, T, H, A = shape
  K = x.shape[1]
  return x.reshape(B, K, H // K, T, A).transpose(0, 3, 1, 2, 4).reshape(shape)


def _scores(rows, keys, at_queries, at_keys, window):
  """Masked scores [B, K, R, S] in fp32 or wider; at_*: (positions, segment ids), [B, T] and [B, S].
  """
  (positions, segments), (key_positions, key_segments) = at_queries, at_keys
  scores = _dot("bkra,bksa->bkrs", rows, keys)
  B, K, R, S = scores.shape
  age = positions[:, :, None] - key_positions[:, None, :]
  seen = (segments[:, :, None] == key_segments[:, None, :]) & (age >= 0)
  if window is not None:
    seen &= age < window
  T = positions.shape[1]
  grouped = scores.reshape(B, K, R // T, T, S)
  return jnp.where(seen[:, None, None], grouped, _NEVER).reshape(B, K, R, S)
