"""Checksums of parameters: exact, computed on the device, the same for every layout.

Each element's bits are hashed together with its place, and the hashes are summed modulo 2^32. The
order of a sum of integers does not matter, so a sharded array, an array on another mesh and a host
array give the same number. One element that differs always changes its tensor's number; of
differences in several elements, 1 in 2^32 goes unseen. Every device hashes what it holds, so each
copy of a replicated tensor is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trinity_jax.errors import RunFailed
from trinity_jax.launch_order import LaunchOrder

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_LISTED = 5  # tensors in an error message before "and n more"
_BLOCK = 2**18  # elements that a CPU hashes at a time; their sums stay in its cache
_COLUMN = np.uint32(0x9E3779B9)  # so that row i and column i have different hashes


def names(tree: Any) -> list[str]:
  """The leaves' paths as dots, in the order of jax.tree.leaves."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]


def checksums(
  params: Any, *, dtype: Any = None, launch: LaunchOrder | None = None
) -> dict[str, int]:
  """Tensor name (its path, as dots) -> 32-bit checksum.

  Args:
    params: pytree of arrays, on devices or on the host, of dtypes of 1, 2 or 4 bytes.
    dtype: of the values whose checksums are wanted; None = those of `params` as they are.
    launch: of the mesh that holds `params`, where other threads use it too.

  Raises:
    ValueError: a tensor of another dtype.
    RunFailed: copies of a tensor on several devices of this process differ.
  """
  leaves = jax.tree.leaves(params)
  for name, leaf in zip(names(params), leaves):
    if np.dtype(leaf.dtype).itemsize not in _WORDS or leaf.dtype == bool:
      raise ValueError(f"checksum of {name}: dtype {leaf.dtype}, expected one of 1, 2 or 4 bytes")
  if not leaves:
    return {}
  mesh, specs = _layout(leaves)
  program = partial(
    _checksums, dtype=None if dtype is None else jnp.dtype(dtype), mesh=mesh, specs=specs
  )
  sums = launch(program, leaves) if launch else program(leaves)
  copies = [(shard.device, np.asarray(shard.data)) for shard in sums.addressable_shards]
  first = dict(zip(names(params), map(int, copies[0][1])))
  for device, copy in copies[1:]:
    compare(first, dict(zip(first, map(int, copy))), f"{device}, beside {copies[0][0]}")
  return first


def _layout(leaves: Sequence[Any]) -> tuple[Mesh | None, tuple[PartitionSpec, ...]]:
  """The mesh that holds the arrays, None without one, and how it splits each."""
  shardings = [getattr(leaf, "sharding", None) for leaf in leaves]
  mesh: Any = next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)
  specs = [s.spec if isinstance(s, NamedSharding) else PartitionSpec() for s in shardings]
  return mesh, tuple(specs)


@partial(jax.jit, static_argnames=("dtype", "mesh", "specs"))
def _checksums(
  leaves: Sequence[Any], dtype: Any, mesh: Mesh | None, specs: tuple[PartitionSpec, ...]
) -> jax.Array:
  """u32[leaves]: one array, so that it comes to the host in one copy."""

  def program(parts):
    return jnp.stack([_checksum(x, spec, mesh, dtype) for x, spec in zip(parts, specs)])

  if mesh is None:
    return program(leaves)
  # What is replicated is hashed by each device for itself: its sums may differ, check_vma cannot.
  return jax.shard_map(
    program, mesh=mesh, in_specs=(list(specs),), out_specs=PartitionSpec(), check_vma=False
  )(list(leaves))


def _checksum(x: jax.Array, spec: PartitionSpec, mesh: Mesh | None, dtype: Any) -> jax.Array:
  """u32[], of the whole tensor of which `x` is this device's part."""
  x = x.reshape(1) if x.ndim == 0 else x
  axes = [() if a is None else (a,) if isinstance(a, str) else tuple(a) for a in spec]
  axes += [()] * (x.ndim - len(axes))
  column = _mix(_places(x, -1, axes) ^ _COLUMN)
  row, stride = jnp.zeros((1,) * (x.ndim - 1), jnp.uint32), 1
  for axis in reversed(range(x.ndim - 1)):
    place = _places(x, axis, axes) * np.uint32(stride % 2**32)
    row += lax.expand_dims(place, [a for a in range(x.ndim - 1) if a != axis])
    stride *= x.shape[axis] * _parts(mesh, axes[axis])
  x, row, column = x.reshape(-1, x.shape[-1]), _mix(row.reshape(-1, 1)), column[None]
  total = lax.platform_dependent(
    x, row, column, cpu=partial(_by_blocks, dtype=dtype), default=partial(_whole, dtype=dtype)
  )
  used = tuple(name for names_ in axes for name in names_)
  return lax.psum(total, used) if used else total


