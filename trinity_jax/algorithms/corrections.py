"""Off-policy corrections: weights for tokens that another policy or another program sampled.

With r = exp(log_weight), the ratio of the proximal policy (the one the loss clips against) to the
distribution that sampled, a correction returns per-token weights that multiply the policy loss:
ratios that were truncated, or 1 and 0 where tokens or whole sequences are rejected. They carry no
gradient, and rejected tokens stay in the denominators of the loss. Log ratios are clamped to
+-20 (of a whole sequence: after summing).

A correction reads one micro-batch. Those of sequences need sums over a sequence's own tokens only,
and a sequence is never split.

  token_tis       min(r, cap)
  sequence_tis    min(prod r, cap)
  geometric_tis   min(g, cap), g = (prod r)^(1 / length)
  icepop          r where low <= r <= high, else 0
  geometric_mask  1 where low <= g <= high, else 0
  sequence_mask   1 where low <= prod r <= high (or every r of the sequence is), else 0

Stats `correction/*`: `ess` of the weights (of tokens, or of sequences where the weight is the
sequence's), `truncated`, `rejected` (shares of tokens or sequences), `weight_mean`, `weight_max`,
and of the tokens' log ratios `k1` and `k3`, estimates of KL(sampling policy || proximal).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trinity_jax.algorithms import options, stats
from trinity_jax.algorithms.numerics import masked, sequence_sum

# e^20 is 5e8: beyond it a ratio says no more than "rejected" or "truncated".
MAX_LOG_RATIO = 20.0

Weights = tuple[jax.Array, dict[str, stats.Stat]]


def loglinear(
  logprob: jax.Array, old_logprob: jax.Array, versions: jax.Array, step: jax.Array, mask: jax.Array
) -> jax.Array:
  """Log-probs of a policy between the one that sampled and the current one (A-3PO, 2512.06547).

  log prox = old + (1 - 1/d) (sg(logprob) - old) for tokens of staleness d = step - version >= 1;
  sg(logprob) for d = 0, and for tokens that no policy of ours sampled (version -1). All arrays X.
  """
  logprob, old_logprob = masked(mask, logprob, old_logprob)
  current = jax.lax.stop_gradient(logprob)
  staleness = jnp.where(versions < 0, 0, step - versions)
  share = (1 - 1 / jnp.maximum(staleness, 1)).astype(current.dtype)
  # Not old + 1 x (current - old), which rounds.
  return jnp.where(staleness > 0, old_logprob + share * (current - old_logprob), current)


def _ratio(log_weight: jax.Array) -> jax.Array:
  return jnp.exp(jnp.clip(log_weight, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def _clean(log_weight, mask):
  return jax.lax.stop_gradient(masked(mask, log_weight)[0])


def _stats(log_weight, mask, weight, counted, truncated, rejected) -> dict[str, stats.Stat]:
  """`weight`, `truncated`, `rejected` over the units under `counted` (tokens or sequences)."""
  near = jnp.clip(log_weight, -MAX_LOG_RATIO, MAX_LOG_RATIO)
  return {
    "correction/ess": stats.effective_sample_size(weight, counted),
    "correction/truncated": stats.mean(truncated, counted),
    "correction/rejected": stats.mean(rejected, counted),
    "correction/weight_mean": stats.mean(weight, counted),
    "correction/weight_max": stats.maximum(weight, counted),
    "correction/k1": stats.mean(-near, mask),
    "correction/k3": stats.mean(jnp.expm1(near) - near, mask),
  }


def token_tis(log_weight: jax.Array, mask: jax.Array, *, cap: float = 2.0) -> Weights:
  """Truncated importance sampling by token: min(r, cap).

  Args:
    log_weight: X, proximal minus sampling log-prob.
    mask: bool X, action tokens.
    cap: largest weight.

  Returns:
    weights X (0 where masked), stats.
  """
  options.number("cap", cap, 1e-30)
  log_weight = _clean(log_weight, mask)
  ratio = _ratio(log_weight)
  weight = jnp.where(mask, jnp.minimum(ratio, cap), 0)
  none = jnp.zeros(ratio.shape, bool)
  return weight, _stats(log_weight, mask, weight, mask, ratio > cap, none)


def icepop(
  log_weight: jax.Array, mask: jax.Array, *, low: float = 0.5, high: float = 5.0
) -> Weights:
  """r where low <= r <= high, otherwise the token is rejected (IcePop).

  Args as in `token_tis`; low, high: the band.
  """
  options.band(low, high)
  log_weight = _clean(log_weight, mask)
  ratio = _ratio(log_weight)
  inside = (ratio >= low) & (ratio <= high)
  weight = jnp.where(mask & inside, ratio, 0)
  none = jnp.zeros(ratio.shape, bool)
  return weight, _stats(log_weight, mask, weight, mask, none, ~inside)


def _lengths(mask, sequence_index, num_sequences, dtype):
  ones = jnp.ones(jnp.shape(mask), dtype)
  return sequence_sum(ones, mask, sequence_index, num_sequences)


def _spread(values, mask, sequence_index):
  return jnp.where(mask, values[jnp.where(mask, sequence_index, 0)], 0)


def _sequence_tis(log_weight, mask, sequence_index, num_sequences, cap, geometric) -> Weights:
  options.number("cap", cap, 1e-30)
  log_weight = _clean(log_weight, mask)
  total = sequence_sum(log_weight, mask, sequence_index, num_sequences)
  length = _lengths(mask, sequence_index, num_sequences, total.dtype)
  ratio = _ratio(total / jnp.maximum(length, 1) if geometric else total)
  weight = jnp.minimum(ratio, cap)
  none = jnp.zeros(ratio.shape, bool)
  out = _stats(log_weight, mask, weight, length > 0, ratio > cap, none)
  return _spread(weight, mask, sequence_index), out


def sequence_tis(
  log_weight: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  num_sequences: int,
  *,
  cap: float = 3.0,
) -> Weights:
  """Truncated importance sampling by sequence: every token has min(product of r, cap).

  Args:
    log_weight, mask, cap: as in `token_tis`.
    sequence_index: i32 X, which sequence a token is of.
    num_sequences: static.
  """
  return _sequence_tis(log_weight, mask, sequence_index, num_sequences, cap, False)


def geometric_tis(
  log_weight: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  num_sequences: int,
  *,
  cap: float = 2.0,
) -> Weights:
  """Every token has min(g, cap), g the geometric mean of the sequence's r. Args: `sequence_tis`."""
  return _sequence_tis(log_weight, mask, sequence_index, num_sequences, cap, True)


