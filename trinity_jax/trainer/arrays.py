"""A Batch as the arrays that algorithms read, under the names of algorithms.parts.INPUTS.

Axis letters: M micro-batches, B rows, T row length, N sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from trinity_jax.experience import Batch, Source
from trinity_jax.trainer.scoring import micro_batch

_PER_SEQUENCE = {
  "rewards": "rewards", "group_ids": "group", "valid": "valid", "run_ids": "run",
  "step_ids": "step", "pair_ids": "pair", "leader": "leader",
}  # fmt: skip
_PER_TOKEN = {
  "mask": "action_mask", "old_logprob": "logprobs", "ref_logprob": "ref_logprobs",
  "sequence_index": "sequence_index", "versions": "versions",
}  # fmt: skip


def whole_step(batch: Batch, num_groups: int, **scalars: Any) -> dict[str, Any]:
  """Arrays of the whole step: X = [M, B, T] and [N].

  Args:
    num_groups: static, most groups of a step.
    **scalars: step, key: passed on.
  """
  experts = batch.source != Source.ROLLOUT
  return {
    **{name: getattr(batch, field) for name, field in (_PER_SEQUENCE | _PER_TOKEN).items()},
    **batch.extras,
    "experts": experts,
    "is_expert": experts[batch.sequence_index],
    "baselines": greedy_rewards(batch, num_groups),
    "num_sequences": batch.rewards.shape[0],
    **scalars,
  }


def of_micro_batch(
  batch: Batch, whole: Mapping[str, jax.Array], m: Any, **scalars: Any
) -> dict[str, Any]:
  """Arrays of micro-batch m: X = [B, T]; those of the whole step that are [N] stay as they are.

  Args:
    whole: arrays [M, B, T] computed before the split (advantages, weights, companions).
    **scalars: step and whatever else is passed on.
  """
  x = micro_batch(batch, m)
  pick = lambda a: lax.dynamic_index_in_dim(a, m, 0, keepdims=False)
  return {
    **{k: x[k] for k in ("tokens", "positions", "segment_ids", "temperature")},
    **{name: getattr(batch, field) for name, field in _PER_SEQUENCE.items()},
    **{name: x[field] for name, field in _PER_TOKEN.items()},
    **{k: x.get(k, v) for k, v in batch.extras.items()},
    **{k: pick(v) for k, v in whole.items()},
    "is_expert": (batch.source != Source.ROLLOUT)[x["sequence_index"]],
    "num_sequences": batch.rewards.shape[0],
    **scalars,
  }


def greedy_rewards(batch: Batch, num_groups: int) -> jax.Array:
  """[N]: the reward of run 0 of each sequence's group (ReMax samples it greedily), its last one.

  A group whose run 0 has failed gets each sequence's own reward: it teaches nothing.
  """
  leads = batch.leader == jnp.arange(batch.leader.shape[0])
  first = jnp.where(batch.valid & leads & (batch.run == 0), batch.group, num_groups)
  reward = jnp.zeros(num_groups).at[first].set(batch.rewards, mode="drop")
  known = jnp.zeros(num_groups, bool).at[first].set(True, mode="drop")
  return jnp.where(known[batch.group], reward[batch.group], batch.rewards)
