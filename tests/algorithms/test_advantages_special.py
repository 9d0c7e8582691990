"""What is particular to one advantage: random drops, anchors, exact gradients, limits, errors."""

from __future__ import annotations

import functools

import algorithm_steps as steps
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_jax import algorithms
from trinity_jax.algorithms import stats
from trinity_jax.algorithms.advantages import (
  ADVANTAGES,
  clipv,
  gae,
  gigpo,
  grpo,
  jsd,
  opmd,
  rec,
  rloo,
)
from trinity_jax.algorithms.advantages.common import classes, ranks
from trinity_jax.algorithms.parts import resolve
from trinity_jax.errors import UserError


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.data())
def test_rec_balance(data):
  rng = np.random.default_rng(data.draw(st.integers(0, 9999)))
  rewards = rng.integers(0, 4, 20) / 4
  ids, valid = rng.integers(0, data.draw(st.sampled_from([1, 3, 20])), 20), rng.random(20) < 0.8
  f = jax.jit(rec, static_argnames=("num_groups", "drop"))
  with jax.enable_x64(True):
    got, out = f(rewards, ids, valid, 20, jax.random.key(int(rng.integers(99))), drop="balance")
    share = float(stats.finish(out)["dropped"])
  got, dropped = np.asarray(got), 0
  for g in set(ids[valid]):
    members = np.flatnonzero(valid & (ids == g))
    r, a = rewards[members], got[members]
    if len(r) == 1:
      np.testing.assert_allclose(a, r)
      continue
    below = r < r.mean()
    extra = max(int(below.sum() - (~below).sum()), 0)
    dropped += extra
    if extra == 0:
      np.testing.assert_allclose(a, r - r.mean(), atol=1e-12)
    else:
      mean = (r - a)[~below][0]  # that of the kept: nobody above is dropped
      kept = np.isclose(a, r - mean, atol=1e-12)
      assert kept[~below].all() and (a[~kept] == 0).all()
      # A dropped one whose reward happens to be the mean looks kept.
      assert (below & ~kept).sum() == extra or (r[below] == mean).any()
  np.testing.assert_allclose(share, dropped / max(valid.sum(), 1), rtol=1e-12)


def test_rec_balance_is_random_and_fair():
  # One success, three failures: two failures are dropped, each equally often.
  rewards, one = jnp.array([1.0, 0, 0, 0]), jnp.ones(4, bool)
  f = jax.jit(jax.vmap(lambda k: rec(rewards, jnp.zeros(4, int), one, 1, k, drop="balance")[0]))
  got = np.asarray(f(jax.random.split(jax.random.key(0), 3000)))
  np.testing.assert_allclose(got[:, 0], 0.5)
  np.testing.assert_allclose(got[:, 1:].sum(axis=1), -0.5)
  # 1000 +- 26 each (standard deviation of a binomial of 3000 at 1/3); 5 of them.
  assert (abs((got[:, 1:] < 0).sum(axis=0) - 1000) < 130).all()
  with pytest.raises(UserError, match="reads key, which was not given"):
    rec(rewards, jnp.zeros(4, int), one, 1, drop="balance")
  alone, _ = rec(jnp.array([2.0]), jnp.zeros(1, int), jnp.ones(1, bool), 1, std=True)
  np.testing.assert_allclose(alone, [2 / (1 + 1e-6)])


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.3, 0.5, 0.99, 1.0])
def test_jsd_is_the_gradient_of_the_divergence(beta):
  """-E_student[A grad log p] against the exact gradient over a vocabulary of 7."""
  rng = np.random.default_rng(3)
  logits, teacher = rng.normal(size=7) * 2, rng.normal(size=7) * 2

  def divergence(logits):
    s, t = jax.nn.log_softmax(logits), jax.nn.log_softmax(teacher)
    kl = lambda p, q: jnp.sum(jnp.exp(p) * (p - q))
    if beta in (0, 1):
      return kl(t, s) if beta == 0 else kl(s, t)
    m = jnp.log(beta * jnp.exp(t) + (1 - beta) * jnp.exp(s))
    return beta * kl(t, m) + (1 - beta) * kl(s, m)

  def surrogate(logits):
    s, t = jax.nn.log_softmax(logits), jax.nn.log_softmax(teacher)
    old = jax.lax.stop_gradient(s)
    a, _ = jsd(old, t, jnp.ones(7, bool), beta=beta)
    return -jnp.sum(jnp.exp(old) * a * s)

  with jax.enable_x64(True):
    exact, ours = jax.grad(divergence)(logits), jax.grad(surrogate)(logits)
  np.testing.assert_allclose(ours, exact, rtol=1e-9, atol=1e-12)


