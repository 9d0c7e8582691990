"""What advantages share: statistics of groups, ranks, whitening, from sequences to tokens.

Axis letters: N sequences, G groups, X the shape of token arrays.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from trinity_jax.algorithms import stats
from trinity_jax.algorithms.numerics import masked


class GroupStatistics(NamedTuple):
  """Of each group, [num_groups]: members, mean, unbiased standard deviation, "all equal" flag."""

  count: jax.Array
  mean: jax.Array
  std: jax.Array
  constant: jax.Array


def members(group_ids: jax.Array, valid: jax.Array, num_groups: int) -> jax.Array:
  """[N]: the group of valid rows; past the end for invalid ones, so that scatters drop them."""
  return jnp.where(valid, group_ids, num_groups)


def of_group(values: jax.Array, group_ids: jax.Array, valid: jax.Array) -> jax.Array:
  """[N]: each sequence's entry of `values` [G] (that of group 0 where not valid)."""
  return values[jnp.where(valid, group_ids, 0)]


def group_statistics(
  rewards: jax.Array, group_ids: jax.Array, valid: jax.Array, num_groups: int
) -> GroupStatistics:
  """Statistics of `rewards` [N] over the valid members of each group (ids in [0, num_groups)).

  Sums are taken relative to the group's smallest reward, so that equal rewards have exactly zero
  deviation: (r - mean) / (std + 1e-6) would otherwise turn the rounding of a mean into advantages
  of 1e-3.
  """
  (rewards,) = masked(valid, rewards)
  index = members(group_ids, valid, num_groups)
  zeros = jnp.zeros(num_groups, rewards.dtype)
  count = zeros.at[index].add(1, mode="drop")
  low = (zeros + jnp.inf).at[index].min(rewards, mode="drop")
  high = (zeros - jnp.inf).at[index].max(rewards, mode="drop")
  low = jnp.where(count > 0, low, 0)
  some = jnp.maximum(count, 1)
  above = rewards - of_group(low, group_ids, valid)
  mean_above = zeros.at[index].add(above, mode="drop") / some
  centered = above - of_group(mean_above, group_ids, valid)
  square = zeros.at[index].add(jnp.square(centered), mode="drop")
  std = jnp.sqrt(square / jnp.maximum(count - 1, 1))
  return GroupStatistics(count, low + mean_above, std, (count > 1) & (high == low))


def centered(
  rewards: jax.Array, group_ids: jax.Array, valid: jax.Array, groups: GroupStatistics
) -> jax.Array:
  """[N]: reward - mean of its group (0 for a group of one member), 0 where not valid."""
  mean = jnp.where(groups.count > 1, groups.mean, 0)
  return jnp.where(valid, rewards - of_group(mean, group_ids, valid), 0)


def ranks(classes: jax.Array, values: jax.Array) -> jax.Array:
  """[N] i32: how many members of the same class have a smaller value (equal ones share a rank)."""
  order = jnp.lexsort((values, classes))
  place = jnp.arange(order.shape[0])
  first = place == 0
  new_class = first | (jnp.diff(classes[order], prepend=classes[order][:1]) != 0)
  new_value = new_class | (jnp.diff(values[order], prepend=values[order][:1]) != 0)
  start = lambda new: lax.cummax(jnp.where(new, place, 0))
  rank = (start(new_value) - start(new_class)).astype(jnp.int32)
  return jnp.zeros_like(rank).at[order].set(rank)


def classes(valid: jax.Array, *keys: jax.Array) -> jax.Array:
  """[N] i32: numbers in [0, N), equal where all `keys` ([N] int) are equal; N where not valid."""
  count = valid.shape[0]
  order = jnp.lexsort((*reversed(keys), ~valid))
  changed = jnp.zeros(count, bool)
  for key in keys:
    changed |= jnp.diff(key[order], prepend=key[order][:1]) != 0
  number = jnp.zeros(count, jnp.int32).at[order].set(jnp.cumsum(changed, dtype=jnp.int32))
  return jnp.where(valid, number, count)


def live(mask: jax.Array, sequence_index: jax.Array, valid: jax.Array | None) -> jax.Array:
  """bool X: action tokens of valid sequences (of all where `valid` is None)."""
  mask = jnp.asarray(mask, bool)
  if valid is None:
    return mask
  return mask & jnp.asarray(valid, bool)[jnp.where(mask, sequence_index, 0)]


def whiten(x: jax.Array, mask: jax.Array) -> jax.Array:
  """(x - mean) / sqrt(var + 1e-8) over the tokens under `mask`, 0 elsewhere.

  var is the unbiased variance. Equal values give exactly 0 (sums are relative to the smallest).
  """
  (x,) = masked(mask, x)
  count = jnp.sum(mask, dtype=x.dtype)
  low = jnp.min(x, where=mask, initial=jnp.inf)
  above = jnp.where(mask, x - jnp.where(count > 0, low, 0), 0)
  above = above - jnp.sum(above) / jnp.maximum(count, 1)
  above = jnp.where(mask, above, 0)
  variance = jnp.sum(jnp.square(above)) / jnp.maximum(count - 1, 1)
  return above * lax.rsqrt(variance + 1e-8)


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
