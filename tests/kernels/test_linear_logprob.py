"""linear_logprob: values, gradients, masks, memory and skipped work of every implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import logprob_cases as cases
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_jax import ops
from trinity_jax.errors import UserError
from trinity_jax.kernels.linear_logprob import api, xla

TILES = cases.TABLE["tiles"]


@functools.partial(jax.jit, static_argnames=("implementation", "softcap"))
def values_and_gradients(h, w, y, m, t, c, implementation, softcap=None):
  run = functools.partial(api.linear_logprob, softcap=softcap)
  implementation = cases.TABLE[implementation]
  outs, vjp = jax.vjp(lambda h, w: run(h, w, y, m, t, implementation=implementation), h, w)
  return outs, vjp(c)


def test_hand_computed():
  # logits = 1 * [0, ln 3] (temperature 1): p = [1/4, 3/4].
  # logprob of 1 = ln(3/4); lse = ln 4; H = 1/4 ln 4 + 3/4 ln(4/3) = 0.562335.
  # At temperature 1/2 logits double: p = [1/10, 9/10], logprob of 0 = -ln 10.
  hidden, weight = jnp.array([[1.0], [1.0]]), jnp.array([[0.0, np.log(3.0)]])
  args = (hidden, weight, jnp.array([1, 0]), jnp.array([True, True]), jnp.array([1.0, 0.5]))
  for implementation in cases.TABLE.values():
    run = jax.jit(functools.partial(api.linear_logprob, implementation=implementation))
    logprob, entropy, lse = run(*args)
    np.testing.assert_allclose(logprob, [np.log(0.75), -np.log(10)], rtol=1e-6)
    np.testing.assert_allclose(entropy, [0.562335, 0.325083], rtol=1e-5)
    np.testing.assert_allclose(lse, [np.log(4), np.log(10)], rtol=1e-6)


@pytest.mark.parametrize("count,vocabulary,softcap", [(7, 11, None), (10, 16, 3.0)])
@pytest.mark.parametrize("name", cases.FLOAT64)
def test_float64_values_and_gradients(name, count, vocabulary, softcap):
  with jax.enable_x64(True):
    args = cases.inputs(0, count, 6, vocabulary, share=0.7, dtype=np.float64)
    c = cases.cotangents(1, count, np.float64)
    got, grads = values_and_gradients(*args, c, name, softcap)
    assert got[0].dtype == grads[0].dtype == jnp.float64
    np.testing.assert_allclose(got, cases.numpy_values(*args, softcap), atol=1e-12)
    cases.close(grads, cases.numpy_gradients(*args, c, softcap), 1e-13)


@pytest.mark.parametrize("name", cases.TABLE)
def test_float32_values_and_gradients(name):
  for mask in (None, np.zeros(13, bool), np.ones(13, bool), np.arange(13) == 12):
    h, w, y, m, t = cases.inputs(2, 13, 8, 21)
    args = (h, w, y, m if mask is None else mask, t)
    c = cases.cotangents(1, 13)
    got, grads = values_and_gradients(*args, c, name, 3.0)
    assert {x.dtype for x in (*got, *grads)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(got, cases.numpy_values(*args, 3.0), rtol=3e-6, atol=1e-5)
    cases.close(grads, cases.numpy_gradients(*args, c, 3.0), 4e-6)


@pytest.mark.parametrize("only", [0, 1, 2])
def test_one_output_used(only):
  # The others' cotangents are then symbolic zeros, and their arithmetic is left out.
  h, w, y, m, t = cases.inputs(4, 12, 6, 18)
  c = tuple(x * (k == only) for k, x in enumerate(cases.cotangents(1, 12)))
  expected = cases.numpy_gradients(h, w, y, m, t, c)
  for name in ("xla", "tiles"):
    run = functools.partial(api.linear_logprob, implementation=cases.TABLE[name])
    f = lambda h, w, run=run: jnp.sum(c[only] * run(h, w, y, m, t)[only])
    cases.close(jax.jit(jax.grad(f, (0, 1)))(h, w), expected, 4e-6)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.data())
def test_property_float32(data):
  count, vocabulary, name, softcap = data.draw(
    st.sampled_from(
      [(1, 2, "tiles", None), (8, 32, "tiles_transposed", None), (13, 9, "tiles", 5.0)]
    )
  )  # fmt: skip
  share = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
  h, w, y, m, t = cases.inputs(data.draw(st.integers(0, 999)), count, 4, vocabulary, share)
  scale = data.draw(st.sampled_from([0.1, 1.0, 100.0]))  # nearly uniform to nearly one-hot
  args = (h * np.float32(scale), w, y, m, t)
  c = cases.cotangents(0, count)
  got, grads = values_and_gradients(*args, c, name, softcap)
  # The rounding of a logit grows with the logit, and reaches everything through exp.
  size = max(1.0, scale)
  expected = cases.numpy_values(*args, softcap)
  np.testing.assert_allclose(got, expected, rtol=3e-6, atol=2e-5 * size)
  cases.close(grads, cases.numpy_gradients(*args, c, softcap), 2e-5 * size)
  assert np.all(np.asarray(got[0]) <= 0) and np.all(np.asarray(got[1]) >= 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", cases.TABLE)
def test_masked_rows_leak_nowhere(bad, name):
  h, w, y, m, t = cases.inputs(5, 10, 4, 6, share=0.5)
  assert 0 < m.sum() < 10
  c = cases.cotangents(0, 10)
  c_bad = tuple(np.where(m, x, np.float32(bad)) for x in c)  # nor what flows back into masked rows
  for outside in (-1, 6, 2**30):
    broken = (np.where(m[:, None], h, np.float32(bad)), w, np.where(m, y, np.int32(outside)), m,
              np.where(m, t, np.float32(0)))  # fmt: skip
    got, grads = values_and_gradients(*broken, c_bad, name)
    good, good_grads = values_and_gradients(h, w, y, m, t, c, name)
    for a, b in zip((*got, *grads), (*good, *good_grads)):
      np.testing.assert_array_equal(a, b)
    assert not np.any(np.asarray(got)[:, ~m]) and not np.any(np.asarray(grads[0])[~m])


def test_temperature_scalar_equals_per_row_and_is_a_constant():
  h, w, y, m, _ = cases.inputs(6, 9, 4, 12)
  for name in ("xla", "tiles", "pallas_tpu"):
    run = functools.partial(api.linear_logprob, h, w, y, m, implementation=cases.TABLE[name])
    both = lambda t, run=run: (run(t), jax.grad(lambda t: jnp.sum(run(t)[0]))(t))
    outs, gradient = jax.jit(both)(0.7)
    for a, b in zip(outs, jax.jit(run)(jnp.full(9, 0.7))):
      np.testing.assert_array_equal(a, b)
    assert gradient == 0


def test_bfloat16_accumulates_in_float32():
  h, w, y, m, t = cases.inputs(7, 12, 32, 40)
  h16, w16 = jnp.asarray(h, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
  wide = [np.asarray(x, np.float32) for x in (h16, w16)]
  c = cases.cotangents(1, 12)
  for name in ("xla", "tiles_transposed", "pallas_tpu"):
    got, grads = values_and_gradients(h16, w16, y, m, t, c, name)
    assert all(x.dtype == jnp.float32 for x in got)
    # Products of bfloat16 numbers are exact in float32, so only the order of sums differs.
    np.testing.assert_allclose(got, cases.numpy_values(*wide, y, m, t), atol=2e-5)
    assert all(g.dtype == jnp.bfloat16 for g in grads)
    cases.close(grads, cases.numpy_gradients(*wide, y, m, t, c), 6e-3)  # the last rounding


def test_vmap_and_tied_weight():
  h, w, y, m, t = cases.inputs(8, 12, 4, 12)
  batched = [x.reshape(3, 4, *x.shape[1:]) for x in (h, y, m, t)]

  @jax.jit
  def by_row(h, y, m, t):
    outs = api.linear_logprob(h, w, y, m, t, implementation=TILES)
    loss = lambda h: jnp.sum(api.linear_logprob(h, w, y, m, t, implementation=TILES)[0])
    return *outs, jax.grad(loss)(h)

  for a, b in zip(jax.vmap(by_row)(*batched), by_row(h, y, m, t)):
    np.testing.assert_allclose(a.reshape(b.shape), b, atol=1e-6)

  loss = lambda w: jnp.sum(api.linear_logprob(h, w, y, m, t, implementation=TILES)[0])
  embed = np.ascontiguousarray(w.T)
  tied = jax.jit(jax.grad(lambda e: loss(e.T)))(embed)
  np.testing.assert_allclose(tied, jax.jit(jax.grad(loss))(w).T, atol=1e-6)


def test_same_bits_again_and_one_trace():
  traces = []

  @jax.jit
  def step(h, w, y, m, t):
    traces.append(1)
    f = lambda h, w: jnp.sum(api.linear_logprob(h, w, y, m, t, implementation=TILES)[0])
    return jax.value_and_grad(f, (0, 1))(h, w)

  args = cases.inputs(9, 30, 8, 40)
  first = jax.tree.leaves(step(*args))
  for _ in range(3):
    for a, b in zip(first, jax.tree.leaves(step(*args))):
      np.testing.assert_array_equal(a, b)
  step(*args[:3], np.zeros(30, bool), args[4])  # how many rows are active is no part of the shape
  assert len(traces) == 1


SHAPES = (
  jax.ShapeDtypeStruct((4096, 64), jnp.float32),
  jax.ShapeDtypeStruct((64, 32768), jnp.float32),
  jax.ShapeDtypeStruct((4096,), jnp.int32),
  jax.ShapeDtypeStruct((4096,), jnp.bool_),
)  # [T, V] in float32: 512 MiB


def temporaries(loss):
  step = jax.jit(jax.value_and_grad(loss, (0, 1)))
  return step.lower(*SHAPES).compile().memory_analysis().temp_size_in_bytes


def test_large_vocabulary_is_never_held():
  def general(implementation):
    def loss(h, w, y, m):
      logprob, entropy, _ = ops.linear_logprob(h, w, y, m, implementation=implementation)
      return jnp.sum(logprob - 0.01 * entropy)

    return loss

  def fused(h, w, y, m):
    f = lambda logprob, entropy, _: logprob - 0.01 * entropy
    return ops.linear_logprob_loss(h, w, y, m, 1.0, f, ())[0]

  naive, ours = temporaries(general("reference")), temporaries(general(None))
  assert naive >= 4096 * 32768 * 4  # the measure sees what it should see
  assert ours < naive / 30
  assert temporaries(fused) < naive / 12  # logits of one chunk of rows


def test_chunks_without_an_active_row_are_skipped():
  # The loop's bound is the number of chunks that the active rows fill, however they are scattered.
  mask = np.zeros(42, bool)
  mask[[3, 11, 12, 25, 39]] = True
  chunks = jax.jit(lambda m: xla.chunks_of(m, 4)[1:3])
  order, live = chunks(mask)
  assert live == 2 and order.shape == (44,)  # 5 rows in chunks of 4
  np.testing.assert_array_equal(order[:8], [3, 11, 12, 25, 39, 42, 42, 42])
  assert chunks(np.zeros(42, bool))[1] == 0
  there = xla.chunks_of(jnp.asarray(mask), 4)
  rows = jnp.arange(1.0, 43.0)
  np.testing.assert_array_equal(there.back(there.take(rows)), np.where(mask, rows, 0))


def test_small_logits_are_kept():
  # One product forward and two backward; beyond that the logits are computed again.
  def products(count, vocabulary):
    shapes = (jnp.zeros((count, 8)), jnp.zeros((8, vocabulary)), jnp.zeros(count, jnp.int32))
    f = lambda h, w, y: jnp.sum(ops.linear_logprob(h, w, y, jnp.ones(count, bool))[0])
    text = jax.jit(jax.grad(f, (0, 1))).lower(*shapes).as_text()
    return text.count("dot_general")

  assert products(4096, 512) == 3
  assert products(4096, 4096) == 4


def test_a_kernel_for_another_platform_is_refused_when_it_is_compiled():
  h, w, y, m, t = (jnp.asarray(x) for x in cases.inputs(11, 256, 128, 512))
  f = lambda implementation: jax.jit(
    functools.partial(api.linear_logprob, implementation=implementation)
  )
  with pytest.raises(ValueError, match="'pallas_tpu' runs on tpu, not on cpu"):
    f("pallas_tpu")(h, w, y, m, t)
  with pytest.raises(ValueError, match="'pallas_tpu' runs on tpu, not on cpu"):
    jax.vmap(lambda h: ops.linear_logprob(h, w, y, m, t, implementation="pallas_tpu"))(h[None])
  with pytest.raises(ValueError, match="'pallas_tpu' cannot run: hidden is float16"):
    f("pallas_tpu")(h.astype(jnp.float16), w, y, m, t)

  def lowered(implementation, platform, vocabulary=65536):
    args = (h, jnp.zeros((128, vocabulary)), y, m, t)
    return f(implementation).trace(*args).lower(lowering_platforms=(platform,)).as_text()

  assert "tpu_custom_call" in lowered("pallas_tpu", "tpu")
  assert "tpu_custom_call" in lowered(None, "tpu")  # one traced function, a kernel where it runs
  assert "tpu_custom_call" not in lowered("xla", "tpu")
  for platform in ("cpu", "cuda"):
    assert "custom_call @tpu" not in lowered(None, platform)


def test_expected_score():
  h, w, _, m, t = cases.inputs(12, 23, 6, 33)
  expected = np.zeros(23)
  for i in np.flatnonzero(m):
    l = h[i].astype(np.float64) @ w / t[i]
    p = np.exp(l - l.max())
    p /= p.sum()
    expected[i] = (p**2 * (np.log(p) - (p * np.log(p)).sum())).sum()
  got = jax.jit(ops.expected_score)(np.where(m[:, None], h, np.nan), w, m, np.where(m, t, 0))
  np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)
  assert not np.any(got[~m])
  d = jax.jit(jax.grad(lambda h: jnp.sum(ops.expected_score(h, w, m, t))))(h)
  assert not np.any(d)
  tiles = functools.partial(xla.expected_score, layout=api.Layout(), tile=xla.Tile(4, 6))
  np.testing.assert_allclose(jax.jit(tiles)(h, w, m, t), expected, rtol=2e-5, atol=1e-6)


def test_errors():
  h, w, y, m, _ = cases.inputs(11, 4, 3, 5)
  with pytest.raises(UserError, match="implementation 'palas' does not exist"):
    ops.linear_logprob(h, w, y, m, implementation="palas")
  with pytest.raises(ValueError, match=r"expected \[T, D\] and \[D, V\]"):
    ops.linear_logprob(h, w.T, y, m)
  with pytest.raises(ValueError, match="targets has shape"):
    ops.linear_logprob(h, w, y[:2], m)
  with pytest.raises(ValueError, match="temperature has shape"):
    ops.linear_logprob(h, w, y, m, np.ones(3))
  with pytest.raises(ValueError, match="softcap is 0"):
    ops.linear_logprob(h, w, y, m, softcap=0)
