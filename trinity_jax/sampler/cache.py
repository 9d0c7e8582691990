"""The key/value cache of the sampler's slots: a tuple of segments per layer, updated in place.

Each layer is its own set of arrays, so that a decode step writes one entry and copies nothing.
Functions here work on one layer and on the slots of one shard; the engine maps them over the mesh.
Axes: S slots, P rows of a chunk, T chunk length, K kv heads, A head dim, n entries of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from trinity_jax.errors import UserError
from trinity_jax.ops import Segment, quantize  # pyright: ignore[reportAttributeAccessIssue]

Layer = tuple[Segment, ...]
Cache = tuple[Layer, ...]

ALIGN = 128  # lengths above 4 of these are multiples of it, so that blocks divide them


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


def aligned(lengths: Sequence[int]) -> tuple[int, ...]:
  """Live lengths as the cache allocates them: long ones rounded up to multiples of ALIGN."""
  return tuple(sorted({n if n <= 4 * ALIGN else -(-n // ALIGN) * ALIGN for n in lengths}))


def init(
  num_layers: int, slots: int, kv_heads: int, head_dim: int, ends: Sequence[int], dtype: Any
) -> Cache:
  """An empty cache whose segments end at `ends` (ascending; the last is the cache length)."""
  scaled = jnp.dtype(dtype) == jnp.int8

  def segment(n: int) -> Segment:
    k = jnp.zeros((slots, kv_heads, head_dim, n), dtype)
    v = jnp.zeros((slots, kv_heads, n, head_dim), dtype)
    if not scaled:
      return Segment(k, v)
    return Segment(k, v, *(jnp.zeros((slots, kv_heads, n), jnp.float32) for _ in range(2)))

  sizes = [end - start for start, end in zip([0, *ends], ends)]
  return tuple(tuple(segment(n) for n in sizes) for _ in range(num_layers))


def up_to(layer: Layer, live: int) -> Layer:
  """The segments that cover the first `live` entries.

  Raises:
    UserError: `live` is not where a segment ends.
  """
  total = 0
  for i, segment in enumerate(layer):
    total += segment.size
    if total == live:
      return layer[: i + 1]
  raise UserError(f"live = {live}: not among the lengths where a segment ends (up to {total})")


def write_entries(layer: Layer, positions: jax.Array, k: jax.Array, v: jax.Array) -> Layer:
  """Puts k, v [S, K, A] at entry positions[s] of each slot; drops positions beyond the layer."""
  S, K = k.shape[:2]
  slot, head = jnp.arange(S)[:, None], jnp.arange(K)[None, :]
  out, start = [], 0
  for s in layer:
    local = positions - start
    at = jnp.where((local >= 0) & (local < s.size), local, s.size)[:, None]  # size: out of range
    put = lambda x, new: x.set(new, mode="drop", unique_indices=True)
    new_k, new_v, k_scale, v_scale = _encode(s, k, v)
    out.append(
      Segment(
        put(s.k.at[slot, head, :, at], new_k),
        put(s.v.at[slot, head, at], new_v),
        None if k_scale is None else put(s.k_scale.at[slot, head, at], k_scale),
        None if v_scale is None else put(s.v_scale.at[slot, head, at], v_scale),
      )
    )
    start += s.size
  return tuple(out)


def write_chunks(
  layer: Layer, slots: jax.Array, starts: jax.Array, k: jax.Array, v: jax.Array
) -> Layer:
  """Puts k, v [P, T, K, A] at entries starts[p].. of slot slots[p].

  A slot outside 0..S - 1 marks a row of padding. What a chunk's own padding writes lies beyond the
  row's length and is overwritten before it is read.
  """
  P, T = k.shape[:2]
  out, begin = [], 0
  for s in layer:
    # Read, modify, write back the whole stretch of each row: blocks never cross an array's end.
    new_k, new_v, k_scale, v_scale = _encode(s, k, v)
    parts = (
      (s.k, new_k.transpose(0, 2, 3, 1), 3),
      (s.v, new_v.transpose(0, 2, 1, 3), 2),
      (s.k_scale, None if k_scale is None else k_scale.transpose(0, 2, 1), 2),
      (s.v_scale, None if v_scale is None else v_scale.transpose(0, 2, 1), 2),
    )

    S, n = s.k.shape[0], s.size
    touched = (slots >= 0) & (slots < S) & (starts < begin + n) & (starts + T > begin)
    row = jnp.clip(slots, 0, S - 1)
    put = jnp.where(touched, slots, S + jnp.arange(P))  # out of range: dropped

    def rows(_, arrays, parts=parts, begin=begin, row=row, put=put, n=n):
      def merge(x, new, axis):
        merged = jax.vmap(lambda old, new, at: _merge(old, new, at, axis - 1, n, T))
        new_rows = merged(x[row], new.astype(x.dtype), starts - begin)
        return x.at[put].set(new_rows, mode="drop", unique_indices=True)

      return tuple(
        None if x is None else merge(x, new, axis) for x, (_, new, axis) in zip(arrays, parts)
      )

    # A loop, because it updates in place what it may not have to touch at all.
    arrays = lax.fori_loop(0, jnp.any(touched).astype(jnp.int32), rows, tuple(p[0] for p in parts))
    out.append(Segment(*arrays))
    begin += s.size
  return tuple(out)


def _merge(old, new, at, axis, n, T):
  """old (n entries on `axis`) with new (T entries) at `at`, which may begin before or end after."""
  pad = [(T, T) if i == axis else (0, 0) for i in range(old.ndim)]
  wide = lax.dynamic_update_slice_in_dim(
    jnp.pad(old, pad), new, jnp.clip(at + T, 0, n + T), axis
  )
  return lax.slice_in_dim(wide, T, T + n, axis=axis)


def copy_rows(layer: Layer, live: int, source: jax.Array, target: jax.Array, count) -> Layer:
  """Slot target[i] gets the first `live` entries of slot source[i], for i < count."""
  first = up_to(layer, live)

  def one(i, segments):
    def move(x):
      row = lax.dynamic_index_in_dim(x, source[i], 0, keepdims=True)
      return lax.dynamic_update_slice_in_dim(x, row, target[i], 0)

    return jax.tree.map(move, segments)

  return (*lax.fori_loop(0, count, one, first), *layer[len(first) :])


def _encode(s: Segment, k: jax.Array, v: jax.Array):
  """k, v [..., A] in the segment's dtype, with their scales (None unless int8)."""
  if s.k_scale is None:
    return k.astype(s.k.dtype), v.astype(s.v.dtype), None, None
  (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
  return k, v, k_scale, v_scale
