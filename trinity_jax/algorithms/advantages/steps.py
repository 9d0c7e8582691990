"""Advantages of runs that were recorded as several sequences, one per turn.

Of every function: arrays are [N]; a run is told by (group_ids, run_ids), its turns by step_ids.
Rows that are not valid enter no statistic and get 0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from trinity_jax.algorithms import options, stats
from trinity_jax.algorithms.advantages.common import (
  advantage_stats,
  centered,
  classes,
  group_statistics,
  of_group,
)
from trinity_jax.algorithms.advantages.group import grpo
from trinity_jax.algorithms.advantages.returns import backwards
from trinity_jax.algorithms.numerics import masked


class Runs(NamedTuple):
  """The runs of a step: `of` [N] says which run a sequence belongs to (N: none); others per run."""

  of: jax.Array
  group: jax.Array
  valid: jax.Array
  length: jax.Array


def find_runs(group_ids: jax.Array, run_ids: jax.Array, valid: jax.Array) -> Runs:
  """Numbers the runs; there are at most N."""
  count = valid.shape[0]
  of = classes(valid, group_ids, run_ids)
  zeros = jnp.zeros(count, jnp.int32)
  group = zeros.at[of].set(group_ids.astype(jnp.int32), mode="drop")
  length = zeros.at[of].add(1, mode="drop")
  return Runs(of, group, length > 0, length)


def step_wise_grpo(
  rewards: jax.Array,
  group_ids: jax.Array,
  run_ids: jax.Array,
  step_ids: jax.Array,
  valid: jax.Array,
  num_groups: int,
  *,
  eps: float = 1e-6,
  std: bool = True,
  std_level: str = "group",
  std_threshold: float | None = None,
  step_norm: bool = False,
) -> tuple[jax.Array, dict[str, stats.Stat]]:
  """GRPO over runs: the reward of a run's last turn, scored among its group's runs, at every turn.

  Args:
    eps, std, std_level, std_threshold: as in `grpo`; statistics are over runs, not turns.
    step_norm: divide by the run's number of turns, so that long runs weigh no more.

  Returns:
    advantages [N] and the stats of `grpo` over runs.
  """
  valid = jnp.asarray(valid, bool)
  (rewards,) = masked(valid, rewards)
  runs = find_runs(group_ids, run_ids, valid)
  count = valid.shape[0]
  last = jnp.full(count, jnp.iinfo(jnp.int32).min, jnp.int32)
  last = last.at[runs.of].max(step_ids.astype(jnp.int32), mode="drop")
  is_last = valid & (step_ids == of_group(last, runs.of, valid))
  reward = jnp.zeros_like(rewards)
  reward = reward.at[jnp.where(is_last, runs.of, count)].set(rewards, mode="drop")
  score, out = grpo(
    reward, runs.group, runs.valid, num_groups,
    eps=eps, std=std, std_level=std_level, std_threshold=std_threshold,
  )  # fmt: skip
  if step_norm:
    score = score / jnp.maximum(runs.length, 1)
  return jnp.where(valid, of_group(score, runs.of, valid), 0), out


def discounted_returns(
  step_rewards: jax.Array,
  group_ids: jax.Array,
  run_ids: jax.Array,
  step_ids: jax.Array,
  valid: jax.Array,
  gamma: float,
) -> jax.Array:
  """[N]: sum over this and the later turns of the run of gamma^(turns between) step_reward."""
  order = jnp.lexsort((step_ids, run_ids, group_ids, ~valid))
  reward = jnp.where(valid, step_rewards, 0)[order]
  same = valid[order][:-1] & valid[order][1:]
  for ids in (group_ids, run_ids):
    same &= ids[order][:-1] == ids[order][1:]
  keep = jnp.where(jnp.append(same, False), gamma, 0).astype(reward.dtype)
  returns = jnp.zeros_like(reward).at[order].set(backwards(keep, reward))
  return jnp.where(valid, returns, 0)


def gigpo(
  step_rewards: jax.Array,
  group_ids: jax.Array,
  run_ids: jax.Array,
  step_ids: jax.Array,
  state_ids: jax.Array,
  valid: jax.Array,
  num_groups: int,
  *,
  omega: float = 1.0,
  gamma: float = 1.0,
  norm: str = "none",
  eps: float = 1e-6,
) -> tuple[jax.Array, dict[str, stats.Stat]]:
  """Episode advantage + omega x step advantage. GiGPO: arXiv 2505.10978.

  Episode: the sum of a run's step_rewards against those of the group's runs, each run counting
  once (a group of one run has mean 0). Step: the discounted return from a turn on against those of
  the group's turns that began in the same state, whichever run they are of; a state met once, or
  unknown, gives 0. States of different groups are never compared: equal states of different tasks
  have different goals.

  Args:
    step_rewards: reward of each turn alone.
    state_ids: -1 = unknown.
    omega: weight of the step advantage.
    gamma: discount per turn, for step returns.
    norm: "none", or "std" to divide both parts by (unbiased standard deviation + eps).
    eps: added to the deviation.

  Returns:
    advantages [N] and stats; `anchored` is the share of turns with a state to compare with.
  """
  options.choice("norm", norm, ("none", "std"))
  options.number("gamma", gamma, 0.0, 1.0 + 1e-9)
  options.number("omega", omega, 0.0)
  valid = jnp.asarray(valid, bool)
  (step_rewards,) = masked(valid, step_rewards)
  runs = find_runs(group_ids, run_ids, valid)
  total = jnp.zeros_like(step_rewards).at[runs.of].add(step_rewards, mode="drop")
  episode, out = grpo(total, runs.group, runs.valid, num_groups, std=norm == "std", eps=eps)

  known = valid & (state_ids >= 0)
  anchor = classes(known, group_ids, state_ids)
  returns = discounted_returns(step_rewards, group_ids, run_ids, step_ids, valid, gamma)
  at = group_statistics(returns, anchor, known, valid.shape[0])
  compared = known & of_group((at.count > 1) & ~at.constant, anchor, known)
  scale = jnp.where(at.constant | (norm == "none"), 1, at.std + eps)
  step = centered(returns, anchor, known, at) / of_group(scale, anchor, known)
  step = jnp.where(compared, step, 0)
  advantages = jnp.where(valid, of_group(episode, runs.of, valid) + omega * step, 0)
  return advantages, {
    **out,
    "anchored": stats.mean(of_group(at.count > 1, anchor, known) & known, valid),
    **advantage_stats(advantages, valid),
  }
