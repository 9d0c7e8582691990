"""The five aggregations: values, empty responses, packing and splitting."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_jax.algorithms.aggregation import MODES, weights
from trinity_jax.algorithms.numerics import clamp, masked, rows, sequence_sum
from trinity_jax.errors import UserError


def numpy_loss(x, mask, mode, max_length):
  """Row per sequence; literally the formulas."""
  sums = [sum(x[i, t] for t in range(x.shape[1]) if mask[i, t]) for i in range(len(x))]
  counts = mask.sum(1)
  match mode:
    case "token-mean":
      return sum(sums) / max(counts.sum(), 1)
    case "seq-mean-token-sum":
      return sum(sums) / len(x)
    case "seq-mean-token-mean":
      return sum(s / max(n, 1) for s, n in zip(sums, counts)) / len(x)
    case "seq-mean-token-sum-norm":
      return sum(sums) / max_length
    case "token-sum":
      return sum(sums)


def test_hand_computed():
  # Three sequences with 2, 1 and 0 action tokens.
  mask = jnp.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
  index, count = rows(mask)
  got = {m: weights(mask, index, count, m, 4.0) for m in MODES}
  expected = {
    "token-mean": (1 / 3, 1 / 3, 1 / 3),  # 3 tokens
    "seq-mean-token-sum": (1 / 3, 1 / 3, 1 / 3),  # 3 sequences, the empty one included
    "seq-mean-token-mean": (1 / 6, 1 / 6, 1 / 3),  # 1/3 * 1/2 and 1/3 * 1/1
    "seq-mean-token-sum-norm": (1 / 4, 1 / 4, 1 / 4),
    "token-sum": (1, 1, 1),
  }
  for mode, (a, b, c) in expected.items():
    np.testing.assert_allclose(got[mode], [[a, b, 0, 0], [0, c, 0, 0], [0] * 4], rtol=1e-7)


def test_slots_without_a_sequence_do_not_count():
  # Five slots, three of them real: seq-mean divides by 3, and a token of an unreal one gets 0.
  mask = jnp.array([[True, True, True, True]])
  index = jnp.array([[0, 1, 1, 4]])
  valid = jnp.array([True, True, True, False, False])
  got = weights(mask, index, 5, "seq-mean-token-mean", valid=valid)
  np.testing.assert_allclose(got, [[1 / 3, 1 / 6, 1 / 6, 0]], rtol=1e-6)
  np.testing.assert_allclose(weights(mask, index, 5, valid=valid), [[1 / 3] * 3 + [0]], rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_train_on_gives_zero(mode):
  mask = jnp.zeros((2, 3), bool)
  index = jnp.full((2, 3), -1)
  got = weights(mask, index, 0, mode, 5) if mode != "seq-mean-token-mean" else weights(
    mask, index, 2, mode, valid=jnp.zeros(2, bool)
  )
  np.testing.assert_array_equal(got, np.zeros((2, 3)))


jitted = jax.jit(weights, static_argnames=("num_sequences", "mode"))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data())
def test_property_values_and_packing(data):
  mode = data.draw(st.sampled_from(MODES))
  rng = np.random.default_rng(data.draw(st.integers(0, 9999)))
  lengths = rng.integers(0, 6, 5)
  x = rng.normal(size=(5, 6))
  mask = (np.arange(6)[None] < lengths[:, None]) & (rng.random((5, 6)) < 0.7)
  expected = numpy_loss(x, mask, mode, 9)
  with jax.enable_x64(True):
    padded = np.asarray(jitted(mask, np.tile(np.arange(5)[:, None], 6), 5, mode, 9.0))
    np.testing.assert_allclose((padded * x).sum(), expected, rtol=1e-12, atol=1e-14)
    # The same tokens in micro-batches of packed rows, in any order; sequences stay whole.
    order = rng.permutation(5)
    flat, index = np.zeros((2, 2, 10)), np.full((2, 2, 10), -1)
    keep = np.zeros((2, 2, 10), bool)
    at = [(m, b) for m in range(2) for b in range(2)]
    used = dict.fromkeys(at, 0)
    for i in order:
      place = next(p for p in at if used[p] + lengths[i] <= 10)
      span = (*place, slice(used[place], used[place] + lengths[i]))
      flat[span], keep[span], index[span] = x[i, : lengths[i]], mask[i, : lengths[i]], i
      used[place] += lengths[i]
    packed = np.asarray(jitted(keep, index, 5, mode, 9.0))
  np.testing.assert_allclose((packed * flat).sum(), expected, rtol=1e-12, atol=1e-14)


def test_errors():
  mask = jnp.ones((1, 2), bool)
  with pytest.raises(UserError, match="'token-meen' does not exist; did you mean 'token-mean'"):
    weights(mask, *rows(mask), "token-meen")
  for bad in (None, 0):
    with pytest.raises(UserError, match=f"max_length is {bad}"):
      weights(mask, *rows(mask), "seq-mean-token-sum-norm", bad)


def test_sequence_sum_reads_nothing_under_the_mask():
  x = jnp.array([[1.0, 2.0, jnp.nan], [4.0, jnp.inf, 8.0]])
  mask = jnp.array([[True, True, False], [True, False, True]])
  index = jnp.array([[0, 2, 77], [2, -1, 2]])
  np.testing.assert_array_equal(sequence_sum(x, mask, index, 4), [1, 0, 14, 0])


def test_numerics():
  (x,) = masked(jnp.array([True, False]), jnp.array([1, 5]))
  np.testing.assert_array_equal(x, [1.0, 0.0])
  assert x.dtype == jnp.float32
  grad = jax.vmap(jax.grad(lambda v: clamp(v, -1.0, 2.0)))
  np.testing.assert_array_equal(grad(jnp.array([-1.5, -1.0, 0.0, 2.0, 2.5])), [0, 1, 1, 1, 0])
  assert np.isnan(clamp(jnp.nan * jnp.ones(()), 0, 1))
  np.testing.assert_array_equal(rows(np.zeros((2, 2, 3)))[0][..., 0], [[0, 1], [2, 3]])
