"""PPO clip and SFT: hand-computed values, torch gradients, masks, ties."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_jax import algorithms
from trinity_jax.algorithms import stats
from trinity_jax.algorithms.policy_losses import ppo, sft
from trinity_jax.errors import UserError


def torch_ppo(logprob, old, advantages, mask, low=0.2, high=0.2, dual=3.0):
  """The loss as torch implementations write it; value and gradient per token in float64."""
  logprob = torch.tensor(np.asarray(logprob, np.float64), requires_grad=True)
  old, a, m = (torch.tensor(np.asarray(x, np.float64)) for x in (old, advantages, mask))
  ratio = torch.exp(torch.clamp(logprob - old, -20, 20))
  loss = torch.maximum(-a * ratio, -a * torch.clamp(ratio, 1 - low, 1 + high))
  if dual is not None:
    loss = torch.where(a < 0, torch.minimum(loss, -a * dual), loss)
  (loss * m).sum().backward()
  return (loss * m).detach().numpy(), logprob.grad.numpy()


@functools.partial(jax.jit, static_argnames=("low", "high", "dual"))
def ours(logprob, old, advantages, mask, low=0.2, high=0.2, dual=3.0):
  def f(logprob):
    return ppo(logprob, old, advantages, mask, clip_low=low, clip_high=high, dual_clip=dual)

  loss, vjp, out = jax.vjp(f, logprob, has_aux=True)
  return loss, vjp(jnp.ones_like(loss))[0], stats.finish(out)


def test_hand_computed():
  # ratio           1.5    1.5    0.5    0.5    4      1
  # advantage       +2     -2     +2     -2     -2     +2
  # -A r            -3      3     -1      1      8     -2
  # -A clip(r)      -2.4    2.4   -1.6    1.6    2.4   -2      bounds 0.8 and 1.2
  # max             -2.4    3     -1      1.6    8     -2
  # A<0: <= -3A             3            1.6     6
  ratio = np.array([1.5, 1.5, 0.5, 0.5, 4.0, 1.0])
  a = np.array([2.0, -2.0, 2.0, -2.0, -2.0, 2.0])
  loss, grad, out = ours(jnp.log(ratio), jnp.zeros(6), a, np.ones(6, bool))
  np.testing.assert_allclose(loss, [-2.4, 3, -1, 1.6, 6, -2], rtol=1e-6)
  # Gradient -A r where neither clipped nor dual-clipped.
  np.testing.assert_allclose(grad, [0, 3, -1, 0, 0, -2], rtol=1e-6)
  # Clipped: tokens 0 (high) and 3 (low); dual: token 4.
  for name, value in {
    "pg_clipfrac": 2 / 6, "pg_clipfrac_high": 1 / 6, "pg_clipfrac_low": 1 / 6,
    "pg_clipfrac_dual": 1 / 6, "ratio/mean": 9 / 6, "ratio/max": 4,
    # k1 = mean(-ln r) = -(2 ln 1.5 + 2 ln 0.5 + ln 4) / 6; k3 = mean(r - 1 - ln r)
    "ppo_kl": -2 * np.log(1.5) / 6, "ppo_kl_k3": 9 / 6 - 1 - 2 * np.log(1.5) / 6,
  }.items():  # fmt: skip
    np.testing.assert_allclose(out[name], value, rtol=1e-6, err_msg=name)


def test_clip_higher_and_no_dual_clip():
  # r = 1.25: inside [0.8, 1.28], so not clipped; r = 10, A = -1: 10 without dual clip.
  loss, _, out = ours(jnp.log(jnp.array([1.25, 10.0])), jnp.zeros(2), jnp.array([1.0, -1.0]),
                      jnp.ones(2, bool), high=0.28, dual=None)  # fmt: skip
  np.testing.assert_allclose(loss, [-1.25, 10], rtol=1e-6)
  assert out["pg_clipfrac"] == 0 and out["pg_clipfrac_dual"] == 0


def tie_near(x):
  """A log ratio near x whose exp is the same number in jax and torch, and 1 + (r - 1) == r."""
  for candidate in x + np.arange(64) / 256:
    r = float(jax.jit(jnp.exp)(jnp.float64(candidate)))
    if r == torch.exp(torch.tensor(candidate)).item() and 1 + (r - 1) == r == 1 - (1 - r):
      return candidate, r
  raise AssertionError("no tie found")


@pytest.mark.parametrize("a", [1.5, -1.5, 0.0])
@pytest.mark.parametrize("bound", ["low", "high", "dual", "clamp_low", "clamp_high"])
def test_ties_follow_torch(a, bound):
  with jax.enable_x64(True):
    # old is 0, so ratio = exp(logprob), and the bound is set to that very number.
    if bound.startswith("clamp"):
      logprob, r = (-20.0, None) if bound == "clamp_low" else (20.0, None)
    else:
      logprob, r = tie_near({"low": -0.5, "high": 0.25, "dual": 1.0}[bound])
    low = 1 - r if bound == "low" else 0.2
    high = r - 1 if bound == "high" else 0.2
    dual = r if bound == "dual" else 1e12 if bound == "clamp_high" else 3.0
    x = np.array([logprob])
    args = (x, np.zeros(1), np.array([a]), np.ones(1, bool))
    loss, grad, _ = ours(*args, low=low, high=high, dual=dual)
    expected, expected_grad = torch_ppo(*args, low, high, dual)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-12)
    if a < 0 and bound == "dual":
      np.testing.assert_allclose(grad, -a * r / 2, rtol=1e-12)  # half passes
    if a > 0 and bound in ("low", "high"):
      np.testing.assert_allclose(grad, -a * r, rtol=1e-12)  # jnp.clip would give half of it


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data())
def test_property_against_torch(data):
  shape = data.draw(st.sampled_from([(1, 1), (2, 5), (3, 2, 4)]))
  rng = np.random.default_rng(data.draw(st.integers(0, 9999)))
  scale = data.draw(st.sampled_from([0.0, 0.1, 1.0, 100.0]))  # up to ratios of e^300
  low, high, dual = data.draw(
    st.sampled_from([(0.2, 0.2, 3.0), (0.2, 0.28, None), (1.0, 5.0, 1.5)])
  )
  logprob, old = -rng.exponential(size=shape) * scale, -rng.exponential(size=shape) * scale
  a = rng.normal(size=shape) * (rng.random(shape) < 0.8)  # some exactly 0
  mask = rng.random(shape) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
  expected, expected_grad = torch_ppo(logprob, old, a, mask, low, high, dual)
  with jax.enable_x64(True):
    loss, grad, out = ours(logprob, old, a, mask, low, high, dual)
  np.testing.assert_allclose(loss, expected, rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(grad, expected_grad, rtol=1e-12, atol=1e-12)
  assert all(np.isfinite(x) for x in out.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["logprob", "old", "advantages"])
def test_masked_positions_leak_nowhere(bad, where):
  rng = np.random.default_rng(0)
  arrays = {k: rng.normal(size=(2, 4)).astype(np.float32) for k in ("logprob", "old", "advantages")}
  mask = np.array([[1, 0, 1, 0], [0, 0, 0, 0]], bool)
  loss, grad, out = ours(**arrays, mask=mask)
  arrays[where] = np.where(mask, arrays[where], bad).astype(np.float32)
  loss_bad, grad_bad, out_bad = ours(**arrays, mask=mask)
  np.testing.assert_array_equal(loss_bad, loss)
  np.testing.assert_array_equal(grad_bad, grad)
  assert {k: float(v) for k, v in out_bad.items()} == {k: float(v) for k, v in out.items()}
  assert not np.any(loss[~mask]) and not np.any(grad[~mask])


def test_a_bad_number_at_a_trained_token_shows():
  loss, _, _ = ours(jnp.array([jnp.nan]), jnp.zeros(1), jnp.ones(1), jnp.ones(1, bool))
  assert np.isnan(loss[0])


def test_sft():
  logprob = jnp.array([[-1.0, -2.0, jnp.nan]])
  mask = jnp.array([[True, True, False]])
  (loss, out), vjp = jax.vjp(lambda x: sft(x, mask), logprob)
  np.testing.assert_array_equal(loss, [[1, 2, 0]])
  np.testing.assert_allclose(stats.finish(out)["nll"], 1.5)
  zero = jax.tree.map(jnp.zeros_like, out)
  np.testing.assert_array_equal(vjp((jnp.ones((1, 3)), zero))[0], [[-1, -1, 0]])


def test_notebook_form():
  # Two rows of two and one tokens, ratio 1: loss per token -A. token-mean: -(1 + 1 - 2) / 3 = 0;
  # seq-mean-token-mean: -(1 - 2) / 2 = 0.5; seq-mean-token-sum-norm: -(2 - 2) / T = 0.
  mask = np.array([[1, 1, 0], [0, 1, 0]], bool)
  zeros = np.zeros((2, 3), np.float32)
  advantages = np.array([1.0, -2.0], np.float32)  # per row, or per token
  for a in (advantages, np.broadcast_to(advantages[:, None], (2, 3))):
    value, out = algorithms.policy_loss("ppo")(zeros, old_logprob=zeros, advantages=a, mask=mask)
    assert value == 0 and out["pg_loss"] == 0 and out["ratio/max"] == 1
    value, _ = algorithms.policy_loss("ppo", aggregation="seq-mean-token-mean")(
      zeros, old_logprob=zeros, advantages=a, mask=mask
    )
    np.testing.assert_allclose(value, 0.5)
  value, out = algorithms.policy_loss("sft", aggregation="token-sum")(zeros - 2, mask=mask)
  assert value == 6 and out["nll"] == 2


def test_notebook_form_packed_equals_padded():
  rng = np.random.default_rng(0)
  lengths = [3, 0, 2, 4]
  padded = {k: rng.normal(size=(4, 4)) for k in ("logprob", "old_logprob", "advantages")}
  mask = np.arange(4)[None] < np.array(lengths)[:, None]
  # One packed row holds all four (the empty one has no token), in another order.
  order = [2, 0, 3]
  packed = {k: np.concatenate([v[i, : lengths[i]] for i in order])[None] for k, v in padded.items()}
  index = np.concatenate([np.full(lengths[i], i) for i in order])[None]
  packed = {k: np.pad(v, ((0, 0), (1, 2)), constant_values=np.nan) for k, v in packed.items()}
  index = np.pad(index, ((0, 0), (1, 2)), constant_values=-1)
  with jax.enable_x64(True):
    for mode in algorithms.MODES:
      f = algorithms.policy_loss("ppo", aggregation=mode, max_length=7)
      f = jax.jit(f, static_argnames="num_sequences")
      a, out_a = f(**padded, mask=mask)
      b, out_b = f(**packed, mask=index >= 0, sequence_index=index, num_sequences=4)
      np.testing.assert_allclose(a, b, rtol=1e-12)
      for k in out_a:
        np.testing.assert_allclose(out_a[k], out_b[k], rtol=1e-12)


def test_vmap_over_clip_range():
  x = jnp.log(jnp.array([1.05, 1.5]))
  f = jax.vmap(lambda c: ppo(x, jnp.zeros(2), jnp.ones(2), jnp.ones(2, bool), clip_high=c)[0])
  np.testing.assert_allclose(
    f(jnp.array([0.0, 0.1, 1.0])), [[-1, -1], [-1.05, -1.1], [-1.05, -1.5]], rtol=1e-6
  )


@pytest.mark.parametrize(
  "options,message",
  [
    ({"clip_hi": 0.1}, "no option 'clip_hi'; did you mean 'clip_high'"),
    ({"clip_high": "wide"}, "clip_high = 'wide': expected a number"),
    ({"clip_low": -0.1}, r"clip_low = -0.1: expected a number in \[0"),
    ({"dual_clip": 0.5}, "dual_clip = 0.5"),
  ],
)
def test_option_errors(options, message):
  with pytest.raises(UserError, match=message):
    x = np.zeros((1, 2))
    algorithms.policy_loss("ppo", **options)(
      x, old_logprob=x, advantages=x, mask=np.ones((1, 2), bool)
    )


def test_input_errors():
  x, mask = np.zeros((1, 2)), np.ones((1, 2), bool)
  with pytest.raises(UserError, match="'pop' does not exist; did you mean 'ppo'"):
    algorithms.policy_loss("pop")
  with pytest.raises(UserError, match="aggregation 'token-men' does not exist"):
    algorithms.policy_loss("ppo", aggregation="token-men")
  with pytest.raises(UserError, match="'ppo' reads old_logprob, which was not given"):
    algorithms.policy_loss("ppo")(x, advantages=x, mask=mask)
  with pytest.raises(UserError, match=r"old_logprob has shape \(2,\), expected mask's \(1, 2\)"):
    algorithms.policy_loss("ppo")(x, old_logprob=x[0], advantages=x, mask=mask)
