"""The weight of a KL penalty, adapted to a target."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trinity_jax.algorithms import options


def adapt(
  coef: jax.Array, kl: jax.Array, count: jax.Array, *, target: float, horizon: int
) -> jax.Array:
  """coef (1 + clip(kl / target - 1, -0.2, 0.2) count / horizon): Ziegler et al., arXiv 1909.08593.

  A fixed coefficient is this function not called.

  Args:
    coef: scalar, the weight in this step.
    kl: scalar, mean KL per token of the step.
    count: sequences of the step.
    target: KL to be held, above 0.
    horizon: sequences over which the weight moves.

  Returns:
    The next step's weight: never negative, and `coef` itself where `kl` is not finite.

  Raises:
    UserError: target or horizon out of range.
  """
  options.number("kl_target", target, 1e-30)
  options.number("kl_horizon", horizon, 1)
  error = jnp.clip(kl / target - 1, -0.2, 0.2)
  # A step of more sequences than 5 horizons would turn the sign.
  factor = jnp.maximum(1 + error * count / horizon, 0)
  return jnp.where(jnp.isfinite(kl), coef * factor, coef)
