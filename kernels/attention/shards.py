"""How attention is split over the mesh in context: kernels see the arrays of one device.

Rows go over data and fsdp, heads over tensor. Where the places of a row go over the axis context,
each device has some of its queries, and gathers the keys and values of all its places for them
(arXiv:2407.21783, 3.3.2); their gradients are summed back over the axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, PartitionSpec

ROW_AXES, PLACE_AXIS, HEAD_AXIS = ("data", "fsdp"), "context", "tensor"


class Shards(NamedTuple):
  """Mesh axes of rows, places and heads; without a mesh everything is on one device."""

  mesh: Any = None
  names: frozenset[str] = frozenset()
  rows: tuple[str, ...] = ()
  places: str | None = None
  heads: str | None = None

  @property
  def parts(self) -> int:
    """Into how many parts the places of a row are split."""
    return self.mesh.shape[self.places] if self.places else 1

  def run(
    self,
    f: Callable[..., jax.Array],
    q: jax.Array,  # [B, T, H, A]
    k: jax.Array,  # [B, T, K, A]
    v: jax.Array,  # [B, T, K, A]
    arrays: Sequence[jax.Array],  # of [B, T]
    operands: Any = (),
    specs: Any = (),
  ) -> jax.Array:  # [B, T, H, A]
    """f(q, k, v, at_queries, at_keys, *operands) on the arrays of one device.

    There q has T / parts places, k and v have all T; at_queries and at_keys are `arrays` at those.

    Args:
      operands, specs: more arguments of f and their PartitionSpecs.
    """
    if self.mesh is None:
      return f(q, k, v, arrays, arrays, *operands)

    def local(q, k, v, arrays, operands):
      keys = arrays
      if self.places:
        gather = lambda x: jax.lax.all_gather(x, self.places, axis=1, tiled=True)
        k, v, keys = jax.tree.map(gather, (k, v, arrays))
      return f(q, k, v, arrays, keys, *operands)

    qkv = PartitionSpec(self.rows, self.places, self.heads)
    row = PartitionSpec(self.rows, self.places)
    return jax.shard_map(
      local, mesh=self.mesh, in_specs=(qkv, qkv, qkv, row, specs), out_specs=qkv,
      axis_names=self.names, check_vma=False,
    )(q, k, v, tuple(arrays), operands)  # fmt: skip


def shards_of(q: tuple[int, ...], k: tuple[int, ...]) -> Shards:
  """For q [B, T, H, A], k [B, T, K, A]: axes that do not divide B, T, or H and K, do not split."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return Shards()
  names = [n for n, t in zip(mesh.axis_names, mesh.axis_types) if t == AxisType.Auto]
  if not names:
    return Shards()
  size = lambda name: mesh.shape[name] if name in names else 1
  rows = tuple(name for name in ROW_AXES if size(name) > 1)
  while rows and q[0] % math.prod(size(name) for name in rows):
    rows = rows[:-1]
  splits = lambda name, *counts: size(name) > 1 and not any(n % size(name) for n in counts)
  return Shards(
    mesh,
    frozenset(names),  # A kernel cannot be split by the compiler: every one is taken, used or not.
    rows,
    PLACE_AXIS if splits(PLACE_AXIS, q[1]) else None,
    HEAD_AXIS if splits(HEAD_AXIS, q[2], k[2]) else None,
  )
