"""Advantages of whole sequences: the reward less some baseline.

Of every function here: rewards, group_ids, valid and the result are [N]; rows that are not valid
enter no statistic and get 0. A group of one has nothing to be compared with: unless said
otherwise its baseline is 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trinity_jax.algorithms import options, stats
from trinity_jax.algorithms.advantages.common import (
  advantage_stats,
  centered,
  group_statistics,
  members,
  of_group,
  ranks,
)
from trinity_jax.algorithms.numerics import masked, sequence_sum
from trinity_jax.errors import UserError

Advantages = tuple[jax.Array, dict[str, stats.Stat]]


def _done(advantages, valid) -> Advantages:
  return advantages, advantage_stats(advantages, valid)


def constant(valid: jax.Array, *, value: float = 1.0) -> Advantages:
  """The same advantage for every valid sequence: learning from demonstrations."""
  valid = jnp.asarray(valid, bool)
  return jnp.where(valid, jnp.asarray(value, jnp.result_type(float)), 0), {}


def reinforce(rewards: jax.Array, valid: jax.Array) -> Advantages:
  """The reward itself (Williams, 1992)."""
  valid = jnp.asarray(valid, bool)
  return _done(masked(valid, rewards)[0], valid)


def remax(rewards: jax.Array, baselines: jax.Array, valid: jax.Array) -> Advantages:
  """reward - baseline, the reward of a greedy answer to the same task. ReMax: arXiv 2310.10505."""
  valid = jnp.asarray(valid, bool)
  rewards, baselines = masked(valid, rewards, baselines)
  return _done(rewards - baselines, valid)


def rloo(rewards: jax.Array, group_ids: jax.Array, valid: jax.Array, num_groups: int) -> Advantages:
  """reward - mean reward of the group's other members = n / (n - 1) (reward - group mean).

  RLOO: arXiv 2402.14740.
  """
  valid = jnp.asarray(valid, bool)
  (rewards,) = masked(valid, rewards)
  groups = group_statistics(rewards, group_ids, valid, num_groups)
  scale = jnp.where(groups.count > 1, groups.count / jnp.maximum(groups.count - 1, 1), 1)
  difference = centered(rewards, group_ids, valid, groups)
  return _done(difference * of_group(scale, group_ids, valid), valid)


def opmd(
  rewards: jax.Array,
  group_ids: jax.Array,
  valid: jax.Array,
  num_groups: int,
  *,
  baseline: str = "mean",
  tau: float = 1.0,
) -> Advantages:
  """reward - baseline of the group: its mean, or tau log mean exp(reward / tau).

  "logavgexp" is the baseline that the optimum of the KL-regularised objective has.

  Args:
    baseline: "mean" or "logavgexp".
    tau: temperature of "logavgexp", above 0.
  """
  options.choice("baseline", baseline, ("mean", "logavgexp"))
  options.number("tau", tau, 1e-30)
  valid = jnp.asarray(valid, bool)
  (rewards,) = masked(valid, rewards)
  groups = group_statistics(rewards, group_ids, valid, num_groups)
  if baseline == "mean":
    return _done(centered(rewards, group_ids, valid, groups), valid)
  index = members(group_ids, valid, num_groups)
  high = jnp.full(num_groups, -jnp.inf, rewards.dtype).at[index].max(rewards, mode="drop")
  high = jnp.where(groups.count > 0, high, 0)
  below = rewards - of_group(high, group_ids, valid)
  total = jnp.zeros_like(high).at[index].add(jnp.exp(below / tau), mode="drop")
  above = tau * jnp.log(jnp.where(groups.count > 0, total / jnp.maximum(groups.count, 1), 1))
  alone = of_group(groups.count == 1, group_ids, valid)
  advantages = jnp.where(alone, rewards, below - of_group(above, group_ids, valid))
  return _done(jnp.where(valid, advantages, 0), valid)


def asymre(
  rewards: jax.Array,
  group_ids: jax.Array,
  valid: jax.Array,
  num_groups: int,
  *,
  shift: float = -0.1,
) -> Advantages:
  """reward - (mean of the group + shift). A negative shift weighs successes more than failures,
  which keeps off-policy REINFORCE stable. AsymRE: arXiv 2506.20520.
  """
  valid = jnp.asarray(valid, bool)
  (rewards,) = masked(valid, rewards)
  groups = group_statistics(rewards, group_ids, valid, num_groups)
  moved = jnp.where(groups.count > 1, jnp.asarray(shift, rewards.dtype), 0)
  advantages = centered(rewards, group_ids, valid, groups) - of_group(moved, group_ids, valid)
  return _done(jnp.where(valid, advantages, 0), valid)


def rec(
  rewards: jax.Array,
  group_ids: jax.Array,
  valid: jax.Array,
  num_groups: int,
  key: jax.Array | None = None,
  *,
  std: bool = False,
  eps: float = 1e-6,
  drop: str = "none",
) -> Advantages:
  """reward - mean of the group, for the group-relative REINFORCE family (arXiv 2509.24203).

  Args:
    key: PRNG key of the step, for `drop`.
    std: divide by (population standard deviation + eps).
    drop: "none", or "balance": where a group has more members below its mean than not, random ones
      of those below get 0 and leave mean and deviation, until there are as many of both.

  Raises:
    UserError: an unknown `drop`, or "balance" without a key.
  """
  options.choice("drop", drop, ("none", "balance"))
  options.number("eps", eps, 0.0)
  valid = jnp.asarray(valid, bool)
  (rewards,) = masked(valid, rewards)
  groups = group_statistics(rewards, group_ids, valid, num_groups)
  kept = valid
  if drop == "balance":
    if key is None:
      raise UserError("drop = 'balance' is random: it reads key, which was not given")
    below = valid & (rewards < of_group(groups.mean, group_ids, valid))
    index = members(group_ids, below, num_groups)
    number = jnp.zeros_like(groups.count).at[index].add(1, mode="drop")
    extra = jnp.maximum(2 * number - groups.count, 0)
    lot = ranks(index, jax.random.uniform(key, rewards.shape))
    kept = valid & ~(below & (lot < of_group(extra, group_ids, valid)))
    groups = group_statistics(rewards, group_ids, kept, num_groups)
  advantages = centered(rewards, group_ids, kept, groups)
  if std:
    many = groups.count > 1
    deviation = groups.std * jnp.sqrt((groups.count - many) / jnp.maximum(groups.count, 1))
    scale = jnp.where(many, deviation, 1) + eps
    # A group of equal rewards divides 0, which eps = 0 would make nan.
    scale = jnp.where(groups.constant, 1, scale)
    advantages = jnp.where(kept, advantages / of_group(scale, group_ids, kept), 0)
  return advantages, {
    "dropped": stats.mean(~kept, valid), **advantage_stats(advantages, valid)
  }  # fmt: skip


def maxrl(
  rewards: jax.Array, group_ids: jax.Array, valid: jax.Array, num_groups: int
) -> Advantages:
  """(reward - mean of the group) / mean of the group, for rewards of 0 and 1.

  The expected gradient is that of the likelihood of success, expanded to the order of the group's
  size (MaxRL: arXiv 2602.02710). A group without success gets 0, and so does a group of one.
  """
  valid = jnp.asarray(valid, bool)
  (rewards,) = masked(valid, rewards)
  groups = group_statistics(rewards, group_ids, valid, num_groups)
  some = (groups.mean > 0) & (groups.count > 1)
  scale = of_group(jnp.where(some, groups.mean, 1), group_ids, valid)
  advantages = centered(rewards, group_ids, valid, groups) / scale
  return _done(jnp.where(of_group(some, group_ids, valid), advantages, 0), valid)


def opo(
  rewards: jax.Array,
  group_ids: jax.Array,
  valid: jax.Array,
  num_groups: int,
  mask: jax.Array,
  sequence_index: jax.Array,
  num_sequences: int,
) -> Advantages:
  """reward - sum_i length_i reward_i / sum_i length_i over the group (lengths in action tokens).

  The baseline of least variance where a sequence's gradient grows with its length. OPO: arXiv
  2505.23585.
  """
  valid = jnp.asarray(valid, bool)
  (rewards,) = masked(valid, rewards)
  groups = group_statistics(rewards, group_ids, valid, num_groups)
  ones = jnp.ones(jnp.shape(mask), rewards.dtype)
  length = sequence_sum(ones, mask, sequence_index, num_sequences)
  index = members(group_ids, valid, num_groups)
  zeros = jnp.zeros(num_groups, rewards.dtype)
  # Relative to the mean, so that equal rewards give exactly 0.
  difference = jnp.where(valid, rewards - of_group(groups.mean, group_ids, valid), 0)
  tokens = zeros.at[index].add(length, mode="drop")
  shift = zeros.at[index].add(length * difference, mode="drop") / jnp.maximum(tokens, 1)
  moved = jnp.where(groups.count > 1, shift, -groups.mean)
  return _done(jnp.where(valid, difference - of_group(moved, group_ids, valid), 0), valid)


def raft(
  rewards: jax.Array,
  group_ids: jax.Array,
  valid: jax.Array,
  num_groups: int,
  *,
  threshold: float | None = None,
) -> Advantages:
  """1 for the best answers, 0 for others: maximum likelihood of what went well.

  RAFT: arXiv 2304.06767. To be used with a likelihood loss that the advantage multiplies.

  Args:
    threshold: answers with a reward above it are the best; None means those with the largest
      reward of their group (several where they tie).
  """
  valid = jnp.asarray(valid, bool)
  (rewards,) = masked(valid, rewards)
  if threshold is None:
    index = members(group_ids, valid, num_groups)
    high = jnp.full(num_groups, -jnp.inf, rewards.dtype).at[index].max(rewards, mode="drop")
    best = rewards == of_group(high, group_ids, valid)
  else:
    best = rewards > threshold
  advantages = jnp.where(valid & best, jnp.ones_like(rewards), 0)
  return advantages, {"selected": stats.mean(best, valid)}
