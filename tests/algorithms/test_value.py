"""The critic's loss, adaptive KL, and the kinds of metrics that they brought."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from trinity_jax.algorithms import stats
from trinity_jax.algorithms.kl_control import adapt
from trinity_jax.algorithms.value import value_loss
from trinity_jax.errors import UserError


def torch_loss(values, old, returns, mask, clip):
  v = torch.tensor(values, requires_grad=True)
  o, r, m = (torch.tensor(np.asarray(x, np.float64)) for x in (old, returns, mask))
  loss = (v - r) ** 2
  if clip is not None:
    loss = torch.max(loss, (torch.clamp(v, o - clip, o + clip) - r) ** 2)
  (0.5 * loss * m).sum().backward()
  return (0.5 * loss * m).detach().numpy(), v.grad.numpy()


@pytest.mark.parametrize("clip", [0.2, 0.0, None])
def test_value_loss_against_torch(clip):
  rng = np.random.default_rng(0)
  values, old = rng.normal(size=(2, 6, 5)), rng.normal(size=(2, 6, 5)) * 0.3
  returns = rng.normal(size=(2, 6, 5))
  values[0, 0] = old[0, 0] + [0.25, -0.25, 0.2, 1000, -1000]
  old[0, 1], values[0, 1] = 0.5, [0.7, 0.3, 0.5, 0.5 + 0.2, 0.5 - 0.2]  # at the bounds
  mask = rng.random((2, 6, 5)) < 0.7
  mask[0, :2] = True
  expected, expected_grad = torch_loss(values, old, returns, mask, clip)
  poison = lambda x: np.where(mask, x, np.resize([np.nan, np.inf, 1e30], x.shape))

  @jax.jit
  def f(v, o, r):
    loss, vjp, out = jax.vjp(lambda v: value_loss(v, o, r, mask, clip=clip), v, has_aux=True)
    return loss, vjp(jnp.ones_like(loss))[0], stats.finish(out)

  with jax.enable_x64(True):
    loss, grad, out = f(poison(values), poison(old), poison(returns))
  np.testing.assert_allclose(loss, expected, rtol=1e-13)
  np.testing.assert_allclose(grad, expected_grad, rtol=1e-13)
  error, target = (returns - values)[mask], returns[mask]
  np.testing.assert_allclose(out["vf_explained_var"], 1 - error.var() / target.var(), rtol=1e-10)
  if clip == 0.2:
    near = np.clip(values, old - clip, old + clip)
    clipped = ((near - returns) ** 2 > (values - returns) ** 2)[mask].mean()
    np.testing.assert_allclose(out["vf_clipfrac"], clipped, rtol=1e-12)
  if clip is None:
    assert float(out["vf_clipfrac"]) == 0


def test_value_loss_by_hand():
  # v 1.5, old 1, clip 0.2: near 1.2. R = 1: 0.25 > 0.04, not clipped. R = 2: 0.25 < 0.64, clipped.
  f = jax.jit(lambda v: value_loss(v, jnp.ones(2), jnp.array([1.0, 2.0]), jnp.ones(2, bool)))
  loss, out = f(jnp.full(2, 1.5))
  np.testing.assert_allclose(loss, [0.125, 0.32], rtol=1e-6)
  assert stats.finish(out)["vf_clipfrac"] == 0.5
  np.testing.assert_allclose(jax.grad(lambda v: f(v)[0].sum())(jnp.full(2, 1.5)), [0.5, 0])
  with pytest.raises(UserError, match="clip = -1.0"):
    value_loss(jnp.ones(2), jnp.ones(2), jnp.ones(2), jnp.ones(2, bool), clip=-1.0)


def test_new_kinds_merge():
  rng = np.random.default_rng(1)
  x, y, mask = rng.normal(size=(5, 8)), rng.normal(size=(5, 8)) + 3, rng.random((5, 8)) < 0.6
  with jax.enable_x64(True):
    of = lambda rows: {
      "ess": stats.effective_sample_size(np.abs(x[rows]), mask[rows]),
      "ev": stats.explained_variance(x[rows], y[rows], mask[rows]),
    }
    merged = stats.neutral(of(slice(0, 1)))
    for i in range(5):
      merged = stats.merge(merged, of(slice(i, i + 1)))
    got = stats.finish(merged)
  w = np.abs(x)[mask]
  np.testing.assert_allclose(got["ess"], w.sum() ** 2 / (len(w) * (w**2).sum()), rtol=1e-12)
  np.testing.assert_allclose(got["ev"], 1 - (y - x)[mask].var() / y[mask].var(), rtol=1e-10)
  # A perfect critic, one no better than the mean, targets that do not vary, nothing at all.
  every = np.ones(8, bool)
  ev = lambda v, r, m=every: float(stats.finish({"x": stats.explained_variance(v, r, m)})["x"])
  assert ev(y[0], y[0]) == 1
  assert abs(ev(np.full(8, y[0].mean()), y[0])) < 1e-5
  assert ev(x[0], np.full(8, 0.1)) == 0
  assert ev(x[0], y[0], ~every) == 0
  ess = lambda w, m=every: float(stats.finish({"x": stats.effective_sample_size(w, m)})["x"])
  assert ess(np.full(8, 5.0)) == 1
  np.testing.assert_allclose(ess(np.eye(8)[0]), 1 / 8)
  assert ess(np.zeros(8)) == 0 and ess(np.ones(8), ~every) == 0


def test_adaptive_kl():
  f = jax.jit(lambda c, kl, n: adapt(c, kl, n, target=0.02, horizon=1000))
  # 10 % above the target, 50 sequences: 1 + 0.1 * 50 / 1000; beyond 20 % the error is clipped.
  np.testing.assert_allclose(f(0.1, 0.022, 50), 0.1 * 1.005, rtol=1e-6)
  np.testing.assert_allclose(f(0.1, 5.0, 50), 0.1 * 1.01, rtol=1e-6)
  np.testing.assert_allclose(f(0.1, -5.0, 50), 0.1 * 0.99, rtol=1e-6)
  assert f(0.1, 0.0, 10**6) == 0  # never negative
  assert f(0.25, jnp.nan, 50) == 0.25 and f(0.25, jnp.inf, 50) == 0.25
  # It brings a KL that answers to the weight to its target.
  coef = jnp.float32(0.001)
  for _ in range(400):
    coef = f(coef, 0.0004 / coef, 200)
  np.testing.assert_allclose(coef, 0.02, rtol=0.01)
  with pytest.raises(UserError, match="kl_target = 0"):
    adapt(0.1, 0.1, 1, target=0, horizon=10)
  with pytest.raises(UserError, match="kl_horizon = 0"):
    adapt(0.1, 0.1, 1, target=0.1, horizon=0)
