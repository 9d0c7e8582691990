"""Bodies of the TPU kernels: what is done with one tile; pallas_tpu.py says over which grids."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .pallas_tpu_tiles import Shape

_NEVER = -1e30  # finite: no row can turn into NaN
STATS = 6  # inverse temperature, lse, entropy, and the cotangents of logprob, entropy, lse


def _dot(a, b, axis_a: int, axis_b: int):
  precision = jax.lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else None
  return jax.lax.dot_general(
    a, b, (((axis_a,), (axis_b,)), ((), ())), precision=precision,
    preferred_element_type=jnp.float32,
  )  # fmt: skip


def _logits(x, w, inverse, shape: Shape, softcap):
  """-> (logits [R, C] capped and divided by temperature, tanh or None)."""
  both = jnp.promote_types(x.dtype, w.dtype)
  logits = _dot(x.astype(both), w.astype(both), 1, 1 if shape.by_rows else 0)
  if softcap is None:
    return logits * inverse, None
  bent = jnp.tanh(logits * (1 / softcap))
  return bent * (softcap * inverse), bent


def _columns(shape: Shape, j):
  tile = (shape.tile.rows, shape.tile.columns)
  return j * shape.tile.columns + jax.lax.broadcasted_iota(jnp.int32, tile, 1)


def forward_kernel(
  live, targets, inverse, x, w, target_out, lse_out, mean_out, peak, total, moment, target, *,
  shape: Shape, softcap,
):  # fmt: skip
  """Over columns: peak m, total = sum e^(l-m), moment = sum e^(l-m) (l-m), the target's logit."""
  i, j = pl.program_id(0), pl.program_id(1)

  @pl.when((i < live[0]) & (j == 0))
  def _():
    peak[...] = jnp.full_like(peak, _NEVER)
    for ref in (total, moment, target):
      ref[...] = jnp.zeros_like(ref)

  @pl.when(i < live[0])
  def _():
    logits, _ = _logits(x[...], w[...], inverse[...], shape, softcap)
    columns = _columns(shape, j)
    if shape.ragged:
      logits = jnp.where(columns < shape.V, logits, _NEVER)
    before = peak[...]
    now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
    shrink = jnp.exp(before - now)
    shifted = logits - now
    e = jnp.exp(shifted)
    moment[...] = shrink * (moment[...] + (before - now) * total[...]) + jnp.sum(
      e * shifted, axis=1, keepdims=True
    )
    total[...] = shrink * total[...] + jnp.sum(e, axis=1, keepdims=True)
    here = jnp.where(columns == targets[...], logits, 0.0)
    target[...] += jnp.sum(here, axis=1, keepdims=True)
    peak[...] = now

  @pl.when((i < live[0]) & (j == shape.column_blocks - 1))
  def _():
    target_out[...] = target[...]
    lse_out[...] = peak[...] + jnp.log(total[...])
    mean_out[...] = peak[...] + moment[...] / total[...]


def _logits_gradient(targets, stats, x, w, j, *, shape: Shape, softcap, uses):
  """d/d(x @ w) of one tile [R, C], float32; 0 beyond V."""
  inverse, lse, entropy, g, h, z = (stats[:, a : a + 1] for a in range(STATS))
  logits, bent = _logits(x, w, inverse, shape, softcap)
  columns = _columns(shape, j)
  d = z - g
  if uses[1]:  # usually a mere metric: then no logarithm is needed
    d = d - h * (logits + (entropy - lse))
  d = jnp.exp(logits - lse) * d
  if uses[0]:
    d = d + jnp.where(columns == targets, g, 0.0)
  if bent is not None:
    d = d * (1 - bent * bent)
  d = d * inverse
  return jnp.where(columns < shape.V, d, 0.0) if shape.ragged else d


def d_hidden_kernel(live, targets, stats, x, w, out, sums, *, shape: Shape, softcap, uses):
  i, j = pl.program_id(0), pl.program_id(1)
  last = j == shape.column_blocks - 1

  @pl.when((i < live[0]) & (j == 0))
  def _():
    sums[...] = jnp.zeros_like(sums)

  def add(clean):
    weight = w[...]
    if clean:  # 0 times what lies beyond V could be NaN
      column = jax.lax.broadcasted_iota(jnp.int32, weight.shape, 0 if shape.by_rows else 1)
      inside = column < shape.V - j * shape.tile.columns
      weight = jnp.where(inside, weight, jnp.zeros_like(weight))
    d = _logits_gradient(
      targets[...], stats[...], x[...], weight, j, shape=shape, softcap=softcap, uses=uses
    )
    sums[...] += _dot(d.astype(weight.dtype), weight, 1, 0 if shape.by_rows else 1)

  if shape.ragged:
    pl.when((i < live[0]) & ~last)(lambda: add(clean=False))
    pl.when((i < live[0]) & last)(lambda: add(clean=True))
  else:
    pl.when(i < live[0])(lambda: add(clean=False))

  @pl.when((i < live[0]) & last)
  def _():
    out[...] = sums[...].astype(out.dtype)


def d_weight_kernel(live, targets, stats, x, w, out, sums, *, shape: Shape, softcap, uses):
  j, i = pl.program_id(0), pl.program_id(1)

  @pl.when(i == 0)
  def _():
    sums[...] = jnp.zeros_like(sums)

  @pl.when(i < live[0])
  def _():
    rows = x[...]
    d = _logits_gradient(
      targets[...], stats[...], rows, w[...], j, shape=shape, softcap=softcap, uses=uses
    )
    d = d.astype(rows.dtype)
    sums[...] += _dot(d, rows, 0, 0) if shape.by_rows else _dot(rows, d, 0, 0)

  @pl.when(i == shape.row_blocks - 1)
  def _():
    out[...] = sums[...].astype(out.dtype)
