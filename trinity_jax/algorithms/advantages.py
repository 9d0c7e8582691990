"""Advantages: how much better an action was than expected.

An advantage names the arrays it reads as positional parameters and its hyper-parameters as
keyword-only ones, sees the whole optimizer step before it is split, and returns `(advantages,
stats)`: one number per sequence ([N]), or, from functions that work token by token, one per token
(arrays of two or more axes). `to_tokens` turns both into token advantages.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from trinity_jax.algorithms import stats
from trinity_jax.algorithms.numerics import masked


class GroupStatistics(NamedTuple):
  """Of each group, [num_groups]: members, mean, unbiased standard deviation, "all equal" flag."""

  count: jax.Array
  mean: jax.Array
  std: jax.Array
  constant: jax.Array


def _members(group_ids, valid, num_groups):
  # Invalid rows point past the end: scatters drop them.
  return jnp.where(valid, group_ids, num_groups)


def group_statistics(
  rewards: jax.Array, group_ids: jax.Array, valid: jax.Array, num_groups: int
) -> GroupStatistics:
  """Statistics of `rewards` [N] over the valid members of each group (ids in [0, num_groups)).

  Sums are taken relative to the group's smallest reward, so that equal rewards have exactly zero
  deviation: (r - mean) / (std + 1e-6) would otherwise turn the rounding of a mean into advantages
  of 1e-3.
  """
  (rewards,) = masked(valid, rewards)
  members = _members(group_ids, valid, num_groups)
  zeros = jnp.zeros(num_groups, rewards.dtype)
  count = zeros.at[members].add(1, mode="drop")
  low = (zeros + jnp.inf).at[members].min(rewards, mode="drop")
  high = (zeros - jnp.inf).at[members].max(rewards, mode="drop")
  low = jnp.where(count > 0, low, 0)
  some = jnp.maximum(count, 1)
  above = rewards - low[jnp.where(valid, group_ids, 0)]
  mean_above = zeros.at[members].add(above, mode="drop") / some
  centered = above - mean_above[jnp.where(valid, group_ids, 0)]
  square = zeros.at[members].add(jnp.square(centered), mode="drop")
  std = jnp.sqrt(square / jnp.maximum(count - 1, 1))
  return GroupStatistics(count, low + mean_above, std, (count > 1) & (high == low))


def grpo(
  rewards: jax.Array,
  group_ids: jax.Array,
  valid: jax.Array,
  num_groups: int,
  *,
  eps: float = 1e-6,
  std: bool = True,
  std_threshold: float | None = None,
) -> tuple[jax.Array, dict[str, stats.Stat]]:
  """(reward - mean of its group) / (standard deviation of its group + eps). GRPO: arXiv 2402.03300.

  The deviation is the unbiased one. A group with one valid member has mean 0 and deviation 1; a
  group of equal rewards has advantage exactly 0.

  Args:
    rewards: float [N], read where `valid`.
    group_ids: int32 [N] in [0, num_groups).
    valid: bool [N]; False rows enter no statistic and get advantage 0.
    num_groups: static.
    eps: added to the deviation.
    std: False divides by 1 (Dr. GRPO, arXiv 2503.20783).
    std_threshold: groups with a deviation of at most this, and groups of one, get advantage 0.
      Their tokens still count in the loss's denominators; whoever wants them gone filters groups
      before the step is built.

  Returns:
    advantages [N] and stats: `frac_reward_zero_std` (share of the groups of two or more whose
    rewards are all equal), `groups_zero_std` (their number), `groups_of_one`, `advantages/*`.
  """
  valid = jnp.asarray(valid, bool)
  (rewards,) = masked(valid, rewards)
  groups = group_statistics(rewards, group_ids, valid, num_groups)
  alone = groups.count == 1
  mean = jnp.where(alone, 0, groups.mean)
  scale = jnp.where(alone, 1, groups.std) + eps if std else jnp.ones_like(groups.std)
  keep = ~groups.constant
  if std_threshold is not None:
    keep &= ~alone & (groups.std > std_threshold)
  group = jnp.where(valid, group_ids, 0)
  advantages = jnp.where(
    valid & keep[group], (rewards - mean[group]) / jnp.where(keep, scale, 1)[group], 0
  )
  return advantages, {
    "frac_reward_zero_std": stats.mean(groups.constant, groups.count > 1),
    "groups_zero_std": stats.total(groups.constant),
    "groups_of_one": stats.total(alone),
    **advantage_stats(advantages, valid),
  }


def constant(valid: jax.Array, *, value: float = 1.0) -> tuple[jax.Array, dict[str, stats.Stat]]:
  """The same advantage for every valid sequence: learning from demonstrations."""
  valid = jnp.asarray(valid, bool)
  return jnp.where(valid, jnp.asarray(value, jnp.result_type(float)), 0), {}


def advantage_stats(advantages: jax.Array, mask: jax.Array) -> dict[str, stats.Stat]:
  """Mean, largest and smallest advantage where `mask`."""
  return {
    "advantages/mean": stats.mean(advantages, mask),
    "advantages/max": stats.maximum(advantages, mask),
    "advantages/min": stats.minimum(advantages, mask),
  }


def to_tokens(advantages: jax.Array, mask: jax.Array, sequence_index: jax.Array) -> jax.Array:
  """Returns token advantages of the shape of `mask` (two or more axes), 0 where it is False.

  `advantages` is [N], spread over the tokens of sequence `sequence_index`, or already per token.
  """
  if jnp.ndim(advantages) == 1 and jnp.ndim(mask) > 1:
    advantages = advantages[jnp.where(mask, sequence_index, 0)]
  return masked(mask, advantages)[0]


ADVANTAGES = {"grpo": grpo, "constant": constant}
