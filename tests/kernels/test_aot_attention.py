"""Attention over long packed rows, compiled for TPUs that are not there (make aot-check)."""

from __future__ import annotations

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trinity_jax import ops
from trinity_jax.models.sharding import MESH_AXES
from trinity_jax.plan import costs

pytestmark = pytest.mark.aot
T, A = 8192, 128


@pytest.mark.parametrize("target", aot.TPUS)
@pytest.mark.parametrize(
  ("sizes", "heads", "window"),
  [
    ((1, 1, 1, 1), (32, 8), None), ((1, 1, 1, 1), (32, 8), 4096), ((1, 2, 1, 2), (32, 8), None),
    ((1, 1, 2, 2), (32, 8), None), ((1, 1, 4, 1), (32, 8), 4096),
  ],
  ids=str,
)
def test_memory_is_not_quadratic(target, sizes, heads, window):
  """The default: forward and backward hold far less than one [H, T, T] of scores.

  Where places are split, a device gathers the keys and values of its rows, and nothing else.
  """
  found = np.array(aot.devices(target)[: np.prod(sizes)]).reshape(sizes)
  mesh = Mesh(found, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
  row = PartitionSpec(("data", "fsdp"), "context")
  place = lambda spec: NamedSharding(mesh, spec)

  def shape(n):
    spec = PartitionSpec(*row, "tensor")
    return jax.ShapeDtypeStruct((2, T, n, A), jnp.bfloat16, sharding=place(spec))

  def loss(q, k, v, positions, segment_ids):
    out = ops.attention(q, k, v, positions=positions, segment_ids=segment_ids, window=window)
    return jnp.sum(out.astype(jnp.float32))

  H, K = heads
  rows = jax.ShapeDtypeStruct((2, T), jnp.int32, sharding=place(row))
  args = (shape(H), shape(K), shape(K), rows, rows)
  with jax.set_mesh(mesh):
    lowered = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*args)
  assert lowered.as_text().count("tpu_custom_call") == 3
  compiled = lowered.compile()
  used = compiled.memory_analysis().temp_size_in_bytes
  operands = 4 * 2 * T * A * (H + K) // np.prod(sizes)  # q, k, v, output: bfloat16, two rows
  print(f"{target} {sizes} {window}: {used / 2**20:.0f} MiB, operands {operands / 2**20:.0f} MiB")
  # logsumexp comes in 128 lanes of float32, which is twice a [T, A] in bfloat16.
  assert used < 8 * operands
  assert used < 0.1 * 2 * H * T * T * 4 / np.prod(sizes)
  moved = [x for x in costs.cost(compiled.as_text()).collectives if x.largest > 1]  # not the sum
  assert {x.kind for x in moved} <= {"all-gather", "reduce-scatter"}
  keys = 2 * T * K * A // (sizes[1] * sizes[3])  # of the rows and heads of a device
  gathered = [x.largest for x in moved if x.kind == "all-gather"]
  assert max(gathered, default=0) == (keys if sizes[2] > 1 else 0)


@pytest.mark.parametrize("target", aot.TPUS)
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_head_dims_compile(target, head_dim):
  one = NamedSharding(Mesh(np.array(aot.devices(target)[:1]), "x"), PartitionSpec())
  shape = lambda size, dtype: jax.ShapeDtypeStruct(size, dtype, sharding=one)

  def loss(q, k, v, positions, segment_ids):
    out = ops.attention(q, k, v, positions=positions, segment_ids=segment_ids)
    return jnp.sum(out.astype(jnp.float32))

  rows = shape((1, 640), jnp.int32)
  for dtype in (jnp.bfloat16, jnp.float32):
    qkv = [shape((1, 640, n, head_dim), dtype) for n in (4, 2, 2)]
    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*qkv, rows, rows)
    assert lowered.as_text().count("tpu_custom_call") == 3
    lowered.compile()
