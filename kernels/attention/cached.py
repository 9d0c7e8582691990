"""Attention over a slot cache that is kept in segments along its length.

A program for live length n touches the first segments only, so that nothing has to be sliced out
of a larger array: XLA copies what it slices. Axes: S slots, P prompts (rows), T chunk length, H
query heads, K kv heads, G = H / K, A head dim, n entries of one segment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_NEVER = -1e30  # a finite "minus infinity": no row can turn into NaN
_BLOCK = 512  # entries of a segment that extend looks at in one go


class Segment(NamedTuple):
  """A stretch of one layer's cache.

  Keys have the head dim before the length: scores are then a plain matrix product, and on a CPU a
  decode step is 1.2 to 1.8 times as fast as with [S, K, n, A].

  Attributes:
    k: [S, K, A, n], rotated keys; v: [S, K, n, A].
    k_scale, v_scale: f32[S, K, n], what int8 entries are multiplied with; None in other dtypes.
  """

  k: Any
  v: Any
  k_scale: Any = None
  v_scale: Any = None

  @property
  def size(self) -> int:
    return self.k.shape[3]


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x [..., A] -> (int8 [..., A], f32 scale [...]), symmetric per vector: x ~ q * scale."""
  x = x.astype(jnp.float32)
  scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), 1e-20) / 127
  return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def decode(
  q: jax.Array,  # [S, H, A]
  segments: Sequence[Segment],
  positions: jax.Array,  # i32[S], position of each query = index of its own cache entry
  window: int | None = None,
) -> jax.Array:  # [S, H, A]
  """One query per slot against entries 0..position of its slot, in these segments."""
  S, H, A = q.shape
  K, live = segments[0].k.shape[1], sum(s.size for s in segments)
  rows = (q * (A**-0.5)).reshape(S, K, H // K, A)
  parts = [_scores("skgd,skdc->skgc", rows, s.k, s.k_scale, (2,)) for s in segments]
  age = positions[:, None] - jnp.arange(live, dtype=positions.dtype)[None, :]
  scores = jnp.where(_seen(age, window)[:, None, None], jnp.concatenate(parts, axis=-1), _NEVER)
  weights = jax.nn.softmax(scores, axis=-1)
  out, start = 0.0, 0
  for s in segments:
    part = lax.slice_in_dim(weights, start, start + s.size, axis=3)
    out += _mixed("skgc,skcd->skgd", part, s.v, s.v_scale, (2,))
    start += s.size
  return out.astype(q.dtype).reshape(S, H, A)  # pyright: ignore[reportAttributeAccessIssue]


def extend(
  q: jax.Array,  # [P, T, H, A]
  segments: Sequence[Segment],
  slots: jax.Array,  # i32[P], the slot each row continues
  positions: jax.Array,  # i32[P, T], of each query = index of its own cache entry
  needed: jax.Array,  # i32[], blocks that begin at or beyond it are not read
  window: int | None = None,
) -> jax.Array:  # [P, T, H, A]
  """A chunk of each row against entries 0..position of the row's slot.

  Blocks of entries are visited in a loop with a traced bound, keeping a running maximum and sum
  (online softmax, arXiv:1805.02867): one program serves every history length, and its bits do not
  depend on the allocation.
  """
  P, T, H, A = q.shape
  K = segments[0].k.shape[1]
  R = T * H // K
  rows = (q * (A**-0.5)).reshape(P, T, K, H // K, A).transpose(0, 2, 3, 1, 4).reshape(P, K, R, A)
  row_positions = jnp.broadcast_to(positions[:, None], (P, H // K, T)).reshape(P, R)
  slots = jnp.clip(slots, 0, segments[0].k.shape[0] - 1)
  carry = (
    jnp.full((P, K, R), _NEVER, jnp.float32),
    jnp.zeros((P, K, R), jnp.float32),
    jnp.zeros((P, K, R, A), jnp.float32),
  )
  start = 0
  for s in segments:
    size = _block(s.size)
    count = jnp.clip(-(-(needed - start) // size), 0, s.size // size)

    def body(i, carry, s=s, start=start, size=size):
      peak, total, mixed = carry
      block = _rows_of(s, slots, i * size, size)
      scores = _scores("pkra,pkac->pkrc", rows, block.k, block.k_scale, (2,))
      entry = start + i * size + jnp.arange(size, dtype=positions.dtype)
      seen = _seen(row_positions[:, :, None] - entry[None, None], window)[:, None]
      new_peak = jnp.maximum(peak, jnp.max(jnp.where(seen, scores, _NEVER), axis=-1))
      weights = jnp.where(seen, jnp.exp(scores - new_peak[..., None]), 0.0)
      scale = jnp.exp(peak - new_peak)
      part = _mixed("pkrc,pkca->pkra", weights, block.v, block.v_scale, (2,))
      return (
        new_peak,
        total * scale + jnp.sum(weights, axis=-1),
        mixed * scale[..., None] + part,
      )

    carry = lax.fori_loop(0, count, body, carry)
    start += s.size
  _, total, mixed = carry
  out = (mixed / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype)
  return out.reshape(P, K, H // K, T, A).transpose(0, 3, 1, 2, 4).reshape(P, T, H, A)


def _block(size: int) -> int:
  """The largest divisor of a segment's size up to _BLOCK."""
  return size if size <= _BLOCK else math.gcd(size, _BLOCK)


def _rows_of(s: Segment, slots: jax.Array, first: jax.Array, size: int) -> Segment:
  """Entries first..first + size of the segment's rows `slots`, and nothing else, copied."""

  def cut(x, axis):
    if x is None:
      return None
    sizes = [1 if i == 0 else size if i == axis else n for i, n in enumerate(x.shape)]

    def one(slot):
      at = [slot if i == 0 else first if i == axis else 0 for i in range(x.ndim)]
      return lax.dynamic_slice(x, at, sizes)[0]

    return jax.vmap(one)(slots)

  return Segment(cut(s.k, 3), cut(s.v, 2), cut(s.k_scale, 2), cut(s.v_scale, 2))


def _seen(age: jax.Array, window: int | None) -> jax.Array:
  seen = age >= 0
  return seen if window is None else seen & (age < window)


def _scores(spec, q, k, scale, axes):
  """fp32 q·k; `scale` [.., n] broadcasts over the query axes."""
  if scale is None:
    return jnp.einsum(spec, q, k, preferred_element_type=jnp.float32)
  scores = jnp.einsum(spec, q.astype(jnp.float32), k.astype(jnp.float32))
  return scores * jnp.expand_dims(scale, axes)


def _mixed(spec, weights, v, scale, axes):
  """fp32 sum of v weighted."""
  if scale is None:
    return jnp.einsum(spec, weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
  return jnp.einsum(spec, weights * jnp.expand_dims(scale, axes), v.astype(jnp.float32))
