"""Surrogates -A r whose ratio r is clipped, hard or softly: PPO, GSPO, GMPO, SAPO."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trinity_jax.algorithms import stats
from trinity_jax.algorithms.numerics import clamp, masked
from trinity_jax.algorithms.parts import by_option
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


def check_clip(clip_low, clip_high) -> None:
  """Raises UserError unless [1 - clip_low, 1 + clip_high] is a range of ratios around 1."""
  check("clip_low", clip_low, 0.0, 1.0 + 1e-9)
  check("clip_high", clip_high, 0.0)


def surrogate(
  ratio: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array]:
  """(max(-A r, -A clip(r)), whether the clipped one is larger)."""
  plain = -advantages * ratio
  clipped = -advantages * clamp(ratio, 1.0 - clip_low, 1.0 + clip_high)
  return jnp.maximum(plain, clipped), clipped > plain


def ppo_sequence_mask(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  num_sequences: int,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float | None = 3.0,
  fallback_to_policy_gradient: bool = False,
  sequence_masking: bool = True,
  delta: float = 0.1,
) -> Loss:
  """`ppo`, but 0 at tokens with A < 0 of sequences that the policy has left behind.

  Those are the ones with mean_t(old_logprob - logprob) > delta, a k1 estimate of KL(old || new):
  off-policy sequence masking of DeepSeek-V3.2. In a config: policy loss ppo with
  `sequence_masking: true`.

  Args:
    logprob, old_logprob, advantages, mask, clip_low, clip_high, dual_clip,
      fallback_to_policy_gradient: see ppo.
    sequence_index: int32 X, the token's sequence in [0, num_sequences).
    num_sequences: static.
    sequence_masking: True; False is `ppo`.
    delta: largest mean of old_logprob - logprob that is kept, nats per token.

  Raises:
    UserError: a hyper-parameter outside its range.
  """
  if sequence_masking is not True:
    raise UserError(f"sequence_masking = {sequence_masking!r}: expected True; without it call ppo")
  check("delta", delta, 0.0)
  loss, out = ppo(
    logprob, old_logprob, advantages, mask, clip_low=clip_low, clip_high=clip_high,
    dual_clip=dual_clip, fallback_to_policy_gradient=fallback_to_policy_gradient,
  )  # fmt: skip
  logprob, old_logprob, advantages = masked(mask, logprob, old_logprob, advantages)
  behind = jax.lax.stop_gradient(-log_ratio(logprob, old_logprob))
  behind = sequence_mean(behind, mask, sequence_index, num_sequences)
  dropped = (advantages < 0) & (behind > delta)
  return jnp.where(dropped, 0, loss), {**out, "pg_sequence_masked": stats.mean(dropped, mask)}


@by_option("sequence_masking", {True: ppo_sequence_mask})
def ppo(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float | None = 3.0,
  fallback_to_policy_gradient: bool = False,
  sequence_masking: bool = False,
) -> Loss:
  """Clipped surrogate: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), r = e^(logprob - old).

  Where A < 0 the loss is at most -A dual_clip. PPO: arXiv 1707.06347; clip_high above clip_low
  ("clip-higher"): DAPO, arXiv 2503.14476; dual clip: arXiv 1912.09729.

  Gradients at ties are torch's: a ratio exactly at a bound still counts as inside; at r = dual_clip
  half the gradient passes.

  Args:
    logprob: of the policy being trained (differentiated).
    old_logprob: of the policy that sampled the token.
    advantages: per token.
    mask: bool, True at action tokens.
    clip_low: the ratio's lower bound is 1 - clip_low.
    clip_high: the ratio's upper bound is 1 + clip_high.
    dual_clip: bound on the ratio where A < 0, above 1; None for no bound.
    fallback_to_policy_gradient: takes r = e^(logprob - sg(logprob)), which is 1 with the gradient
      of the plain policy gradient; old_logprob then serves the metrics only.
    sequence_masking: True selects `ppo_sequence_mask` (by name, in configs and policy_loss()).

  Raises:
    UserError: a hyper-parameter outside its range.
  """
  if sequence_masking is not False:
    raise UserError(
      f"sequence_masking = {sequence_masking!r}: expected False; ppo_sequence_mask is that function"
    )
  check_clip(clip_low, clip_high)
  if dual_clip is not None:
    check("dual_clip", dual_clip, 1.0 + 1e-9)
  logprob, old_logprob, advantages = masked(mask, logprob, old_logprob, advantages)
  moved = log_ratio(logprob, old_logprob)
  own = logprob - jax.lax.stop_gradient(logprob)
  ratio = jnp.exp(own if fallback_to_policy_gradient else moved)
  loss, is_clipped = surrogate(ratio, advantages, clip_low, clip_high)
  is_dual = jnp.zeros(jnp.shape(ratio), bool)
  if dual_clip is not None:
    bound = -advantages * dual_clip
    is_dual = (advantages < 0) & (loss > bound)
    loss = jnp.where(advantages < 0, jnp.minimum(loss, bound), loss)
  return loss, {
    **clip_stats(is_clipped, advantages, mask),
    "pg_clipfrac_dual": stats.mean(is_dual, mask),
    **ratio_stats(moved, mask),
  }


def _sequence_surrogate(log_sequence, moved, advantages, mask, clip_low, clip_high) -> Loss:
  ratio = jnp.exp(clamp(log_sequence, -MAX_LOG_RATIO, MAX_LOG_RATIO))
  loss, is_clipped = surrogate(ratio, advantages, clip_low, clip_high)
  return jnp.where(mask, loss, 0), {
    **clip_stats(is_clipped, advantages, mask),
    "sequence_ratio/mean": stats.mean(ratio, mask),
    "sequence_ratio/max": stats.maximum(ratio, mask),
    **ratio_stats(clamp(moved, -MAX_LOG_RATIO, MAX_LOG_RATIO), mask),
  }


def gspo(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  num_sequences: int,
  *,
  clip_low: float = 3e-4,
  clip_high: float = 4e-4,
) -> Loss:
  """max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high)), s = exp(mean_t(logprob - old)).

  Every token of a sequence has its sequence's s, differentiated through all of them: GSPO, arXiv
  2507.18071. With aggregation seq-mean-token-mean the loss is the paper's.

  Args:
    logprob, old_logprob, advantages, mask: see ppo.
    sequence_index: int32 X, the token's sequence in [0, num_sequences).
    num_sequences: static.
    clip_low, clip_high: of s, whose spread is much smaller than a token's ratio's.

  Raises:
    UserError: a hyper-parameter outside its range.
  """
  check_clip(clip_low, clip_high)
  logprob, old_logprob, advantages = masked(mask, logprob, old_logprob, advantages)
  moved = logprob - old_logprob
  log_sequence = sequence_mean(moved, mask, sequence_index, num_sequences)
  return _sequence_surrogate(log_sequence, moved, advantages, mask, clip_low, clip_high)


def gspo_token(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  num_sequences: int,
  *,
  clip_low: float = 3e-4,
  clip_high: float = 4e-4,
) -> Loss:
  """`gspo` with s_t = sg(s) e^(logprob - sg(logprob)): the sequence's ratio, a token's gradient.

  arXiv 2507.18071. Equal to `gspo` in value, and, where a sequence's advantages are
  equal, in gradient under seq-mean-token-mean; it differs where they are not.

  Args and raises: see gspo.
  """
  check_clip(clip_low, clip_high)
  logprob, old_logprob, advantages = masked(mask, logprob, old_logprob, advantages)
  moved = logprob - old_logprob
  mean = sequence_mean(jax.lax.stop_gradient(moved), mask, sequence_index, num_sequences)
  log_sequence = logprob - jax.lax.stop_gradient(logprob) + mean
  return _sequence_surrogate(log_sequence, moved, advantages, mask, clip_low, clip_high)


def gmpo(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  num_sequences: int,
  *,
  clip_low: float = 0.4,
  clip_high: float = 0.4,
) -> Loss:
  """-A exp(mean_t c_t), the geometric mean of a sequence's clipped token ratios.

  c_t = min(logprob - old, clip_high) where A > 0, max(logprob - old, -clip_low) where A < 0. GMPO,
  arXiv 2507.20673, whose range of ratios is (e^-0.4, e^0.4). With aggregation seq-mean-token-mean
  the loss is the paper's.

  Args:
    logprob, old_logprob, advantages, mask: see ppo; the paper's advantages are equal over a
      sequence.
    sequence_index: int32 X, the token's sequence in [0, num_sequences).
    num_sequences: static.
    clip_low, clip_high: bounds of the logarithm of a token's ratio.

  Raises:
    UserError: a hyper-parameter outside its range.
  """
  check("clip_low", clip_low, 0.0)
  check("clip_high", clip_high, 0.0)
  logprob, old_logprob, advantages = masked(mask, logprob, old_logprob, advantages)
  moved = logprob - old_logprob
  too_high = (advantages > 0) & (moved > clip_high)
  too_low = (advantages < 0) & (moved < -clip_low)
  bounded = jnp.where(too_high, clip_high, jnp.where(too_low, -clip_low, moved))
  mean = sequence_mean(bounded.astype(moved.dtype), mask, sequence_index, num_sequences)
  ratio = jnp.exp(clamp(mean, -MAX_LOG_RATIO, MAX_LOG_RATIO))
  return jnp.where(mask, -advantages * ratio, 0), {
    **clip_stats(too_high | too_low, advantages, mask),
    "sequence_ratio/mean": stats.mean(ratio, mask),
    "sequence_ratio/max": stats.maximum(ratio, mask),
    **ratio_stats(clamp(moved, -MAX_LOG_RATIO, MAX_LOG_RATIO), mask),
  }


def sapo(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  tau_pos: float = 1.0,
  tau_neg: float = 1.05,
  variant: str = "paper",
) -> Loss:
  """-A f(r), f(r) = 4/tau sigmoid(tau (r - 1)): a clip without an edge. SAPO, arXiv 2511.20347.

  Its weight on r grad log p is 4 sigmoid (1 - sigmoid), 1 at r = 1 and falling to both sides.

  Args:
    logprob, old_logprob, advantages, mask: see ppo.
    tau_pos: tau where A > 0.
    tau_neg: tau elsewhere; above tau_pos it makes the gradients of bad tokens fade sooner.
    variant: "paper", or "trinity": -A sg(f(r)) logprob as Trinity-RFT 0.6 released it, whose
      weight grows with r (2/tau at r = 1, 4/tau far above).

  Raises:
    UserError: a hyper-parameter outside its range.
  """
  check("tau_pos", tau_pos, POSITIVE)
  check("tau_neg", tau_neg, POSITIVE)
  check_choice("variant", variant, ("paper", "trinity"))
  logprob, old_logprob, advantages = masked(mask, logprob, old_logprob, advantages)
  moved = log_ratio(logprob, old_logprob)
  tau = jnp.where(advantages > 0, tau_pos, tau_neg).astype(moved.dtype)
  gate = jax.nn.sigmoid(tau * jnp.expm1(moved))
  value = 4 / tau * gate
  if variant == "trinity":
    value = jax.lax.stop_gradient(value) * logprob
  return -advantages * value, {
    "sapo/slope": stats.mean(4 * gate * (1 - gate), mask),
    **ratio_stats(moved, mask),
  }
