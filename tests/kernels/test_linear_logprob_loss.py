"""linear_logprob_loss: the fused path is the general one, in fewer products."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import logprob_cases as cases
import numpy as np
import pytest

from trinity_jax import ops
from trinity_jax.kernels.linear_logprob import api

EPS = 0.2


def clipped(logprob, entropy, x):
  """PPO's clipped surrogate with an entropy bonus, weighted."""
  ratio = jnp.exp(logprob - x["old"])
  limited = jnp.clip(ratio, 1 - EPS, 1 + EPS)
  loss = -jnp.minimum(ratio * x["advantage"], limited * x["advantage"])
  return x["weight"] * (loss - x["coefficient"] * entropy)


def plain(logprob, entropy, x):
  """Without the entropy, but for what has no effect."""
  del entropy
  return -x["weight"] * x["advantage"] * logprob


def arrays(seed, count, dtype=np.float32):
  rng = np.random.default_rng(seed)
  draw = lambda: rng.normal(size=count).astype(dtype)
  return {"old": draw() - 3, "advantage": draw(), "weight": abs(draw()), "coefficient": dtype(0.1)}


@functools.partial(jax.jit, static_argnames=("implementation", "token_loss", "softcap"))
def both(h, w, y, m, t, x, implementation, token_loss, softcap=None):
  """((loss, outputs), gradients) by the fused path, and by the general one with autodiff."""
  options = {"softcap": softcap, "implementation": cases.TABLE[implementation]}

  def fused(h, w):
    loss, outs = api.linear_logprob_loss(h, w, y, m, t, token_loss, x, **options)
    return 3 * loss, outs

  def general(h, w):
    outs = api.linear_logprob(h, w, y, m, t, **options)
    return 3 * jnp.sum(jnp.where(m, token_loss(outs[0], outs[1], x), 0)), outs

  run = lambda f: jax.value_and_grad(f, (0, 1), has_aux=True)(h, w)
  return run(fused), run(general)


@pytest.mark.parametrize(
  "name,token_loss", [*((name, clipped) for name in cases.TABLE), ("xla", plain), ("tiles", plain)]
)
def test_equals_the_general_path(name, token_loss):
  for seed, mask in enumerate((None, np.zeros(13, bool), np.ones(13, bool))):
    h, w, y, m, t = cases.inputs(seed, 13, 8, 21)
    m = m if mask is None else mask
    args = (h, w, y, m, t, arrays(seed, 13))
    fused, general = (jax.tree.leaves(o) for o in both(*args, name, token_loss, 4.0))
    cases.close(fused, general, 4e-6)


@pytest.mark.parametrize("name", cases.FLOAT64)
def test_float64_against_numpy(name):
  with jax.enable_x64(True):
    h, w, y, m, t = cases.inputs(3, 12, 6, 18, dtype=np.float64)
    x = arrays(3, 12, np.float64)
    ((loss, outs), grads), _ = both(h, w, y, m, t, x, name, clipped)
    values = cases.numpy_values(h, w, y, m, t)
    ratio = np.exp(values[0] - x["old"])
    limited = np.clip(ratio, 1 - EPS, 1 + EPS)
    a, weight = x["advantage"], x["weight"]
    per_token = weight * (-np.minimum(ratio * a, limited * a) - 0.1 * values[1])
    np.testing.assert_allclose(loss, 3 * per_token[m].sum(), rtol=1e-12)
    np.testing.assert_allclose(outs, values, atol=1e-12)
    g = np.where(ratio * a <= limited * a, -weight * a * ratio, 0)
    c = (3 * g, -0.3 * weight, np.zeros(12))
    cases.close(grads, cases.numpy_gradients(h, w, y, m, t, c), 1e-13)


