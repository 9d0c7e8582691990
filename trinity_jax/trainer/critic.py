"""The critic: a decoder with a value head that learns what reward to expect after each token.

Axis letters: M micro-batches, B rows, T row length, N sequences, D model width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trinity_jax.algorithms import aggregation, stats
from trinity_jax.algorithms.algorithm import Algorithm
from trinity_jax.algorithms.value import value_loss
from trinity_jax.config import Config
from trinity_jax.experience import Batch
from trinity_jax.models import transformer
from trinity_jax.trainer.arrays import of_micro_batch, whole_step
from trinity_jax.trainer.frozen import load_other
from trinity_jax.trainer.optimizer import make_optimizer
from trinity_jax.trainer.scoring import Policy, over_micro_batches, preceding
from trinity_jax.trainer.state import on_device, opt_shardings
from trinity_jax.trainer.step import ROWS, accumulate, batch_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CriticState:
  """params: {"model": the decoder's, "value_head": f32[D]}; opt_state: optax state."""

  params: Any
  opt_state: Any


class Critic(NamedTuple):
  """How the critic is evaluated and changed."""

  policy: Policy
  optimizer: optax.GradientTransformation


def make_critic(
  config: Config, policy: Policy, params: Any, mesh: Mesh
) -> tuple[Critic, CriticState]:
  """A critic that starts from critic.path's decoder, or from the policy's."""
  if config.critic.path:
    params, policy = load_other(config.critic.path, "critic.path", config, policy, mesh)
  optimizer = make_critic_optimizer(config, policy)
  offload = config.trainer.offload == "optimizer"
  return Critic(policy, optimizer), init_critic(params, optimizer, mesh, offload=offload)


def init_critic(
  model_params: Any, optimizer: optax.GradientTransformation, mesh: Mesh, *, offload: bool = False
) -> CriticState:
  """A critic that starts from a decoder's parameters and says 0 of everything.

  Args:
    model_params: sharded arrays; copied.
    offload: as state.init_state's.
  """
  shardings = jax.tree.map(lambda p: p.sharding, model_params)
  replicated = NamedSharding(mesh, PartitionSpec())

  def build(params):
    params = jax.tree.map(jnp.copy, params)
    head = jnp.zeros(params["embed"].shape[-1], params["embed"].dtype)
    params = {"model": params, "value_head": head}
    return CriticState(params, optimizer.init(params))

  where = {"model": shardings, "value_head": replicated}
  shapes = jax.eval_shape(build, model_params)
  out = CriticState(where, opt_shardings(shapes.opt_state, where, optimizer, mesh, offload=offload))
  return jax.jit(build, out_shardings=out)(model_params)


def make_critic_optimizer(config: Config, policy: Policy) -> optax.GradientTransformation:
  """The policy's optimizer with the critic's learning rate."""
  specs = {
    "model": transformer.abstract(policy.config),
    "value_head": transformer.ParamSpec((policy.config.hidden_size,), ("norm",), "zeros", ""),
  }
  own = dataclasses.replace(config.optimizer, learning_rate=config.critic.learning_rate)
  return make_optimizer(own, config.trainer.total_steps, specs, config.trainer.minibatches)


def token_values(params, policy: Policy, tokens, positions, segment_ids) -> jax.Array:
  """f32[B, T]: the value of what precedes each token, before the token is written."""
  before = preceding(params["model"], policy, tokens, positions, segment_ids)
  return jnp.einsum(
    "btd,d->bt", before, params["value_head"].astype(before.dtype),
    preferred_element_type=jnp.float32,
  )  # fmt: skip


def score_values(params, policy: Policy, batch: Batch) -> jax.Array:
  """f32[M, B, T], 0 where not an action token."""

  def of(x):
    values = token_values(params, policy, x["tokens"], x["positions"], x["segment_ids"])
    return [jnp.where(x["action_mask"], values, 0)]

  return over_micro_batches(batch, ["values"], of)["values"]


def critic_step(
  state: CriticState,
  batch: Batch,
  kl_coef: jax.Array,
  *,
  policy: Policy,
  algorithm: Algorithm,
  optimizer: optax.GradientTransformation,
  num_groups: int,
  clip: float,
  offload: bool = False,
) -> tuple[CriticState, dict[str, jax.Array]]:
  """One optimizer step towards the returns of the step's advantages; the keywords are static.

  The loss is the clipped value loss, a mean over all action tokens of the step. A non-finite loss
  or gradient changes nothing.

  Returns:
    (new state, metrics: dict of f32 scalars)
  """
  returns, target_stats = algorithm.value_targets(
    kl_coef=kl_coef, **whole_step(batch, num_groups)
  )
  weights = aggregation.weights(
    batch.action_mask, batch.sequence_index, batch.rewards.shape[0], valid=batch.valid
  )
  whole = {"returns": returns, "weights": weights}

  def micro_loss(params, x):
    values = token_values(params, policy, x["tokens"], x["positions"], x["segment_ids"])
    per_token, out = value_loss(values, x["values"], x["returns"], x["mask"], clip=clip)
    loss = jnp.sum(x["weights"] * per_token)
    return loss, ({**out, "vf_loss": stats.total(loss)}, values)

  def arrays(m):
    x = of_micro_batch(batch, whole, m)
    del x["num_sequences"]
    return x

  loss, grads, out, _ = accumulate(micro_loss, state.params, arrays, batch)
  norm = optax.tree.norm(grads)
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  old = state.opt_state
  if offload:
    old, grads = on_device(old, grads)
  updates, opt_state = optimizer.update(grads, old, state.params)
  keep = lambda new, old: jnp.where(finite, new, old)
  params = jax.tree.map(keep, optax.apply_updates(state.params, updates), state.params)
  metrics = stats.finish({**target_stats, **out})
  return (
    CriticState(params, jax.tree.map(keep, opt_state, old)),
    {**metrics, "critic/grad_norm": norm},
  )


def compile_critic(mesh: Mesh, shardings: CriticState, batch: Batch, **static):
  """`jax.jit` of (score_values, critic_step) with explicit shardings; the step donates its state.

  Args:
    shardings: CriticState of NamedSharding.
    batch: any batch of the shape meant.
    **static: the keywords of `critic_step`.
  """
  rows, replicated = NamedSharding(mesh, ROWS), NamedSharding(mesh, PartitionSpec())
  where = batch_shardings(batch, mesh)
  values = jax.jit(
    lambda params, batch: score_values(params, static["policy"], batch),
    in_shardings=(shardings.params, where),
    out_shardings=rows,
  )
  step = jax.jit(
    lambda state, batch, kl_coef: critic_step(state, batch, kl_coef, **static),
    in_shardings=(shardings, where, replicated),
    out_shardings=(shardings, replicated),
    donate_argnums=0,
  )
  return values, step
