"""linear_logprob: values, gradients, masks, memory and skipped work of every implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from trinity_jax import ops
from trinity_jax.errors import UserError
from trinity_jax.kernels.linear_logprob import api, reference, xla


def numpy_reference(hidden, weight, targets, mask, temperature, softcap=None):
  """Independent float64 computation, row by row."""
  out = np.zeros((3, len(targets)))
  temperature = np.broadcast_to(temperature, len(targets))
  for i in np.flatnonzero(mask):
    l = np.asarray(hidden[i], np.float64) @ np.asarray(weight, np.float64)
    if softcap is not None:
      l = softcap * np.tanh(l / softcap)
    l = l / temperature[i]
    lse = l.max() + np.log(np.exp(l - l.max()).sum())
    p = np.exp(l - lse)
    out[:, i] = l[targets[i]] - lse, -(p * (l - lse)).sum(), lse
  return out


def inputs(seed, count, width, vocabulary, share=0.6, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return (
    rng.normal(size=(count, width)).astype(dtype),
    rng.normal(size=(width, vocabulary)).astype(dtype),
    rng.integers(0, vocabulary, count).astype(np.int32),
    rng.random(count) < share,
    rng.uniform(0.5, 1.5, count).astype(dtype),
  )


@functools.partial(jax.jit, static_argnames=("softcap", "chunk", "naive"))
def values_and_gradients(h, w, y, m, t, c, softcap=None, chunk=None, naive=False):
  f = reference.linear_logprob if naive else functools.partial(xla.linear_logprob, chunk=chunk)
  outs, vjp = jax.vjp(lambda h, w: f(h, w, y, m, t, softcap=softcap), h, w)
  return outs, vjp(c)


def scalar(f, cotangents, targets, mask, temperature, softcap):
  """A loss in which every output of every row has its own weight."""

  def loss(hidden, weight):
    outs = f(hidden, weight, targets, mask, temperature, softcap=softcap)
    return sum(jnp.sum(c * o) for c, o in zip(cotangents, outs))

  return loss


def test_hand_computed():
  # logits = 1 * [0, ln 3] (temperature 1): p = [1/4, 3/4].
  # logprob of 1 = ln(3/4); lse = ln 4; H = 1/4 ln 4 + 3/4 ln(4/3) = 0.562335.
  # At temperature 1/2 logits double: p = [1/10, 9/10], logprob of 0 = -ln 10.
  hidden, weight = jnp.array([[1.0], [1.0]]), jnp.array([[0.0, np.log(3.0)]])
  for name in api.IMPLEMENTATIONS:
    logprob, entropy, lse = ops.linear_logprob(
      hidden, weight, jnp.array([1, 0]), jnp.array([True, True]), jnp.array([1.0, 0.5]),
      implementation=name,
    )  # fmt: skip
    np.testing.assert_allclose(logprob, [np.log(0.75), -np.log(10)], rtol=1e-6)
    np.testing.assert_allclose(entropy, [0.562335, 0.325083], rtol=1e-5)
    np.testing.assert_allclose(lse, [np.log(4), np.log(10)], rtol=1e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
  "count,vocabulary,chunk", [(7, 11, None), (13, 17, 4), (16, 8, 8), (1, 5, None)]
)
def test_float64_values_and_gradients(count, vocabulary, chunk, softcap):
  with jax.enable_x64(True):
    h, w, y, m, t = inputs(0, count, 6, vocabulary, dtype=np.float64)
    c = tuple(np.random.default_rng(1).normal(size=(3, count)))
    got, grads = values_and_gradients(h, w, y, m, t, c, softcap=softcap, chunk=chunk)
    naive, naive_grads = values_and_gradients(h, w, y, m, t, c, softcap=softcap, naive=True)
    expected = numpy_reference(h, w, y, m, t, softcap)
    assert got[0].dtype == naive[0].dtype == jnp.float64
    np.testing.assert_allclose(got, expected, atol=1e-12)
    np.testing.assert_allclose(naive, expected, atol=1e-12)
    for a, b in zip(grads, naive_grads):
      np.testing.assert_allclose(a, b, atol=1e-12)


def test_gradient_matches_finite_differences():
  with jax.enable_x64(True):
    h, w, y, m, t = inputs(3, 5, 4, 7, dtype=np.float64)
    c = np.random.default_rng(2).normal(size=(3, 5))
    loss = scalar(functools.partial(xla.linear_logprob, chunk=2), c, y, m, t, 2.0)
    check_grads(jax.jit(loss), (jnp.asarray(h), jnp.asarray(w)), order=1, modes=["rev"])


@pytest.mark.parametrize("only", [0, 1, 2])
def test_one_output_used(only):
  # The others' cotangents are then symbolic zeros, and their arithmetic is left out.
  h, w, y, m, t = inputs(4, 12, 6, 20)

  def grad(f):
    return jax.jit(
      jax.grad(lambda h, w: jnp.sum(f(h, w, y, m, t, softcap=None)[only] ** 2), (0, 1))
    )(h, w)

  expected = grad(reference.linear_logprob)
  for chunk in (5, 12):
    got = grad(functools.partial(xla.linear_logprob, chunk=chunk))
    for a, b in zip(got, expected):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.data())
def test_property_float32(data):
  count, vocabulary, chunk, softcap = data.draw(
    st.sampled_from([(1, 2, None, None), (8, 32, 8, None), (13, 9, 4, 5.0), (13, 32, 1, None)])
  )
  share = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
  h, w, y, m, t = inputs(data.draw(st.integers(0, 999)), count, 4, vocabulary, share)
  scale = data.draw(st.sampled_from([0.1, 1.0, 100.0]))  # nearly uniform to nearly one-hot
  h = h * np.float32(scale)
  c = tuple(np.random.default_rng(0).normal(size=(3, count)).astype(np.float32))
  got, grads = values_and_gradients(h, w, y, m, t, c, softcap=softcap, chunk=chunk)
  with jax.enable_x64(True):
    exact, exact_grads = values_and_gradients(
      *(x.astype(np.float64) for x in (h, w)), y, m, t,
      tuple(x.astype(np.float64) for x in c), softcap=softcap, naive=True,
    )  # fmt: skip
  # The rounding of a logit grows with the logit, and reaches everything through exp.
  size = max(1.0, scale)
  np.testing.assert_allclose(got, exact, rtol=3e-6, atol=2e-5 * size)
  for x, z in zip(grads, exact_grads):
    x, z = np.asarray(x), np.asarray(z)
    assert np.linalg.norm(x - z) <= 2e-5 * size * max(1.0, np.linalg.norm(z))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("chunk", [3, None])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_masked_rows_leak_nowhere(bad, chunk, implementation):
  h, w, y, m, t = inputs(5, 10, 4, 6, share=0.5)
  assert 0 < m.sum() < 10
  run = functools.partial(xla.linear_logprob, chunk=chunk)
  run = run if implementation == "xla" else reference.linear_logprob
  c = np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32)
  c_bad = np.where(m, c, bad)  # nor does what flows back into a masked row
  h_bad, y_bad, t_bad = np.where(m[:, None], h, bad), np.where(m, y, -1), np.where(m, t, 0)
  for a, b in zip(
    run(h_bad, w, y_bad, m, t_bad, softcap=None), run(h, w, y, m, t, softcap=None)
  ):
    np.testing.assert_array_equal(a, b)
    assert not np.any(a[~m])
  outs, vjp = jax.vjp(lambda h, w: run(h, w, y_bad, m, t_bad, softcap=None), h_bad, w)
  d_hidden, d_weight = vjp(tuple(jnp.asarray(x) for x in c_bad))
  good = jax.vjp(lambda h, w: run(h, w, y, m, t, softcap=None), h, w)[1](
    tuple(jnp.asarray(x) for x in c)
  )
  np.testing.assert_array_equal(d_hidden, good[0])
  np.testing.assert_array_equal(d_weight, good[1])
  assert not np.any(d_hidden[~m])


def test_temperature_scalar_equals_per_row_and_is_a_constant():
  h, w, y, m, _ = inputs(6, 9, 4, 12)
  for name in api.IMPLEMENTATIONS:
    run = functools.partial(ops.linear_logprob, h, w, y, m, implementation=name)
    for a, b in zip(run(0.7), run(jnp.full(9, 0.7))):
      np.testing.assert_array_equal(a, b)
    assert jax.grad(lambda t, run=run: jnp.sum(run(t)[0]))(0.7) == 0


def test_bfloat16_accumulates_in_float32():
  h, w, y, m, t = inputs(7, 12, 32, 40)
  h16, w16 = jnp.asarray(h, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
  got = xla.linear_logprob(h16, w16, y, m, t, softcap=None, chunk=5)
  assert all(x.dtype == jnp.float32 for x in got)
  # Products of bfloat16 numbers are exact in float32, so only the order of sums differs.
  exact = numpy_reference(np.asarray(h16, np.float32), np.asarray(w16, np.float32), y, m, t)
  np.testing.assert_allclose(got, exact, atol=1e-5)
  grads = jax.grad(
    lambda h, w: jnp.sum(xla.linear_logprob(h, w, y, m, t, softcap=None, chunk=5)[0]), (0, 1)
  )(h16, w16)
  assert all(g.dtype == jnp.bfloat16 for g in grads)


def test_jit_vmap_and_tied_weight():
  h, w, y, m, t = inputs(8, 12, 4, 10)
  batched = [x.reshape(3, 4, *x.shape[1:]) for x in (h, y, m, t)]
  run = functools.partial(xla.linear_logprob, softcap=None, chunk=3)
  got = jax.jit(jax.vmap(lambda h, y, m, t: run(h, w, y, m, t)))(*batched)
  for a, b in zip(got, run(h, w, y, m, t)):
    np.testing.assert_allclose(a.reshape(-1), b, atol=1e-6)

  embed = np.ascontiguousarray(w.T)
  plain = jax.grad(lambda w: jnp.sum(run(h, w, y, m, t)[0]))(w)
  tied = jax.jit(jax.grad(lambda e: jnp.sum(run(h, e.T, y, m, t)[0])))(embed)
  np.testing.assert_allclose(tied, plain.T, atol=1e-6)
  grads = jax.vmap(jax.grad(lambda h, y, m, t: jnp.sum(run(h, w, y, m, t)[0])))(*batched)
  np.testing.assert_allclose(
    grads.reshape(12, 4), jax.grad(lambda h: jnp.sum(run(h, w, y, m, t)[0]))(h), atol=1e-6
  )


@pytest.mark.parametrize("chunk", [4, None])
def test_eight_devices_equal_one(chunk):
  mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  h, w, y, m, t = inputs(9, 16, 8, 20)
  c = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)

  def step(h, w, y, m, t):
    run = functools.partial(xla.linear_logprob, chunk=chunk)
    return jax.value_and_grad(scalar(run, c, y, m, t, None), (0, 1))(h, w)

  specs = [("data",), (None, "tensor"), ("data",), ("data",), ("data",)]
  placed = [
    jax.device_put(x, NamedSharding(mesh, PartitionSpec(*s)))
    for x, s in zip((h, w, y, m, t), specs)
  ]
  for a, b in zip(jax.tree.leaves(jax.jit(step)(*placed)), jax.tree.leaves(step(h, w, y, m, t))):
    np.testing.assert_allclose(a, b, atol=5e-6)


def test_large_vocabulary_is_never_held():
  count, width, vocabulary = 4096, 64, 32768  # [T, V] in float32: 512 MiB
  shapes = [
    jax.ShapeDtypeStruct(s, d)
    for s, d in (
      ((count, width), jnp.float32), ((width, vocabulary), jnp.float32), ((count,), jnp.int32),
      ((count,), jnp.bool_),
    )
  ]  # fmt: skip

  def temporaries(f):
    def loss(h, w, y, m):
      logprob, entropy, _ = f(h, w, y, m, 1.0, softcap=None)
      return jnp.sum(logprob - 0.01 * entropy)

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

  naive, ours = temporaries(reference.linear_logprob), temporaries(xla.linear_logprob)
  assert naive >= count * vocabulary * 4  # the measure sees what it should see
  assert ours < naive / 8
  assert ours < 100 * 2**20


def test_chunks_without_an_active_row_are_skipped():
  # The loop's bound is the number of chunks that the active rows fill, however they are scattered.
  mask = np.zeros(40, bool)
  mask[[3, 11, 12, 25, 39]] = True
  order, live = jax.jit(xla._order, static_argnums=1)(mask, 4)
  assert live == 2  # 5 rows in chunks of 4
  np.testing.assert_array_equal(order[:8], [3, 11, 12, 25, 39, 40, 40, 40])
  assert xla._order(np.zeros(40, bool), 4)[1] == 0
  # XLA runs what lies in a while body once per chunk: no product stands outside of it.
  h, w, y, _, t = inputs(10, 40, 8, 16)
  text = jax.jit(functools.partial(xla.linear_logprob, softcap=None, chunk=4)).lower(
    h, w, y, mask, t
  ).as_text()
  assert text.count("dot_general") == 1 and "stablehlo.while" in text


def test_chunk_rows():
  assert xla.chunk_rows(4096, 512) == 4096  # 2^21 logits: one chunk
  assert xla.chunk_rows(4096, 32768) == 256  # 2^23 / 2^15
  assert xla.chunk_rows(8192, 151936) == 128  # never fewer
  assert xla.chunk_rows(100, 151936) == 100


def test_errors():
  h, w, y, m, _ = inputs(11, 4, 3, 5)
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
