"""Host arrays to devices and back, where the devices may belong to several processes.

Every process of a run calls these together, in the same order, with equal host arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

_GATHERED = 256 << 20  # bytes


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
  return jax.device_get(jax.tree.map(lambda x: replicated(x, launch), tree))


def replicated(x: Any, launch: Callable[..., Any] | None = None) -> Any:
  """An array of which this process holds all; what it does not is gathered from the others."""
  if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
    return x
  program = _gather(_whole(x))
  return launch(program, x) if launch else program(x)


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
  """One array on the devices of `target`.

  Args:
    most: bytes that a device holds whole at once, where the array is made of layers.
  """
  layers = leaf.shape[0] if leaf.ndim > 2 else 1
  count = max(1, min(layers, layers * most // max(1, leaf.nbytes)))
  if count == layers:
    whole = jax.block_until_ready(launch(_gather(_whole(leaf)), leaf))
    return None if target is None else jax.device_put(whole.addressable_data(0), target)
  out = None if target is None else _empty(leaf.shape, leaf.dtype, target)()
  for first in range(0, layers, count):
    first = np.int32(min(first, layers - count))
    part = jax.block_until_ready(launch(_gather_layers(_whole(leaf), count), leaf, first))
    if out is not None:
      out = _put(out, jax.device_put(part.addressable_data(0), target), first)
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
