"""The loss at a large vocabulary, compiled for TPUs and H100s that are not there (make aot-check).

The compiler's own account of temporary memory, beside that of the loss written plainly: T = 8192
rows, D = 4096, V = 151936, bfloat16, forward and backward, on one device and on four.
"""

from __future__ import annotations

import functools

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trinity_jax import ops

pytestmark = pytest.mark.aot
T, D, V = 8192, 4096, 151936
ROW = PartitionSpec(("data", "fsdp"))
AXES = ("data", "fsdp", "tensor")


def plain(hidden, weight, targets, mask):
  logits = jnp.dot(hidden, weight, preferred_element_type=jnp.float32)
  logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]
  return jnp.sum(jnp.where(mask, logprob, 0))


def general(hidden, weight, targets, mask):
  return jnp.sum(ops.linear_logprob(hidden, weight, targets, mask)[0])


def with_entropy(hidden, weight, targets, mask):
  logprob, entropy, _ = ops.linear_logprob(hidden, weight, targets, mask, 0.7, softcap=30.0)
  return jnp.sum(logprob + 0.01 * entropy)


def fused(hidden, weight, targets, mask):
  loss = lambda logprob, entropy, arrays: -jnp.minimum(logprob * arrays, 1.0)
  return ops.linear_logprob_loss(hidden, weight, targets, mask, 1.0, loss, jnp.ones(targets.shape))[
    0
  ]


@functools.cache
def temporaries(target, sizes, loss, kernels=None) -> int:
  """Bytes on each device of value and gradient, split as the trainer splits them."""
  found = np.array(aot.devices(target)[: np.prod(sizes)]).reshape(sizes)
  mesh = Mesh(found, AXES, axis_types=(AxisType.Auto,) * 3)

  def shape(size, dtype, spec):
    return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, spec))

  args = (
    shape((T, D), jnp.bfloat16, ROW), shape((D, V), jnp.bfloat16, PartitionSpec("fsdp", "tensor")),
    shape((T,), jnp.int32, ROW), shape((T,), jnp.bool_, ROW),
  )  # fmt: skip
  out = (NamedSharding(mesh, PartitionSpec()), (args[0].sharding, args[1].sharding))
  with jax.set_mesh(mesh):
    lowered = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=out).lower(*args)
  if kernels is not None:
    assert lowered.as_text().count("tpu_custom_call") == kernels
  return lowered.compile().memory_analysis().temp_size_in_bytes


# On a split mesh a device has a quarter of the logits. What is left then: the rows under the mask,
# d_hidden before its sum over the vocabulary, and under fsdp two slices and d_hidden in float32.
LIMITS = {(1, 1, 1): 0.05, (1, 1, 4): 0.06, (1, 2, 2): 0.095}


@pytest.mark.parametrize("sizes", LIMITS, ids=str)
@pytest.mark.parametrize("target", [*aot.TPUS, aot.H100])
def test_temporaries_of_the_loss(target, sizes):
  tpu = target != aot.H100
  naive = temporaries(target, sizes, plain)
  # Under fsdp forward and backward are there twice: for a slice of the weight, and for the rest.
  kernels = 3 * (2 if sizes[1] > 1 else 1)
  used = temporaries(target, sizes, general, kernels=kernels if tpu else 0)
  print(f"{target} {sizes}: {used / 2**20:.0f} of {naive / 2**20:.0f} MiB")
  assert used <= (LIMITS[sizes] if tpu else 0.35) * naive


@pytest.mark.parametrize("target", [*aot.TPUS, aot.H100])
@pytest.mark.parametrize("loss", [with_entropy, fused], ids=lambda f: f.__name__)
def test_other_ways_to_the_loss(target, loss):
  tpu = target != aot.H100
  naive = temporaries(target, (1, 1, 1), plain)
  used = temporaries(target, (1, 1, 1), loss)
  print(f"{target} {loss.__name__}: {used / 2**20:.0f} of {naive / 2**20:.0f} MiB")
  assert used <= (0.05 if tpu else 0.35) * naive


@pytest.mark.parametrize("target", aot.TPUS)
@pytest.mark.parametrize("width", [896, 4096, 8192])
def test_other_widths_compile(target, width):
  """Tiles of each chip's own memory, too; a trainer's parameters are float32, its rows are not."""
  from trinity_jax.kernels.linear_logprob import pallas_tpu

  one = NamedSharding(Mesh(np.array(aot.devices(target)[:1]), "x"), PartitionSpec())
  shape = lambda size, dtype: jax.ShapeDtypeStruct(size, dtype, sharding=one)

  def run(chip, h, w, y, m, t):
    outs = pallas_tpu.forward(h, w, y, m, t, chip=chip)
    return outs, pallas_tpu.backward(h, w, y, m, t, *outs[1:], outs, chip=chip)

  own, half, full = target.partition(":")[0], jnp.bfloat16, jnp.float32
  for chip, rows, weight in (
    (own, half, half), (own, full, full), (own, half, full), (None, half, full),
  ):  # fmt: skip
    args = (
      shape((1000, width), rows), shape((width, 32003), weight), shape((1000,), jnp.int32),
      shape((1000,), jnp.bool_), shape((1000,), jnp.float32),
    )  # fmt: skip
    jax.jit(functools.partial(run, chip)).lower(*args).compile()
