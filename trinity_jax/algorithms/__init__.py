"""Objectives of reinforcement and supervised fine-tuning as pure functions of arrays.

Usable without the rest of the framework, on padded [B, T] arrays with one sequence per row:

  from trinity_jax import algorithms

  advantages = algorithms.advantage("grpo")(rewards=rewards, group_ids=ids, mask=mask)   # [B, T]
  loss_fn = algorithms.policy_loss("ppo", aggregation="token-mean", clip_high=0.28)
  loss, metrics = loss_fn(logprob, old_logprob=old, advantages=advantages, mask=mask)
  penalty = algorithms.kl("k3")(logprob, ref_logprob)                                    # [B, T]

The trainer uses the same functions on packed rows, through `make` (see algorithm.py). Everything is
differentiable, jit-able and vmap-able, in float32 and float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trinity_jax.algorithms import aggregation as _aggregation
from trinity_jax.algorithms import stats
from trinity_jax.algorithms.advantages import ADVANTAGES, to_tokens
from trinity_jax.algorithms.aggregation import MODES, weights
from trinity_jax.algorithms.algorithm import Algorithm, make, policy_terms
from trinity_jax.algorithms.kl import KLS
from trinity_jax.algorithms.listing import render_pieces, render_table
from trinity_jax.algorithms.numerics import rows
from trinity_jax.algorithms.parts import INPUTS, per_sequence, resolve, whole_step
from trinity_jax.algorithms.policy_losses import POLICY_LOSSES
from trinity_jax.algorithms.table import TABLE, Row
from trinity_jax.errors import UserError

__all__ = [
  "INPUTS",
  "MODES",
  "TABLE",
  "Algorithm",
  "Row",
  "advantage",
  "kl",
  "make",
  "per_sequence",
  "policy_loss",
  "render_pieces",
  "render_table",
  "stats",
  "to_tokens",
  "weights",
  "whole_step",
]


def policy_loss(
  name: str, *, aggregation: str = "token-mean", max_length: float | None = None, **options: Any
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
  """Returns `f(logprob, *, mask, old_logprob=, advantages=, ...) -> (loss, metrics)`.

  Args:
    name: a policy loss (ppo, sft) or 'module:function'.
    aggregation: one of MODES.
    max_length: of seq-mean-token-sum-norm; None means the row length T.
    **options: hyper-parameters of the loss.

  Of the returned function all arrays have the shape [B, T] of `mask`; `advantages` may be [B].
  Packed rows are told by `sequence_index` ([B, T] int32) and `num_sequences` (static), otherwise
  each row is one sequence. loss and metrics are scalars.

  Raises:
    UserError: unknown name, option or aggregation; an array that the loss reads was not given.
  """
  part = resolve("policy loss", name, POLICY_LOSSES, options)
  _aggregation.check_mode(aggregation)

  def loss(logprob, *, mask, sequence_index=None, num_sequences=None, advantages=None, **arrays):
    # The whole step is here: what a trainer scores beforehand is what is being differentiated.
    arrays.setdefault("prox_logprob", jax.lax.stop_gradient(logprob))
    if arrays.get("entropy") is not None:
      arrays.setdefault("prox_entropy", jax.lax.stop_gradient(arrays["entropy"]))
    mask = jnp.asarray(mask, bool)
    if sequence_index is None:
      sequence_index, num_sequences = rows(mask)
    if num_sequences is None:
      raise UserError("sequence_index is given without num_sequences; say how many there are")
    if advantages is not None:
      advantages = to_tokens(jnp.asarray(advantages), mask, sequence_index)
    weight = weights(
      mask, sequence_index, num_sequences, aggregation,
      mask.shape[-1] if max_length is None else max_length,
    )  # fmt: skip
    arrays |= dict(mask=mask, advantages=advantages, sequence_index=sequence_index,
                   num_sequences=num_sequences)  # fmt: skip
    arrays |= part.before_split(**arrays)
    per_token, out = policy_terms(part, logprob=logprob, **arrays)
    value = jnp.sum(weight * per_token)
    out["pg_loss"] = stats.total(value)
    return value, stats.finish(out)

  return loss


def advantage(name: str, **options: Any) -> Callable[..., jax.Array]:
  """Returns `f(*, mask, rewards=, group_ids=, ...) -> advantages [B, T]`, 0 where mask is False.

  `group_ids` [B] are any integers: rows with equal ids form a group. `valid` [B] (default all
  True) excludes rows.

  Raises:
    UserError: unknown name or option; an array that the advantage reads was not given.
  """
  part = resolve("advantage", name, ADVANTAGES, options)

  def compute(*, mask, group_ids=None, valid=None, sequence_index=None, **arrays):
    mask = jnp.asarray(mask, bool)
    index, count = rows(mask)
    if sequence_index is None:
      sequence_index = index
    first = arrays.get("rewards", group_ids)
    size = count if first is None else jnp.shape(first)[0]
    valid = jnp.ones(size, bool) if valid is None else jnp.asarray(valid, bool)
    if group_ids is not None:
      # Renumbered densely; there are at most as many groups as sequences.
      ids = jnp.unique(jnp.asarray(group_ids), return_inverse=True, size=size, fill_value=0)[1]
      group_ids = ids.reshape(-1).astype(jnp.int32)
    values, _ = part(
      mask=mask, group_ids=group_ids, valid=valid, num_groups=size, num_sequences=size,
      sequence_index=sequence_index, **arrays,
    )  # fmt: skip
    return to_tokens(values, mask, sequence_index)

  return compute


def kl(name: str, **options: Any) -> Callable[..., jax.Array]:
  """Returns `f(logprob, ref_logprob, mask=None) -> per-token estimate` of shape X.

  Raises:
    UserError: unknown name or option.
  """
  part = resolve("kl", name, KLS, options)
  return functools.partial(part.function, **part.options)
