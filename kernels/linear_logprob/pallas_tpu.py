"""TPU kernels (Pallas, Mosaic): logits exist one tile at a time, in the chip's vector memory.

Axes: T rows (tokens), D model width, V vocabulary; R rows and C columns of a tile.

Active rows are compacted first (a stable sort puts them in front); how many blocks of rows are live
is known at run time only and goes ahead of the grid as a prefetched scalar. A dead block asks for
the blocks that are there already, so nothing is fetched for it, computed or written back. Blocks
span the whole of D, so that a tile of the weight is read once per block of rows:

  forward   grid (rows, columns): log-sum-exp and mean logit are carried over the columns
  d_hidden  grid (rows, columns): sums over columns in a [R, D] accumulator
  d_weight  grid (columns, rows): sums over rows in a [D, C] accumulator, written once

The backward kernels compute the logits again. Accumulators are float32, operands keep their dtype.
The last tile of columns may reach beyond V: what is read there is arbitrary, NaN included.

A kernel demands row-major operands, and XLA would copy what is not. A [D, V] whose V is no multiple
of 128 lies in memory as [V, D] (less padding); the kernels then take it, and give its gradient,
that way round.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..errors import CannotRun
from .pallas_tpu_kernels import STATS, d_hidden_kernel, d_weight_kernel, forward_kernel
from .pallas_tpu_tiles import BACKWARD, FORWARD, MEMORY, Shape, Tile, tile_of


class Active(NamedTuple):
  """Active rows in front, then the first of them again up to T' = T in whole blocks."""

  order: jax.Array  # i32[T']: the row at each place
  real: jax.Array  # bool[T']: not a repetition
  place: jax.Array  # i32[T]: the place of each row, T' when it is masked
  live: jax.Array  # i32[1]: blocks of rows that hold an active one


def unsupported(hidden: Any, weight: Any, chip: str | None = None) -> str | None:
  """Why these operands cannot be served ("... is float64, ..."), or None. Looks at shapes only."""
  for name, x in (("hidden", hidden), ("weight", weight)):
    if x.dtype not in (jnp.bfloat16, jnp.float32):
      return f"{name} is {x.dtype}, expected bfloat16 or float32"
  T, D, V = *hidden.shape, weight.shape[1]
  if 0 in (T, D, V):
    return f"hidden [T, D] = {hidden.shape} and weight [D, V] = {weight.shape} hold nothing"
  if tile_of(BACKWARD, hidden, weight, chip) is None:  # the forward needs less
    return f"D = {D} in {hidden.dtype} leaves no room for a tile in {MEMORY[chip] >> 20} MiB"
  return None


def forward(
  hidden, weight, targets, mask, temperature, *, softcap=None, chip=None, by_rows=None,
  interpret: Any = False,
):  # fmt: skip
  """(target_logit, lse, mean_logit), each f32[T]: see implementation.py.

  Args:
    chip: a key of MEMORY.
    by_rows: whether the weight lies in memory as [V, D]; None: as XLA lays out such a shape.

  Raises:
    CannotRun: operands that `unsupported` names.
  """
  tile = _checked_tile(FORWARD, hidden, weight, chip)
  active = _active(mask, tile.rows)
  shape = Shape(hidden, weight, tile, by_rows, interpret, chip)
  out = shape.call(
    functools.partial(forward_kernel, shape=shape, softcap=softcap),
    name="linear_logprob_forward",
    grid=(shape.row_blocks, shape.column_blocks),
    in_specs=[shape.per_row(1), shape.per_row(1), shape.hidden(), shape.weight()],
    out_specs=[shape.per_row(1)] * 3,
    out_shape=[jax.ShapeDtypeStruct((shape.row_blocks * tile.rows, 1), jnp.float32)] * 3,
    scratch_shapes=[pltpu.VMEM((tile.rows, 1), jnp.float32)] * 4,
  )(
    active.live,
    _take(active, _local(targets, weight))[:, None],
    _take(active, 1 / jnp.where(mask, temperature, 1).astype(jnp.float32))[:, None],
    _take(active, hidden),
    shape.laid(weight),
  )
  return tuple(_put(active, x[:, 0]) for x in out)


