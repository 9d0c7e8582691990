"""How attention is split over the mesh in context: kernels see the arrays of one device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, PartitionSpec

ROW_AXES, HEAD_AXIS = ("data", "fsdp"), "tensor"


class Shards(NamedTuple):
  """Mesh axes of the rows and of the heads; without a mesh everything is on one device."""

  mesh: Any = None
  names: frozenset[str] = frozenset()
  rows: tuple[str, ...] = ()
  heads: str | None = None

  def map(self, f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """f(q, k, v, *arrays of rows [B, T]) -> [B, T, H, A], on the arrays of one device."""
    if self.mesh is None:
      return f
    qkv, row = PartitionSpec(self.rows, None, self.heads), PartitionSpec(self.rows)

    def on_mesh(q, k, v, *arrays):
      return jax.shard_map(
        f, mesh=self.mesh, in_specs=(qkv, qkv, qkv, *(row for _ in arrays)), out_specs=qkv,
        axis_names=self.names, check_vma=False,
      )(q, k, v, *arrays)  # fmt: skip

    return on_mesh


def shards_of(q: tuple[int, ...], k: tuple[int, ...]) -> Shards:
  """For q [B, T, H, A] and k [B, T, K, A]: axes that do not divide B, or H and K, do not split."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return Shards()
  names = [n for n, t in zip(mesh.axis_names, mesh.axis_types) if t == AxisType.Auto]
  splits = lambda name: name in names and mesh.shape[name] > 1
  rows = tuple(name for name in ROW_AXES if splits(name))
  while rows and q[0] % math.prod(mesh.shape[name] for name in rows):
    rows = rows[:-1]
  heads = splits(HEAD_AXIS) and not (q[2] % mesh.shape[HEAD_AXIS] or k[2] % mesh.shape[HEAD_AXIS])
  # A kernel cannot be split by the compiler: every automatic axis is taken, used or not.
  return Shards(mesh, frozenset(names), rows, HEAD_AXIS if heads else None) if names else Shards()
