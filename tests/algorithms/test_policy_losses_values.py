"""Policy losses by hand: numbers worked out on paper, ties, selections, pairs, options, errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from loss_cases import CASES, jit, part_of

from trinity_jax import algorithms
from trinity_jax.algorithms import policy_losses as losses
from trinity_jax.algorithms import stats
from trinity_jax.algorithms.parts import resolve
from trinity_jax.algorithms.policy_losses import selective
from trinity_jax.algorithms.policy_losses.preference import find_pairs
from trinity_jax.errors import UserError


def of_ratios(f, ratio, advantages, old=0.5, sequence_index=None, **static):
  """(loss, gradient in logprob, stats) of tokens with the given ratios, in float64."""
  given = {} if sequence_index is None else {"sequence_index": sequence_index}
  mask = np.ones(np.shape(ratio), bool)

  @jit
  def compute(x, old, a):
    call = lambda x: f(logprob=x, old_logprob=old, advantages=a, mask=mask, **given, **static)
    loss, vjp, out = jax.vjp(call, x, has_aux=True)
    return loss, vjp(jnp.ones_like(loss))[0], stats.finish(out)

  old = np.log(np.broadcast_to(old, np.shape(ratio)))
  with jax.enable_x64(True):
    return jax.tree.map(np.asarray, compute(old + np.log(ratio), old, np.asarray(advantages)))


def close(got, expected, rtol=1e-9, atol=1e-12):
  np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


# Two sequences of two tokens: ratios (2, 1/2) and (4, 1).
TWO = dict(sequence_index=np.array([[0, 0], [1, 1]]), num_sequences=2)
R2, A2 = [[2.0, 0.5], [4.0, 1.0]], [[1.0, 1.0], [-1.0, -1.0]]


def test_gspo():
  # Geometric means 1 and 2. A = 1, s = 1: loss -1, gradient -1 to each token (two halves).
  # A = -1, s = 2: above 1 + .0004 with A < 0 is not clipped: loss 2.
  loss, grad, out = of_ratios(losses.gspo, R2, A2, old=0.1, **TWO)
  close(loss, [[-1, -1], [2, 2]])
  close(grad, [[-1, -1], [2, 2]])
  close(out["sequence_ratio/max"], 2)
  # With A = 1 the second is clipped: no gradient.
  loss, grad, out = of_ratios(losses.gspo, R2, np.abs(A2), old=0.1, **TWO)
  close(loss, [[-1, -1], [-1.0004, -1.0004]])
  close(grad, [[-1, -1], [0, 0]])
  close(out["pg_clipfrac_high"], 0.5)


def test_gspo_token_differs_from_gspo_only_in_where_a_gradient_goes():
  a = [[1.0, 3.0], [-1.0, -1.0]]
  wide = dict(clip_low=0.9, clip_high=9.0)
  one = of_ratios(functools.partial(losses.gspo, **wide), R2, a, old=0.1, **TWO)
  two = of_ratios(functools.partial(losses.gspo_token, **wide), R2, a, old=0.1, **TWO)
  close(one[0], two[0])
  close(one[1], [[-2, -2], [2, 2]])  # the sequence's mean advantage reaches every token
  close(two[1], [[-1, -3], [2, 2]])


def test_gmpo():
  # clip .4: A > 0: min(ln 2, .4), ln 1/2 -> mean (.4 - .6931) / 2; A < 0: ln 4, 0 -> mean ln 2.
  loss, grad, out = of_ratios(losses.gmpo, R2, A2, old=0.1, **TWO)
  s = np.exp((0.4 - np.log(2)) / 2)
  close(loss, [[-s, -s], [2, 2]])
  close(grad, [[0, -s], [2, 2]])  # each token's share is s/2, from two tokens
  close(out["pg_clipfrac"], 1 / 4)


def test_sapo():
  # r = 1: sigmoid(0) = 1/2: loss -2/tau A, slope 1. The released variant's weight there is 2/tau.
  loss, grad, out = of_ratios(losses.sapo, [1.0, 1.0], [1.0, -1.0])
  close(loss, [-2, 2 / 1.05])
  close(grad, [-1, 1])
  close(out["sapo/slope"], 1)
  _, grad, _ = of_ratios(functools.partial(losses.sapo, variant="trinity"), [1.0, 1.0], [1.0, -1.0])
  close(grad, [-2, 2 / 1.05])
  # r = 3, tau = 1: sigmoid(2) = 0.880797; 3 x 4 x 0.880797 x 0.119203 = 1.259923.
  _, grad, _ = of_ratios(losses.sapo, [3.0], [1.0], old=0.1)
  close(grad, [-1.259923], rtol=1e-5)


def test_cispo():
  # Weights clip(r, 0, 1.28): 1/2 and 1.28; loss -w A log p with p = .05 and .2.
  loss, grad, out = of_ratios(losses.cispo, [0.5, 2.0], [1.0, -1.0], old=0.1)
  close(loss, [-0.5 * np.log(0.05), 1.28 * np.log(0.2)])
  close(grad, [-0.5, 1.28])
  close(out["pg_clipfrac"], 1 / 2)
  f = functools.partial(losses.cispo, mask_low=0.2, mask_high=0.2)
  _, grad, out = of_ratios(f, [0.5, 2.0, 0.5, 2.0], [1.0, 1.0, -1.0, -1.0], old=0.1)
  close(grad, [-0.5, 0, 0, 1.28])  # left: what still has to come back into the range
  close(out["pg_masked"], 0.5)


def test_topr():
  # Sequence ratios 2 x 1/2 = 1 and 4 x 1 -> 1; then 1/2 x 1/2 = 1/4 for bad, 1 for good ones.
  _, grad, _ = of_ratios(losses.topr, R2, A2, old=0.1, **TWO)
  close(grad, [[-1, -1], [1, 1]])
  half = [[0.5, 0.5], [0.5, 0.5]]
  loss, grad, out = of_ratios(losses.topr, half, A2, **TWO)
  close(grad, [[-1, -1], [0.25, 0.25]])
  close(loss, [[np.log(4)] * 2, [-0.25 * np.log(4)] * 2])
  close(out["topr/weight"], 0.25)
  _, grad, _ = of_ratios(losses.topr_token, half, A2)  # as released: the token's own ratio
  close(grad, [[-1, -1], [0.5, 0.5]])


def test_plain_gradients():
  loss, grad, _ = of_ratios(lambda old_logprob, **k: losses.reinforce(**k), [0.5, 2.0], [1.0, -3.0])
  close(loss, [np.log(4), 0])
  close(grad, [-1, 3])
  loss, grad, _ = of_ratios(
    lambda old_logprob, **k: losses.opmd(**k, tau=3.0), [0.5, 2.0], [1.0, -3.0]
  )
  close(grad, [-0.25, 0.75])
  loss, grad, _ = of_ratios(losses.importance_sampling, [0.5, 2.0], [1.0, -3.0])
  close(loss, [-0.5, 6])
  close(grad, [-0.5, 6])


def test_sppo():
  # eps .3: [1/1.3, 1.3] = [.769, 1.3].
  loss, grad, out = of_ratios(losses.sppo, [0.8, 1.25, 0.76, 1.31], [1.0, -1.0, 1.0, -1.0])
  close(loss, [-np.log(0.8), np.log(1.25), 0, 0])
  close(grad, [-1, 1, 0, 0])
  close(out["pg_clipfrac"], 0.5)


def test_dppo():
  # q = .5: p = .7, .6, .3, .4: |p - q| = .2, .1, .2, .1 against .15. q = .001, r = 10: .009 is
  # little, though a ratio clip would cut it.
  r, a = [1.4, 1.2, 0.6, 0.8], [1.0, 1.0, -1.0, -1.0]
  loss, grad, out = of_ratios(losses.dppo_tv, r, a)
  close(loss, [0, -1.2, 0, 0.8])
  close(grad, [0, -1.2, 0, 0.8])
  close(out["dppo/masked_high"], 0.25)
  _, grad, _ = of_ratios(losses.dppo_tv, r, -np.array(a))
  close(grad, [1.4, 1.2, -0.6, -0.8])  # towards where it came from: never masked
  _, grad, _ = of_ratios(losses.dppo_tv, [10.0], [1.0], old=0.001)
  close(grad, [-10])
  # KL(.5 || .7) = .5 ln(.5/.7) + .5 ln(.5/.3) = .08718; KL(.5 || .6) = .02041; against .05.
  _, grad, _ = of_ratios(losses.dppo_kl, r, a)
  close(grad, [0, -1.2, 0, 0.8])
  with jax.enable_x64(True):
    p, q = jnp.log(jnp.array([0.7, 0.6, 0.5, 1.0, 1.0])), jnp.log(jnp.array([0.5] * 3 + [1, 0.9]))
    close(losses.gradient.binary_kl(p, q)[:4], [0.0871767, 0.0204110, 0, 0], rtol=1e-5)
    assert losses.gradient.binary_kl(p, q)[4] > 50  # 0.1 of probability where none is left
  _, grad, _ = of_ratios(functools.partial(losses.dppo_tv, truncate=1.1), [1.2, 1.05], [1.0, 1.0])
  close(grad, [-1.1, -1.05])


def test_supervised():
  # p = .5 and .25.
  x, mask = jnp.log(jnp.array([[0.5, 0.25]])), jnp.ones((1, 2), bool)

  def grads(f):
    return jax.grad(lambda x: jnp.sum(f(x, mask)[0]))(x)

  close(losses.sft_is(x, mask)[0], [[0.5 * np.log(2), 0.25 * np.log(4)]], rtol=1e-6)
  close(grads(losses.sft_is), [[-0.5, -0.25]], rtol=1e-6)
  close(losses.sft_phi(x, mask)[0], [[0.25 * np.log(2), 3 / 16 * np.log(4)]], rtol=1e-6)
  close(grads(losses.sft_phi), [[-0.25, -3 / 16]], rtol=1e-6)
  cut = lambda x, m: losses.sft_phi(x, m, cutoff=0.3)
  close(cut(x, mask)[0], [[-0.25 * np.log(0.3), 3 / 16 * np.log(4)]], rtol=1e-6)
  close(grads(cut), [[0, -3 / 16]], rtol=1e-6)


@pytest.mark.parametrize("f", [losses.mix, losses.chord])
def test_experts(f):
  expert = jnp.array([[True, False, True, False]])
  x = jnp.log(jnp.array([[0.5, 0.5, 0.25, jnp.nan]]))
  old = jnp.array([[jnp.nan, jnp.log(0.25), jnp.nan, 0.0]])  # nobody knows an expert's log-probs
  a = jnp.array([[jnp.nan, -1.0, jnp.inf, 1.0]])
  mask = jnp.array([[True, True, True, False]])
  (loss, out), vjp = jax.vjp(lambda x: f(x, old, a, mask, expert), x)
  grad = vjp((jnp.ones_like(loss), jax.tree.map(jnp.zeros_like, out)))[0]
  weights = (1, 1) if f is losses.mix else (0.25, 3 / 16)
  close(loss, [[weights[0] * np.log(2), 2, weights[1] * np.log(4), 0]], rtol=1e-6)
  close(grad, [[-weights[0], 2, -weights[1], 0]], rtol=1e-6)
  out = stats.finish(out)
  close(out["expert/tokens"], 2 / 3, rtol=1e-6)
  close(out["expert/nll"], np.log(8) / 2, rtol=1e-6)
  close(out["ratio/mean"], 2, rtol=1e-6)


def test_sequence_masking():
  # mean(-log r) of the sequences: ln 2 > .1 and -ln 2. Only the first has left, and only bad
  # advantages are dropped.
  r, a = [[0.5, 0.5], [2.0, 2.0]], [[-1.0, 1.0], [-1.0, -1.0]]
  loss, grad, out = of_ratios(losses.ppo_sequence_mask, r, a, old=0.4, **TWO)
  plain, plain_grad, _ = of_ratios(losses.ppo, r, a, old=0.4)
  close(plain, [[0.8, -0.5], [2, 2]])
  close(loss, [[0, -0.5], [2, 2]])
  close(grad, plain_grad * np.array([[0, 1], [1, 1]]))
  close(out["pg_sequence_masked"], 1 / 4)


def test_ppo_falls_back_to_the_policy_gradient():
  f = functools.partial(losses.ppo, fallback_to_policy_gradient=True)
  loss, grad, out = of_ratios(f, [0.1, 2.0], [1.0, -1.0])
  close(loss, [-1, 1])
  close(grad, [-1, 1])
  assert out["pg_clipfrac"] == 0
  close(out["ratio/max"], 2)  # metrics still tell how far the data is


@pytest.mark.parametrize("a", [1.0, -1.0])
@pytest.mark.parametrize("high", [True, False])
def test_ties_follow_torch(a, high):
  # A log ratio exactly at a bound. exp of it is the same number in jax and torch for one of these.
  with jax.enable_x64(True):
    for x in (0.25 if high else -0.5) + np.arange(64) / 256:
      r = float(jax.jit(jnp.exp)(jnp.float64(x)))
      if r == torch.exp(torch.tensor(x)).item() and 1 + (r - 1) == r == 1 - (1 - r):
        break
    else:
      raise AssertionError("no tie found")
    bounds = {"clip_high": r - 1} if high else {"clip_low": 1 - r}
    arrays = (jnp.array([[x]]), jnp.zeros((1, 1)), jnp.array([[a]]), jnp.ones((1, 1), bool))
    one = (jnp.zeros((1, 1), jnp.int32), 1)
    inside = {
      "gspo": lambda y: losses.gspo(y, *arrays[1:], *one, **bounds),
      "gspo-token": lambda y: losses.gspo_token(y, *arrays[1:], *one, **bounds),
      "clip-cov": lambda y: losses.clip_cov(y, *arrays[1:], jnp.zeros((1, 1), bool), **bounds),
    }
    for name, f in inside.items():
      grad = jax.grad(lambda y, f=f: f(y)[0].sum())(arrays[0])
      # torch.clamp passes all of it, jnp.clip half.
      np.testing.assert_allclose(grad, -a * r, rtol=1e-12, err_msg=name)
    bound = {"clip_high" if high else "clip_low": abs(x)}
    grad = jax.grad(lambda y: losses.gmpo(y, *arrays[1:], *one, **bound)[0].sum())(arrays[0])
    close(grad, -a * r)


def test_m2po_keeps_the_largest_set_within_the_second_moment():
  # Squares of the candidates: .01, .04, .09, .16; their means .01, .025, .0467, .075.
  moved = jnp.array([[0.1, 0.2, 0.3, 0.4, -0.5, 0.6]])
  a = jnp.array([[1.0, 1.0, 1.0, 1.0, 1.0, -1.0]])  # the last two come back: no candidates
  old, mask = jnp.full((1, 6), -2.0), jnp.ones((1, 6), bool)

  keep = jit(lambda tau, moved: selective.m2po_keep(old + moved, old, a, mask, tau=tau))

  def kept(tau, moved=moved):
    return keep(tau, moved)[0].tolist()

  assert kept(0.04) == [True, True, False, False, True, True]
  assert kept(0.05) == [True, True, True, False, True, True]
  assert kept(1.0) == [True] * 6
  assert kept(0.0) == [False] * 4 + [True] * 2
  # Equal ones stand or fall together: .01, .04, .04: mean of all three .03.
  tied = jnp.array([[0.1, 0.25, 0.25, 4.0, 0.0, 0.0]])
  assert kept(0.0375, tied) == [True, False, False, False, True, True]
  assert kept(0.0475, tied) == [True, True, True, False, True, True]


def test_kl_cov_selects_the_share_with_the_largest_covariance():
  logprob = jnp.array([[-1.0, -2.0, -3.0, -4.0, -5.0, 7e7]])
  a = jnp.array([[1.0, 0.5, 0.0, 0.0, 0.0, 9e9]])
  mask = jnp.array([[True] * 5 + [False]])
  index = jnp.zeros((1, 6), jnp.int32)
  # Means -3 and .3: covariances 1.4, .2, 0, .3, .6.
  close(selective.covariance(logprob, a, mask), [[1.4, 0.2, 0, 0.3, 0.6, 0]], atol=1e-6)
  select = jit(lambda ratio: selective.kl_cov_select(logprob, a, mask, index, 1, cov_ratio=ratio))
  for ratio, expected in [(2e-4, [0]), (0.4, [0, 4]), (0.79, [0, 3, 4]), (1.0, [0, 1, 2, 3, 4])]:
    got = select(ratio)
    assert np.flatnonzero(got).tolist() == expected
  # All equal: still the share, not all of them; the first in the sequences' order.
  ones = jnp.ones((3, 4))
  places = jnp.broadcast_to(jnp.array([[2], [0], [1]]), (3, 4))
  got = jit(lambda x: selective.kl_cov_select(x, x, x > 0, places, 3, cov_ratio=0.5))(ones)
  assert got.tolist() == [[False] * 4, [True] * 4, [True, True, False, False]]


def test_clip_cov_draws_its_share_from_the_band():
  rng = np.random.default_rng(0)
  shape = (20, 50)
  logprob, a = -rng.exponential(size=shape), rng.normal(size=shape)
  mask = rng.random(shape) < 0.9
  index = np.broadcast_to(np.arange(20)[:, None], shape)
  cov = np.asarray(selective.covariance(logprob, a, mask))
  band = mask & (cov > 0.5) & (cov < 3)

  @jax.jit
  def draw(key, old, ratio):
    return selective.clip_cov_select(
      logprob, old, a, mask, index, 20, key, cov_low=0.5, cov_high=3.0, cov_ratio=ratio
    )

  count = int(0.02 * mask.sum())
  drawn = np.stack([draw(jax.random.key(i), logprob, 0.02) for i in range(200)])
  assert np.all(drawn.sum((1, 2)) == count) and not np.any(drawn & ~band)
  # Every token of the band is equally likely: 200 x count / size, give or take 5 deviations.
  often, p = drawn.sum(0)[band], count / band.sum()
  assert np.all(np.abs(often - 200 * p) < 5 * np.sqrt(200 * p * (1 - p)))
  assert np.array_equal(drawn[0], draw(jax.random.key(0), logprob, 0.02))
  assert draw(jax.random.key(0), logprob, 1e-9).sum() == 1  # at least one
  assert np.array_equal(draw(jax.random.key(1), logprob, 1.0), band)  # no more than there are
  # What the clip range cuts anyway is not drawn: r = e^9 with A > 0.
  got = draw(jax.random.key(1), logprob - 9, 1.0)
  assert np.array_equal(got, band & (a < 0)) and got.any()


def dpo_arrays(gains, rewards, pair_ids):
  """One token per sequence, its logprob above the reference's by the gain."""
  n = len(gains)
  return np.asarray(gains, np.float32)[:, None] - 9, dict(
    ref_logprob=np.full((n, 1), -9, np.float32), mask=np.ones((n, 1), bool),
    rewards=np.asarray(rewards, np.float32), pair_ids=np.asarray(pair_ids, np.int32),
    sequence_index=np.arange(n, dtype=np.int32)[:, None], num_sequences=n,
  )  # fmt: skip


