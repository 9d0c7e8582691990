"""Policy gradients -w A log p whose weight w is not differentiated, and the plain importance ratio.

Of such a loss only the gradient means something, not the value.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trinity_jax.algorithms import stats
from trinity_jax.algorithms.numerics import clamp, masked
from trinity_jax.algorithms.parts import by_option
from trinity_jax.algorithms.policy_losses.clipped import check_clip
from trinity_jax.algorithms.policy_losses.common import (
  POSITIVE,
  Loss,
  check,
  check_choice,
  clip_stats,
  log_ratio,
  ratio_stats,
  sequence_total,
)

_sg = jax.lax.stop_gradient


def reinforce(logprob: jax.Array, advantages: jax.Array, mask: jax.Array) -> Loss:
  """-A logprob: the policy gradient (Williams 1992), which takes all data for on-policy.

  Args:
    logprob: of the policy being trained (differentiated).
    advantages: per token.
    mask: bool, True at action tokens.
  """
  logprob, advantages = masked(mask, logprob, advantages)
  return -advantages * logprob, {"nll": stats.mean(-logprob, mask)}


def importance_sampling(
  logprob: jax.Array, old_logprob: jax.Array, advantages: jax.Array, mask: jax.Array
) -> Loss:
  """-A r, r = e^(logprob - old) with the logarithm within +-20 and no other bound.

  Args: see ppo.
  """
  logprob, old_logprob, advantages = masked(mask, logprob, old_logprob, advantages)
  moved = log_ratio(logprob, old_logprob)
  return -advantages * jnp.exp(moved), ratio_stats(moved, mask)


def cispo(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  clip_low: float = 1.0,
  clip_high: float = 0.28,
  mask_low: float | None = None,
  mask_high: float | None = None,
) -> Loss:
  """-A sg(clip(r, 1 - clip_low, 1 + clip_high)) logprob. CISPO, arXiv 2506.13585.

  No token loses its gradient, unless a mask is asked for: then the loss is 0 where
  A > 0 and r > 1 + mask_high, and where A < 0 and r < 1 - mask_low.

  Args:
    logprob, old_logprob, advantages, mask: see ppo.
    clip_low: 1 means no lower bound.
    clip_high: of the ratio.
    mask_low, mask_high: None for no mask on that side.

  Raises:
    UserError: a hyper-parameter outside its range.
  """
  check_clip(clip_low, clip_high)
  logprob, old_logprob, advantages = masked(mask, logprob, old_logprob, advantages)
  moved = log_ratio(logprob, old_logprob)
  ratio = _sg(jnp.exp(moved))
  weight = clamp(ratio, 1.0 - clip_low, 1.0 + clip_high)
  dropped = jnp.zeros(ratio.shape, bool)
  if mask_high is not None:
    check("mask_high", mask_high, 0.0)
    dropped |= (advantages > 0) & (ratio > 1.0 + mask_high)
  if mask_low is not None:
    check("mask_low", mask_low, 0.0, 1.0 + 1e-9)
    dropped |= (advantages < 0) & (ratio < 1.0 - mask_low)
  return jnp.where(dropped, 0, -advantages * weight * logprob), {
    **clip_stats(weight != ratio, advantages, mask),
    "pg_masked": stats.mean(dropped, mask),
    **ratio_stats(moved, mask),
  }


def _tapered(log_weight, logprob, advantages, moved, mask, threshold) -> Loss:
  weight = jnp.where(advantages <= threshold, jnp.exp(jnp.minimum(_sg(log_weight), 0)), 1)
  return -advantages * weight * logprob, {
    "topr/weight": stats.mean(weight, mask & (advantages <= threshold)),
    "topr/weight_min": stats.minimum(weight, mask),
    **ratio_stats(moved, mask),
  }


def topr_token(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  threshold: float = 0.0,
  variant: str = "trinity",
) -> Loss:
  """`topr` with the ratio of the token instead of the sequence's: as Trinity-RFT 0.6 released it.

  Args and raises: see topr.
  """
  check_choice("variant", variant, ("trinity",))
  logprob, old_logprob, advantages = masked(mask, logprob, old_logprob, advantages)
  moved = log_ratio(logprob, old_logprob)
  return _tapered(moved, logprob, advantages, moved, mask, threshold)


@by_option("variant", {"trinity": topr_token})
def topr(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  num_sequences: int,
  *,
  threshold: float = 0.0,
  variant: str = "paper",
) -> Loss:
  """-w A logprob, w = sg(min(1, pi(y) / mu(y))) where A <= threshold (a bad sequence), else 1.

  pi(y) / mu(y) = exp(sum_t(logprob - old)), the ratio of whole responses: TOPR, arXiv 2503.14286,
  with the truncation to [0, 1] that the paper recommends. Its "advantage" is the reward, negative
  for a failure.

  Args:
    logprob, old_logprob, advantages, mask: see ppo.
    sequence_index: int32 X, the token's sequence in [0, num_sequences).
    num_sequences: static.
    threshold: largest advantage that counts as bad.
    variant: "paper", or "trinity" for `topr_token` (by name, in configs and policy_loss()).

  Raises:
    UserError: unknown variant.
  """
  check_choice("variant", variant, ("paper",))
  logprob, old_logprob, advantages = masked(mask, logprob, old_logprob, advantages)
  moved = logprob - old_logprob
  whole = sequence_total(moved, mask, sequence_index, num_sequences)
  return _tapered(
    whole, logprob, advantages, log_ratio(logprob, old_logprob), mask, threshold
  )  # fmt: skip


def opmd(logprob: jax.Array, advantages: jax.Array, mask: jax.Array, *, tau: float = 1.0) -> Loss:
  """-A logprob / (1 + tau): the policy gradient step of online policy mirror descent.

  In the form of arXiv 2509.24203 (after Kimi k1.5, arXiv 2501.12599); the advantage is opmd's.

  Args:
    logprob: of the policy being trained (differentiated).
    advantages: per token.
    mask: bool, True at action tokens.
    tau: temperature of the mirror step.

  Raises:
    UserError: tau below 0.
  """
  check("tau", tau, 0.0)
  logprob, advantages = masked(mask, logprob, advantages)
  return -advantages * logprob / (1.0 + tau), {"nll": stats.mean(-logprob, mask)}


def sppo(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  eps: float = 0.3,
) -> Loss:
  """-A (logprob - old) where 1 / (1 + eps) <= r <= 1 + eps, else 0. Softmax PPO, arXiv 2108.05828.

  Args:
    logprob, old_logprob, advantages, mask: see ppo.
    eps: half-width of the range of ratios.

  Raises:
    UserError: eps below 0.
  """
  check("eps", eps, 0.0)
  logprob, old_logprob, advantages = masked(mask, logprob, old_logprob, advantages)
  moved = log_ratio(logprob, old_logprob)
  ratio = jnp.exp(moved)
  outside = (ratio < 1.0 / (1.0 + eps)) | (ratio > 1.0 + eps)
  return jnp.where(outside, 0, -advantages * moved), {
    **clip_stats(outside, advantages, mask),
    **ratio_stats(moved, mask),
  }


def _within(dropped, moved, advantages, mask, truncate) -> Loss:
  ratio = jnp.exp(moved)
  if truncate is not None:
    check("truncate", truncate, POSITIVE)
    # e^(logprob - old) with the weight of its gradient bounded, too.
    ratio = ratio * _sg(jnp.minimum(ratio, truncate) / ratio)
  return jnp.where(dropped, 0, -advantages * ratio), {
    "dppo/masked": stats.mean(dropped, mask),
    "dppo/masked_high": stats.mean(dropped & (advantages > 0), mask),
    "dppo/masked_low": stats.mean(dropped & (advantages < 0), mask),
    **ratio_stats(moved, mask),
  }


def dppo_tv(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  delta_low: float = 0.15,
  delta_high: float = 0.15,
  truncate: float | None = None,
) -> Loss:
  """-A r, but 0 where the token's probability has moved too far in the direction A pushes it.

  With p = e^logprob and q = e^old: 0 where A > 0 and p - q > delta_high, and where A < 0 and
  q - p > delta_low. |p - q| is the total variation of the two-way choice "this token or another":
  DPPO with the binary TV mask, arXiv 2602.04879.

  Args:
    logprob, old_logprob, advantages, mask: see ppo.
    delta_low, delta_high: bounds of the probability's change; the defaults are those of the
      authors' recipe.
    truncate: upper bound of the ratio as a weight (truncated importance sampling); None for none.

  Raises:
    UserError: a hyper-parameter outside its range.
  """
  check("delta_low", delta_low, 0.0)
  check("delta_high", delta_high, 0.0)
  logprob, old_logprob, advantages = masked(mask, logprob, old_logprob, advantages)
  change = jnp.exp(_sg(logprob)) - jnp.exp(old_logprob)
  dropped = ((advantages > 0) & (change > delta_high)) | ((advantages < 0) & (-change > delta_low))
  return _within(dropped, log_ratio(logprob, old_logprob), advantages, mask, truncate)


def binary_kl(logprob: jax.Array, old_logprob: jax.Array) -> jax.Array:
  """KL(q || p) of "this token or another", q = e^old_logprob, p = e^logprob; nats, no gradient.

  q log(q/p) + (1 - q) log((1 - q) / (1 - p)), with the other tokens' probability at least the
  smallest normal number.
  """
  logprob, old_logprob = _sg(logprob), _sg(old_logprob)
  tiny = jnp.finfo(logprob.dtype).tiny
  others, old_others = (jnp.maximum(-jnp.expm1(x), tiny) for x in (logprob, old_logprob))
  return jnp.exp(old_logprob) * (old_logprob - logprob) + old_others * (
    jnp.log(old_others) - jnp.log(others)
  )


def dppo_kl(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  delta_low: float = 0.05,
  delta_high: float = 0.05,
  truncate: float | None = None,
) -> Loss:
  """`dppo_tv` with `binary_kl` in place of the total variation.

  0 where A > 0, r > 1 and the KL exceeds delta_high, and where A < 0, r < 1 and it exceeds
  delta_low: DPPO with the binary KL mask, arXiv 2602.04879.

  Args and raises: see dppo_tv; delta_low and delta_high are in nats.
  """
  check("delta_low", delta_low, 0.0)
  check("delta_high", delta_high, 0.0)
  logprob, old_logprob, advantages = masked(mask, logprob, old_logprob, advantages)
  moved = log_ratio(logprob, old_logprob)
  divergence = binary_kl(logprob, old_logprob)
  up = (advantages > 0) & (moved > 0) & (divergence > delta_high)
  down = (advantages < 0) & (moved < 0) & (divergence > delta_low)
  return _within(up | down, moved, advantages, mask, truncate)