def _places(x: jax.Array, axis: int, axes: Sequence[tuple[str, ...]]) -> jax.Array:
  """u32[x.shape[axis]]: where this device's part of a dimension stands in the whole."""
  size = x.shape[axis]
  first = lax.axis_index(axes[axis]).astype(jnp.uint32) * np.uint32(size) if axes[axis] else 0
  return jnp.arange(size, dtype=jnp.uint32) + first


def _parts(mesh: Mesh | None, axes: tuple[str, ...]) -> int:
  return math.prod(mesh.shape[a] for a in axes) if mesh else 1


def _hashes(x: jax.Array, row: jax.Array, column: jax.Array, dtype: Any) -> jax.Array:
  """u32[R, C] of x [R, C], row u32[R, 1], column u32[1, C]."""
  x = x if dtype is None else x.astype(dtype)
  words = lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
  return _mix(words ^ (row + column))


def _whole(x: jax.Array, row: jax.Array, column: jax.Array, dtype: Any) -> jax.Array:
  """u32[]. Elementwise and one reduction, which TPU and GPU compile to one pass."""
  return jnp.sum(_hashes(x, row, column, dtype), dtype=jnp.uint32)


def _by_blocks(x: jax.Array, row: jax.Array, column: jax.Array, dtype: Any) -> jax.Array:
  """`_whole` in pieces: XLA's CPU compiler stores what it reduces, of a size that fits a cache."""
  if x.size <= _BLOCK:
    return _whole(x, row, column, dtype)
  rows = max(1, _BLOCK // x.shape[1])
  count = x.shape[0] // rows

  def add(i, sums):
    # Nothing here may look constant: bfloat16 becomes float32, all of it, before the loop.
    part, i = lax.optimization_barrier((x, i))
    part = lax.dynamic_slice_in_dim(part, i * rows, rows)
    return sums + _hashes(part, lax.dynamic_slice_in_dim(row, i * rows, rows), column, dtype)

  sums = lax.fori_loop(0, count, add, jnp.zeros((rows, x.shape[1]), jnp.uint32))
  rest = _whole(x[count * rows :], row[count * rows :], column, dtype)
  return jnp.sum(sums, dtype=jnp.uint32) + rest


def _mix(x: jax.Array) -> jax.Array:
  """A bijection of u32 after which every bit depends on every bit (C. Wellons, "lowbias32")."""
  x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
  return x ^ (x >> 16)


def compare(expected: Mapping[str, int], found: Mapping[str, int], what: str) -> None:
  """Raises RunFailed naming every tensor whose checksums differ or that only one side has.

  Args:
    what: whose weights `found` are, for the message.
  """
  wrong = [f"{k} is missing" for k in expected if k not in found]
  wrong += [f"{k} is unexpected" for k in found if k not in expected]
  wrong += [
    f"{k} has checksum {found[k]:08x}, expected {n:08x}"
    for k, n in expected.items()
    if k in found and found[k] != n
  ]
  if wrong:
    more = f" and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
    raise RunFailed(f"{what}: weights differ: {'; '.join(wrong[:_LISTED])}{more}")


def verify(
  source: Any,
  published: Any,
  *,
  what: str = "published weights",
  source_launch: LaunchOrder | None = None,
  published_launch: LaunchOrder | None = None,
) -> dict[str, int]:
  """Compares params with their copy in another layout, on another mesh, perhaps in another dtype.

  Args:
    source: what was published, in the trainer's layout and dtype.
    published: what came out.
    what: of which the message speaks.
    source_launch, published_launch: of the two meshes.

  Returns:
    The checksums, in the published dtype.

  Raises:
    RunFailed: they differ; names the tensors.
    ValueError: `published` has more than one dtype.
  """
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(published)}
  if len(dtypes) != 1:
    raise ValueError(f"{what}: dtypes {sorted(map(str, dtypes))}, expected one")
  expected = checksums(source, dtype=dtypes.pop(), launch=source_launch)
  compare(expected, checksums(published, launch=published_launch), what)
  return expected
