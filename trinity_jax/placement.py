"""Host arrays to devices and back, where the devices may belong to several processes.

Every process of a run calls these together, in the same order, with equal host arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


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
  assert isinstance(x.sharding, NamedSharding)
  program = _gather(NamedSharding(x.sharding.mesh, PartitionSpec()))
  return launch(program, x) if launch else program(x)


@functools.cache
def _gather(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(lambda x: x, out_shardings=sharding)


def to_local(tree: Any, shardings: Any, launch: Callable[..., Any] | None = None) -> Any:
  """Arrays of all processes on devices of this one, leaf by leaf.

  Args:
    shardings: on this process's devices; None where it only takes part, and gets None.
  """
  leaves, treedef = jax.tree.flatten(tree)
  targets = [None] * len(leaves) if shardings is None else treedef.flatten_up_to(shardings)
  out = []
  for leaf, target in zip(leaves, targets):
    whole = jax.block_until_ready(replicated(leaf, launch))
    if target is not None:
      out.append(jax.device_put(whole.addressable_data(0), target))
  return None if shardings is None else treedef.unflatten(out)