def test_dpo():
  # Pairs (0, 3) with 3 chosen: d = 1 - 4 = -3; (1, 2) with 1 chosen: d = 2 - 0 = 2. beta = .1.
  x, arrays = dpo_arrays([4.0, 2.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.5], [7, 5, 5, 7])

  @jit
  def compute(x):
    loss, vjp, out = jax.vjp(lambda x: losses.dpo(x, **arrays), x, has_aux=True)
    return loss, vjp(jnp.full((4, 1), 0.25))[0], stats.finish(out)  # the gradient of the mean

  loss, grad, out = compute(x)
  a, b = np.log1p(np.exp(0.3)), np.log1p(np.exp(-0.2))
  close(loss[:, 0], [a, b, b, a], rtol=1e-6)
  # -beta sigmoid(-beta d), half of it: the mean over two pairs.
  ga, gb = (0.05 / (1 + np.exp(0.1 * d)) for d in (-3, 2))
  close(grad[:, 0], [ga, -gb, gb, -ga], rtol=1e-5)
  close(
    [out[f"dpo/{k}"] for k in ("accuracy", "margin", "chosen", "rejected", "pairs", "unpaired")],
    [0.5, -0.05, 0.15, 0.2, 2, 0], rtol=1e-5, atol=1e-7,
  )  # fmt: skip


