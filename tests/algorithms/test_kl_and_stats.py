"""KL estimators, entropy, and metrics that survive a split."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from trinity_jax import algorithms
from trinity_jax.algorithms import entropy, stats
from trinity_jax.algorithms.kl import KLS
from trinity_jax.errors import UserError

TORCH = {
  "none": lambda d: 0 * d,
  "k1": lambda d: d,
  "k2": lambda d: d**2 / 2,
  "k3": lambda d: torch.exp(-d) - 1 + d,
  "abs": lambda d: d.abs(),
}


def test_hand_computed():
  # d = +-ln 2: k1 +-0.693147, k2 0.480453 / 2, k3 1/2 - 1 + ln 2 = 0.193147 and 2 - 1 - ln 2.
  logprob, ref = jnp.log(jnp.array([0.5, 0.25])), jnp.log(jnp.array([0.25, 0.5]))
  for name, expected in {
    "none": [0, 0], "k1": [0.693147, -0.693147], "k2": [0.240227, 0.240227],
    "k3": [0.193147, 0.306853], "abs": [0.693147, 0.693147],
  }.items():  # fmt: skip
    if name != "none":
      np.testing.assert_allclose(algorithms.kl(name)(logprob, ref), expected, rtol=1e-5)
  np.testing.assert_array_equal(algorithms.kl("none")(logprob), [0, 0])


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "abs"])
def test_values_and_gradients_against_torch(name):
  d = np.array([-5.0, -1e-3, 0.0, 1e-9, 0.5, 30.0])
  ref = np.linspace(-3, -1, 6)
  with jax.enable_x64(True):
    value, vjp = jax.vjp(lambda x: KLS[name](x, ref), ref + d)
    grad = vjp(jnp.ones(6))[0]
  x = torch.tensor(ref + d, requires_grad=True)
  expected = TORCH[name](x - torch.tensor(ref))
  expected.sum().backward()
  np.testing.assert_allclose(value, expected.detach(), rtol=1e-9, atol=1e-15)
  np.testing.assert_allclose(grad, x.grad, rtol=1e-9, atol=1e-12)


def test_low_variance_kl():
  # d = -3: e^3 - 4 = 16.09 -> 10, no gradient; -1: e - 2, slope 1 - e; 30 -> 20, then 19 -> 10.
  x, vjp = jax.vjp(lambda x: KLS["low_var_kl"](x, jnp.zeros(3)), jnp.array([-3.0, -1.0, 30.0]))
  np.testing.assert_allclose(x, [10, np.e - 2, 10], rtol=1e-6)
  np.testing.assert_allclose(vjp(jnp.ones(3))[0], [0, 1 - np.e, 0], rtol=1e-6)


def test_corrected_k3_against_torch():
  logprob = np.array([-1.0, -2.0, -0.5, -3.0, -25.0, -1.0])
  ref = np.array([-1.5, -1.0, -0.5, -2.0, -1.0, -26.0])
  old = np.array([-1.2, -3.5, -0.5, -3.0, -1.0, -1.0])  # ratios e^0.2, e^1.5 (bounded), 1, 1
  with jax.enable_x64(True):
    value, vjp = jax.vjp(lambda x: KLS["corrected_k3"](x, ref, old), logprob)
    grad = vjp(jnp.ones(6))[0]
    wider = KLS["corrected_k3"](logprob, ref, old, max_ratio=9.0)
  x = torch.tensor(logprob, requires_grad=True)
  d = torch.clamp(x - torch.tensor(ref), -20, 20)
  ratio = torch.exp(torch.clamp(x - torch.tensor(old), -20, 20))
  k3 = torch.exp(-d) - 1 + d
  expected = torch.clamp(ratio, 0, 2) * k3
  expected.sum().backward()
  np.testing.assert_allclose(value, expected.detach(), rtol=1e-9, atol=1e-15)
  np.testing.assert_allclose(grad, x.grad, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(wider, (ratio * k3).detach(), rtol=1e-9, atol=1e-15)
  with pytest.raises(UserError, match="max_ratio = 0: expected a number above 0"):
    KLS["corrected_k3"](logprob, ref, old, max_ratio=0)


def test_corrected_k3_has_the_gradient_of_the_divergence():
  # Tokens of an older policy q: E_q[estimate] is KL(p || ref), and so is its gradient in p.
  rng = np.random.default_rng(0)
  logits, ref, old = rng.normal(size=(3, 5)) * 0.3
  with jax.enable_x64(True):
    log_ref, log_old = jax.nn.log_softmax(ref), jax.nn.log_softmax(old)

    def estimate(logits):
      p = jax.nn.log_softmax(logits)
      return jnp.sum(jnp.exp(log_old) * KLS["corrected_k3"](p, log_ref, log_old))

    def divergence(logits):
      p = jax.nn.log_softmax(logits)
      return jnp.sum(jnp.exp(p) * (p - log_ref))

    got, expected = (jax.value_and_grad(f)(logits) for f in (estimate, divergence))
  np.testing.assert_allclose(got[0], expected[0], rtol=1e-10)
  np.testing.assert_allclose(got[1], expected[1], rtol=1e-9, atol=1e-12)


def test_k3_keeps_its_digits_near_zero():
  # d = 1e-3: d^2/2 - d^3/6 = 4.998333e-7; exp(-d) - 1 + d in float32 has an error of 6e-8.
  got = KLS["k3"](jnp.array([1e-3]), jnp.zeros(1))
  np.testing.assert_allclose(got, 4.998333e-7, rtol=1e-3)


@pytest.mark.parametrize("name", list(KLS))
def test_masked_positions_leak_nowhere(name):
  mask = jnp.array([True, False, False, False])
  logprob = jnp.array([-1.0, jnp.nan, -jnp.inf, 0.0])
  ref = jnp.array([-2.0, 0.0, jnp.inf, jnp.nan])
  part = algorithms.parts.resolve("kl", name, KLS)
  old = jnp.array([-1.5, jnp.inf, 0.0, jnp.nan])
  value, vjp = jax.vjp(
    lambda x: part(logprob=x, ref_logprob=ref, old_logprob=old, mask=mask), logprob
  )
  if name != "none":
    assert np.all(np.isfinite(value)) and not np.any(value[1:])
    assert value[0] != 0
  grad = vjp(jnp.ones(4))[0]
  assert np.all(np.isfinite(grad)) and not np.any(grad[1:])


def test_entropy():
  x = jnp.array([0.5, jnp.nan])
  np.testing.assert_array_equal(entropy.default(x, jnp.array([True, False])), [0.5, 0])
  np.testing.assert_array_equal(entropy.none(jnp.array([True, False])), [0, 0])
  x = jnp.array([0.5, jnp.nan, 0.25])
  value, vjp = jax.vjp(
    lambda x: entropy.mix(x, jnp.array([True, True, True]), jnp.array([False, True, False])), x
  )
  np.testing.assert_array_equal(value, [0.5, 0, 0.25])  # the expert's entropy is not read
  np.testing.assert_array_equal(vjp(jnp.ones(3))[0], [1, 0, 1])


def test_stats_do_not_depend_on_the_split():
  rng = np.random.default_rng(0)
  x, mask = rng.normal(size=(6, 5)), rng.random((6, 5)) < 0.4
  x[~mask] = np.nan
  mask[2:4] = False  # micro-batches may hold nothing

  def of(x, mask):
    return {
      "a": stats.mean(x, mask), "b": stats.maximum(x, mask), "c": stats.minimum(x, mask),
      "d": stats.total(jnp.where(mask, x, 0)), "e": stats.mean(x > 0, mask),
    }  # fmt: skip

  with jax.enable_x64(True):
    whole = stats.finish(of(x, mask))
    expected = {
      "a": x[mask].mean(), "b": x[mask].max(), "c": x[mask].min(), "d": x[mask].sum(),
      "e": (x[mask] > 0).mean(),
    }  # fmt: skip
    for k, v in expected.items():
      np.testing.assert_allclose(whole[k], v, rtol=1e-12)

    @jax.jit
    def looped(x, mask, count):  # the trainer's loop: traced bound, carry from shapes alone
      start = stats.neutral(jax.eval_shape(of, x[0], mask[0]))
      body = lambda i, carry: stats.merge(carry, of(x[i], mask[i]))
      return stats.finish(jax.lax.fori_loop(0, count, body, start))

    split = looped(x.reshape(3, 2, 5), mask.reshape(3, 2, 5), 3)
    for k in whole:
      np.testing.assert_allclose(split[k], whole[k], rtol=1e-12)
    assert all(v == 0 for v in looped(x.reshape(3, 2, 5), mask.reshape(3, 2, 5), 0).values())


def test_stats_carry_no_gradient():
  assert jax.grad(lambda x: stats.mean(x, True).parts[0] + x)(2.0) == 1


def test_merge_refuses_what_differs():
  a, b = {"x": stats.total(1.0)}, {"x": stats.maximum(1.0, True)}
  with pytest.raises(TypeError, match="different names or kinds"):
    stats.merge(a, b)
  with pytest.raises(TypeError, match="different names or kinds"):
    stats.merge(a, {"y": a["x"]})


def test_unknown_kl():
  with pytest.raises(UserError, match="kl 'k4' does not exist"):
    algorithms.kl("k4")