@pytest.mark.parametrize("name", ["reference", "xla", "tiles", "pallas_tpu"])
def test_masked_rows_leak_nowhere(name):
  h, w, y, m, t = cases.inputs(5, 13, 8, 21, share=0.5)
  x = arrays(5, 13)
  bad = {k: v if v.ndim == 0 else np.where(m, v, np.float32(np.nan)) for k, v in x.items()}
  h_bad, y_bad, t_bad = np.where(m[:, None], h, np.inf), np.where(m, y, -1), np.where(m, t, 0)
  broken = (h_bad.astype(np.float32), w, y_bad, m, t_bad, bad)
  good = both(h, w, y, m, t, x, name, clipped)[0]
  for a, b in zip(jax.tree.leaves(both(*broken, name, clipped)[0]), jax.tree.leaves(good)):
    np.testing.assert_array_equal(a, b)


def products(f, *args):
  return jax.jit(f).lower(*args).as_text().count("dot_general")


@pytest.mark.parametrize("vocabulary", [512, 4096])  # logits that are kept, and tiles
def test_products(vocabulary):
  shape = jax.ShapeDtypeStruct
  args = (shape((4096, 8), jnp.float32), shape((8, vocabulary), jnp.float32))
  rows = jnp.ones(4096)

  def loss(h, w):
    y = jnp.zeros(4096, jnp.int32)
    return ops.linear_logprob_loss(h, w, y, rows > 0, 1.0, lambda l, e, x: x * l, rows)[0]

  assert products(loss, *args) == 1  # undifferentiated: only the forward pass
  assert products(jax.grad(loss, (0, 1)), *args) == 3


def test_what_is_auxiliary_has_no_gradient():
  h, w, y, m, t = cases.inputs(6, 9, 4, 12)
  for name in ("reference", "xla", "tiles"):
    run = functools.partial(api.linear_logprob_loss, implementation=cases.TABLE[name])
    x = arrays(0, 9)

    @jax.jit
    def gradients(h, x, run=run):
      aux = lambda h: sum(map(jnp.sum, run(h, w, y, m, t, plain, x)[1]))
      return jax.grad(aux)(h), jax.grad(lambda x: run(h, w, y, m, t, clipped, x)[0])(x)

    zero = gradients(h, x)
    assert not any(np.any(v) for v in jax.tree.leaves(zero))


def test_vmap_and_integer_arrays():
  h, w, y, m, t = cases.inputs(7, 12, 4, 12)
  sign = np.random.default_rng(0).integers(-1, 2, 12).astype(np.int32)
  f = lambda logprob, entropy, x: logprob * x
  run = functools.partial(api.linear_logprob_loss, implementation=cases.TABLE["tiles"])
  one = jax.jit(lambda h, y, m, t, s: jax.value_and_grad(lambda h: run(h, w, y, m, t, f, s)[0])(h))
  batched = [x.reshape(3, 4, *x.shape[1:]) for x in (h, y, m, t, sign)]
  losses, grads = jax.vmap(one)(*batched)
  loss, grad = one(h, y, m, t, sign)
  np.testing.assert_allclose(losses.sum(), loss, rtol=1e-5)
  np.testing.assert_allclose(grads.reshape(12, 4), grad, atol=1e-6)


def test_errors():
  h, w, y, m, t = cases.inputs(11, 4, 3, 5)
  run = lambda f, x=(): ops.linear_logprob_loss(h, w, y, m, t, f, x)
  with pytest.raises(ValueError, match="expected one loss per token"):
    run(lambda logprob, entropy, x: jnp.sum(logprob))
  with pytest.raises(ValueError, match=r"arrays\['a'\] has shape \(3,\), expected a scalar or"):
    run(plain, {"a": np.ones(3)})
  with pytest.raises(ValueError, match="captures a traced array of shape"):
    jax.jit(lambda s: run(lambda logprob, entropy, x: s * logprob)[0])(2.0)
  with pytest.raises(ValueError, match="linear_logprob_loss: implementation 'palas'"):
    ops.linear_logprob_loss(h, w, y, m, t, plain, (), implementation="palas")
