"""Host arrays to devices and back, where the devices may belong to several processes.

Every process of a run calls these together, in the same order, with equal host arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

_GATHERED = 256 << 20  # bytes that a device holds whole at once, of an array made of layers


def place(tree: Any, shardings: Any) -> Any:
  """Host arrays, equal on every process, on the devices; each process puts in its own part."""

  def one(x: Any, sharding: Any) -> jax.Array:
    if sharding.is_fully_addressable:
      return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return jax.tree.map(one, tree, shardings)


def fetch(tree: Any, launch: Callable[..., Any] | None = None) -> Any:
  """Arrays on the devices as host arrays, whole on every process.

  Args:
    launch: of the arrays' mesh, where other threads use it too.
  """

  def one(x: Any) -> Any:
    if _is_here(x):
      return x
    parts = list(host_parts(x, launch))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

  return jax.device_get(jax.tree.map(one, tree))


def host_parts(x: Any, launch: Callable[..., Any] | None = None) -> Iterator[np.ndarray]:
  """Yields host arrays that make up an array along its first axis, the same on every process.

  What is on other processes is gathered from them, a large array by some layers: a stack of layers
  is more than a device holds beside its own part.
  """
  if _is_here(x):
    yield np.asarray(x)
    return
  done = 0
  for first, part in _gathered(x, launch or _call):
    new = np.asarray(part)[done - first :]  # the last part may begin before the end of the others
    yield new
    done += len(new)


def take_part(tree: Any, launch: Callable[..., Any] | None = None) -> None:
  """What `host_parts` of another process asks of this one, which does not want the values."""
  for x in jax.tree.leaves(tree):
    if not _is_here(x):
      for _ in _gathered(x, launch or _call):
        pass


def _is_here(x: Any) -> bool:
  return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def _gathered(
  leaf: jax.Array, launch: Callable[..., Any], most: int = _GATHERED
) -> Iterator[tuple[int, jax.Array]]:
  """Yields (first, the layers from there on), whole on every device, one after the other.

  Args:
    most: bytes that a device holds whole at once, where the array is made of layers.
  """
  layers = leaf.shape[0] if leaf.ndim > 2 else 1
  count = max(1, min(layers, layers * most // max(1, leaf.nbytes)))
  if count == layers:
    yield 0, jax.block_until_ready(launch(_gather(_whole(leaf)), leaf))
    return
  program = _gather_layers(_whole(leaf), count)
  for first in range(0, layers, count):
    first = min(first, layers - count)
    yield first, jax.block_until_ready(launch(program, leaf, np.int32(first)))


@functools.cache
def _gather(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(lambda x: x, out_shardings=sharding)


def to_local(tree: Any, shardings: Any, launch: Callable[..., Any] | None = None) -> Any:
  """Arrays of all processes on devices of this one, leaf by leaf; a large one by some layers.

  Args:
    shardings: on this process's devices; None where it only takes part, and gets None.
  """
  leaves, treedef = jax.tree.flatten(tree)
  targets = [None] * len(leaves) if shardings is None else treedef.flatten_up_to(shardings)
  out = [_to_local(leaf, target, launch or _call) for leaf, target in zip(leaves, targets)]
  return None if shardings is None else treedef.unflatten(out)


def _to_local(
  leaf: jax.Array, target: Any, launch: Callable[..., Any], most: int = _GATHERED
) -> jax.Array | None:
  """One array on the devices of `target`; most: of `_gathered`."""
  out = None
  for first, part in _gathered(leaf, launch, most):
    if target is None:
      continue
    moved = jax.device_put(part.addressable_data(0), target)
    if part.shape == leaf.shape:
      return moved
    if out is None:
      out = _empty(leaf.shape, leaf.dtype, target)()
    out = _put(out, moved, np.int32(first))
  return out


def _call(program: Callable[..., Any], *args: Any) -> Any:
  return program(*args)


def _whole(x: jax.Array) -> NamedSharding:
  assert isinstance(x.sharding, NamedSharding)
  return NamedSharding(x.sharding.mesh, PartitionSpec())


@functools.cache
def _gather_layers(sharding: NamedSharding, count: int) -> Callable[..., jax.Array]:
  """(array, first) -> its layers first, ..., first + count - 1, on every device."""
  take = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=count)
  return jax.jit(take, out_shardings=sharding)


@functools.cache
def _empty(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Callable[[], jax.Array]:
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _put(out: jax.Array, part: jax.Array, first: Any) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(out, part, first, axis=0)
