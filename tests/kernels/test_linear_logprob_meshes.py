"""linear_logprob split over rows and vocabulary, on 8 devices: equal, and nothing is gathered."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import logprob_cases as cases
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from trinity_jax import ops
from trinity_jax.kernels.linear_logprob import api, columns, layout
from trinity_jax.models.sharding import make_mesh

COUNT, WIDTH = 37, 16  # no multiple of the row shards


def everything(h, w, y, m, t, c, implementation):
  """Both operators' values and gradients, and expected_score."""

  def general(h, w):
    outs = api.linear_logprob(h, w, y, m, t, softcap=3.0, implementation=implementation)
    return sum(jnp.sum(a * b) for a, b in zip(c, outs)), outs

  def fused(h, w):
    f = lambda logprob, entropy, x: x["a"] * jnp.exp(logprob) - x["b"] * entropy
    x = {"a": c[0], "b": jnp.sum(c[1]) ** 2}
    return api.linear_logprob_loss(h, w, y, m, t, f, x, softcap=3.0, implementation=implementation)

  run = lambda f: jax.value_and_grad(f, (0, 1), has_aux=True)(h, w)
  return run(general), run(fused), fused(h, w)[0], api.expected_score(h, w, m, t)


step = jax.jit(everything, static_argnames="implementation")


@functools.cache
def on_one_device(vocabulary):
  """(arguments of `everything`, what it gives)"""
  args = (*cases.inputs(0, COUNT, WIDTH, vocabulary), cases.cotangents(1, COUNT))
  return args, jax.tree.leaves(step(*args, implementation="reference"))


@pytest.mark.parametrize(
  "shape,vocabulary,names",
  [
    ((8, 1, 1), 64, ["tiles"]),
    ((2, 2, 2), 64, ["tiles", "xla"]),
    ((1, 4, 2), 64, ["tiles"]),
    ((1, 1, 8), 64, ["tiles_transposed"]),
    ((2, 1, 4), 61, ["tiles", "xla"]),  # does not divide: rows are split over tensor too
  ],
  ids=str,
)
def test_equals_one_device(shape, vocabulary, names):
  args, expected = on_one_device(vocabulary)
  with jax.set_mesh(make_mesh(*shape)):
    for name in names:
      got = jax.tree.leaves(step(*args, implementation=cases.TABLE[name]))
      cases.close(got, expected, 1e-5)


@pytest.mark.parametrize("shape,name", [((2, 2, 2), "tiles"), ((1, 4, 1), "pallas_tpu")], ids=str)
def test_a_large_weight_is_gathered_in_slices(shape, name, monkeypatch):
  """Two slices of 128 columns and a rest on each shard."""
  monkeypatch.setattr(columns, "SLICE", 1)
  vocabulary = 300 * shape[2]
  args, expected = on_one_device(vocabulary)
  # A function of its own: the limit is no argument that a compiled program could be told by.
  own = jax.jit(lambda *args: everything(*args, implementation=cases.TABLE[name]))
  with jax.set_mesh(make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])):
    cases.close(jax.tree.leaves(own(*args)), expected, 1e-5)


def test_layouts():
  assert layout.layout_of(64) == layout.Layout()
  with jax.set_mesh(make_mesh(2, 2, 2)):
    there = layout.layout_of(64)
    assert (there.rows, there.vocabulary) == (("data", "fsdp"), "tensor")
    assert (there.row_shards, there.vocabulary_shards) == (4, 2)
    there = layout.layout_of(61)
    assert (there.rows, there.vocabulary) == (("data", "fsdp", "tensor"), None)
  with jax.set_mesh(make_mesh(1, 1, 1, jax.devices()[:1])):
    assert layout.layout_of(64) == layout.Layout()  # one device pays for nothing
    f = jax.jit(lambda h, w, y, m: ops.linear_logprob(h, w, y, m))
    assert "shard" not in f.lower(*cases.inputs(0, 8, 4, 8)[:4]).as_text().replace("sharding", "")
  mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
  with jax.set_mesh(mesh):
    assert layout.layout_of(64) == layout.Layout()


def compiled(mesh, count, width, vocabulary, fused):
  """The program of a loss and its gradients, laid out as the trainer does."""
  place = lambda s, d, *spec: jax.ShapeDtypeStruct(
    s, d, sharding=NamedSharding(mesh, PartitionSpec(*spec))
  )
  rows = ("data", "fsdp")
  args = (
    place((count, width), jnp.float32, rows),
    place((width, vocabulary), jnp.float32, "fsdp", "tensor"),
    place((count,), jnp.int32, rows),
    place((count,), jnp.bool_, rows),
  )

  def loss(h, w, y, m):
    if fused:
      return ops.linear_logprob_loss(h, w, y, m, 1.0, lambda l, e, x: l - 0.1 * e, ())[0]
    logprob, entropy, _ = ops.linear_logprob(h, w, y, m)
    return jnp.sum(logprob - 0.1 * entropy)

  with jax.set_mesh(mesh):
    shardings = tuple(x.sharding for x in args[:2])
    step = jax.jit(jax.grad(loss, (0, 1)), out_shardings=shardings)
    return step.lower(*args).compile()


@pytest.mark.parametrize("fused", [False, True])
def test_logits_and_vocabulary_are_never_gathered(fused):
  count, width, vocabulary = 4096, 64, 32768  # 128 MiB of logits on each of 4 x 2 devices
  program = compiled(make_mesh(2, 2, 2), count, width, vocabulary, fused)
  text = program.as_text()
  for rows in (count, count // 4):
    for size in (vocabulary, vocabulary // 2):
      assert f"f32[{rows},{size}]" not in text
  assert f"f32[{width},{vocabulary}]" not in text  # the weight is gathered over fsdp only
  assert f"f32[{width},{vocabulary // 2}]" in text
  whole = count // 4 * vocabulary // 2 * 4
  limit = whole // 6 + width * vocabulary // 2 * 4 * 2  # and the gathered weight and its gradient
  if fused:
    limit += 512 * vocabulary // 2 * 4  # logits of one chunk
  assert program.memory_analysis().temp_size_in_bytes < limit
  # Each device keeps its part of the gradient.
  assert program.memory_analysis().output_size_in_bytes < whole // 8


def test_a_large_weight_is_never_whole(monkeypatch):
  width, vocabulary = 64, 32768
  monkeypatch.setattr(columns, "SLICE", 4 * width * 4096)
  text = compiled(make_mesh(2, 2, 2), 4096, width, vocabulary, True).as_text()
  assert f"f32[{width},{vocabulary // 2}]" not in text
  assert f"f32[{width},4096]" in text


def test_small_logits_stay_split_too():
  text = compiled(make_mesh(2, 2, 2), 512, 32, 2048, False).as_text()
  assert "f32[128,1024]" in text
  for shape in ("512,2048", "128,2048", "512,1024"):
    assert f"f32[{shape}]" not in text


def test_unlike_shards_of_rows():
  """One shard has no active row, another only such: no collective waits inside a loop."""
  (h, w, y, _, t, c), _ = on_one_device(64)
  m = np.zeros(COUNT, bool)
  m[:10] = True
  m[20] = True
  expected = jax.tree.leaves(step(h, w, y, m, t, c, implementation="reference"))
  with jax.set_mesh(make_mesh(4, 1, 2)):
    got = jax.tree.leaves(step(h, w, y, m, t, c, implementation=cases.TABLE["tiles"]))
  cases.close(got, expected, 1e-5)
