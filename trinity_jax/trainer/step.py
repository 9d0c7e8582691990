"""The train step: `train_step(state, batch) -> (state, outputs)`, pure, jitted once per shape.

Denominators are those of the whole optimizer step, fixed before the micro-batches are split; only
live micro-batches are computed, by a loop with a traced bound.
Axis letters: M micro-batches, B rows, T row length, N sequences, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trinity_jax import ops
from trinity_jax.algorithms import aggregation, stats
from trinity_jax.algorithms.advantages import advantage_stats, to_tokens
from trinity_jax.algorithms.algorithm import Algorithm
from trinity_jax.experience import Batch
from trinity_jax.models import transformer
from trinity_jax.models.presets import ModelConfig
from trinity_jax.trainer.state import TrainState

ROWS = PartitionSpec(None, ("data", "fsdp"), None)


class Policy(NamedTuple):
  """How to evaluate the decoder in a train step: architecture, dtype, remat, unroll."""

  config: ModelConfig
  dtype: Any = jnp.float32
  remat: str = "none"
  unroll: int | None = None


def batch_shardings(batch: Batch, mesh: Mesh) -> Batch:
  """Rows over data x fsdp; the [N] table and scalars replicated."""

  def one(x):
    return NamedSharding(mesh, ROWS if jnp.ndim(x) == 3 else PartitionSpec())

  return jax.tree.map(one, batch)


def token_logprobs(params, policy: Policy, tokens, positions, segment_ids, mask, temperature):
  """Log-prob and entropy of every masked token given what precedes it in its segment.

  Args:
    tokens, positions, segment_ids: i32[B, T].
    mask: bool[B, T], tokens wanted (never the first of a segment).
    temperature: f32[B, T], the distribution is softmax(logits / temperature).

  Returns:
    (logprob f32[B, T], entropy f32[B, T]), 0 where not masked.
  """
  hidden = transformer.forward(
    params,
    policy.config,
    tokens,
    positions,
    segment_ids,
    dtype=policy.dtype,
    remat=policy.remat,
    unroll=policy.unroll,
  )
  # The hidden state at t - 1 predicts the token at t.
  before = jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
  flat = lambda x: x.reshape(-1)
  logprob, entropy, _ = ops.linear_logprob(
    before.reshape(-1, before.shape[-1]),
    transformer.output_weight(params, policy.config),
    flat(tokens),
    flat(mask),
    flat(temperature),
  )
  return logprob.reshape(tokens.shape), entropy.reshape(tokens.shape)


def _micro(batch: Batch, m) -> dict[str, jax.Array]:
  """The token fields of micro-batch m, [B, T] each."""
  pick = lambda x: lax.dynamic_index_in_dim(x, m, 0, keepdims=False)
  out = {k: pick(getattr(batch, k)) for k in Batch.TOKEN_FIELDS}
  out |= {k: pick(v) for k, v in batch.extras.items() if v.ndim == 3}
  out["temperature"] = batch.temperature[out["sequence_index"]]
  return out


def score(params, policy: Policy, batch: Batch) -> jax.Array:
  """Log-probs f32[M, B, T] of the batch's action tokens under `params` (0 elsewhere)."""

  def body(m, out):
    x = _micro(batch, m)
    logprob, _ = token_logprobs(
      params, policy, x["tokens"], x["positions"], x["segment_ids"], x["action_mask"],
      x["temperature"],
    )  # fmt: skip
    return lax.dynamic_update_index_in_dim(out, logprob, m, 0)

  return lax.fori_loop(0, batch.num_micro, body, jnp.zeros(batch.tokens.shape, jnp.float32))


def prepare(algorithm: Algorithm, batch: Batch, *, num_groups: int, max_response: int):
  """What needs the whole step: advantages, token weights (global denominators), metrics.

  Args:
    num_groups: static, most groups of a step.
    max_response: the constant length of the aggregation seq-mean-token-sum-norm. Not the row
      length: that is chosen step by step, and no choice of shapes may change a loss.

  Returns:
    (batch with advantages, weights f32[M, B, T], stats)
  """
  if algorithm.prepare is not None:
    arrays = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    batch = Batch(**algorithm.prepare(arrays))
  advantages, out = algorithm.advantage(
    rewards=batch.rewards,
    group_ids=batch.group,
    valid=batch.valid,
    num_groups=num_groups,
    mask=batch.action_mask,
    old_logprob=batch.logprobs,
    ref_logprob=batch.ref_logprobs,
    sequence_index=batch.sequence_index,
    num_sequences=batch.rewards.shape[0],
    **batch.extras,
  )
  advantages = to_tokens(advantages, batch.action_mask, batch.sequence_index)
  batch = dataclasses.replace(batch, advantages=advantages)
  weights = aggregation.weights(
    batch.action_mask,
    batch.sequence_index,
    batch.rewards.shape[0],
    algorithm.aggregation,
    max_response,
    valid=batch.valid,
  )
  return batch, weights, {**out, **advantage_stats(advantages, batch.action_mask)}