def test_dpo_with_the_likelihood_of_the_chosen():
  # d = 2 - 0; the chosen response's one token has log p = 2 - 9 = -7: 0.5 x 7 more for the pair.
  x, arrays = dpo_arrays([2.0, 0.0], [1.0, 0.0], [3, 3])
  total = lambda x, coef: losses.dpo(x, **arrays, nll_coef=coef)[0].mean()
  (plain, before), (loss, grad) = (
    jax.value_and_grad(total)(jnp.asarray(x), coef) for coef in (0.0, 0.5)
  )
  close(loss - plain, 3.5, rtol=1e-6)
  close(grad[:, 0] - before[:, 0], [-0.5, 0.0], rtol=1e-6, atol=1e-7)


def test_dpo_as_released_sums_the_margins():
  # Total 2 - 3 = -1: one loss log(1 + e^.1), gradient -+.1 / (1 + e^-.1) to every sequence.
  x, arrays = dpo_arrays([4.0, 2.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.5], [7, 5, 5, 7])
  f = algorithms.policy_loss("dpo", aggregation="seq-mean-token-mean", variant="trinity")
  value, grad = jit(jax.value_and_grad(lambda x: f(x, **arrays)[0]))(x)
  close(value, np.log1p(np.exp(0.1)), rtol=1e-6)
  g = 0.1 / (1 + np.exp(-0.1))
  close(grad[:, 0], [g, -g, g, -g], rtol=1e-5)
  # For one pair the two agree.
  x, arrays = dpo_arrays([4.0, 2.0], [0.0, 1.0], [0, 0])
  paper = algorithms.policy_loss("dpo", aggregation="seq-mean-token-mean")
  both = [jit(jax.value_and_grad(lambda x, f=f: f(x, **arrays)[0]))(x) for f in (f, paper)]
  close(both[0][0], both[1][0], rtol=1e-6)
  close(both[0][1], both[1][1], rtol=1e-6)


