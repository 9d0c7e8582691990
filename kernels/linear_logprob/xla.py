"""Tiles of logits in loops of plain XLA: [T, V] never exists. Runs on every platform.

Axes: T rows (tokens), D model width, V vocabulary (the columns of this device), N chunks of C rows,
B columns of a tile.

Rows under the mask are compacted first (a stable sort puts them in front), and loops over chunks of
rows end after ceil(active / C), a bound known only at run time: masked rows cost nothing. A tile
[C, B] is small enough to stay in a processor's cache between its product and what is done to it,
and large enough for products at full rate.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import arithmetic
from .columns import over_columns
from .layout import Layout
from .token_loss import TokenLoss

# A program with no more logits than that (32 MiB in float32) on a device keeps them, see whole.py.
SMALL = 1 << 23


class Tile(NamedTuple):
  rows: int
  columns: int
  # Whether x^T is laid out before the loop: XLA:CPU multiplies by a transposed left side slowly.
  transpose: bool = False


CPU = Tile(512, 2048, transpose=True)
ACCELERATOR = Tile(2048, 8192)


class Chunks(NamedTuple):
  """Rows under the mask, in front, in chunks; the first `live` chunks hold some."""

  mask: jax.Array
  order: jax.Array  # i32[N C]: the row, or T where there is none
  live: jax.Array  # i32[]
  rows: int  # C

  def take(self, x: jax.Array) -> jax.Array:
    """[T, ...] -> [N, C, ...], 0 where there is no row; scalars as they are."""
    if not x.ndim:
      return x
    return x.at[self.order].get(mode="fill", fill_value=0).reshape(-1, self.rows, *x.shape[1:])

  @property
  def active(self) -> jax.Array:
    """bool[N, C]."""
    return (self.order < self.mask.shape[0]).reshape(-1, self.rows)

  def zeros(self, dtype, *more: int) -> jax.Array:
    """[N, C, ...]."""
    return jnp.zeros((self.order.shape[0] // self.rows, self.rows, *more), dtype)

  def back(self, x: jax.Array) -> jax.Array:
    """[N, C, ...] -> [T, ...], 0 where masked."""
    place = jnp.cumsum(self.mask, dtype=jnp.int32) - 1
    place = jnp.where(self.mask, place, self.order.shape[0])
    return x.reshape(-1, *x.shape[2:]).at[place].get(mode="fill", fill_value=0)


def chunks_of(mask: jax.Array, rows: int) -> Chunks:
  count = mask.shape[0]
  rows = min(rows, count)
  order = jnp.argsort(~mask, stable=True).astype(jnp.int32)
  active = jnp.sum(mask, dtype=jnp.int32)
  order = jnp.where(jnp.arange(count) < active, order, count)
  order = jnp.pad(order, (0, -count % rows), constant_values=count)
  return Chunks(mask, order, (active + rows - 1) // rows, rows)


def _at(arrays, i):
  return tuple(x[i] for x in arrays)


def _set(arrays, i, values):
  return tuple(x.at[i].set(v) for x, v in zip(arrays, values, strict=True))


def forward(hidden, weight, targets, mask, temperature, *, softcap=None, tile: Tile = CPU):
  """-> (target_logit, lse, mean_logit), see implementation.py."""
  chunks = chunks_of(mask, tile.rows)
  x, y, t = map(chunks.take, (hidden, targets, temperature))
  t = jnp.where(chunks.active, t, 1)

  def block(start, part, sums):
    def step(i, sums):
      logits = arithmetic.logits_of(x[i], part, t[i], softcap)
      return _set(sums, i, arithmetic.add_columns(_at(sums, i), logits, y[i] - start))

    return lax.fori_loop(0, chunks.live, step, sums)

  start = arithmetic.no_columns(chunks.zeros(arithmetic.wide(hidden, weight)))
  sums = over_columns(weight, tile.columns, block, start)
  return tuple(map(chunks.back, arithmetic.finish(sums)))


def backward(
  hidden, weight, targets, mask, temperature, lse, entropy, cotangents, *, softcap=None,
  tile: Tile = CPU,
):  # fmt: skip
  """-> (d_hidden, d_weight), see implementation.py. Logits are computed again, tile by tile.

  With columns in the outer loop, a block of d_weight is summed over rows where it is small and
  written once; d_hidden, which is small, is what sums up over the blocks.
  """
  chunks = chunks_of(mask, tile.rows)
  x, y, t, lse, entropy = map(chunks.take, (hidden, targets, temperature, lse, entropy))
  cotangents = jax.tree.map(chunks.take, cotangents)
  t = jnp.where(chunks.active, t, 1)
  left = _left(x, tile)
  wide = arithmetic.wide(hidden, weight)

  def block(start, part, gradients):
    def step(i, gradients):
      d_hidden, d_part = gradients
      logits = arithmetic.logits_of(x[i], part, t[i], softcap)
      c = jax.tree.map(lambda c: c[i], cotangents)
      d = arithmetic.logits_gradient(logits, y[i] - start, t[i], entropy[i], lse[i], c, softcap)
      d_hidden = d_hidden.at[i].add(arithmetic.hidden_gradient(d, part))
      return d_hidden, d_part + arithmetic.product(left[i], d)

    d_hidden, d_weight = gradients
    d_part = jnp.zeros(part.shape, wide)
    d_hidden, d_part = lax.fori_loop(0, chunks.live, step, (d_hidden, d_part))
    d_part = d_part.astype(weight.dtype)
    return d_hidden, lax.dynamic_update_slice_in_dim(d_weight, d_part, start, 1)

  zeros = (chunks.zeros(wide, hidden.shape[1]), jnp.zeros_like(weight))
  d_hidden, d_weight = over_columns(weight, tile.columns, block, zeros)
  return chunks.back(d_hidden), d_weight


def _left(x, tile: Tile):
  """[..., C, D] -> x^T [..., D, C], as left side of the products for d_weight."""
  x = jnp.swapaxes(x, -1, -2)
  return lax.optimization_barrier(x) if tile.transpose else x


def loss_gradients(
  hidden, weight, targets, mask, temperature, arrays, *, token_loss: TokenLoss, layout: Layout,
  softcap=None, tile: Tile = CPU,
):  # fmt: skip
  """-> (losses[T], (logprob, entropy, lse), d_hidden, d_weight), in three products; see api.py.

  The logits of one chunk, [C, V], are kept. Shards of the vocabulary merge inside the loop: they
  have the same rows, so the same number of live chunks. Shards of the rows do not meet in it.
  """
  chunks = chunks_of(mask, tile.rows)
  x, y, t = map(chunks.take, (hidden, targets, temperature))
  active, arrays = chunks.active, jax.tree.map(chunks.take, arrays)
  t = jnp.where(active, t, 1)
  wide = arithmetic.wide(hidden, weight)

  def step(i, carry):
    columns, d_hidden, d_weight, kept = carry
    kept, parts = _chunk_logits(x[i], weight, y[i], t[i], softcap, tile, kept)
    logprob, entropy, lse = outs = layout.merge(*parts)
    extra = jax.tree.map(lambda a: a[i] if a.ndim else a, arrays)
    losses, g, h = token_loss.gradients(active[i], logprob, entropy, extra)
    left = _left(lax.optimization_barrier(x[i]), tile)

    def block(start, part, gradients):
      d_rows, d_weight = gradients
      logits = lax.dynamic_slice_in_dim(kept, start, part.shape[1], 1)
      given = (g, h, None)
      d = arithmetic.logits_gradient(logits, y[i] - start, t[i], entropy, lse, given, softcap)
      d_part = lax.dynamic_slice_in_dim(d_weight, start, part.shape[1], 1)
      d_part += arithmetic.product(left, d)
      d_weight = lax.dynamic_update_slice_in_dim(d_weight, d_part, start, 1)
      return d_rows + arithmetic.hidden_gradient(d, part), d_weight

    rows = jnp.zeros(x.shape[1:], wide)
    rows, d_weight = over_columns(weight, tile.columns, block, (rows, d_weight))
    columns = _set(columns, i, (losses, *outs))
    return columns, d_hidden.at[i].set(rows.astype(hidden.dtype)), d_weight, kept

  start = (
    (chunks.zeros(wide),) * 4,
    chunks.zeros(hidden.dtype, hidden.shape[1]),
    jnp.zeros(weight.shape, wide),
    jnp.zeros((chunks.rows, weight.shape[1]), wide),
  )
  columns, d_hidden, d_weight, _ = lax.fori_loop(0, chunks.live, step, start)
  losses, *outs = map(chunks.back, columns)
  return losses, tuple(outs), chunks.back(d_hidden), d_weight


def _chunk_logits(x, weight, y, temperature, softcap, tile: Tile, kept):
  """-> (logits of a chunk [C, V], written over `kept`, (target logit, lse, mean logit))."""

  def block(start, part, carry):
    kept, sums = carry
    logits = arithmetic.logits_of(x, part, temperature, softcap)
    kept = lax.dynamic_update_slice_in_dim(kept, logits, start, 1)
    return kept, arithmetic.add_columns(sums, logits, y - start)

  sums = arithmetic.no_columns(jnp.zeros(x.shape[0], kept.dtype))
  kept, sums = over_columns(weight, tile.columns, block, (kept, sums))
  return kept, arithmetic.finish(sums)


def expected_score(hidden, weight, mask, temperature, *, layout: Layout, tile: Tile = CPU):
  """-> [T], see api.py."""
  chunks = chunks_of(mask, tile.rows)
  x, t = map(chunks.take, (hidden, temperature))
  t = jnp.where(chunks.active, t, 1)
  wide = arithmetic.wide(hidden, weight)

  def step(i, carry):
    out, kept = carry
    nothing = jnp.full(chunks.rows, -1, jnp.int32)
    kept, parts = _chunk_logits(x[i], weight, nothing, t[i], None, tile, kept)
    _, entropy, lse = layout.merge(*parts)

    def block(start, part, total):
      log_p = lax.dynamic_slice_in_dim(kept, start, part.shape[1], 1) - lse[:, None]
      return total + jnp.sum(jnp.exp(2 * log_p) * (entropy[:, None] + log_p), axis=-1)

    total = over_columns(weight, tile.columns, block, jnp.zeros(chunks.rows, wide))
    return out.at[i].set(layout.sum_vocabulary(total)), kept

  kept = jnp.zeros((chunks.rows, weight.shape[1]), wide)
  out, _ = lax.fori_loop(0, chunks.live, step, (chunks.zeros(wide), kept))
  return chunks.back(out)