def backward(
  hidden, weight, targets, mask, temperature, lse, entropy, cotangents, *, softcap=None, chip=None,
  by_rows=None, interpret: Any = False,
):  # fmt: skip
  """(d_hidden[T, D], d_weight[D, V]) in their operands' dtypes: see implementation.py."""
  tile = _checked_tile(BACKWARD, hidden, weight, chip)
  active = _active(mask, tile.rows)
  shape = Shape(hidden, weight, tile, by_rows, interpret, chip)
  inverse = 1 / jnp.where(mask, temperature, 1)
  stats = [_take(active, x.astype(jnp.float32)) for x in (inverse, lse, entropy)]
  for c in cotangents:  # a repetition contributes nothing
    c = jnp.zeros(mask.shape) if c is None else c
    stats.append(jnp.where(active.real, _take(active, c.astype(jnp.float32)), 0))
  args = (
    active.live,
    _take(active, _local(targets, weight))[:, None],
    jnp.stack(stats, axis=1),
    _take(active, hidden),
    shape.laid(weight),
  )
  uses = tuple(c is not None for c in cotangents)
  D = hidden.shape[1]
  turn = lambda spec: pl.BlockSpec(spec.block_shape, lambda j, i, n: spec.index_map(i, j, n))
  d_weight = shape.call(
    functools.partial(d_weight_kernel, shape=shape, softcap=softcap, uses=uses),
    name="linear_logprob_d_weight",
    grid=(shape.column_blocks, shape.row_blocks),
    in_specs=[
      turn(shape.per_row(1)), turn(shape.per_row(STATS)), turn(shape.hidden()),
      # Here the columns are the outer axis: with any row alive, each tile is fetched once.
      shape.columns(lambda j, i, n: jnp.where(n[0] > 0, j, 0)),
    ],
    out_specs=shape.columns(lambda j, i, n: j),
    out_shape=jax.ShapeDtypeStruct(shape.turned(weight.shape), weight.dtype),
    scratch_shapes=[pltpu.VMEM(shape.turned((D, tile.columns)), jnp.float32)],
  )(*args)  # fmt: skip
  # In this order, so that the compacted rows are gone when d_hidden is put back in place.
  *head, rows, laid = args
  rows, d_weight = jax.lax.optimization_barrier((rows, d_weight))
  d_hidden = shape.call(
    functools.partial(d_hidden_kernel, shape=shape, softcap=softcap, uses=uses),
    name="linear_logprob_d_hidden",
    grid=(shape.row_blocks, shape.column_blocks),
    in_specs=[shape.per_row(1), shape.per_row(STATS), shape.hidden(), shape.weight()],
    out_specs=shape.hidden(),
    out_shape=jax.ShapeDtypeStruct((shape.row_blocks * tile.rows, D), hidden.dtype),
    scratch_shapes=[pltpu.VMEM((tile.rows, D), jnp.float32)],
  )(*head, rows, laid)
  return _put(active, d_hidden), shape.laid(d_weight)


# --- which rows -----------------------------------------------------------------------------------


def _checked_tile(kernels, hidden, weight, chip) -> Tile:
  reason = unsupported(hidden, weight, chip)
  tile = None if reason else tile_of(kernels, hidden, weight, chip)
  if tile is None:
    raise CannotRun(f"linear_logprob: implementation 'pallas_tpu' cannot run: {reason}")
  return tile


def _local(targets, weight):
  """Targets of other shards match no column, those of the last tile's overhang included."""
  targets = targets.astype(jnp.int32)
  return jnp.where((targets >= 0) & (targets < weight.shape[1]), targets, -1)


def _active(mask, rows: int) -> Active:
  (T,) = mask.shape
  padded = pl.cdiv(T, rows) * rows
  count = jnp.sum(mask, dtype=jnp.int32)
  order = jnp.argsort(~mask, stable=True).astype(jnp.int32)
  order = jnp.pad(order, (0, padded - T))
  real = jnp.arange(padded) < count
  place = jnp.where(mask, jnp.cumsum(mask, dtype=jnp.int32) - 1, padded)
  live = ((count + rows - 1) // rows)[None]
  return Active(jnp.where(real, order, order[0]), real, place, live)


def _take(active: Active, x):
  return x.at[active.order].get(mode="promise_in_bounds")


def _put(active: Active, x):
  """Back to the rows' places. Dead blocks were never written: nothing reads them here."""
  return x.at[active.place].get(mode="fill", fill_value=0)