def test_who_is_a_pair():
  ids = jnp.array([1, 1, 2, 3, 3, 4, 4, 4, -1, -1, 5, 5])
  rewards = jnp.array([0.0, 1, 0, 1, 1, 0, 1, 2, 0, 1, 1, 0])  # 3: a tie, 4: three, 5: one invalid
  valid = jnp.arange(12) != 11
  find = jit(find_pairs)
  pairs = find(rewards, ids, valid)
  assert np.flatnonzero(pairs.paired).tolist() == [0, 1]
  assert np.flatnonzero(pairs.chosen).tolist() == [1]
  assert find(rewards, ids, None).paired[10:].all()
  assert not find(rewards.at[0].set(jnp.nan), ids, valid).paired.any()
  x, arrays = dpo_arrays([4.0, 2.0, 1.0], [0.0, 1.0, 1.0], [0, 0, 1])
  loss, out = jit(lambda x: losses.dpo(x, **arrays))(x)
  assert loss[2, 0] == 0 and stats.finish(out)["dpo/unpaired"] == 1


def test_an_option_reads_only_what_it_needs():
  def inputs(name, **options):
    return part_of((name, options)).inputs

  sequence = {"sequence_index", "num_sequences"}
  assert not sequence & inputs("ppo") and not sequence & inputs("ppo", sequence_masking=False)
  assert sequence <= inputs("ppo", sequence_masking=True)
  assert sequence <= inputs("topr") and not sequence & inputs("topr", variant="trinity")
  assert "prox_logprob" not in inputs("dpo") and "prox_logprob" in inputs("dpo", variant="trinity")
  assert {"prox_logprob", "key"} <= inputs("clip-cov") and "selected" not in inputs("clip-cov")
  assert "old_logprob" not in inputs("reinforce") | inputs("opmd") | inputs("sft")
  assert "versions" not in frozenset().union(*(part_of(case).inputs for case in CASES))


