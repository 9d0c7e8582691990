"""GRPO: an answer against the other answers to the same task, and its published refinements."""

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


def grpo(
  rewards: jax.Array,
  group_ids: jax.Array,
  valid: jax.Array,
  num_groups: int,
  old_logprob: jax.Array | None = None,
  mask: jax.Array | None = None,
  sequence_index: jax.Array | None = None,
  num_sequences: int | None = None,
  *,
  eps: float = 1e-6,
  std: bool = True,
  std_level: str = "group",
  std_threshold: float | None = None,
  duplicate_experiences: bool = False,
  rank_penalty: float = 0.0,
) -> tuple[jax.Array, dict[str, stats.Stat]]:
  """(reward - mean of its group) / (standard deviation of its group + eps). GRPO: arXiv 2402.03300.

  The deviation is the unbiased one. A group with one valid member has mean 0 and deviation 1; a
  group whose rewards are all equal gets exactly 0.

  Args:
    rewards: [N].
    group_ids: [N] int, in [0, num_groups).
    valid: [N] bool; rows that are not valid enter no statistic and get 0.
    num_groups: static; ids without a valid member are allowed.
    old_logprob, mask, sequence_index, num_sequences: token arrays X, read by `rank_penalty` only.
    eps: added to the deviation.
    std: divide by the deviation; False is Dr. GRPO (arXiv 2503.20783).
    std_level: "group", or "batch" for the deviation of all valid rewards of the step (means stay
      those of the groups).
    std_threshold: groups whose deviation is at most this, and groups of one, get 0.
    duplicate_experiences: let groups with signal carry the weight of those without (equal rewards,
      or dropped by `std_threshold`). Polaris refills the batch with copies of random sequences
      that have signal; this is the expected loss of such a batch, without the randomness: the
      advantages of all sequences with signal times (valid sequences / sequences with signal).
    rank_penalty: p in reward (1 - p rank / members), rank = members of the group whose mean
      old_logprob per token is lower (the least likely answer keeps its reward): after the
      unlikeliness reward of arXiv 2506.02355. It changes the score itself, not only mean and
      deviation. For rewards that are not negative.

  Returns:
    advantages [N] and stats: `frac_reward_zero_std` (share of the groups of two or more whose
    rewards are all equal), `groups_zero_std` (their number), `groups_of_one`, `advantages/*`.

  Raises:
    UserError: an option outside its range, or `rank_penalty` without the token arrays.
  """
  options.choice("std_level", std_level, ("group", "batch"))
  options.number("rank_penalty", rank_penalty, 0.0, 1.0 + 1e-9)
  options.number("eps", eps, 0.0)
  valid = jnp.asarray(valid, bool)
  (rewards,) = masked(valid, rewards)
  if not (isinstance(rank_penalty, (int, float)) and rank_penalty == 0):
    arrays = (old_logprob, mask, sequence_index, num_sequences)
    rewards = _penalise_rank(rewards, group_ids, valid, num_groups, arrays, rank_penalty)
  groups = group_statistics(rewards, group_ids, valid, num_groups)
  alone = groups.count == 1
  scale = jnp.ones_like(groups.std)
  if std and std_level == "batch":
    one = group_statistics(rewards, jnp.zeros_like(group_ids), valid, 1)
    scale = scale * jnp.where(one.count[0] > 1, one.std[0], 1) + eps
  elif std:
    scale = jnp.where(alone, 1, groups.std) + eps
  keep = ~groups.constant
  if std_threshold is not None:
    keep &= ~alone & (groups.std > std_threshold)
  kept = valid & of_group(keep, group_ids, valid)
  # Where a group is dropped its scale may be 0.
  scale = of_group(jnp.where(keep, scale, 1), group_ids, valid)
  advantages = jnp.where(kept, centered(rewards, group_ids, valid, groups) / scale, 0)
  if duplicate_experiences:
    advantages = advantages * (jnp.sum(valid) / jnp.maximum(jnp.sum(kept), 1))
  return advantages, {
    "frac_reward_zero_std": stats.mean(groups.constant, groups.count > 1),
    "groups_zero_std": stats.total(groups.constant),
    "groups_of_one": stats.total(alone),
    **advantage_stats(advantages, valid),
  }


def _penalise_rank(rewards, group_ids, valid, num_groups, arrays, penalty):
  if any(x is None for x in arrays):
    raise UserError(
      "rank_penalty ranks sequences by likelihood: it reads old_logprob, mask, sequence_index and "
      "num_sequences, of which one was not given"
    )
  old_logprob, mask, index, size = arrays
  length = sequence_sum(jnp.ones_like(masked(mask, old_logprob)[0]), mask, index, size)
  likelihood = sequence_sum(old_logprob, mask, index, size) / jnp.maximum(length, 1)
  group = members(group_ids, valid, num_groups)
  count = jnp.zeros(num_groups, rewards.dtype).at[group].add(1, mode="drop")
  share = ranks(group, likelihood) / jnp.maximum(of_group(count, group_ids, valid), 1)
  return jnp.where(valid, rewards * (1 - penalty * share), 0).astype(rewards.dtype)