def test_jsd_limits_are_continuous_and_extreme_ratios_finite():
  s, t = jnp.array([-1.0, -3.0, -2.0]), jnp.array([-2.0, -0.5, -2.0])
  every = jnp.ones(3, bool)
  with jax.enable_x64(True):
    a = lambda beta: np.asarray(jsd(s.astype(float), t.astype(float), every, beta=beta)[0])
    np.testing.assert_allclose(a(1e-6) / 1e-6, a(0.0), rtol=1e-4)
    np.testing.assert_allclose(a(1 - 1e-6) / 1e-6, a(1.0), rtol=1e-4, atol=1e-9)
  for beta in (0.0, 0.5, 1.0):
    for variant in ("gradient", "trinity"):
      far, _ = jsd(jnp.array([-1e3, 0.0]), jnp.array([0.0, -1e3]), every[:2], beta=beta,
                   variant=variant)  # fmt: skip
      assert np.isfinite(far).all()


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.data())
def test_group_baselines_are_shift_invariant_and_centred(data):
  """grpo, rloo and opmd: adding a constant to a group's rewards changes nothing, sums are 0."""
  rng = np.random.default_rng(data.draw(st.integers(0, 9999)))
  rewards, shift = rng.normal(size=16), rng.normal(size=16)
  ids = rng.integers(0, data.draw(st.sampled_from([1, 3, 16])), 16)
  valid = rng.random(16) < data.draw(st.sampled_from([0.5, 1.0]))
  many = np.array([valid[ids == g].sum() > 1 for g in ids]) & valid
  with jax.enable_x64(True):
    for f in _baselines():
      a, b = f(rewards, ids, valid), f(rewards + shift[ids], ids, valid)
      np.testing.assert_allclose(np.where(many, a, 0), np.where(many, b, 0), atol=1e-9)
      np.testing.assert_allclose(np.asarray(a)[many].sum(), 0, atol=1e-9)
      assert (np.asarray(a)[~valid] == 0).all()


@functools.cache
def _baselines():
  return [jax.jit(lambda r, i, v, f=f: f(r, i, v, 16)[0]) for f in (grpo, rloo, opmd)]


def test_opmd_logavgexp_is_stable():
  rewards = jnp.array([1000.0, 0.0, 500.0, 500.0])
  got, _ = opmd(
    rewards, jnp.array([0, 0, 1, 1]), jnp.ones(4, bool), 3, baseline="logavgexp", tau=0.5
  )
  # tau log((e^2000 + 1) / 2) = 1000 - 0.5 ln 2
  half = 0.5 * np.log(2)
  np.testing.assert_allclose(got, [half, -1000 + half, 0, 0], rtol=1e-6)


