"""GRPO without the tokens that would change the policy's entropy most: clip-B and clip-V.

arXiv 2602.03392. S = p (H + log p) says how a step on a sampled token changes the entropy H of its
distribution: raising a token with S above its expectation lowers H. Both drop tokens (advantage 0)
with A < 0 only; tokens with A = 0 have no gradient and are not counted as dropped. They stay in
the denominators of the loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trinity_jax.algorithms import options, stats
from trinity_jax.algorithms.advantages.common import advantage_stats, live, to_tokens
from trinity_jax.algorithms.advantages.group import grpo
from trinity_jax.algorithms.numerics import masked


def score(prox_logprob: jax.Array, prox_entropy: jax.Array, mask: jax.Array) -> jax.Array:
  """S = p (H + log p) of every token, X, 0 where masked."""
  logprob, entropy = masked(mask, prox_logprob, prox_entropy)
  return jnp.where(mask, jnp.exp(jnp.minimum(logprob, 0)) * (entropy + logprob), 0)


def _mean_and_std(x, mask):
  count = jnp.maximum(jnp.sum(mask, dtype=x.dtype), 1)
  mean = jnp.sum(jnp.where(mask, x, 0)) / count
  return mean, jnp.sqrt(jnp.sum(jnp.where(mask, jnp.square(x - mean), 0)) / count)


def _dropped(advantages, drop, mask, out):
  negative = mask & (advantages < 0)
  kept = jnp.where(drop, 0, advantages)
  return kept, {
    **out,
    "entropy_clip/dropped": stats.mean(drop, mask),
    "entropy_clip/dropped_negative": stats.mean(drop, negative),
    **advantage_stats(kept, mask),
  }


def clipb(
  rewards: jax.Array,
  group_ids: jax.Array,
  valid: jax.Array,
  num_groups: int,
  prox_logprob: jax.Array,
  prox_entropy: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  *,
  mu: float = 2.5,
  eps: float = 1e-6,
  std: bool = True,
) -> tuple[jax.Array, dict[str, stats.Stat]]:
  """GRPO (`eps`, `std`) without the tokens with A < 0 and S - mean(S) < -mu std(S).

  Mean and population standard deviation are over all action tokens of the step.
  """
  options.number("mu", mu, 0.0)
  per_sequence, out = grpo(rewards, group_ids, valid, num_groups, eps=eps, std=std)
  mask = live(mask, sequence_index, valid)
  advantages = to_tokens(per_sequence, mask, sequence_index)
  s = score(prox_logprob, prox_entropy, mask)
  mean, deviation = _mean_and_std(s, mask)
  drop = mask & (advantages < 0) & (s - mean < -mu * deviation) & (deviation > 1e-12)
  return _dropped(advantages, drop, mask, out)


def clipv(
  rewards: jax.Array,
  group_ids: jax.Array,
  valid: jax.Array,
  num_groups: int,
  prox_logprob: jax.Array,
  prox_entropy: jax.Array,
  expected_score: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  *,
  mu: float = 8.5,
  max_frac: float = 1e-4,
  eps: float = 1e-6,
  std: bool = True,
) -> tuple[jax.Array, dict[str, stats.Stat]]:
  """GRPO (`eps`, `std`) without the tokens with A < 0 and E[S] - S > mu std(E[S] - S).

  E[S] is the expectation of S over the token's own distribution. The population standard deviation
  is over all action tokens of the step.

  Args:
    mu: how far from its expectation is too far.
    max_frac: at most this share of the step's action tokens is dropped (but one may always be),
      those farthest from their expectation.
  """
  options.number("mu", mu, 0.0)
  options.number("max_frac", max_frac, 0.0, 1.0 + 1e-9)
  per_sequence, out = grpo(rewards, group_ids, valid, num_groups, eps=eps, std=std)
  mask = live(mask, sequence_index, valid)
  advantages = to_tokens(per_sequence, mask, sequence_index)
  (expected,) = masked(mask, expected_score)
  difference = expected - score(prox_logprob, prox_entropy, mask)
  _, deviation = _mean_and_std(difference, mask)
  far = mask & (advantages < 0) & (difference > mu * deviation) & (deviation > 1e-12)
  most = jnp.maximum(jnp.floor(max_frac * jnp.sum(mask)), 1)
  order = jnp.argsort(-jnp.where(far, difference, -jnp.inf).reshape(-1))
  place = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0]))
  return _dropped(advantages, far & (place.reshape(mask.shape) < most), mask, out)