@pytest.mark.parametrize("name", ["m2po", "clip-cov", "kl-cov", "gspo", "dppo-kl", "mix"])
def test_from_a_notebook(name):
  rng = np.random.default_rng(0)
  x, old = -rng.exponential(size=(2, 3, 4)).astype(np.float32)
  a, mask = rng.normal(size=3).astype(np.float32), np.arange(4)[None] < np.array([[4], [0], [2]])
  more = {"key": jax.random.key(0), "is_expert": mask & False}
  part = part_of((name, {}))
  more = {k: v for k, v in more.items() if k in part.inputs}
  f = jax.jit(algorithms.policy_loss(name, aggregation="seq-mean-token-mean"))
  value, out = f(x, old_logprob=old, advantages=a, mask=mask, **more)
  assert np.isfinite(value) and all(np.isfinite(v) for v in out.values())
  assert out["pg_loss"] == value


def test_vmap_over_options():
  x, old, a = np.log([[0.5, 0.9]]), np.log([[0.45, 0.5]]), np.ones((1, 2))
  mask = np.ones((1, 2), bool)
  f = lambda high: losses.gspo(
    x, old, a, mask, jnp.zeros((1, 2), jnp.int32), 1, clip_high=high, clip_low=0.1
  )[0][0, 0]
  s = np.sqrt(1.8 / 0.9)
  close(jax.vmap(f)(jnp.array([0.0, 0.1, 9.0])), [-1, -1.1, -s], rtol=1e-6)


