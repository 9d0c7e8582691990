"""TrainState: everything the train step changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Donated to each train step.

  Attributes:
    params: pytree of trained parameters.
    opt_state: optax state, sharded like params.
    step: i32[], optimizer steps taken (skipped ones count: a step is a batch consumed).
    nonfinite: i32[], steps in a row whose loss or gradient was not finite.
    skipped: i32[], such steps so far; step - skipped updates have been applied.
    kl_coef: f32[], weight of the KL penalty where it is adapted.
    critic: critic.CriticState, or None for algorithms without one.
  """

  params: Any
  opt_state: Any
  step: Any
  nonfinite: Any
  skipped: Any
  kl_coef: Any
  critic: Any = None


def init_state(
  params: Any, optimizer: optax.GradientTransformation, mesh: Mesh, kl_coef: float = 0.0
) -> TrainState:
  """Builds the state of step 0 on the mesh; `params` are sharded arrays and become the state's."""
  shardings = jax.tree.map(lambda p: p.sharding, params)

  def build(params):
    zero = jnp.zeros((), jnp.int32)
    coef = jnp.asarray(kl_coef, jnp.float32)
    return TrainState(params, optimizer.init(params), zero, zero, zero, coef)

  out = state_shardings(jax.eval_shape(build, params), shardings, optimizer, mesh)
  return jax.jit(build, out_shardings=out)(params)


def state_shardings(
  abstract: TrainState, shardings: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
  """Shardings of a TrainState: moments like their parameters, everything else replicated."""
  replicated = NamedSharding(mesh, PartitionSpec())
  opt = opt_shardings(abstract.opt_state, shardings, optimizer, mesh)
  return TrainState(shardings, opt, *[replicated] * 4)


def opt_shardings(
  opt_state: Any, shardings: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Any:
  """Shardings of an optimizer's state: moments like their parameters, the rest replicated."""
  replicated = NamedSharding(mesh, PartitionSpec())
  return optax.tree_utils.tree_map_params(
    optimizer,
    lambda _, s: s,
    opt_state,
    shardings,
    transform_non_params=lambda _: replicated,
  )
