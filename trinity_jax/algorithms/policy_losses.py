"""Policy losses: one number per token, to be minimised.

A loss names the arrays it reads as positional parameters and its hyper-parameters as keyword-only
ones. All arrays have one shape X ([B, T] of packed or padded rows), float, read only where `mask`
(bool X) is True. It returns `(loss X, stats)` where `stats` is `dict[str, stats.Stat]`; both are 0
(or do not count) where `mask` is False. Averaging is not its business: see aggregation.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trinity_jax.algorithms import stats
from trinity_jax.algorithms.numerics import clamp, masked
from trinity_jax.errors import UserError

# e^20 is 5e8. Clamped as in verl and Trinity-RFT, so that exp stays finite; no gradient beyond.
MAX_LOG_RATIO = 20.0


def _check(name: str, value, low: float, high: float) -> None:
  # Traced hyper-parameters (vmap over a clip range) cannot be looked at.
  if isinstance(value, (int, float)) and not low <= value < high:
    raise UserError(f"{name} = {value!r}: expected a number in [{low}, {high})")


def ppo(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float | None = 3.0,
) -> tuple[jax.Array, dict[str, stats.Stat]]:
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

  Raises:
    UserError: a hyper-parameter outside its range.
  """
  _check("clip_low", clip_low, 0.0, 1.0 + 1e-9)
  _check("clip_high", clip_high, 0.0, float("inf"))
  if dual_clip is not None:
    _check("dual_clip", dual_clip, 1.0 + 1e-9, float("inf"))
  logprob, old_logprob, advantages = masked(mask, logprob, old_logprob, advantages)
  log_ratio = clamp(logprob - old_logprob, -MAX_LOG_RATIO, MAX_LOG_RATIO)
  ratio = jnp.exp(log_ratio)
  plain = -advantages * ratio
  clipped = -advantages * clamp(ratio, 1.0 - clip_low, 1.0 + clip_high)
  loss = jnp.maximum(plain, clipped)
  is_clipped = clipped > plain
  is_dual = jnp.zeros(jnp.shape(ratio), bool)
  if dual_clip is not None:
    bound = -advantages * dual_clip
    is_dual = (advantages < 0) & (loss > bound)
    loss = jnp.where(advantages < 0, jnp.minimum(loss, bound), loss)
  return loss, {
    "pg_clipfrac": stats.mean(is_clipped, mask),
    "pg_clipfrac_high": stats.mean(is_clipped & (advantages > 0), mask),
    "pg_clipfrac_low": stats.mean(is_clipped & (advantages < 0), mask),
    "pg_clipfrac_dual": stats.mean(is_dual, mask),
    **ratio_stats(log_ratio, mask),
  }


def ratio_stats(log_ratio: jax.Array, mask: jax.Array) -> dict[str, stats.Stat]:
  """How far the policy has moved from the one that sampled: k1 and k3 of KL(old || new), ratio."""
  ratio = jnp.exp(log_ratio)
  return {
    "ppo_kl": stats.mean(-log_ratio, mask),
    "ppo_kl_k3": stats.mean(jnp.expm1(log_ratio) - log_ratio, mask),
    "ratio/mean": stats.mean(ratio, mask),
    "ratio/max": stats.maximum(ratio, mask),
  }


def sft(logprob: jax.Array, mask: jax.Array) -> tuple[jax.Array, dict[str, stats.Stat]]:
  """-logprob: maximum likelihood of the tokens under `mask`."""
  (logprob,) = masked(mask, logprob)
  return -logprob, {"nll": stats.mean(-logprob, mask)}


POLICY_LOSSES = {"ppo": ppo, "sft": sft}
