"""Attention: value and gradient of each implementation against the reference; a hand-made case."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trinity_jax import ops
from trinity_jax.errors import UserError
from trinity_jax.kernels.attention import cudnn, shards, splash_tpu
from trinity_jax.models.sharding import MESH_AXES, make_mesh

_QUICK = {"xla_backend_optimization_level": 0}  # halves the compile time, which is the test's


def _inputs(seed, rows, length, heads, kv_heads, size):
  rng = np.random.default_rng(seed)
  q, k, v, g = (
    rng.normal(size=(rows, length, n, size)).astype(np.float32)
    for n in (heads, kv_heads, kv_heads, heads)
  )
  # Segments of random lengths, then padding; positions start anywhere.
  segment_ids = np.zeros((rows, length), np.int32)
  positions = np.zeros((rows, length), np.int32)
  for row in range(rows):
    start, number = 0, 1
    end = int(rng.integers(0, length + 1))
    while start < end:
      n = int(rng.integers(1, end - start + 1))
      segment_ids[row, start : start + n] = number
      positions[row, start : start + n] = rng.integers(0, 100) + np.arange(n)
      start, number = start + n, number + 1
  return q, k, v, g, positions, segment_ids


@pytest.mark.parametrize(
  ("length", "heads", "window"), [(16, (4, 2), 3), (7, (6, 1), None), (1, (2, 2), 1)]
)
def test_value_and_gradient_equal_the_reference(length, heads, window):
  @functools.partial(jax.jit, static_argnames="implementation", compiler_options=_QUICK)
  def run(q, k, v, g, positions, segment_ids, implementation):
    real = (segment_ids > 0)[..., None, None]

    def loss(q, k, v):
      out = ops.attention(
        q, k, v, positions=positions, segment_ids=segment_ids, window=window,
        implementation=implementation,
      )  # fmt: skip
      return jnp.sum(jnp.where(real, out * g, 0)), out

    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, grads

  for seed in range(20):
    inputs = _inputs(seed, 2, length, *heads, 8)
    out, grads = run(*inputs, implementation="xla")
    want, want_grads = run(*inputs, implementation="reference")
    real = (inputs[-1] > 0)[..., None, None]
    assert np.all(np.isfinite(out))
    np.testing.assert_allclose(np.where(real, out, 0), np.where(real, want, 0), atol=2e-6)
    for a, b in zip(grads, want_grads):
      np.testing.assert_allclose(a, b, atol=1e-5)


def test_by_hand():
  """Equal scores: each token receives the mean of what it may see."""
  T = 5
  q = jnp.zeros((1, T, 1, 2))
  k = jnp.ones((1, T, 1, 2))
  v = jnp.arange(T, dtype=jnp.float32).reshape(1, T, 1, 1) * jnp.ones((1, 1, 1, 2))
  positions = jnp.array([[0, 1, 2, 0, 1]])
  segment_ids = jnp.array([[1, 1, 1, 2, 2]])
  for implementation in ("reference", "xla"):
    for window, want in ((None, [0, 0.5, 1, 3, 3.5]), (2, [0, 0.5, 1.5, 3, 3.5])):
      out = ops.attention(
        q, k, v, positions=positions, segment_ids=segment_ids, window=window,
        implementation=implementation,
      )  # fmt: skip
      np.testing.assert_allclose(out[0, :, 0, 0], want, rtol=1e-6)


def test_unknown_implementation_is_an_error():
  q, k, v, _, positions, segment_ids = _inputs(0, 1, 4, 2, 2, 4)
  with pytest.raises(UserError, match="attention: implementation 'xl' does not exist.*'xla'"):
    ops.attention(q, k, v, positions=positions, segment_ids=segment_ids, implementation="xl")


def _value_and_gradient(attention, inputs, **how):
  q, k, v, g, positions, segment_ids = inputs
  real = (segment_ids > 0)[..., None, None]

  def loss(q, k, v):
    out = attention(q, k, v, positions=positions, segment_ids=segment_ids, **how)
    return jnp.sum(jnp.where(real, out * g, 0)), out

  (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
  return jnp.where(real, out, 0), jnp.all(jnp.isfinite(out)), grads


@pytest.mark.parametrize(
  ("length", "heads", "window", "mesh"),
  [
    (256, (4, 2), None, None), (128, (2, 1), 5, None), (128, (4, 2), 1000, (2, 2, 1, 2)),
    (256, (4, 2), None, (2, 1, 2, 2)), (256, (4, 2), 100, (1, 1, 2, 2)),
  ],
)  # fmt: skip
def test_splash_equals_the_reference(length, heads, window, mesh):
  """Interpreted, on one device and on meshes with rows, places and heads split."""
  how = dict(window=window)
  interpreted = jax.jit(
    functools.partial(_value_and_gradient, splash_tpu.attention, interpret=True, **how)
  )
  reference = jax.jit(
    functools.partial(_value_and_gradient, ops.attention, implementation="reference", **how)
  )
  if mesh is not None:
    data, fsdp, context, tensor = mesh
    mesh = make_mesh(data, fsdp, tensor, jax.devices()[: int(np.prod(mesh))], context=context)
  for seed in range(3 if mesh is None else 1):
    inputs = _inputs(seed, 4, length, *heads, 16)
    want, _, want_grads = reference(inputs)
    if mesh is None:
      out, finite, grads = interpreted(inputs)
    else:
      with jax.set_mesh(mesh):
        found = shards.shards_of(inputs[0].shape, inputs[1].shape)
        assert found.parts == context and found.heads == "tensor"
        assert len(found.rows) == (data > 1) + (fsdp > 1)
        out, finite, grads = interpreted(inputs)
    assert finite
    np.testing.assert_allclose(out, want, atol=2e-6)
    for a, b in zip(grads, want_grads):
      np.testing.assert_allclose(a, b, atol=1e-5)


def test_axes_that_do_not_divide_do_not_split():
  with jax.set_mesh(make_mesh(2, 2, 2)):
    for rows, heads, want in (
      (4, (4, 2), (("data", "fsdp"), "tensor")), (2, (4, 2), (("data",), "tensor")),
      (3, (4, 1), ((), None)),
    ):  # fmt: skip
      found = shards.shards_of((rows, 8, heads[0], 8), (rows, 8, heads[1], 8))
      assert (found.rows, found.heads, found.parts) == (*want, 1)
      assert found.names == set(MESH_AXES)  # a kernel takes them all
  with jax.set_mesh(make_mesh(2, context=4)):
    of = lambda length: shards.shards_of((2, length, 2, 8), (2, length, 1, 8))
    assert [of(length).parts for length in (8, 12, 10)] == [4, 4, 1]
    q = jax.ShapeDtypeStruct((2, 256, 2, 8), jnp.float32)
    assert "row length is 256, expected a multiple of 512" in (splash_tpu.unsupported(q, q) or "")
  assert shards.shards_of((4, 8, 4, 8), (4, 8, 2, 8)).mesh is None


def test_default_by_platform():
  """One traced function: splash in a TPU's program, XLA's own operations elsewhere."""

  def program(length, platform, implementation=None):
    shape = lambda n: jax.ShapeDtypeStruct((1, length, n, 64), jnp.bfloat16)
    row = jax.ShapeDtypeStruct((1, length), jnp.int32)
    run = lambda q, k, v, p, s: ops.attention(
      q, k, v, positions=p, segment_ids=s, implementation=implementation
    )
    traced = jax.jit(run).trace(shape(4), shape(2), shape(2), row, row)
    return traced.lower(lowering_platforms=(platform,)).as_text()

  for length, platform, splash in (
    (256, "tpu", True), (256, "cpu", False), (256, "cuda", False), (200, "tpu", False),
  ):  # fmt: skip
    assert ("tpu_custom_call" in program(length, platform)) == splash
  with pytest.raises(ValueError, match="'splash' runs on tpu, not on cpu"):
    program(256, "cpu", "splash")
  with pytest.raises(ValueError, match="'splash' cannot run: row length is 200.* multiple of 128"):
    program(200, "tpu", "splash")


def test_limits_of_implementations():
  shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)
  k = shape(1, 128, 2, 64)
  for module, q, reason in (
    (splash_tpu, shape(1, 128, 4, 64), None),
    (splash_tpu, shape(1, 128, 4, 64, dtype=jnp.float64), "dtype is float64"),
    (splash_tpu, shape(1, 100, 4, 64), "row length is 100"),
    (splash_tpu, shape(1, 128, 4, 60), "head dim is 60"),
    (splash_tpu, shape(1, 128, 3, 64), "3 query heads are no multiple of 2"),
    (cudnn, shape(1, 128, 4, 64), None),
    (cudnn, shape(1, 128, 4, 64, dtype=jnp.float32), "dtype is float32"),
    (cudnn, shape(1, 127, 4, 64), "row length is 127"),
    (cudnn, shape(1, 128, 4, 264), "head dim is 264"),
    (cudnn, shape(1, 128, 3, 64), "3 query heads are no multiple of 2"),
  ):  # fmt: skip
    got = module.unsupported(q, k)
    assert got is None if reason is None else reason in (got or "")


@pytest.mark.parametrize("window", [None, 7])
def test_cudnn_lowers_for_a_gpu(monkeypatch, window):
  """Forward and backward become cuDNN's calls; whether they are right, only a GPU can say."""
  from jax._src.cudnn import fused_attention_stablehlo as calls

  shape = lambda n: jax.ShapeDtypeStruct((2, 64, n, 32), jnp.bfloat16)
  row = jax.ShapeDtypeStruct((2, 64), jnp.int32)

  def loss(q, k, v, p, s):
    out = ops.attention(q, k, v, positions=p, segment_ids=s, window=window, implementation="cudnn")
    return jnp.sum(out.astype(jnp.float32))

  trace = lambda: jax.jit(jax.grad(loss, (0, 1, 2))).trace(shape(4), shape(2), shape(2), row, row)
  if calls.cuda_versions is None:
    with pytest.raises(ValueError, match="'cudnn' cannot run: no cuDNN on this machine"):
      trace()
  monkeypatch.setattr(calls, "check_cudnn_version", lambda: 91000)
  text = trace().lower(lowering_platforms=("cuda",)).as_text()
  for name in ("__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"):
    assert name in text
  with pytest.raises(ValueError, match="'cudnn' runs on cuda, not on cpu"):
    trace().lower(lowering_platforms=("cpu",))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linear_accumulates_in_fp32(dtype):
  x = jnp.ones((2, 3, 1000), dtype)
  w = jnp.ones((1000, 4), dtype)
  out = ops.linear(x, w, out_dtype=jnp.float32)
  np.testing.assert_array_equal(out, np.full((2, 3, 4), 1000.0))
  assert ops.linear(x, w).dtype == dtype
