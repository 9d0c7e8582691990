"""Chunks of active rows in a loop: [T, V] never exists. Runs on every platform.

Axes: T rows (tokens), C rows of a chunk, D model width, V vocabulary (the columns of this device).

Rows under the mask are compacted first (a stable sort puts them in front) and the loop runs over
ceil(active / C) chunks, a bound known only at run time: masked rows cost nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import arithmetic
from .layout import Layout
from .token_loss import TokenLoss

# A chunk of this many logits (32 MiB in float32) is large enough for matmuls at full rate and small
# beside weight and gradient; a program with no more logits than that keeps them.
CHUNK_LOGITS = 1 << 23
MIN_ROWS = 128


def chunk_rows(num_rows: int, vocabulary: int) -> int:
  """Rows per chunk: all of them when that is at most CHUNK_LOGITS logits."""
  if num_rows * vocabulary <= CHUNK_LOGITS:
    return num_rows
  rows = max(CHUNK_LOGITS // vocabulary, MIN_ROWS)
  return min(num_rows, rows // MIN_ROWS * MIN_ROWS)


class Chunks(NamedTuple):
  """Rows under the mask, in front; the rest of `order` is T. The first `live` chunks hold some."""

  size: int
  mask: jax.Array
  order: jax.Array  # i32[T rounded up to whole chunks]
  live: jax.Array  # i32[]

  def rows(self, i, *arrays):
    """Which of the i-th chunk's rows are active; those rows of `arrays`, 0 where not; scalars."""
    index = jax.lax.dynamic_slice(self.order, (i * self.size,), (self.size,))
    take = lambda a: a.at[index].get(mode="fill", fill_value=0) if a.ndim else a
    return (index < self.mask.shape[0], *(jax.tree.map(take, a) for a in arrays))

  def empty(self, dtype, *width):
    """An array of rows in the order of the chunks."""
    return jnp.zeros((self.order.shape[0], *width), dtype)

  def put(self, i, outs, values):
    """The i-th chunk's rows of `outs`, arrays in the order of the chunks."""
    at = i * self.size
    return tuple(
      jax.lax.dynamic_update_slice_in_dim(o, v.astype(o.dtype), at, 0)
      for o, v in zip(outs, values, strict=True)
    )

  def back(self, out):
    """From the order of the chunks to that of the rows, 0 where masked."""
    place = jnp.cumsum(self.mask, dtype=jnp.int32) - 1
    place = jnp.where(self.mask, place, out.shape[0])
    return out.at[place].get(mode="fill", fill_value=0)


