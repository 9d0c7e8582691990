"""Advantages token by token: GAE with a critic, whitened returns without one.

Tokens of a sequence lie in one row (last axis), in order, with other things between them:
observations, padding, other sequences. Recursions run over the action tokens of one sequence only:
they jump over whatever `mask` excludes and end where the sequence does. Rewards and values are read
at action tokens only: what an environment pays for an action belongs on that action's last token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from trinity_jax.algorithms import options, stats
from trinity_jax.algorithms.advantages.common import (
  advantage_stats,
  centered,
  group_statistics,
  live,
  to_tokens,
  whiten,
)
from trinity_jax.algorithms.numerics import masked


def backwards(a: jax.Array, b: jax.Array) -> jax.Array:
  """y with y[t] = a[t] y[t + 1] + b[t] along the last axis, y past the end = 0 (log depth)."""

  def combine(right, left):
    return left[0] * right[0], left[0] * right[1] + left[1]

  return lax.associative_scan(combine, (a, b), reverse=True, axis=a.ndim - 1)[1]


def next_action(
  mask: jax.Array, sequence_index: jax.Array, values: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Of every action token, whether its sequence has a later one (bool X), and that one's value."""

  width = mask.shape[-1]
  place = lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
  # The nearest action token at or after each place, then the one strictly after it.
  nearest = lax.cummin(jnp.where(mask, place, width), axis=mask.ndim - 1, reverse=True)
  after = jnp.concatenate([nearest[..., 1:], jnp.full_like(nearest[..., :1], width)], axis=-1)
  at = lambda x: jnp.take_along_axis(x, jnp.minimum(after, width - 1), axis=-1)
  follows = mask & (after < width) & (at(sequence_index) == sequence_index)
  return follows, jnp.where(follows, at(values), 0)


def _discounted(rewards, mask, follows, factor):
  """Sums of later rewards of the same sequence, each action token costing one `factor`."""
  keep = jnp.where(mask, jnp.where(follows, factor, 0), 1).astype(rewards.dtype)
  return jnp.where(mask, backwards(keep, jnp.where(mask, rewards, 0)), 0)


def _estimate(token_rewards, values, mask, sequence_index, valid, gamma, lam):
  options.number("gamma", gamma, 0.0, 1.0 + 1e-9)
  options.number("lam", lam, 0.0, 1.0 + 1e-9)
  mask = live(mask, sequence_index, valid)
  token_rewards, values = masked(mask, token_rewards, values)
  follows, after = next_action(mask, sequence_index, values)
  delta = token_rewards + gamma * after - values
  return _discounted(delta, mask, follows, gamma * lam), values, mask


def gae(
  token_rewards: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  valid: jax.Array | None = None,
  *,
  gamma: float = 1.0,
  lam: float = 1.0,
  whitening: bool = True,
) -> tuple[jax.Array, dict[str, stats.Stat]]:
  """Generalised advantage estimate (arXiv 1506.02438) over action tokens.

  A_t = delta_t + gamma lam A_u, delta_t = r_t + gamma V_u - V_t, with u the sequence's next action
  token; past its last one A_u = V_u = 0.

  Args:
    token_rewards: X.
    values: X, the critic's value of what precedes each token.
    mask: bool X, action tokens.
    sequence_index: X.
    valid: [N], sequences that count; None means all.
    gamma: discount per action token.
    lam: 1 trusts rewards alone, 0 the critic alone.
    whitening: subtract the mean and divide by the standard deviation over all action tokens of
      the step.

  Returns:
    advantages X, stats.
  """
  advantages, _, mask = _estimate(token_rewards, values, mask, sequence_index, valid, gamma, lam)
  if whitening:
    advantages = whiten(advantages, mask)
  return advantages, advantage_stats(advantages, mask)


def value_targets(
  token_rewards: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  valid: jax.Array | None = None,
  *,
  gamma: float = 1.0,
  lam: float = 1.0,
) -> tuple[jax.Array, dict[str, stats.Stat]]:
  """What the critic should have said: `gae` without whitening, plus the values. X, stats."""
  advantages, values, mask = _estimate(
    token_rewards, values, mask, sequence_index, valid, gamma, lam
  )
  returns = advantages + values
  return returns, {
    "critic/returns_mean": stats.mean(returns, mask),
    "critic/values_mean": stats.mean(values, mask),
    "critic/explained_variance": stats.explained_variance(values, returns, mask),
  }


def reinforce_plus_plus(
  token_rewards: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  valid: jax.Array | None = None,
  *,
  gamma: float = 1.0,
) -> tuple[jax.Array, dict[str, stats.Stat]]:
  """Discounted sum of the later rewards, whitened over all action tokens of the step.

  REINFORCE++: arXiv 2501.03262. The step counts action tokens only.
  """
  options.number("gamma", gamma, 0.0, 1.0 + 1e-9)
  mask = live(mask, sequence_index, valid)
  (token_rewards,) = masked(mask, token_rewards)
  follows, _ = next_action(mask, sequence_index, token_rewards)
  advantages = whiten(_discounted(token_rewards, mask, follows, gamma), mask)
  return advantages, advantage_stats(advantages, mask)


def reinforce_plus_plus_baseline(
  rewards: jax.Array,
  group_ids: jax.Array,
  valid: jax.Array,
  num_groups: int,
  mask: jax.Array,
  sequence_index: jax.Array,
) -> tuple[jax.Array, dict[str, stats.Stat]]:
  """reward - mean of its group, then whitened over all action tokens of the step.

  REINFORCE++ with baseline: arXiv 2501.03262. Mean and deviation count tokens, as they do without
  the baseline: long answers weigh more. A group of one has mean 0.
  """
  valid = jnp.asarray(valid, bool)
  (rewards,) = masked(valid, rewards)
  groups = group_statistics(rewards, group_ids, valid, num_groups)
  mask = live(mask, sequence_index, valid)
  difference = centered(rewards, group_ids, valid, groups)
  advantages = whiten(to_tokens(difference, mask, sequence_index), mask)
  return advantages, advantage_stats(advantages, mask)
