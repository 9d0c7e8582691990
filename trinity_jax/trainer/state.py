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
  """

  params: Any
  opt_state: Any
  step: Any
  nonfinite: Any
  skipped: Any


def init_state(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Builds the state of step 0 on the mesh; `params` are sharded arrays and become the state's."""
  shardings = jax.tree.map(lambda p: p.sharding, params)

  def build(params):
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, optimizer.init(params), zero, zero, zero)

  out = state_shardings(jax.eval_shape(build, params), shardings, optimizer, mesh)
  return jax.jit(build, out_shardings=out)(params)


def state_shardings(
  abstract: TrainState, shardings: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
  """Shardings of a TrainState: moments like their parameters, everything else replicated."""
  replicated = NamedSharding(mesh, PartitionSpec())
  opt = optax.tree_utils.tree_map_params(
    optimizer,
    lambda _, s: s,
    abstract.opt_state,
    shardings,
    transform_non_params=lambda _: replicated,
  )
  return TrainState(shardings, opt, replicated, replicated, replicated)