def loss_and_grads(params, policy: Policy, algorithm: Algorithm, batch: Batch, weights, step):
  """Loss and gradient of the whole step, summed over live micro-batches.

  Returns:
    (loss f32[], grads, stats of the whole step, logprobs f32[M, B, T])
  """

  def micro_loss(params, x, w):
    logprob, entropy = token_logprobs(
      params, policy, x["tokens"], x["positions"], x["segment_ids"], x["action_mask"],
      x["temperature"],
    )  # fmt: skip
    extras = {k: x[k] for k in batch.extras if k in x}
    loss, out = algorithm.loss(
      w,
      logprob=logprob,
      entropy=entropy,
      mask=x["action_mask"],
      old_logprob=x["logprobs"],
      ref_logprob=x["ref_logprobs"],
      advantages=x["advantages"],
      sequence_index=x["sequence_index"],
      num_sequences=batch.rewards.shape[0],
      step=step,
      **extras,
    )
    return loss, (out, logprob)

  grad_fn = jax.value_and_grad(micro_loss, has_aux=True)

  def body(m, carry):
    loss, grads, total, logprobs = carry
    w = lax.dynamic_index_in_dim(weights, m, 0, keepdims=False)
    (part, (out, logprob)), g = grad_fn(params, _micro(batch, m), w)
    return (
      loss + part,
      jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, g),
      stats.merge(total, out),
      lax.dynamic_update_index_in_dim(logprobs, logprob, m, 0),
    )

  (_, (out, _)), grads = jax.eval_shape(grad_fn, params, _micro(batch, 0), weights[0])
  start = (
    jnp.zeros((), jnp.float32),
    jax.tree.map(lambda g: jnp.zeros(g.shape, jnp.promote_types(g.dtype, jnp.float32)), grads),
    stats.neutral(out),
    jnp.zeros(batch.tokens.shape, jnp.float32),
  )
  return lax.fori_loop(0, batch.num_micro, body, start)


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  policy: Policy,
  algorithm: Algorithm,
  optimizer: optax.GradientTransformation,
  num_groups: int,
  max_response: int,
) -> tuple[TrainState, dict[str, Any]]:
  """One optimizer step; the keywords are static, see `prepare`.

  A non-finite loss or gradient leaves params and optimizer as they were and is counted.

  Returns:
    (new state, {"metrics": dict of f32 scalars, "logprobs": f32[M, B, T] under the old params,
    "advantages": f32[M, B, T]})
  """
  batch, weights, before = prepare(
    algorithm, batch, num_groups=num_groups, max_response=max_response
  )
  loss, grads, during, logprobs = loss_and_grads(
    state.params, policy, algorithm, batch, weights, state.step
  )
  grad_norm = optax.tree.norm(grads)
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  keep = lambda new, old: jnp.where(finite, new, old)
  params = jax.tree.map(keep, optax.apply_updates(state.params, updates), state.params)
  new_state = TrainState(
    params=params,
    opt_state=jax.tree.map(keep, opt_state, state.opt_state),
    step=state.step + 1,
    nonfinite=jnp.where(finite, 0, state.nonfinite + 1),
    skipped=state.skipped + ~finite,
  )
  metrics = {
    **stats.finish({**before, **during}),
    "grad_norm": grad_norm,
    "update_norm": jnp.where(finite, optax.tree.norm(updates), 0.0),
    "nonfinite_steps": new_state.nonfinite.astype(jnp.float32),
    "loss/nan_count": new_state.skipped.astype(jnp.float32),
  }
  return new_state, {"metrics": metrics, "logprobs": logprobs, "advantages": batch.advantages}


def compile_step(
  mesh: Mesh, shardings: TrainState, batch: Batch, **static
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
  """`jax.jit` of `train_step` with explicit shardings and a donated state.

  Args:
    shardings: TrainState of NamedSharding.
    batch: any batch of the shape meant (its tree gives the shardings).
    **static: the keywords of `train_step`.
  """
  replicated = NamedSharding(mesh, PartitionSpec())
  rows = NamedSharding(mesh, ROWS)
  return jax.jit(
    lambda state, batch: train_step(state, batch, **static),
    in_shardings=(shardings, batch_shardings(batch, mesh)),
    out_shardings=(
      shardings,
      {"metrics": replicated, "logprobs": rows, "advantages": rows},
    ),
    donate_argnums=0,
  )