def chunks_of(mask: jax.Array, size: int) -> Chunks:
  count = mask.shape[0]
  order = jnp.argsort(~mask, stable=True).astype(jnp.int32)
  active = jnp.sum(mask, dtype=jnp.int32)
  order = jnp.where(jnp.arange(count) < active, order, count)
  order = jnp.pad(order, (0, -count % size), constant_values=count)
  return Chunks(size, mask, order, (active + size - 1) // size)


def forward(hidden, weight, targets, mask, temperature, *, softcap=None, chunk=None):
  """-> (target_logit, lse, mean_logit), see api.py. `chunk`: rows whose logits exist at a time."""
  chunks = chunks_of(mask, chunk or chunk_rows(hidden.shape[0], weight.shape[1]))

  def body(i, out):
    active, x, y, t = chunks.rows(i, hidden, targets, temperature)
    t = jnp.where(active, t, 1)
    return chunks.put(i, out, arithmetic.reduce(arithmetic.logits_of(x, weight, t, softcap), y))

  zeros = chunks.empty(arithmetic.wide(hidden, weight))
  out = jax.lax.fori_loop(0, chunks.live, body, (zeros, zeros, zeros))
  return tuple(map(chunks.back, out))


def backward(
  hidden, weight, targets, mask, temperature, lse, entropy, cotangents, *, softcap=None, chunk=None
):
  """-> (d_hidden, d_weight), see api.py. The chunk's logits are computed again."""
  chunks = chunks_of(mask, chunk or chunk_rows(hidden.shape[0], weight.shape[1]))

  def body(i, gradients):
    d_hidden, d_weight = gradients
    active, x, y, t, l, e, c = chunks.rows(
      i, hidden, targets, temperature, lse, entropy, cotangents
    )
    t = jnp.where(active, t, 1)
    logits = arithmetic.logits_of(x, weight, t, softcap)
    d = arithmetic.logits_gradient(logits, y, t, e, l, c, softcap)
    (d_hidden,) = chunks.put(i, (d_hidden,), (arithmetic.hidden_gradient(d, weight),))
    return d_hidden, d_weight + arithmetic.weight_gradient(x, d)

  zeros = (
    chunks.empty(hidden.dtype, hidden.shape[1]),
    jnp.zeros(weight.shape, arithmetic.wide(hidden, weight)),
  )
  d_hidden, d_weight = jax.lax.fori_loop(0, chunks.live, body, zeros)
  return chunks.back(d_hidden), d_weight


def loss_gradients(
  hidden, weight, targets, mask, temperature, arrays, *, token_loss: TokenLoss,
  layout: Layout, softcap=None, chunk=None,
):  # fmt: skip
  """-> (losses[T], (logprob, entropy, lse), d_hidden, d_weight), see api.py; in three products.

  Shards of the vocabulary merge inside the loop: they have the same rows, so the same number of
  live chunks. Shards of the rows do not meet in it.
  """
  chunks = chunks_of(mask, chunk or chunk_rows(hidden.shape[0], weight.shape[1]))

  def body(i, carry):
    columns, d_hidden, d_weight = carry
    active, x, y, t, extra = chunks.rows(i, hidden, targets, temperature, arrays)
    t = jnp.where(active, t, 1)
    logits = arithmetic.logits_of(x, weight, t, softcap)
    outs = layout.merge(*arithmetic.reduce(logits, y))
    losses, g, h = token_loss.gradients(active, *outs[:2], extra)
    d = arithmetic.logits_gradient(logits, y, t, outs[1], outs[2], (g, h, None), softcap)
    (d_hidden,) = chunks.put(i, (d_hidden,), (arithmetic.hidden_gradient(d, weight),))
    d_weight = d_weight + arithmetic.weight_gradient(x, d)
    return chunks.put(i, columns, (losses, *outs)), d_hidden, d_weight

  wide = arithmetic.wide(hidden, weight)
  columns = (chunks.empty(wide),) * 4
  start = (columns, chunks.empty(hidden.dtype, hidden.shape[1]), jnp.zeros(weight.shape, wide))
  columns, d_hidden, d_weight = jax.lax.fori_loop(0, chunks.live, body, start)
  losses, *outs = map(chunks.back, columns)
  return losses, tuple(outs), chunks.back(d_hidden), d_weight


def expected_score(hidden, weight, mask, temperature, *, layout: Layout, chunk=None):
  """-> [T], see api.py."""
  chunks = chunks_of(mask, chunk or chunk_rows(hidden.shape[0], weight.shape[1]))

  def body(i, out):
    active, x, t = chunks.rows(i, hidden, temperature)
    logits = arithmetic.logits_of(x, weight, jnp.where(active, t, 1), None)
    zeros = jnp.zeros(x.shape[0], jnp.int32)
    _, entropy, lse = layout.merge(*arithmetic.reduce(logits, zeros))
    log_p = logits - lse[:, None]
    terms = jnp.exp(2 * log_p) * (entropy[:, None] + log_p)
    return chunks.put(i, out, (layout.sum_vocabulary(jnp.sum(terms, axis=-1)),))

  zeros = chunks.empty(arithmetic.wide(hidden, weight))
  return chunks.back(jax.lax.fori_loop(0, chunks.live, body, (zeros,))[0])
