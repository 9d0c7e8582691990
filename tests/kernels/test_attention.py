"""Attention: value and gradient of each implementation against the reference; a hand-made case."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trinity_jax import ops
from trinity_jax.errors import UserError

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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linear_accumulates_in_fp32(dtype):
  x = jnp.ones((2, 3, 1000), dtype)
  w = jnp.ones((1000, 4), dtype)
  out = ops.linear(x, w, out_dtype=jnp.float32)
  np.testing.assert_array_equal(out, np.full((2, 3, 4), 1000.0))
  assert ops.linear(x, w).dtype == dtype
