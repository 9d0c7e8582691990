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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..errors import CannotRun

# Vector memory that a kernel may use, per chip; the first is what every listed chip has. A program
# is compiled for chips that are not there, so the local device is never asked.
MEMORY = {None: 56 << 20, "v5e": 112 << 20, "v5p": 56 << 20, "v6e": 112 << 20}
# (R, C), best first: more rows means fewer passes over the weight, and likewise for columns.
TILES = ((1024, 512), (512, 512), (256, 512), (256, 256), (128, 256), (128, 128), (64, 128))
LANES = 128
FORWARD, BACKWARD = ("forward",), ("d_hidden", "d_weight")  # what shares a tile
_NEVER = -1e30  # finite: no row can turn into NaN
_STATS = 6  # inverse temperature, lse, entropy, and the cotangents of logprob, entropy, lse


class Tile(NamedTuple):
  rows: int
  columns: int


class Plan(NamedTuple):
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
  if _tile(BACKWARD, hidden, weight, chip) is None:  # the forward needs less
    return f"D = {D} in {hidden.dtype} leaves no room for a tile in {MEMORY[chip] >> 20} MiB"
  return None


def lies_by_rows(width: int, columns: int) -> bool:
  """Whether XLA lays a weight [D, V] = [width, columns] out as [V, D]: where that pads less."""
  return columns % LANES != 0 and width % LANES == 0


def forward(
  hidden, weight, targets, mask, temperature, *, softcap=None, chip=None, by_rows=None,
  interpret: Any = False,
):  # fmt: skip
  """(target_logit, lse, mean_logit), each f32[T]: see api.py.

  Args:
    chip: a key of MEMORY.
    by_rows: whether the weight lies in memory as [V, D]; None: as XLA lays out such a shape.

  Raises:
    CannotRun: operands that `unsupported` names.
  """
  tile = _checked_tile(FORWARD, hidden, weight, chip)
  plan = _plan(mask, tile.rows)
  shape = _Shape(hidden, weight, tile, by_rows, interpret, chip)
  out = shape.call(
    functools.partial(_forward_kernel, shape=shape, softcap=softcap),
    name="linear_logprob_forward",
    grid=(shape.row_blocks, shape.column_blocks),
    in_specs=[shape.per_row(1), shape.per_row(1), shape.hidden(), shape.weight()],
    out_specs=[shape.per_row(1)] * 3,
    out_shape=[jax.ShapeDtypeStruct((shape.row_blocks * tile.rows, 1), jnp.float32)] * 3,
    scratch_shapes=[pltpu.VMEM((tile.rows, 1), jnp.float32)] * 4,
  )(
    plan.live,
    _take(plan, _local(targets, weight))[:, None],
    _take(plan, 1 / jnp.where(mask, temperature, 1).astype(jnp.float32))[:, None],
    _take(plan, hidden),
    shape.laid(weight),
  )
  return tuple(_put(plan, x[:, 0]) for x in out)


