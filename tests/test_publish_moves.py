"""Publishing moves each byte at most once: the collectives of the compiled program."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest

from trinity_jax.models import params as params_lib
from trinity_jax.models import sharding
from trinity_jax.models.hf import tiny_config
from trinity_jax.plan.costs import cost
from trinity_jax.synchronizer import publishing

MODEL = tiny_config(hidden=64, layers=2, heads=8, kv_heads=8, head_dim=8, intermediate=128)


def laid_out(sizes):
  """The parameters as shapes, on a mesh (data, fsdp, tensor) of 8 devices."""
  layout = sharding.param_shardings(MODEL, sharding.make_mesh(*sizes))
  shapes = jax.eval_shape(lambda: params_lib.init(jax.random.key(0), MODEL, jnp.float32))
  return jax.tree.map(lambda x, s: x.update(sharding=s), shapes, layout)


def lacking(before, after) -> int:
  """Bytes that the last device holds afterwards and has not held before."""
  total = 0
  for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
    parts = [x.sharding.devices_indices_map(x.shape)[jax.devices()[-1]] for x in (old, new)]
    old_part, new_part = ([s.indices(n)[:2] for s, n in zip(p, old.shape)] for p in parts)
    both = [max(0, min(a[1], b[1]) - max(a[0], b[0])) for a, b in zip(old_part, new_part)]
    total += math.prod(high - low for low, high in new_part) - math.prod(both)
  return total * 4


@pytest.mark.parametrize(
  "source, target",
  [((1, 8, 1), (1, 8, 1)), ((2, 2, 2), (2, 2, 2)),  # a shared mesh: nothing travels
   ((1, 8, 1), (1, 1, 8)), ((1, 8, 1), (8, 1, 1)), ((1, 8, 1), (1, 2, 4))],
)  # fmt: skip
def test_no_more_travels_than_is_lacking(source, target):
  before, after = laid_out(source), laid_out(target)
  layout = jax.tree.map(lambda x: x.sharding, after)
  done = publishing(layout, jnp.float32).lower(before).compile()
  sent = sum(cost(done.as_text()).sent().values())
  limit = lacking(before, after)
  assert sent <= limit
  assert (sent > 0) == (source != target) == (limit > 0)
