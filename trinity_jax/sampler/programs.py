"""Ahead-of-time compiled sampler programs: one per declared shape, none after `warmup`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trinity_jax.errors import UserError
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.sampler import engine
from trinity_jax.sampler.engine import DecodeState, EngineSpec, Requests

SLOTS = ("data", "fsdp")


def state_shardings(spec: EngineSpec, mesh: Mesh) -> DecodeState:
  """Slots over data x fsdp, kv heads over tensor.

  Raises:
    UserError: slots or kv heads that the mesh does not divide.
  """
  over = mesh.shape["data"] * mesh.shape["fsdp"]
  if spec.slots % over:
    raise UserError(
      f"config.sampler.slots = {spec.slots}: must be a multiple of the {over} devices of "
      f"mesh.data x mesh.fsdp; use {-(-spec.slots // over) * over}"
    )
  if spec.model.num_kv_heads % mesh.shape["tensor"]:
    raise UserError(
      f"config.mesh.tensor = {mesh.shape['tensor']}: must divide the model's "
      f"{spec.model.num_kv_heads} kv heads"
    )

  def one(x):
    cache = PartitionSpec(None, SLOTS, "tensor", None, None)
    return NamedSharding(mesh, cache if x.ndim == 5 else PartitionSpec(SLOTS))

  return jax.tree.map(one, jax.eval_shape(lambda: engine.init_state(spec)))


def admit(spec, params, state, tokens, lengths, source, requests, version) -> DecodeState:
  """`prefill` and `insert` in one program."""
  return engine.insert(
    spec, state, engine.prefill(spec, params, tokens, lengths), source, requests, version
  )


class Programs:
  """The compiled programs of one engine on one mesh.

  Attributes:
    state_shardings: DecodeState of NamedSharding.
  """

  def __init__(
    self,
    spec: EngineSpec,
    mesh: Mesh,
    param_shardings: Any,
    launch: LaunchOrder,
    *,
    prompt_lengths: tuple[int, ...],
    prompt_counts: tuple[int, ...],
    live_lengths: tuple[int, ...],
  ):
    self.spec = spec
    self.prompt_lengths, self.prompt_counts = prompt_lengths, prompt_counts
    self.live_lengths = live_lengths
    self.state_shardings = state_shardings(spec, mesh)
    self._launch, self._mesh = launch, mesh
    self._replicated = NamedSharding(mesh, PartitionSpec())
    self._slots = NamedSharding(mesh, PartitionSpec(SLOTS))
    self._param_shardings = param_shardings
    self._compiled: dict[Any, Any] = {}

  def warmup(self, params: Any) -> None:
    """Compiles every program; afterwards a call compiles nothing."""
    with jax.set_mesh(self._mesh):  # for the layout hints inside the model
      self._compile(params)

  def _compile(self, params: Any) -> None:
    spec, rep, state_sh = self.spec, self._replicated, self.state_shardings
    par = self._param_shardings
    per_slot = jax.tree.map(lambda _: self._slots, Requests.empty(1))
    shapes = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
    state = jax.eval_shape(lambda: engine.init_state(spec))
    params = shapes(params)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    ints = lambda *s: jax.ShapeDtypeStruct(s, jnp.int32)

    self._compiled["init"] = (
      jax.jit(functools.partial(engine.init_state, spec), out_shardings=state_sh).lower().compile()
    )
    admitting = jax.jit(
      functools.partial(admit, spec),
      in_shardings=(par, state_sh, rep, rep, self._slots, per_slot, rep),
      out_shardings=state_sh,
      donate_argnums=1,
    )
    requests = shapes(Requests.empty(spec.slots))
    for T in self.prompt_lengths:
      for P in self.prompt_counts:
        self._compiled["admit", P, T] = admitting.lower(
          params, state, ints(P, T), ints(P), ints(spec.slots), requests, scalar
        ).compile()
    for live in self.live_lengths:
      generating = jax.jit(
        functools.partial(engine.generate, spec, live=live),
        in_shardings=(par, state_sh, rep, rep, rep),
        out_shardings=state_sh,
        donate_argnums=1,
      )
      self._compiled["generate", live] = generating.lower(
        params, state, scalar, scalar, scalar
      ).compile()
    mask = jax.ShapeDtypeStruct((spec.slots,), jnp.bool_)
    self._compiled["release"] = (
      jax.jit(
        engine.release,
        in_shardings=(state_sh, self._slots),
        out_shardings=state_sh,
        donate_argnums=0,
      )
      .lower(state, mask)
      .compile()
    )

  def _run(self, name, *args):
    return self._launch(self._compiled[name], *args)

  def init_state(self) -> DecodeState:
    return self._run("init")

  def admit(self, params, state, tokens, lengths, source, requests, version) -> DecodeState:
    """tokens i32[P, T] of a compiled shape; see engine.insert."""
    return self._run(
      ("admit", *tokens.shape), params, state, tokens, lengths, source, requests, np.int32(version)
    )

  def generate(self, params, state, version, max_steps, enough_free, live: int) -> DecodeState:
    args = (np.int32(version), np.int32(max_steps), np.int32(enough_free))
    return self._run(("generate", live), params, state, *args)

  def release(self, state, mask) -> DecodeState:
    return self._run("release", state, mask)
