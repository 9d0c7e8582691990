"""Checksums of parameters: exact, computed on the device, the same for every layout.

Each element's bits are hashed together with its place, and the hashes are summed modulo 2^32. The
order of a sum of integers does not matter, so a sharded array, an array on another mesh and a host
array give the same number. One element that differs always changes its tensor's number; of
differences in several elements, 1 in 2^32 goes unseen.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from trinity_jax.errors import RunFailed
from trinity_jax.launch_order import LaunchOrder

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_LISTED = 5  # tensors in an error message before "and n more"


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
  """
  for name, leaf in zip(names(params), jax.tree.leaves(params)):
    if np.dtype(leaf.dtype).itemsize not in _WORDS or leaf.dtype == bool:
      raise ValueError(f"checksum of {name}: dtype {leaf.dtype}, expected one of 1, 2 or 4 bytes")
  program = functools.partial(_checksums, dtype=None if dtype is None else jnp.dtype(dtype))
  if not jax.tree.leaves(params):
    return {}
  sums = launch(program, params) if launch else program(params)
  return {name: int(n) for name, n in zip(names(params), jax.device_get(sums))}


@functools.partial(jax.jit, static_argnames="dtype")
def _checksums(params: Any, dtype: Any) -> jax.Array:
  """u32[leaves]: one array, so that it comes to the host in one copy."""
  leaves = jax.tree.leaves(params)
  return jnp.stack([_checksum(x if dtype is None else x.astype(dtype)) for x in leaves])


def _checksum(x: jax.Array) -> jax.Array:
  """u32[]. Elementwise and one reduction: nothing of the tensor's size is stored."""
  place, stride = jnp.zeros(x.shape, jnp.uint32), 1
  for axis in reversed(range(x.ndim)):
    place += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride % 2**32)
    stride *= x.shape[axis]
  words = lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
  return jnp.sum(_mix(words ^ _mix(place)), dtype=jnp.uint32)


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