def _reject(log_weight, mask, sequence_index, num_sequences, keep, cap) -> Weights:
  """Weight 1, or min(r, cap), for the tokens of sequences under `keep` [N]."""
  ratio = _ratio(log_weight)
  weight = jnp.ones_like(ratio) if cap is None else jnp.minimum(ratio, cap)
  over = jnp.zeros(ratio.shape, bool) if cap is None else ratio > cap
  kept = _spread(keep, mask, sequence_index).astype(bool)
  weight = jnp.where(kept, weight, 0)
  present = _lengths(mask, sequence_index, num_sequences, ratio.dtype) > 0
  return weight, {
    **_stats(log_weight, mask, weight, mask, over & kept, ~kept),
    "correction/rejected": stats.mean(~keep, present),
  }


def geometric_mask(
  log_weight: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  num_sequences: int,
  *,
  low: float = 0.99,
  high: float = 1.01,
  cap: float | None = None,
) -> Weights:
  """Rejects sequences whose geometric mean of r is outside [low, high].

  Args:
    log_weight, mask, sequence_index, num_sequences: as in `sequence_tis`.
    low, high: the band.
    cap: None gives kept tokens weight 1; a number gives them min(r, cap).
  """
  options.band(low, high)
  if cap is not None:
    options.number("cap", cap, 1e-30)
  log_weight = _clean(log_weight, mask)
  total = sequence_sum(log_weight, mask, sequence_index, num_sequences)
  length = _lengths(mask, sequence_index, num_sequences, total.dtype)
  mean = _ratio(total / jnp.maximum(length, 1))
  keep = (mean >= low) & (mean <= high)
  return _reject(log_weight, mask, sequence_index, num_sequences, keep, cap)


def sequence_mask(
  log_weight: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  num_sequences: int,
  *,
  by: str = "product",
  low: float = 0.5,
  high: float = 2.0,
  cap: float | None = None,
) -> Weights:
  """Rejects sequences whose product of r ("product") or any r of which ("token") is outside a band.

  Args:
    log_weight, mask, sequence_index, num_sequences, cap: as in `geometric_mask`.
    by: "product" or "token" (its largest and smallest r; with low = 1e-4 and a large high that is
      a veto of catastrophic tokens).
    low, high: the band.
  """
  options.choice("by", by, ("product", "token"))
  options.band(low, high)
  if cap is not None:
    options.number("cap", cap, 1e-30)
  log_weight = _clean(log_weight, mask)
  if by == "product":
    product = _ratio(sequence_sum(log_weight, mask, sequence_index, num_sequences))
    keep = (product >= low) & (product <= high)
  else:
    ratio = _ratio(log_weight)
    outside = ((ratio < low) | (ratio > high)).astype(ratio.dtype)
    keep = sequence_sum(outside, mask, sequence_index, num_sequences) == 0
  return _reject(log_weight, mask, sequence_index, num_sequences, keep, cap)


CORRECTIONS: dict[str, Callable[..., Any]] = {
  "token_tis": token_tis,
  "sequence_tis": sequence_tis,
  "geometric_tis": geometric_tis,
  "icepop": icepop,
  "geometric_mask": geometric_mask,
  "sequence_mask": sequence_mask,
}
