"""Per-token estimates of KL(policy || reference), with d = logprob - ref_logprob.

k1, k2, k3 are those of http://joschu.net/blog/kl-approx.html. All arrays have one shape X; the
result is float, 0 where `mask` is False; `mask=None` means every position counts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trinity_jax.algorithms.numerics import masked


def _difference(logprob, ref_logprob, mask):
  mask = jnp.ones(jnp.shape(logprob), bool) if mask is None else mask
  logprob, ref_logprob = masked(mask, logprob, ref_logprob)
  return logprob - ref_logprob


def none(logprob: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """0: no reference is needed."""
  del mask
  return jnp.zeros_like(logprob)


def k1(logprob: jax.Array, ref_logprob: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """d. Unbiased, but as a loss its expected gradient is zero."""
  return _difference(logprob, ref_logprob, mask)


def k2(logprob: jax.Array, ref_logprob: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """d^2 / 2. As a loss its expected gradient is that of the KL divergence."""
  return 0.5 * jnp.square(_difference(logprob, ref_logprob, mask))


def k3(logprob: jax.Array, ref_logprob: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """exp(-d) - 1 + d. Unbiased and never negative."""
  d = _difference(logprob, ref_logprob, mask)
  return jnp.expm1(-d) + d  # expm1 keeps the digits that exp(-d) - 1 loses near d = 0


def absolute(
  logprob: jax.Array, ref_logprob: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
  """|d|, with gradient 0 at d = 0 as in torch (that of `jnp.abs` is 1 there)."""
  d = _difference(logprob, ref_logprob, mask)
  return jax.lax.stop_gradient(jnp.sign(d)) * d


KLS = {"none": none, "k1": k1, "k2": k2, "k3": k3, "abs": absolute}
