"""The train step: `train_step(state, batch) -> (state, outputs)`, pure, jitted once per shape.

Denominators are those of the whole optimizer step, fixed before the micro-batches are split; only
live micro-batches are computed, by a loop with a traced bound.
Axis letters: M micro-batches, B rows, T row length, N sequences, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trinity_jax.algorithms import stats
from trinity_jax.algorithms.advantages import advantage_stats
from trinity_jax.algorithms.algorithm import Algorithm
from trinity_jax.algorithms.kl_control import adapt
from trinity_jax.experience import Batch
from trinity_jax.models.sharding import RULES
from trinity_jax.trainer.arrays import of_micro_batch, whole_step
from trinity_jax.trainer.scoring import Policy, token_logprobs, token_loss
from trinity_jax.trainer.state import TrainState, on_device

# Of [M, B, T]: rows, and the places in them.
ROWS = PartitionSpec(None, RULES["batch"], RULES["sequence"])


def batch_shardings(batch: Batch, mesh: Mesh) -> Batch:
  """Rows over data x fsdp, their tokens over context; the [N] table and scalars replicated."""

  def one(x):
    return NamedSharding(mesh, ROWS if jnp.ndim(x) == 3 else PartitionSpec())

  return jax.tree.map(one, batch)


def prepare(
  algorithm: Algorithm,
  batch: Batch,
  *,
  num_groups: int,
  max_response: int,
  step: Any = 0,
  seed: int = 0,
  kl_coef: Any = None,
):
  """What needs the whole step, before the split.

  Args:
    num_groups: static, most groups of a step.
    max_response: the constant length of the aggregation seq-mean-token-sum-norm. Not the row
      length: that is chosen step by step, and no choice of shapes may change a loss.
    step, seed: number of the step and the run's seed, for what draws at random.
    kl_coef: of a KL penalty in the reward; None means the algorithm's.

  Returns:
    (batch, {"advantages", "weights" and the loss's companions: f32[M, B, T]}, stats)
  """
  if algorithm.prepare is not None:
    arrays = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    batch = Batch(**algorithm.prepare(arrays))
  whole, out = algorithm.before_split(
    num_groups=num_groups,
    max_length=max_response,
    kl_coef=kl_coef,
    **whole_step(batch, num_groups, step=step, key=_step_key(seed, step)),
  )
  out = {**out, **advantage_stats(whole["advantages"], batch.action_mask)}
  return batch, whole, out


def _step_key(seed: int, step: Any) -> jax.Array:
  return jax.random.fold_in(jax.random.key(seed), step)


def loss_and_grads(
  params, policy: Policy, algorithm: Algorithm, batch: Batch, whole, step, kl_coef=None
):
  """Loss and gradient of the whole step, summed over live micro-batches.

  Args:
    whole: from `prepare`.
    kl_coef: of a KL term in the loss; None means the algorithm's.

  Returns:
    (loss f32[], grads, stats of the whole step, logprobs f32[M, B, T])
  """

  micro_loss, arrays = _of_micro_batches(policy, algorithm, batch, whole, step, kl_coef)
  return accumulate(micro_loss, params, arrays, batch)


def accumulate(
  micro_loss: Callable[..., Any], params: Any, arrays: Callable[[Any], Any], batch: Batch
):
  """Sums over live micro-batches.

  Args:
    micro_loss: (params, arrays(m)) -> (share of the loss, (stats, f32[B, T])).
    arrays: m -> arrays of micro-batch m.

  Returns:
    (loss f32[], gradient in float32 or wider, stats merged, f32[M, B, T])
  """
  grad_fn = jax.value_and_grad(micro_loss, has_aux=True)

  def body(m, carry):
    loss, grads, total, tokens = carry
    (part, (out, found)), g = grad_fn(params, arrays(m))
    return (
      loss + part,
      jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, g),
      stats.merge(total, out),
      lax.dynamic_update_index_in_dim(tokens, found, m, 0),
    )

  (_, (out, _)), grads = jax.eval_shape(grad_fn, params, arrays(0))
  start = (
    jnp.zeros((), jnp.float32),
    jax.tree.map(lambda g: jnp.zeros(g.shape, jnp.promote_types(g.dtype, jnp.float32)), grads),
    stats.neutral(out),
    jnp.zeros(batch.tokens.shape, jnp.float32),
  )
  return lax.fori_loop(0, batch.num_micro, body, start)


def _of_micro_batches(policy, algorithm: Algorithm, batch: Batch, whole, step, kl_coef):
  """(params, arrays -> (share of the loss, (stats, logprob [B, T])), m -> arrays)."""

  def micro_loss(params, x):
    x = dict(x)
    tokens, positions, segments, temperature = (
      x.pop(k) for k in ("tokens", "positions", "segment_ids", "temperature")
    )
    loss_of = functools.partial(algorithm.loss, num_sequences=batch.rewards.shape[0])
    if not algorithm.token_level:
      logprob, entropy = token_logprobs(
        params, policy, tokens, positions, segments, x["mask"], temperature
      )
      loss, out = loss_of(**x, logprob=logprob, entropy=entropy)
      return loss, (out, logprob)
    # A token's gradient is known with its log-prob: the logits need not be computed twice.
    loss, logprob, entropy = token_loss(
      params, policy, tokens, positions, segments, temperature, algorithm, x
    )
    _, out = loss_of(**x, logprob=logprob, entropy=entropy)
    return loss, (out, logprob)

  def arrays(m):
    x = of_micro_batch(batch, whole, m, step=step, kl_coef=kl_coef)
    del x["num_sequences"]  # static
    return x

  return micro_loss, arrays


def held_out(
  params, batch: Batch, *, policy: Policy, algorithm: Algorithm, num_groups: int, max_response: int
) -> dict[str, jax.Array]:
  """Metrics of a batch that is not learned from; the keywords as for `train_step`."""
  batch, whole, before = prepare(
    algorithm, batch, num_groups=num_groups, max_response=max_response
  )
  micro_loss, arrays = _of_micro_batches(policy, algorithm, batch, whole, 0, None)

  def body(m, total):
    return stats.merge(total, micro_loss(params, arrays(m))[1][0])

  out = jax.eval_shape(lambda: micro_loss(params, arrays(0)))[1][0]
  during = lax.fori_loop(0, batch.num_micro, body, stats.neutral(out))
  return stats.finish({**before, **during})


def train_step(
  state: TrainState,
  batch: Batch,
  advance: Any = 1,
  *,
  policy: Policy,
  algorithm: Algorithm,
  optimizer: optax.GradientTransformation,
  num_groups: int,
  max_response: int,
  seed: int = 0,
  frozen_steps: int = 0,
  kl_target: float = 0.0,
  kl_horizon: int = 10000,
  offload: bool = False,
) -> tuple[TrainState, dict[str, Any]]:
  """One update of the parameters; the keywords are static, see `prepare`.

  `advance` is what it adds to the number of the step: 0 where a step has more updates to come.

  A non-finite loss or gradient leaves params and optimizer as they were and is counted; so do the
  first `frozen_steps` steps, which are not counted. With a `kl_target` state.kl_coef follows the
  step's KL. With `offload` the optimizer's state comes from host memory, and is on the devices for
  the update only.

  Returns:
    (new state, {"metrics": dict of f32 scalars, "logprobs": f32[M, B, T] under the old params,
    "advantages": f32[M, B, T]})
  """
  kl_coef = state.kl_coef if kl_target else None
  batch, whole, before = prepare(
    algorithm,
    batch,
    num_groups=num_groups,
    max_response=max_response,
    step=state.step,
    seed=seed,
    kl_coef=kl_coef,
  )
  loss, grads, during, logprobs = loss_and_grads(
    state.params, policy, algorithm, batch, whole, state.step, kl_coef
  )
  grad_norm = optax.tree.norm(grads)
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

  old = state.opt_state
  if offload:
    old, grads = on_device(old, grads)
  updates, opt_state = optimizer.update(grads, old, state.params)
  learns = finite & (state.step >= frozen_steps)
  keep = lambda new, old: jnp.where(learns, new, old)
  params = jax.tree.map(keep, optax.apply_updates(state.params, updates), state.params)
  metrics = stats.finish({**before, **during})
  coef = state.kl_coef
  if kl_target:
    coef = adapt(coef, metrics["kl"], batch.num_sequences, target=kl_target, horizon=kl_horizon)
    metrics["kl_coef"] = state.kl_coef
  new_state = dataclasses.replace(
    state,
    params=params,
    opt_state=jax.tree.map(keep, opt_state, old),
    step=state.step + advance,
    nonfinite=jnp.where(finite, 0, state.nonfinite + 1),
    skipped=state.skipped + ~finite,
    kl_coef=jnp.where(finite, coef, state.kl_coef),
  )
  metrics = {
    **metrics,
    "grad_norm": grad_norm,
    "update_norm": jnp.where(learns, optax.tree.norm(updates), 0.0),
    "nonfinite_steps": new_state.nonfinite.astype(jnp.float32),
    "loss/nan_count": new_state.skipped.astype(jnp.float32),
  }
  return new_state, {"metrics": metrics, "logprobs": logprobs, "advantages": whole["advantages"]}


def compile_step(
  mesh: Mesh, shardings: TrainState, batch: Batch, **static
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, Any]]]:
  """`jax.jit` of `train_step` with explicit shardings and a donated state.

  Args:
    shardings: TrainState of NamedSharding.
    batch: any batch of the shape meant (its tree gives the shardings).
    **static: the keywords of `train_step`.
  """
  replicated = NamedSharding(mesh, PartitionSpec())
  rows = NamedSharding(mesh, ROWS)
  return jax.jit(
    lambda state, batch, advance: train_step(state, batch, advance, **static),
    in_shardings=(shardings, batch_shardings(batch, mesh), replicated),
    out_shardings=(
      shardings,
      {"metrics": replicated, "logprobs": rows, "advantages": rows},
    ),
    donate_argnums=0,
  )
