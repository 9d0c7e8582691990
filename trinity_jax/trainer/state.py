"""TrainState: everything the train step changes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trinity_jax.errors import UserError

HOST = "pinned_host"  # JAX's name of the host memory that a device's programs reach


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Donated to each train step.

  Attributes:
    params: pytree of trained parameters.
    opt_state: optax state, sharded like params, on the devices or in their hosts' memory.
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
  params: Any,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  kl_coef: float = 0.0,
  *,
  offload: bool = False,
) -> TrainState:
  """Builds the state of step 0 on the mesh; `params` are sharded arrays and become the state's.

  Args:
    offload: keep the optimizer's moments in host memory.

  Raises:
    UserError: the devices have no host memory that their programs reach.
  """
  shapes = abstract_state(params, optimizer, mesh, offload=offload)
  build = functools.partial(_build, optimizer, kl_coef)
  return jax.jit(build, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))(params)


def abstract_state(
  params: Any, optimizer: optax.GradientTransformation, mesh: Mesh, *, offload: bool = False
) -> TrainState:
  """What `init_state` builds, as shapes with shardings; so may `params` be."""
  shapes = jax.eval_shape(functools.partial(_build, optimizer, 0.0), params)
  own = jax.tree.map(lambda p: p.sharding, params)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    state_shardings(shapes, own, optimizer, mesh, offload=offload),
  )


def _build(optimizer: optax.GradientTransformation, kl_coef: float, params: Any) -> TrainState:
  zero = jnp.zeros((), jnp.int32)
  coef = jnp.asarray(kl_coef, jnp.float32)
  return TrainState(params, optimizer.init(params), zero, zero, zero, coef)


def state_shardings(
  abstract: TrainState,
  shardings: Any,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  *,
  offload: bool = False,
) -> TrainState:
  """Shardings of a TrainState: moments like their parameters, everything else replicated."""
  replicated = NamedSharding(mesh, PartitionSpec())
  opt = opt_shardings(abstract.opt_state, shardings, optimizer, mesh, offload=offload)
  return TrainState(shardings, opt, *[replicated] * 4)


def opt_shardings(
  opt_state: Any,
  shardings: Any,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  *,
  offload: bool = False,
) -> Any:
  """Shardings of an optimizer's state: moments like their parameters, the rest replicated.

  With `offload` the moments are in the memory of the devices' hosts.
  """
  replicated = NamedSharding(mesh, PartitionSpec())
  if offload:
    check_host_memory(mesh)
    shardings = jax.tree.map(lambda s: s.with_memory_kind(HOST), shardings)
  return optax.tree_utils.tree_map_params(
    optimizer,
    lambda _, s: s,
    opt_state,
    shardings,
    transform_non_params=lambda _: replicated,
  )


def check_host_memory(mesh: Mesh) -> None:
  """Raises UserError where the devices' programs reach no host memory."""
  device = mesh.devices.flat[0]
  kinds = [m.kind for m in device.addressable_memories()]
  if HOST not in kinds:
    raise UserError(
      f"config.trainer.offload = 'optimizer': {device.device_kind} devices have no {HOST!r} memory "
      f"(they have {', '.join(kinds)}); use 'none'"
    )


def on_device(opt_state: Any, after: Any) -> tuple[Any, Any]:
  """Inside a program: (an offloaded state on the devices, `after`), not before `after` is known."""
  opt_state, after = jax.lax.optimization_barrier((opt_state, after))
  return jax.device_put(opt_state, jax.memory.Space.Device), after
