"""What the policy losses share: ratios and their metrics, sequences."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trinity_jax.algorithms import stats
from trinity_jax.algorithms.numerics import clamp, sequence_sum
from trinity_jax.algorithms.options import choice as check_choice
from trinity_jax.algorithms.options import number as check

__all__ = [
  "INFINITY", "MAX_LOG_RATIO", "POSITIVE", "Loss", "check", "check_choice", "clip_stats",
  "log_ratio", "ratio_stats", "sequence_mean", "sequence_total", "to_tokens",
]  # fmt: skip

# e^20 is 5e8. Clamped as in verl and Trinity-RFT, so that exp stays finite; no gradient beyond.
MAX_LOG_RATIO = 20.0
INFINITY = float("inf")
POSITIVE = 1e-30  # smallest value of hyper-parameters that must be above 0

Loss = tuple[jax.Array, dict[str, stats.Stat]]


def log_ratio(logprob: jax.Array, old_logprob: jax.Array) -> jax.Array:
  """logprob - old_logprob within +-MAX_LOG_RATIO; both already masked."""
  return clamp(logprob - old_logprob, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def ratio_stats(log_ratio: jax.Array, mask: jax.Array) -> dict[str, stats.Stat]:
  """How far the policy has moved from the one that sampled: k1 and k3 of KL(old || new), ratio."""
  ratio = jnp.exp(log_ratio)
  return {
    "ppo_kl": stats.mean(-log_ratio, mask),
    "ppo_kl_k3": stats.mean(jnp.expm1(log_ratio) - log_ratio, mask),
    "ratio/mean": stats.mean(ratio, mask),
    "ratio/max": stats.maximum(ratio, mask),
  }


def clip_stats(
  is_clipped: jax.Array, advantages: jax.Array, mask: jax.Array
) -> dict[str, stats.Stat]:
  """Share of the tokens where `is_clipped`, and of those with A > 0 (high) and A < 0 (low)."""
  return {
    "pg_clipfrac": stats.mean(is_clipped, mask),
    "pg_clipfrac_high": stats.mean(is_clipped & (advantages > 0), mask),
    "pg_clipfrac_low": stats.mean(is_clipped & (advantages < 0), mask),
  }


def to_tokens(values: jax.Array, mask: jax.Array, sequence_index: jax.Array) -> jax.Array:
  """Gives every masked token (X) the value [N] of its sequence; 0 elsewhere."""
  return jnp.where(mask, values[jnp.where(mask, sequence_index, 0)], 0)


def sequence_total(
  x: jax.Array, mask: jax.Array, sequence_index: jax.Array, num_sequences: int
) -> jax.Array:
  """Sum of `x` over the masked tokens of a token's sequence; X, 0 where `mask` is False."""
  total = sequence_sum(x, mask, sequence_index, num_sequences)
  return to_tokens(total, mask, sequence_index)


def sequence_mean(
  x: jax.Array, mask: jax.Array, sequence_index: jax.Array, num_sequences: int
) -> jax.Array:
  """Mean of `x` over the masked tokens of a token's sequence; X, 0 where `mask` is False."""
  total = sequence_sum(x, mask, sequence_index, num_sequences)
  count = sequence_sum(jnp.ones_like(x), mask, sequence_index, num_sequences)
  return to_tokens(total / jnp.maximum(count, 1), mask, sequence_index)
