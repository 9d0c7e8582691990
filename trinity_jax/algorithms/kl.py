"""Per-token estimates of KL(policy || reference), with d = logprob - ref_logprob.

k1, k2, k3 are those of http://joschu.net/blog/kl-approx.html. All arrays have one shape X; the
result is float, 0 where `mask` is False; `mask=None` means every position counts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trinity_jax.algorithms.numerics import clamp, masked
from trinity_jax.errors import UserError


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


def low_var_kl(
  logprob: jax.Array, ref_logprob: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
  """k3 with d within +-20 and the result at most 10; no gradient beyond."""
  d = clamp(_difference(logprob, ref_logprob, mask), -20.0, 20.0)
  return clamp(jnp.expm1(-d) + d, -10.0, 10.0)


def corrected_k3(
  logprob: jax.Array,
  ref_logprob: jax.Array,
  old_logprob: jax.Array,
  mask: jax.Array | None = None,
  *,
  max_ratio: float = 2.0,
) -> jax.Array:
  """min(e^(logprob - old), max_ratio) k3: unbiased, and in its gradient too, for data of an older
  policy up to the bound.

  The ratio is differentiated with the rest (DeepSeek-V3.2, arXiv 2512.02556). Both logarithms are
  kept within +-20, without gradient beyond.

  Raises:
    UserError: max_ratio not above 0.
  """
  if isinstance(max_ratio, (int, float)) and not max_ratio > 0:
    raise UserError(f"max_ratio = {max_ratio!r}: expected a number above 0")
  moved = clamp(_difference(logprob, old_logprob, mask), -20.0, 20.0)
  d = clamp(_difference(logprob, ref_logprob, mask), -20.0, 20.0)
  return clamp(jnp.exp(moved), 0.0, max_ratio) * (jnp.expm1(-d) + d)


KLS = {
  "none": none,
  "k1": k1,
  "k2": k2,
  "k3": k3,
  "abs": absolute,
  "low_var_kl": low_var_kl,
  "corrected_k3": corrected_k3,
}
