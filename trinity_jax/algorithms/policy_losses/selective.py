"""Losses that pick tokens by statistics of the whole optimizer step: M2PO, Clip-Cov, KL-Cov.

The picking is a companion (see parts.whole_step): it sees all tokens of the step, under the policy
as it is when the step begins, and does not depend on how the step is laid out or split.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trinity_jax.algorithms import stats
from trinity_jax.algorithms.numerics import masked
from trinity_jax.algorithms.parts import whole_step
from trinity_jax.algorithms.policy_losses.clipped import check_clip, surrogate
from trinity_jax.algorithms.policy_losses.common import (
  POSITIVE,
  Loss,
  check,
  clip_stats,
  log_ratio,
  ratio_stats,
)


def m2po_keep(
  prox_logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  tau: float = 0.04,
) -> jax.Array:
  """Which tokens M2PO trains on: bool X.

  Candidates for masking are the tokens that already went where their advantage pushes them (A > 0
  and r > 1, or A < 0 and r < 1). Of these the ones with the smallest (log r)^2 are kept, as many as
  have a mean of at most tau; equal values are kept or dropped together. All others are kept.
  """
  check("tau", tau, 0.0)
  mask = jnp.asarray(mask, bool)
  prox_logprob, old_logprob, advantages = masked(mask, prox_logprob, old_logprob, advantages)
  moved = prox_logprob - old_logprob
  square = jnp.square(log_ratio(prox_logprob, old_logprob))
  candidate = ((advantages > 0) & (moved > 0)) | ((advantages < 0) & (moved < 0))
  rising = jnp.sort(jnp.where(candidate, square, jnp.inf), axis=None)
  count = jnp.arange(1, rising.size + 1)
  mean = jnp.cumsum(jnp.where(jnp.isfinite(rising), rising, 0)) / count
  last = jnp.append(rising[1:] > rising[:-1], True)  # of its equals
  fits = jnp.isfinite(rising) & last & (mean <= tau)
  largest = jnp.max(jnp.where(fits, rising, -1), initial=-1)
  return mask & (~candidate | (square <= largest))


@whole_step(kept=m2po_keep)
def m2po(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  kept: jax.Array,
  *,
  tau: float = 0.04,
) -> Loss:
  """-A r on the tokens that `m2po_keep` keeps, 0 elsewhere. M2PO, arXiv 2510.01161.

  The trust region is a bound on the second moment of log r over the step, which far fewer tokens
  violate than a clip range. Dropped tokens still count in the aggregation's denominators.

  Args:
    logprob, old_logprob, advantages, mask: see ppo.
    kept: bool X, from `m2po_keep`.
    tau: bound of the second moment.

  Raises:
    UserError: tau below 0.
  """
  check("tau", tau, 0.0)
  logprob, old_logprob, advantages = masked(mask, logprob, old_logprob, advantages)
  moved = log_ratio(logprob, old_logprob)
  dropped = ~jnp.asarray(kept, bool)
  return jnp.where(dropped, 0, -advantages * jnp.exp(moved)), {
    "m2po/masked": stats.mean(dropped, mask),
    "m2po/second_moment": stats.mean(jnp.square(moved), jnp.asarray(mask, bool) & ~dropped),
    **ratio_stats(moved, mask),
  }


def _place(mask, sequence_index, num_sequences):
  """(sequence, place in it) of every token: names that do not depend on the layout."""
  order = jnp.cumsum(mask.reshape(-1), dtype=jnp.int32).reshape(mask.shape)
  sequence = jnp.where(mask, sequence_index, 0).astype(jnp.int32)
  first = jnp.full(num_sequences, mask.size + 1, jnp.int32)
  first = first.at[jnp.where(mask, sequence, num_sequences)].min(order, mode="drop")
  return sequence, jnp.where(mask, order - first[sequence], 0)


def _first(value, place, count):
  """The `count` tokens with the smallest `value`, equal ones in the order of `place`: bool X."""
  flat = [x.reshape(-1) for x in (value, *place)]
  index = jnp.arange(flat[0].size, dtype=jnp.int32)
  *_, index = jax.lax.sort((*flat, index), num_keys=3)
  picked = jnp.zeros(index.shape, bool).at[index].set(jnp.arange(index.size) < count)
  return picked.reshape(value.shape)


def covariance(logprob: jax.Array, advantages: jax.Array, mask: jax.Array) -> jax.Array:
  """(A - mean A) (logprob - mean logprob) per token, means over `mask`; 0 where it is False."""
  logprob, advantages = masked(mask, logprob, advantages)
  count = jnp.maximum(jnp.sum(mask, dtype=logprob.dtype), 1)
  a, b = (jnp.where(mask, x - jnp.sum(x) / count, 0) for x in (advantages, logprob))
  return a * b


def _share(ratio, mask):
  # At least one, as in the authors' program.
  size = jnp.sum(mask, dtype=jnp.result_type(float))
  return jnp.maximum(jnp.floor(ratio * size), 1)


def clip_cov_select(
  prox_logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  num_sequences: int,
  key: jax.Array,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  cov_ratio: float = 2e-4,
  cov_low: float = 1.0,
  cov_high: float = 5.0,
) -> jax.Array:
  """Which tokens Clip-Cov takes the gradient from: bool X.

  cov_ratio of the step's tokens (at least one), at random among those whose covariance is in
  (cov_low, cov_high) and which the clip range leaves alone. What is drawn for a token depends on
  `key`, its sequence and its place there.
  """
  check("cov_ratio", cov_ratio, POSITIVE, 1.0 + 1e-9)
  check("cov_high", cov_high, cov_low)
  mask = jnp.asarray(mask, bool)
  cov = covariance(prox_logprob, advantages, mask)
  prox_logprob, old_logprob, advantages = masked(mask, prox_logprob, old_logprob, advantages)
  ratio = jnp.exp(log_ratio(prox_logprob, old_logprob))
  _, is_clipped = surrogate(ratio, advantages, clip_low, clip_high)
  eligible = mask & ~is_clipped & (cov > cov_low) & (cov < cov_high)
  place = _place(mask, sequence_index, num_sequences)
  draw = jax.vmap(
    lambda s, t: jax.random.bits(
      jax.random.fold_in(jax.random.fold_in(key, s), t), dtype=jnp.uint32
    )
  )
  bits = draw(*(x.reshape(-1) for x in place)).reshape(mask.shape)
  # Halved, so that no eligible token draws the number of those that are not.
  bits = jnp.where(eligible, bits // 2, jnp.uint32(2**32 - 1))
  return eligible & _first(bits, place, _share(cov_ratio, mask))


@whole_step(selected=clip_cov_select)
def clip_cov(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  selected: jax.Array,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  cov_ratio: float = 2e-4,
  cov_low: float = 1.0,
  cov_high: float = 5.0,
) -> Loss:
  """PPO's clipped surrogate (no dual clip), 0 at the tokens that `clip_cov_select` selects.

  Clip-Cov, arXiv 2505.22617: tokens whose log-prob and advantage covary strongly are what makes the
  entropy collapse, so a few of them are left out of each step.

  Args:
    logprob, old_logprob, advantages, mask, clip_low, clip_high: see ppo.
    selected: bool X, from `clip_cov_select`.
    cov_ratio: share of the step's tokens to leave out.
    cov_low, cov_high: covariances between which they are chosen.

  Raises:
    UserError: a hyper-parameter outside its range.
  """
  check_clip(clip_low, clip_high)
  logprob, old_logprob, advantages = masked(mask, logprob, old_logprob, advantages)
  moved = log_ratio(logprob, old_logprob)
  loss, is_clipped = surrogate(jnp.exp(moved), advantages, clip_low, clip_high)
  selected = jnp.asarray(selected, bool)
  return jnp.where(selected, 0, loss), {
    **clip_stats(is_clipped, advantages, mask),
    "cov/selected": stats.mean(selected, mask),
    **ratio_stats(moved, mask),
  }


def kl_cov_select(
  prox_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  num_sequences: int,
  *,
  cov_ratio: float = 2e-4,
) -> jax.Array:
  """The cov_ratio of the step's tokens (at least one) with the largest covariance: bool X.

  Of equal ones the earlier in (sequence, place) come first.
  """
  check("cov_ratio", cov_ratio, POSITIVE, 1.0 + 1e-9)
  mask = jnp.asarray(mask, bool)
  cov = covariance(prox_logprob, advantages, mask)
  place = _place(mask, sequence_index, num_sequences)
  return mask & _first(jnp.where(mask, -cov, jnp.inf), place, _share(cov_ratio, mask))


@whole_step(selected=kl_cov_select)
def kl_cov(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  selected: jax.Array,
  *,
  cov_ratio: float = 2e-4,
  cov_kl_coef: float = 1.0,
) -> Loss:
  """-A r without a clip, plus cov_kl_coef |logprob - old| at the tokens of `kl_cov_select`.

  KL-Cov, arXiv 2505.22617: see clip_cov; here the tokens are held where they are instead.

  Args:
    logprob, old_logprob, advantages, mask: see ppo.
    selected: bool X, from `kl_cov_select`.
    cov_ratio: share of the step's tokens to hold.
    cov_kl_coef: of their penalty.

  Raises:
    UserError: a hyper-parameter outside its range.
  """
  check("cov_kl_coef", cov_kl_coef, 0.0)
  logprob, old_logprob, advantages = masked(mask, logprob, old_logprob, advantages)
  moved = log_ratio(logprob, old_logprob)
  selected = jnp.asarray(selected, bool)
  distance = jax.lax.stop_gradient(jnp.sign(moved)) * moved
  penalty = jnp.where(selected, cov_kl_coef * distance, 0)
  return -advantages * jnp.exp(moved) + penalty, {
    "cov/selected": stats.mean(selected, mask),
    "cov/distance": stats.mean(distance, jnp.asarray(mask, bool) & selected),
    **ratio_stats(moved, mask),
  }
