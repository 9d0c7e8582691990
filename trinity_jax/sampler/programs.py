"""Ahead-of-time compiled sampler programs: one per declared shape, none after `warmup`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trinity_jax.checksums import verify
from trinity_jax.errors import UserError
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import transformer
from trinity_jax.ops import Segment  # pyright: ignore[reportAttributeAccessIssue]
from trinity_jax.sampler import engine, scoring
from trinity_jax.sampler.engine import SLOTS, DecodeState, EngineSpec, Requests


def shards_of(mesh: Mesh) -> int:
  """Parts that the slots are split into."""
  return math.prod(mesh.shape[name] for name in SLOTS)


def state_shardings(spec: EngineSpec, mesh: Mesh) -> DecodeState:
  """Slots over data x context x fsdp, kv heads over tensor.

  Raises:
    UserError: slots or kv heads that the mesh does not divide.
  """
  over = shards_of(mesh)
  if spec.slots % over:
    raise UserError(
      f"config.sampler.slots = {spec.slots}: must be a multiple of the {over} devices of "
      f"mesh.data x mesh.fsdp x mesh.context; use {-(-spec.slots // over) * over}"
    )
  if spec.model.num_kv_heads % mesh.shape["tensor"]:
    raise UserError(
      f"config.mesh.tensor = {mesh.shape['tensor']}: must divide the model's "
      f"{spec.model.num_kv_heads} kv heads"
    )
  state = jax.eval_shape(lambda: engine.init_state(spec))
  return jax.tree.map(lambda x: NamedSharding(mesh, engine.layout(x)), state)


def formats(shardings: DecodeState, mesh: Mesh) -> DecodeState:
  """How the state lies in memory: on a TPU a key's numbers beside each other, as decode's loop has
  them. Else decode would copy all keys on its way in and on its way out, and need room for that."""
  if mesh.devices.flat[0].platform != "tpu":
    return shardings
  keys_last = Layout(major_to_minor=(0, 1, 3, 2))
  cache = jax.tree.map(
    lambda s: s._replace(k=Format(keys_last, s.k)), shardings.cache,
    is_leaf=lambda x: isinstance(x, Segment),
  )  # fmt: skip
  return dataclasses.replace(shardings, cache=cache)


def unstacked(layout: Any, spec: EngineSpec) -> Any:
  """The shardings of transformer.unstack(params), from those of params."""

  def one(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))

  layers = jax.tree.map(one, layout["layers"])
  return {**layout, "layers": (layers,) * spec.model.num_layers}


class Programs:
  """The compiled programs of one engine on one mesh.

  Attributes:
    shards: parts that slots and rows are split into; slot and row numbers in the arguments of
      `extend`, `copy` and `start` count within a shard.
    prompt_lengths, prompt_counts: T and P / shards of the compiled extends.
    state_shardings: DecodeState of NamedSharding.

  Args:
    param_shardings: of the parameters on `mesh`, as published.
    source: launch order of the mesh that publishes, where it is another one.
    scores: whether `score` is compiled too.
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
    source: LaunchOrder | None = None,
    scores: bool = False,
  ):
    self.spec, self.scores = spec, scores
    self.prompt_lengths, self.prompt_counts = prompt_lengths, prompt_counts
    self.live_lengths = spec.live_lengths
    self.shards = shards_of(mesh)
    self.state_shardings = state_shardings(spec, mesh)
    self.mesh = mesh
    self._launch, self._source = launch, source or launch
    self._published = param_shardings
    self._params = unstacked(param_shardings, spec)
    self._compiled: dict[Any, Any] = {}

  @property
  def count(self) -> int:
    """Programs that `warmup` compiles."""
    extends = len(self.prompt_lengths) * len(self.prompt_counts)
    scores = len(scoring.lengths(self.spec)) if self.scores else 0
    return 3 + extends + len(self.prompt_counts) + 2 * len(self.live_lengths) + scores

  def warmup(self, params: Any) -> None:
    """Compiles every program; afterwards a call compiles nothing.

    Args:
      params: as published, or their shapes and dtypes.
    """
    with jax.set_mesh(self.mesh):  # for the layout hints inside the model
      for name, lower in self._declared(params).items():
        self._compiled[name] = lower().compile()

  def lower(self, name: Any, params: Any) -> jax.stages.Lowered:
    """One program, not compiled: ("extend", P, T), ("generate", live), "prepare" and so on.

    Args:
      params: as for `warmup`.
    """
    with jax.set_mesh(self.mesh):
      return self._declared(params)[name]()

  def _declared(self, params: Any) -> dict[Any, Callable[[], jax.stages.Lowered]]:
    """What lowers each program, by name."""
    out: dict[Any, Callable[[], jax.stages.Lowered]] = {}
    spec, shards = self.spec, self.shards
    state_sh = formats(self.state_shardings, self.mesh)
    rep = NamedSharding(self.mesh, PartitionSpec())
    slots = NamedSharding(self.mesh, PartitionSpec(SLOTS))
    wide = NamedSharding(self.mesh, PartitionSpec(SLOTS, "tensor"))
    state = jax.eval_shape(lambda: engine.init_state(spec))
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    ints = lambda *s: jax.ShapeDtypeStruct(s, jnp.int32)
    S, V = spec.slots, spec.model.vocab_size

    def add(name, f, inputs, outputs, *shapes, donate=None):
      jitted = jax.jit(f, in_shardings=inputs, out_shardings=outputs, donate_argnums=donate)
      out[name] = functools.partial(jitted.lower, *shapes)

    add("init", functools.partial(engine.init_state, spec), (), state_sh)
    published = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    unstack = functools.partial(transformer.unstack, config=spec.model)
    add("prepare", unstack, (self._published,), self._params, published)
    params = jax.eval_shape(unstack, published)
    requests = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), Requests.empty(S))
    per_slot = jax.tree.map(lambda _: slots, requests)
    for P in (n * shards for n in self.prompt_counts):
      for T in self.prompt_lengths:
        add(
          ("extend", P, T), functools.partial(engine.extend, spec),
          (self._params, state_sh, slots, slots, slots, slots), (state_sh, wide),
          params, state, ints(P, T), ints(P), ints(P), ints(P), donate=1,
        )  # fmt: skip
      add(
        ("start", P), engine.start,
        (state_sh, wide, slots, slots, per_slot, rep), state_sh,
        state, jax.ShapeDtypeStruct((P, V), jnp.float32), ints(S), ints(S), requests, scalar,
        donate=0,
      )  # fmt: skip
    for live in self.live_lengths:
      add(
        ("generate", live), functools.partial(engine.generate, spec, live=live),
        (self._params, state_sh, rep, rep, rep), (state_sh, rep),
        params, state, scalar, scalar, scalar, donate=1,
      )  # fmt: skip
      add(
        ("copy", live), functools.partial(engine.copy, live=live),
        (state_sh, slots, slots, slots), state_sh,
        state, ints(S), ints(S), ints(shards), donate=0,
      )  # fmt: skip
    for T in scoring.lengths(spec) if self.scores else ():
      P = scoring.rows(spec, T, shards)
      add(
        ("score", P, T), functools.partial(scoring.score, spec),
        (self._params, slots, slots, slots), rep,
        params, ints(P, T), ints(P), jax.ShapeDtypeStruct((P,), jnp.float32),
      )  # fmt: skip
    mask = jax.ShapeDtypeStruct((S,), jnp.bool_)
    add("release", engine.release, (state_sh, slots), state_sh, state, mask, donate=0)
    return out

  def _run(self, name, *args):
    return self._launch(self._compiled[name], *args)

  def init_state(self) -> DecodeState:
    return self._run("init")

  def prepare(self, params: Any) -> Any:
    """Published params, on this mesh and in the layout of the other programs; a copy.

    Raises:
      RunFailed: the sampler has devices of its own and other values arrived there.
    """
    placed = self._source(jax.device_put, params, self._published)  # nothing on a shared mesh
    if self._source is not self._launch:
      verify(
        params,
        placed,
        what="weights on the sampler's devices",
        source_launch=self._source,
        published_launch=self._launch,
      )
    return self._run("prepare", placed)

  def extend(self, params, state, tokens, starts, counts, slots):
    """tokens i32[P, T] of a compiled shape; see engine.extend. Returns (state, logits)."""
    return self._run(("extend", *tokens.shape), params, state, tokens, starts, counts, slots)

  def copy(self, state, source, target, count, live: int) -> DecodeState:
    return self._run(("copy", live), state, source, target, count)

  def start(self, state, logits, rows, lengths, requests, version) -> DecodeState:
    name = ("start", logits.shape[0])
    return self._run(name, state, logits, rows, lengths, requests, np.int32(version))

  def generate(self, params, state, version, max_steps, enough_free, live: int):
    """Returns (state, steps done)."""
    args = (np.int32(version), np.int32(max_steps), np.int32(enough_free))
    return self._run(("generate", live), params, state, *args)

  def score(self, params, tokens, counts, temperature):
    """tokens i32[P, T] of a compiled shape; see scoring.score. Returns f32[P, T]."""
    return self._run(("score", *tokens.shape), params, tokens, counts, temperature)

  def release(self, state, mask) -> DecodeState:
    return self._run("release", state, mask)
