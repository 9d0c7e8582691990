"""How the operator is split over the mesh in context, and how its parts are put together again.

Rows go over the axes data, fsdp and context, the vocabulary over tensor; the weight is gathered
over fsdp, a large one in slices (see columns.py). A vocabulary that does not divide over tensor is
left whole, and the rows are split over tensor too.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

ROW_AXES, VOCABULARY_AXIS = ("data", "fsdp", "context"), "tensor"


class Layout(NamedTuple):
  """Mesh axes of the rows and of the vocabulary; without a mesh everything is on one device."""

  mesh: Any = None
  rows: tuple[str, ...] = ()
  vocabulary: str | None = None

  @property
  def row_shards(self) -> int:
    return math.prod(self.mesh.shape[a] for a in self.rows)

  @property
  def vocabulary_shards(self) -> int:
    return self.mesh.shape[self.vocabulary] if self.vocabulary else 1

  @property
  def row(self) -> PartitionSpec:
    """Of an array whose first axis are rows."""
    return PartitionSpec(self.rows)

  def rows_of(self, arrays: Any) -> Any:
    """Of a pytree of arrays of rows and scalars."""
    return jax.tree.map(lambda x: self.row if x.ndim else PartitionSpec(), arrays)

  def weight(self, split: bool = False) -> PartitionSpec:
    """Of the weight [D, V]: gathered over fsdp, or left split over it."""
    return PartitionSpec("fsdp" if split else None, self.vocabulary)

  def shard(self, weight: tuple[int, ...]) -> tuple[int, int]:
    """Shape of a device's part of a weight [D, V] that is split over fsdp."""
    return weight[0] // self.mesh.shape["fsdp"], weight[1] // self.vocabulary_shards

  def weight_gradient(self, width: int) -> PartitionSpec:
    """The gradient is left split over fsdp, as the weight is, where its rows divide."""
    return PartitionSpec("fsdp" if self.scatters(width) else None, self.vocabulary)

  def scatters(self, width: int) -> bool:
    """Whether a weight of `width` rows can lie split over fsdp."""
    return "fsdp" in self.rows and width % self.mesh.shape["fsdp"] == 0

  def map(self, f: Any, in_specs: Any, out_specs: Any) -> Any:
    """f on the arrays of one device."""
    if self.mesh is None:
      return f
    names = set(self.rows) | ({self.vocabulary} if self.vocabulary else set())
    idle = {name for name, size in self.mesh.shape.items() if size == 1}
    return jax.shard_map(
      f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=names | idle,
      check_vma=False,
    )  # fmt: skip

  def columns(self, targets: jax.Array, columns: int) -> jax.Array:
    """Inside map: targets as columns of this shard; those of other shards lie outside [0, V)."""
    if self.vocabulary is None:
      return targets
    return targets - jax.lax.axis_index(self.vocabulary) * columns

  def merge(self, target: jax.Array, lse: jax.Array, mean: jax.Array):
    """Inside map: (target logit, lse, mean logit) of each shard -> (logprob, entropy, lse)."""
    if self.vocabulary is not None:
      top = jax.lax.pmax(lse, self.vocabulary)
      share = jnp.exp(lse - top)
      total = jax.lax.psum(share, self.vocabulary)
      mean = jax.lax.psum(mean * share, self.vocabulary) / total
      target = jax.lax.psum(target, self.vocabulary)
      lse = top + jnp.log(total)
    # Neither sign can come from anything but rounding.
    return jnp.minimum(target - lse, 0), jnp.maximum(lse - mean, 0), lse

  def gather(self, weight: jax.Array) -> jax.Array:
    """Inside map: all rows of a weight that is split over fsdp."""
    return jax.lax.all_gather(weight, "fsdp", axis=0, tiled=True)

  def sum_vocabulary(self, x: Any) -> Any:
    """Inside map: sums what each shard of the vocabulary contributes."""
    return x if self.vocabulary is None else jax.lax.psum(x, self.vocabulary)

  def sum_rows(self, x: Any) -> Any:
    """Inside map: sums what each shard of the rows contributes."""
    return jax.lax.psum(x, self.rows) if self.rows else x

  def sum_weight_gradient(self, d: jax.Array) -> jax.Array:
    """Inside map: sum_rows, leaving to each shard the part that `weight_gradient` gives it."""
    if not self.scatters(d.shape[0]):
      return self.sum_rows(d)
    d = jax.lax.psum_scatter(d, "fsdp", scatter_dimension=0, tiled=True)
    rest = tuple(a for a in self.rows if a != "fsdp")
    return jax.lax.psum(d, rest) if rest else d


def layout_of(vocabulary: int) -> Layout:
  """The layout on the mesh in context; axes of size 1, manual or explicit ones do not split."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return Layout()
  automatic = {n for n, t in zip(mesh.axis_names, mesh.axis_types) if t == AxisType.Auto}
  splits = lambda name: name in automatic and mesh.shape[name] > 1
  rows = tuple(name for name in ROW_AXES if splits(name))
  if not splits(VOCABULARY_AXIS):
    return Layout(mesh, rows) if rows else Layout()
  if vocabulary % mesh.shape[VOCABULARY_AXIS]:
    return Layout(mesh, (*rows, VOCABULARY_AXIS))
  return Layout(mesh, rows, VOCABULARY_AXIS)
