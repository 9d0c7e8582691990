"""Group advantages: hand-computed values, an independent float64 computation, edge cases."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_jax import algorithms
from trinity_jax.algorithms import stats
from trinity_jax.algorithms.advantages import constant, group_statistics, grpo, to_tokens
from trinity_jax.errors import UserError


def numpy_grpo(rewards, ids, valid, eps=1e-6, std=True, threshold=None):
  out = np.zeros(len(rewards))
  for g in set(ids[valid]):
    members = np.flatnonzero(valid & (ids == g))
    r = rewards[members].astype(np.float64)
    mean = r.mean() if len(r) > 1 else 0.0
    deviation = r.std(ddof=1) if len(r) > 1 else 1.0
    if len(r) > 1 and (r == r[0]).all():
      continue
    if threshold is not None and (len(r) == 1 or deviation <= threshold):
      continue
    out[members] = (r - mean) / (deviation + eps if std else 1.0)
  return out


jitted = jax.jit(grpo, static_argnames=("num_groups", "std", "std_threshold"))


def test_hand_computed():
  # Group 0: rewards 1, 0, 0, 1: mean 1/2, unbiased variance 4 * (1/4) / 3 = 1/3, std 0.577350:
  #   +-0.5 / (0.577350 + 1e-6) = +-0.866024.
  # Group 1: rewards 2, 4: mean 3, variance (1 + 1) / 1 = 2: -+1 / (1.414214 + 1e-6).
  rewards = jnp.array([1.0, 0.0, 2.0, 0.0, 1.0, 4.0])
  ids = jnp.array([0, 0, 1, 0, 0, 1])
  advantages, out = jitted(rewards, ids, jnp.ones(6, bool), 2)
  np.testing.assert_allclose(
    advantages, [0.866024, -0.866024, -0.707106, -0.866024, 0.866024, 0.707106], atol=1e-6
  )
  out = stats.finish(out)
  assert out["frac_reward_zero_std"] == 0
  np.testing.assert_allclose(out["advantages/max"], 0.866024, atol=1e-6)
  np.testing.assert_allclose(out["advantages/mean"], 0, atol=1e-6)
  # Dr. GRPO: no division.
  plain, _ = jitted(rewards, ids, jnp.ones(6, bool), 2, std=False)
  np.testing.assert_allclose(plain, [0.5, -0.5, -1, -0.5, 0.5, 1], atol=1e-7)


def test_group_of_one_keeps_its_reward():
  # Mean 0, deviation 1: 3 / (1 + 1e-6).
  advantages, out = jitted(jnp.array([3.0, 1.0, 1.0]), jnp.array([1, 0, 0]), jnp.ones(3, bool), 2)
  np.testing.assert_allclose(advantages, [3 / (1 + 1e-6), 0, 0], rtol=1e-7)
  out = stats.finish(out)
  assert out["groups_of_one"] == 1 and out["groups_zero_std"] == 1
  assert out["frac_reward_zero_std"] == 1  # of the groups that could have differed


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e6 + 0.1])
def test_equal_rewards_give_exactly_zero(reward):
  # A plain mean of seven 0.1 is off by 7e-9, which (std + 1e-6) turns into 4e-3.
  advantages, out = jitted(jnp.full(7, reward), jnp.zeros(7, int), jnp.ones(7, bool), 1)
  np.testing.assert_array_equal(advantages, np.zeros(7))
  assert stats.finish(out)["groups_zero_std"] == 1


def test_std_threshold_drops_flat_groups_and_groups_of_one():
  rewards = jnp.array([0.0, 0.1, 0.0, 1.0, 5.0])
  ids = jnp.array([0, 0, 1, 1, 2])
  advantages, _ = jitted(rewards, ids, jnp.ones(5, bool), 3, std_threshold=0.2)
  # std of (0, 0.1) is 0.0707 <= 0.2; of (0, 1) it is 0.7071.
  np.testing.assert_allclose(advantages, [0, 0, -0.707106, 0.707106, 0], atol=1e-6)


def test_empty_groups_and_invalid_rows():
  rewards = jnp.array([1.0, jnp.nan, 0.0, jnp.inf])
  ids = jnp.array([2, 2, 2, -7])  # an invalid row's id may be anything
  valid = jnp.array([True, False, True, False])
  advantages, out = jitted(rewards, ids, valid, 5)
  np.testing.assert_allclose(advantages, [0.707106, 0, -0.707106, 0], atol=1e-6)
  assert all(np.isfinite(x) for x in stats.finish(out).values())
  nothing, out = jitted(rewards, ids, jnp.zeros(4, bool), 5)
  np.testing.assert_array_equal(nothing, np.zeros(4))
  assert all(x == 0 for x in stats.finish(out).values())


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data())
def test_property_against_numpy(data):
  count, std, threshold = data.draw(
    st.sampled_from([(1, True, None), (17, True, None), (17, False, None), (17, True, 0.2)])
  )
  rng = np.random.default_rng(data.draw(st.integers(0, 9999)))
  groups = data.draw(st.sampled_from([1, 4, 20]))
  ids = rng.integers(0, groups, count).astype(np.int32)
  # Few distinct rewards: many groups are constant; large offsets: cancellation shows.
  rewards = rng.integers(0, 3, count) * 0.25 + data.draw(st.sampled_from([0.0, -1.0, 1000.0]))
  valid = rng.random(count) < data.draw(st.sampled_from([0.5, 1.0]))
  with jax.enable_x64(True):
    got, _ = jitted(rewards, ids, valid, 20, std=std, std_threshold=threshold)
    assert got.dtype == jnp.float64
  np.testing.assert_allclose(
    got, numpy_grpo(rewards, ids, valid, std=std, threshold=threshold), atol=1e-11
  )


def test_group_statistics():
  got = group_statistics(
    jnp.array([1.0, 3.0, 8.0]), jnp.array([0, 0, 2]), jnp.ones(3, bool), 4
  )
  np.testing.assert_array_equal(got.count, [2, 0, 1, 0])
  np.testing.assert_allclose(got.mean, [2, 0, 8, 0])
  np.testing.assert_allclose(got.std, [np.sqrt(2), 0, 0, 0], rtol=1e-6)
  np.testing.assert_array_equal(got.constant, [False] * 4)


def test_vmap():
  rng = np.random.default_rng(0)
  rewards, ids = rng.random((3, 8)), rng.integers(0, 3, (3, 8))
  valid = rng.random((3, 8)) < 0.7
  got = jax.jit(jax.vmap(lambda r, i, v: grpo(r, i, v, 3)[0]))(rewards, ids, valid)
  for i in range(3):
    np.testing.assert_allclose(got[i], numpy_grpo(rewards[i], ids[i], valid[i]), atol=2e-5)


def test_notebook_form():
  mask = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], bool)
  rewards = np.array([1.0, 0.0, 1.0, 3.0])
  ids = np.array([70, 70, -5, -5])  # any integers
  got = algorithms.advantage("grpo")(rewards=rewards, group_ids=ids, mask=mask)
  # +-0.5 / (0.707107 + 1e-6) = 0.707106; (3 - 2) / (1.414214 + 1e-6) = 0.707106.
  np.testing.assert_allclose(
    got, np.array([[0.707106], [-0.707106], [0], [0.707106]]) * mask, atol=1e-6
  )
  jit = jax.jit(functools.partial(algorithms.advantage("grpo", std=False), mask=mask))
  np.testing.assert_allclose(
    jit(rewards=rewards, group_ids=ids), np.array([[0.5], [-0.5], [-1], [1]]) * mask
  )
  # Without row 3, row 2 is alone in its group and keeps its reward; its tokens are masked.
  part = algorithms.advantage("grpo")(
    rewards=rewards, group_ids=ids, mask=np.ones((4, 3), bool), valid=np.array([1, 1, 1, 0])
  )
  np.testing.assert_allclose(part[:, 0], [0.707106, -0.707106, 1, 0], atol=2e-6)


def test_constant_and_to_tokens():
  np.testing.assert_array_equal(constant(jnp.array([True, False]))[0], [1, 0])
  mask = jnp.array([[False, True, True, True], [False, True, False, False]])
  index = jnp.array([[99, 0, 0, 2], [-1, 1, -1, -1]])  # read only under the mask
  got = to_tokens(jnp.array([1.0, 2.0, 3.0]), mask, index)
  np.testing.assert_array_equal(got, [[0, 1, 1, 3], [0, 2, 0, 0]])
  per_token = jnp.where(mask, 7.0, jnp.nan)
  np.testing.assert_array_equal(to_tokens(per_token, mask, index), mask * 7)


def test_errors():
  with pytest.raises(UserError, match="advantage 'grp' does not exist; did you mean 'grpo'"):
    algorithms.advantage("grp")
  with pytest.raises(UserError, match="no option 'epsilon'"):
    algorithms.advantage("grpo", epsilon=1)
  with pytest.raises(UserError, match="reads group_ids, which was not given"):
    algorithms.advantage("grpo")(rewards=np.ones(2), mask=np.ones((2, 3), bool))