@pytest.mark.parametrize(
  "name,options,message",
  [
    ("sapo", {"variant": "trinty"}, "variant = 'trinty': expected one of paper, trinity; did you"),
    ("topr", {"variant": "x"}, "variant = 'x': expected one of paper"),
    ("rec", {"clip_mode": "rings"}, "clip_mode = 'rings': expected one of none, two-side"),
    ("rec", {"regularizer": "k2"}, "regularizer_coef = 0.0: regularizer 'k2' needs one above 0"),
    ("rec", {"temp": 0.0}, "temp = 0.0: expected a number"),
    ("gspo", {"clip_low": 1.5}, "clip_low = 1.5: expected a number"),
    ("gspo", {"clip_high": None}, "clip_high = None: expected a number"),
    ("cispo", {"mask_low": -0.1}, "mask_low = -0.1"),
    ("cispo", {"mask_high": "x"}, "mask_high = 'x'"),
    ("sft_phi", {"cutoff": 0.0}, "cutoff = 0.0"),
    ("chord", {"expert": "dpo"}, "expert = 'dpo': expected one of sft_phi, sft"),
    ("dpo", {"beta": 0.0}, "beta = 0.0"),
    ("dpo", {"nll_coef": -1.0}, "nll_coef = -1.0"),
    ("dpo", {"label_smoothing": 1.0}, "label_smoothing = 1.0"),
    ("m2po", {"tau": -1.0}, "tau = -1.0"),
    ("clip-cov", {"cov_ratio": 0.0}, "cov_ratio = 0.0"),
    ("clip-cov", {"cov_low": 6.0}, r"cov_high = 5.0: expected a number in \[6.0"),
    ("dppo-tv", {"truncate": 0.0}, "truncate = 0.0"),
    ("ppo", {"sequence_masking": True, "delta": -1.0}, "delta = -1.0"),
    ("ppo", {"sequence_masking": 1}, "sequence_masking = 1: expected True or False"),
  ],
)
def test_option_errors(name, options, message):
  x = jnp.full((2, 2), -1.0)
  arrays = dict(
    logprob=x, old_logprob=x, ref_logprob=x, advantages=x, mask=x < 0, is_expert=x > 0,
    prox_logprob=x, key=jax.random.key(0), sequence_index=jnp.array([[0, 0], [1, 1]]),
    num_sequences=2, rewards=x[0], pair_ids=jnp.array([0, 0]),
  )  # fmt: skip
  with pytest.raises(UserError, match=message):
    part = resolve("policy loss", name, losses.POLICY_LOSSES, options)
    part(**arrays, **part.before_split(**arrays))


def test_functions_called_directly_do_one_thing():
  x, mask = jnp.zeros((1, 1)), jnp.ones((1, 1), bool)
  with pytest.raises(UserError, match="ppo_sequence_mask is that function"):
    losses.ppo(x, x, x, mask, sequence_masking=True)
  index = jnp.zeros((1, 1), jnp.int32)
  with pytest.raises(UserError, match="without it call ppo"):
    losses.ppo_sequence_mask(x, x, x, mask, index, 1, sequence_masking=False)
  with pytest.raises(UserError, match="variant = 'trinity': expected one of paper"):
    losses.topr(x, x, x, mask, index, 1, variant="trinity")
