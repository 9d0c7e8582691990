"""REC: REINFORCE with every combination of clipping, weighting and regularising (2509.24203)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trinity_jax.algorithms import stats
from trinity_jax.algorithms.numerics import clamp, masked
from trinity_jax.algorithms.policy_losses.common import (
  MAX_LOG_RATIO,
  POSITIVE,
  Loss,
  check,
  check_choice,
  clip_stats,
  log_ratio,
  ratio_stats,
  sequence_mean,
)
from trinity_jax.errors import UserError

CLIP_MODES = ("none", "two-side", "one-side", "gspo-one-side", "ring")
WEIGHTS = ("none", "importance_sampling", "gspo_importance_sampling", "advantage")
REGULARIZERS = ("none", "k2", "forward-kl")


def _outside(mode, ratio, sequence_ratio, advantages, inner, outer):
  low, high = 1.0 - inner[0], 1.0 + inner[1]
  if mode == "two-side":
    return (ratio < low) | (ratio > high)
  if mode in ("one-side", "gspo-one-side"):
    r = ratio if mode == "one-side" else sequence_ratio
    # At A = 0 either bound will do: there is no gradient.
    return ((advantages > 0) & (r > high)) | ((advantages < 0) & (r < low))
  if mode == "ring":
    inside = (ratio >= low) & (ratio <= high)
    inside |= (advantages >= 0) & (ratio <= 1.0 - outer[0])
    inside |= (advantages <= 0) & (ratio >= 1.0 + outer[1])
    return ~inside
  return jnp.zeros(ratio.shape, bool)


def rec(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  num_sequences: int,
  *,
  clip_mode: str = "none",
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  ring_low: float = 0.6,
  ring_high: float = 2.0,
  weight: str = "none",
  temp: float = 1.0,
  regularizer: str = "none",
  regularizer_coef: float = 0.0,
) -> Loss:
  """-A' logprob where the ratio is in range, else 0, plus a regulariser. arXiv 2509.24203.

  With r = e^(logprob - old) and s = exp(mean_t(logprob - old)) of the sequence, none of which is
  differentiated:
    clip_mode "two-side": in range for 1 - clip_low <= r <= 1 + clip_high; "one-side": r <= 1 +
    clip_high where A > 0, r >= 1 - clip_low where A < 0; "gspo-one-side": the same of s; "ring": in
    the band of "two-side", or A >= 0 and r <= 1 - ring_low, or A <= 0 and r >= 1 + ring_high.
    weight "importance_sampling": A' = A r; "gspo_importance_sampling": A s; "advantage":
    A e^(A/temp).
    regularizer "k2": + coef (logprob - old)^2; "forward-kl": - coef logprob. On every token.

  Args:
    logprob, old_logprob, advantages, mask: see ppo.
    sequence_index: int32 X, the token's sequence in [0, num_sequences).
    num_sequences: static.
    clip_mode, weight, regularizer: above; each goes with each.
    clip_low, clip_high, ring_low, ring_high: bounds of the ratio.
    temp: of the weight "advantage".
    regularizer_coef: above 0 where there is a regulariser.

  Raises:
    UserError: a hyper-parameter outside its range, a regulariser without a coefficient.
  """
  check_choice("clip_mode", clip_mode, CLIP_MODES)
  check_choice("weight", weight, WEIGHTS)
  check_choice("regularizer", regularizer, REGULARIZERS)
  for name, value in {"clip_low": clip_low, "ring_low": ring_low}.items():
    check(name, value, 0.0, 1.0 + 1e-9)
  for name, value in {"clip_high": clip_high, "ring_high": ring_high}.items():
    check(name, value, 0.0)
  check("temp", temp, POSITIVE)
  check("regularizer_coef", regularizer_coef, 0.0)
  if regularizer != "none" and isinstance(regularizer_coef, (int, float)) and regularizer_coef == 0:
    raise UserError(
      f"regularizer_coef = {regularizer_coef}: regularizer {regularizer!r} needs one above 0"
    )
  logprob, old_logprob, advantages = masked(mask, logprob, old_logprob, advantages)
  moved = log_ratio(logprob, old_logprob)
  ratio = jnp.exp(jax.lax.stop_gradient(moved))
  mean = sequence_mean(
    jax.lax.stop_gradient(logprob - old_logprob), mask, sequence_index, num_sequences
  )
  sequence_ratio = jnp.exp(clamp(mean, -MAX_LOG_RATIO, MAX_LOG_RATIO))
  outside = _outside(
    clip_mode, ratio, sequence_ratio, advantages, (clip_low, clip_high), (ring_low, ring_high)
  )
  factor = {
    "none": jnp.ones_like(ratio),
    "importance_sampling": ratio,
    "gspo_importance_sampling": sequence_ratio,
    "advantage": jnp.exp(clamp(advantages / temp, -MAX_LOG_RATIO, MAX_LOG_RATIO)),
  }[weight]
  loss = jnp.where(outside, 0, -advantages * factor * logprob)
  if regularizer == "k2":
    loss = loss + regularizer_coef * jnp.square(moved)
  elif regularizer == "forward-kl":
    loss = loss - regularizer_coef * logprob
  return loss, {
    **clip_stats(outside, advantages, mask),
    "rec/weight": stats.mean(factor, mask),
    "sequence_ratio/max": stats.maximum(sequence_ratio, mask),
    **ratio_stats(moved, mask),
  }
