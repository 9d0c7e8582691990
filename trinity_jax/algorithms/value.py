"""The critic's loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trinity_jax.algorithms import options, stats
from trinity_jax.algorithms.numerics import clamp, masked


def value_loss(
  values: jax.Array,
  old_values: jax.Array,
  returns: jax.Array,
  mask: jax.Array,
  *,
  clip: float | None = 0.2,
) -> tuple[jax.Array, dict[str, stats.Stat]]:
  """max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2) / 2 per token.

  The clipped value loss that goes with PPO (arXiv 1707.06347; the clip is its authors'
  implementation's). Ties follow torch: a value exactly at a bound counts as inside, and where both
  squares are equal outside the band half the gradient passes.

  Args:
    values: X, under the critic being trained (differentiated).
    old_values: X, under the critic as it was when the advantages were computed.
    returns: X, targets (`advantages.value_targets`).
    mask: bool X, action tokens.
    clip: largest change of a value that the loss rewards; None for a plain squared error.

  Returns:
    loss X, 0 where masked; stats `vf_clipfrac`, `vf_explained_var` (of the values being trained).
  """
  values, old_values, returns = masked(mask, values, old_values, returns)
  plain = jnp.square(values - returns)
  loss, clipped = plain, jnp.zeros(plain.shape, bool)
  if clip is not None:
    options.number("clip", clip, 0.0)
    near = jnp.square(clamp(values, old_values - clip, old_values + clip) - returns)
    loss, clipped = jnp.maximum(plain, near), near > plain
  return 0.5 * loss, {
    "vf_clipfrac": stats.mean(clipped, mask),
    "vf_explained_var": stats.explained_variance(values, returns, mask),
  }