def test_duplicate_experiences_keeps_the_weight():
  # Groups 0 and 1 have signal (4 sequences), group 2 has none (2), one row is not valid.
  rewards = jnp.array([1.0, 0, 2, 0, 1, 1, 9])
  ids, valid = jnp.array([0, 0, 1, 1, 2, 2, 0]), jnp.array([1, 1, 1, 1, 1, 1, 0], bool)
  f = jax.jit(grpo, static_argnames=("num_groups", "duplicate_experiences"))
  plain, _ = f(rewards, ids, valid, 3)
  got, _ = f(rewards, ids, valid, 3, duplicate_experiences=True)
  np.testing.assert_allclose(got, plain * 6 / 4, rtol=1e-6)
  # The mean over a batch of 6 that Polaris fills with copies, in expectation: the mean over the 4.
  weight = np.array([1, 2, 3, 4, 0, 0, 0])
  np.testing.assert_allclose((got * weight).sum() / 6, (plain * weight)[:4].sum() / 4, rtol=1e-6)
  nothing, _ = f(jnp.ones(7), ids, valid, 3, duplicate_experiences=True)
  np.testing.assert_array_equal(nothing, np.zeros(7))


def test_gigpo_by_hand_and_tasks_are_never_mixed():
  # Two tasks with the same states; task 0: runs 0 and 1, two turns each, task 1 likewise.
  ids = jnp.array([0, 0, 0, 0, 1, 1, 1, 1])
  runs, turn = jnp.array([0, 0, 1, 1, 0, 0, 1, 1]), jnp.array([0, 1] * 4)
  state = jnp.array([5, 6, 5, 7, 5, 6, 5, -1])
  rewards = jnp.array([0.0, 1, 0, 0, 0, 4, 2, 0])
  args = (ids, runs, turn, state, jnp.ones(8, bool), 2)
  f = jax.jit(lambda r: gigpo(r, *args, gamma=0.5, omega=1.0))
  got, out = f(rewards)
  # Episodes: 1 and 0 in task 0 (+-0.5), 4 and 2 in task 1 (+-1). Returns in state 5: task 0
  # 0.5 and 0 (+-0.25), task 1 2 and 2 (0). States 6, 7 are met once per task, -1 is unknown.
  np.testing.assert_allclose(got, [0.75, 0.5, -0.75, -0.5, 1, 1, -1, -1], atol=1e-6)
  np.testing.assert_allclose(stats.finish(out)["anchored"], 0.5)
  # Task 1's rewards change nothing in task 0.
  other, _ = f(rewards.at[5].set(-7.0))
  np.testing.assert_array_equal(other[:4], got[:4])


def test_step_wise_counts_runs_not_turns():
  # Run 0 has three turns and reward 1, run 1 one turn and reward 0; turns in any order.
  score = functools.partial(
    algorithms.advantage("step_wise_grpo", std=False), mask=np.ones((4, 1), bool)
  )
  got = jax.jit(score)( rewards=np.array([1.0, 0.0, 0.3, 0.7]),
    group_ids=np.zeros(4, int), run_ids=np.array([0, 1, 0, 0]), step_ids=np.array([9, 0, 0, 4]),
  )  # fmt: skip
  np.testing.assert_allclose(got[:, 0], [0.5, -0.5, 0.5, 0.5])


def test_clipv_drops_at_most_max_frac_and_no_zero_advantage():
  rng = np.random.default_rng(0)
  mask = np.ones((6, 50), bool)
  index = np.broadcast_to(np.arange(6)[:, None], (6, 50))
  # Group 2 has equal rewards: A = 0 there.
  rewards, ids = np.array([1.0, 0, 1, 0, 1, 1]), np.array([0, 0, 1, 1, 2, 2])
  f = jax.jit(clipv, static_argnames=("num_groups", "mu", "max_frac"))
  for frac, most in ((1e-4, 1), (0.02, 6), (1.0, 300)):
    a, out = f(
      rewards, ids, np.ones(6, bool), 3, -rng.exponential(size=mask.shape),
      rng.exponential(size=mask.shape), rng.normal(size=mask.shape), mask, index,
      mu=0.01, max_frac=frac,
    )  # fmt: skip
    plain, _ = grpo(rewards, ids, jnp.ones(6, bool), 3)
    changed = np.asarray(a) != np.broadcast_to(np.asarray(plain)[:, None], mask.shape)
    assert 0 < changed.sum() <= most and not changed[[0, 2, 4, 5]].any()
    np.testing.assert_allclose(stats.finish(out)["entropy_clip/dropped"], changed.mean(), rtol=1e-6)