def backward(
  hidden, weight, targets, mask, temperature, lse, entropy, cotangents, *, softcap=None, chip=None,
  by_rows=None, interpret: Any = False,
):  # fmt: skip
  """(d_hidden[T, D], d_weight[D, V]) in their operands' dtypes: see api.py."""
  tile = _checked_tile(BACKWARD, hidden, weight, chip)
  plan = _plan(mask, tile.rows)
  shape = _Shape(hidden, weight, tile, by_rows, interpret, chip)
  inverse = 1 / jnp.where(mask, temperature, 1)
  stats = [_take(plan, x.astype(jnp.float32)) for x in (inverse, lse, entropy)]
  for c in cotangents:  # a repetition contributes nothing
    c = jnp.zeros(mask.shape) if c is None else c
    stats.append(jnp.where(plan.real, _take(plan, c.astype(jnp.float32)), 0))
  args = (
    plan.live,
    _take(plan, _local(targets, weight))[:, None],
    jnp.stack(stats, axis=1),
    _take(plan, hidden),
    shape.laid(weight),
  )
  uses = tuple(c is not None for c in cotangents)
  D = hidden.shape[1]
  turn = lambda spec: pl.BlockSpec(spec.block_shape, lambda j, i, n: spec.index_map(i, j, n))
  d_weight = shape.call(
    functools.partial(_d_weight_kernel, shape=shape, softcap=softcap, uses=uses),
    name="linear_logprob_d_weight",
    grid=(shape.column_blocks, shape.row_blocks),
    in_specs=[
      turn(shape.per_row(1)), turn(shape.per_row(_STATS)), turn(shape.hidden()),
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
    functools.partial(_d_hidden_kernel, shape=shape, softcap=softcap, uses=uses),
    name="linear_logprob_d_hidden",
    grid=(shape.row_blocks, shape.column_blocks),
    in_specs=[shape.per_row(1), shape.per_row(_STATS), shape.hidden(), shape.weight()],
    out_specs=shape.hidden(),
    out_shape=jax.ShapeDtypeStruct((shape.row_blocks * tile.rows, D), hidden.dtype),
    scratch_shapes=[pltpu.VMEM((tile.rows, D), jnp.float32)],
  )(*head, rows, laid)
  return _put(plan, d_hidden), shape.laid(d_weight)


# --- which rows, which tiles ----------------------------------------------------------------------


def _checked_tile(kernels, hidden, weight, chip) -> Tile:
  reason = unsupported(hidden, weight, chip)
  tile = None if reason else _tile(kernels, hidden, weight, chip)
  if tile is None:
    raise CannotRun(f"linear_logprob: implementation 'pallas_tpu' cannot run: {reason}")
  return tile


def _local(targets, weight):
  """Targets of other shards match no column, those of the last tile's overhang included."""
  targets = targets.astype(jnp.int32)
  return jnp.where((targets >= 0) & (targets < weight.shape[1]), targets, -1)


def _plan(mask, rows: int) -> Plan:
  (T,) = mask.shape
  padded = pl.cdiv(T, rows) * rows
  active = jnp.sum(mask, dtype=jnp.int32)
  order = jnp.argsort(~mask, stable=True).astype(jnp.int32)
  order = jnp.pad(order, (0, padded - T))
  real = jnp.arange(padded) < active
  place = jnp.where(mask, jnp.cumsum(mask, dtype=jnp.int32) - 1, padded)
  live = ((active + rows - 1) // rows)[None]
  return Plan(jnp.where(real, order, order[0]), real, place, live)


def _take(plan: Plan, x):
  return x.at[plan.order].get(mode="promise_in_bounds")


def _put(plan: Plan, x):
  """Back to the rows' places. Dead blocks were never written: nothing reads them here."""
  return x.at[plan.place].get(mode="fill", fill_value=0)


def _need(kernel: str, tile: Tile, D: int, hidden_size: int, weight_size: int) -> int:
  """Bytes of vector memory: blocks are fetched one ahead; a few [R, C] intermediates in float32.

  Of two dtypes the narrower operand is there in the wider one too.
  """
  rows, columns = tile.rows * D, tile.columns * D
  blocks = rows * hidden_size + columns * weight_size
  own = 4 * (rows if hidden_size < weight_size else columns if weight_size < hidden_size else 0)
  if kernel == "d_hidden":
    blocks, own = blocks + rows * hidden_size, own + 2 * 4 * rows
  elif kernel == "d_weight":
    blocks, own = blocks + columns * weight_size, own + 2 * 4 * columns
  return 2 * blocks + own + 6 * 4 * tile.rows * tile.columns


def _tile(kernels: tuple[str, ...], hidden, weight, chip: str | None) -> Tile | None:
  """The best tile with which each of `kernels` has room."""
  T, D, V = *hidden.shape, weight.shape[1]
  if chip not in MEMORY:
    raise CannotRun(f"linear_logprob: chip {chip!r} is not one of {', '.join(map(str, MEMORY))}")
  D = pl.cdiv(D, LANES) * LANES
  sizes = hidden.dtype.itemsize, weight.dtype.itemsize
  for rows, columns in TILES:
    # 16 rows fill whole registers in both dtypes; a block of all columns may have any width.
    tile = Tile(min(rows, pl.cdiv(T, 16) * 16), V if V <= columns else columns)
    if all(_need(kernel, tile, D, *sizes) <= MEMORY[chip] for kernel in kernels):
      return tile
  return None


class _Shape:
  """The static side of one kernel call."""

  def __init__(self, hidden, weight, tile: Tile, by_rows, interpret, chip):
    self.V = weight.shape[1]
    self.D = hidden.shape[1]
    self.tile = tile
    self.row_blocks = pl.cdiv(hidden.shape[0], tile.rows)
    self.column_blocks = pl.cdiv(self.V, tile.columns)
    self.ragged = self.V % tile.columns != 0
    self.by_rows = lies_by_rows(self.D, self.V) if by_rows is None else by_rows
    self.interpret = interpret
    self.limit = MEMORY[chip]

  def per_row(self, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((self.tile.rows, width), lambda i, j, n: (_alive(i, n), 0))

  def hidden(self) -> pl.BlockSpec:
    return pl.BlockSpec((self.tile.rows, self.D), lambda i, j, n: (_alive(i, n), 0))

  def turned(self, shape: tuple[int, int]) -> tuple[int, int]:
    """[D, V] as the kernel sees it."""
    return (shape[1], shape[0]) if self.by_rows else shape

  def laid(self, weight):
    return weight.T if self.by_rows else weight

  def columns(self, index: Callable[..., Any]) -> pl.BlockSpec:
    """The tile of the weight whose number is index(*grid, live)."""
    if self.by_rows:
      return pl.BlockSpec((self.tile.columns, self.D), lambda *grid: (index(*grid), 0))
    return pl.BlockSpec((self.D, self.tile.columns), lambda *grid: (0, index(*grid)))

  def weight(self) -> pl.BlockSpec:
    """A dead block of rows stays with the tile that the last live one ended with."""
    last = self.column_blocks - 1
    return self.columns(lambda i, j, n: jnp.where(i < n[0], j, jnp.where(n[0] > 0, last, 0)))

  def call(self, kernel, *, name, grid, in_specs, out_specs, out_shape, scratch_shapes):
    return pl.pallas_call(
      kernel,
      out_shape=out_shape,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=grid, in_specs=in_specs, out_specs=out_specs,
        scratch_shapes=scratch_shapes,
      ),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=self.limit
      ),
      interpret=self.interpret,
      name=name,
    )  # fmt: skip


def _alive(i, n):
  """Block i of rows, or the last live one."""
  return jnp.minimum(i, jnp.maximum(n[0] - 1, 0))


# --- the kernels ----------------------------------------------------------------------------------


def _dot(a, b, axis_a: int, axis_b: int):
  precision = jax.lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else None
  return jax.lax.dot_general(
    a, b, (((axis_a,), (axis_b,)), ((), ())), precision=precision,
    preferred_element_type=jnp.float32,
  )  # fmt: skip


def _logits(x, w, inverse, shape: _Shape, softcap):
  """-> (logits [R, C] capped and divided by temperature, tanh or None)."""
  both = jnp.promote_types(x.dtype, w.dtype)
  logits = _dot(x.astype(both), w.astype(both), 1, 1 if shape.by_rows else 0)
  if softcap is None:
    return logits * inverse, None
  bent = jnp.tanh(logits * (1 / softcap))
  return bent * (softcap * inverse), bent


def _columns(shape: _Shape, j):
  tile = (shape.tile.rows, shape.tile.columns)
  return j * shape.tile.columns + jax.lax.broadcasted_iota(jnp.int32, tile, 1)


def _forward_kernel(
  live, targets, inverse, x, w, target_out, lse_out, mean_out, peak, total, moment, target, *,
  shape: _Shape, softcap,
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


def _logits_gradient(targets, stats, x, w, j, *, shape: _Shape, softcap, uses):
  """d/d(x @ w) of one tile [R, C], float32; 0 beyond V."""
  inverse, lse, entropy, g, h, z = (stats[:, a : a + 1] for a in range(_STATS))
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


def _d_hidden_kernel(live, targets, stats, x, w, out, sums, *, shape: _Shape, softcap, uses):
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


def _d_weight_kernel(live, targets, stats, x, w, out, sums, *, shape: _Shape, softcap, uses):
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
