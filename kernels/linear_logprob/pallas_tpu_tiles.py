"""How the TPU kernels cut rows and columns into tiles: what fits, and where each tile lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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


class Tile(NamedTuple):
  rows: int
  columns: int


def lies_by_rows(width: int, columns: int) -> bool:
  """Whether XLA lays a weight [D, V] = [width, columns] out as [V, D]: where that pads less."""
  return columns % LANES != 0 and width % LANES == 0


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


def tile_of(kernels: tuple[str, ...], hidden, weight, chip: str | None) -> Tile | None:
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


class Shape:
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