def test_ranks_and_classes():
  got = ranks(jnp.array([1, 0, 1, 1, 0]), jnp.array([3.0, 5.0, 1.0, 3.0, 2.0]))
  np.testing.assert_array_equal(got, [1, 1, 0, 1, 0])
  valid = jnp.array([True, True, False, True, True])
  got = np.asarray(classes(valid, jnp.array([1, 0, 1, 1, 0]), jnp.array([2, 2, 2, 2, 9])))
  assert got[0] == got[3] and len({got[0], got[1], got[4]}) == 3 and got[2] == 5
  assert set(got[[0, 1, 3, 4]]) == {0, 1, 2}


@pytest.mark.parametrize(
  "name, options, message",
  [
    ("grpo", {"std_level": "task"}, "std_level = 'task': expected one of group, batch"),
    ("grpo", {"rank_penalty": 1.5}, "rank_penalty = 1.5"),
    ("grpo", {"rank_penalty": 0.5}, "reads old_logprob"),
    ("opmd", {"baseline": "median"}, "expected one of mean, logavgexp"),
    ("opmd", {"tau": 0.0}, "tau = 0.0"),
    ("rec", {"drop": "all"}, "expected one of none, balance"),
    ("gae", {"gamma": 1.1}, "gamma = 1.1"),
    ("gae", {"lam": -0.1}, "lam = -0.1"),
    ("jsd", {"beta": 2.0}, "beta = 2.0"),
    ("jsd", {"variant": "other"}, "expected one of gradient, trinity"),
    ("gigpo", {"norm": "mean"}, "expected one of none, std"),
    ("clipv", {"max_frac": -1.0}, "max_frac = -1.0"),
    ("gae", {"lambda": 1.0}, "no option 'lambda'"),
  ],
)
def test_errors(name, options, message):
  n = np.zeros(2, int)
  token = dict.fromkeys(
    ("token_rewards", "values", "teacher_logprob", "prox_logprob", "prox_entropy",
     "expected_score"), np.zeros((2, 3)),
  )  # fmt: skip
  if "rank_penalty" not in options:
    token["old_logprob"] = np.zeros((2, 3))
  with pytest.raises(UserError, match=message):
    algorithms.advantage(name, **options)(
      rewards=np.zeros(2), group_ids=n, run_ids=n, step_ids=n, state_ids=n,
      step_rewards=np.zeros(2), mask=np.ones((2, 3), bool), **token,
    )  # fmt: skip


def test_traced_options():
  """Hyper-parameters may be traced: a sweep over lam is one vmap."""
  rng = np.random.default_rng(0)
  r, v, mask = rng.normal(size=(2, 5)), rng.normal(size=(2, 5)), np.ones((2, 5), bool)
  index = np.broadcast_to(np.arange(2)[:, None], (2, 5))
  f = lambda lam: gae(r, v, mask, index, lam=lam, whitening=False)[0]
  got = jax.jit(jax.vmap(f))(jnp.array([0.5, 0.9]))
  np.testing.assert_allclose(got[1], jax.jit(f, static_argnums=0)(0.9), rtol=1e-6)


def test_rows_over_devices_give_what_one_device_gives():
  """Rows spread over devices, as in the trainer: whole-step statistics cross them."""
  step = steps.random_step(5)
  tokens, _ = steps.packed(step)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data", None))
  for name in ("gae", "clipv"):
    part = resolve("advantage", name, ADVANTAGES, {"mu": 0.3} if name == "clipv" else {})
    f = jax.jit(lambda t, part=part: part(**step.sequences, **t, num_groups=6, num_sequences=14)[0])
    with jax.enable_x64(True):
      here = f(tokens)
      there = f(jax.device_put(tokens, place))
      np.testing.assert_allclose(there, here, rtol=1e-12, atol=1e-12)
