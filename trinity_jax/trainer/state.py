"""TrainState: everything the train step changes."""

from __future__ import annotations

import dataclasses
import functools
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
  shapes = abstract_state(params, optimizer, mesh)
  build = functools.partial(_build, optimizer, kl_coef)
  return jax.jit(build, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))(params)


def abstract_state(
  params: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
  """What `init_state` builds, as shapes with shardings; so may `params` be."""
  shapes = jax.eval_shape(functools.partial(_build, optimizer, 0.0), params)
  own = jax.tree.map(lambda p: p.sharding, params)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    state_shardings(shapes, own, optimizer, mesh),
  )


def _build(optimizer: optax.GradientTransformation, kl_coef: float, params: Any) -> TrainState:
  zero = jnp.zeros((), jnp.int32)
  coef = jnp.asarray(kl_coef, jnp.float32)
  return TrainState(params, optimizer.init(params), zero, zero, zero, coef)


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
