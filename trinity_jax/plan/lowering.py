"""A config's programs, lowered as its run lowers them, from shapes alone: nothing is computed."""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trinity_jax import build, check, synchronizer
from trinity_jax.algorithms.algorithm import Algorithm
from trinity_jax.algorithms.algorithm import make as make_algorithm
from trinity_jax.config import Config
from trinity_jax.config_checks import check_lag, check_rows
from trinity_jax.errors import UserError, suggestion
from trinity_jax.memory import BLOCK, LOGIT_ROWS
from trinity_jax.models import params as params_lib
from trinity_jax.models import sharding
from trinity_jax.models.presets import PRESETS, ModelConfig
from trinity_jax.plan import costs
from trinity_jax.sampler.programs import Programs, shards_of
from trinity_jax.trainer.extras import extras_of
from trinity_jax.trainer.packing import PackSpec, pack, pack_spec
from trinity_jax.trainer.programs import lower_step, make_parts
from trinity_jax.trainer.state import abstract_state


class Stage(NamedTuple):
  """A stage on its devices, with nothing on them.

  Attributes:
    layout: pytree of NamedSharding of the parameters on the training mesh.
    sampler: its programs on the (first) rollout mesh.
    lowered: the same programs on the devices they are compiled for.
    params: parameters as shapes, in the trained dtype, with their shardings.
  """

  config: Config
  algorithm: Algorithm
  model: ModelConfig
  meshes: build.Meshes
  layout: Any
  sampler: Programs
  lowered: Programs
  spec: PackSpec
  params: Any

  @property
  def samplers(self) -> int:
    """Independent ones of the whole stage: where several processes train, one in each."""
    processes = {d.process_index for d in self.meshes.train.devices.flat}
    return len(processes) if len(processes) > 1 else len(self.meshes.rollout)

  @property
  def longest(self) -> int:
    """Tokens of the longest sequence there can be."""
    return self.config.sampler.max_prompt_length + self.config.sampler.max_response_length

  @property
  def micros(self) -> int:
    """Micro-batches of an update whose sequences are all of them the longest."""
    per_row = max(1, max(self.spec.row_lengths) // self.longest)
    return -(-self.spec.sequences // (per_row * self.spec.rows))


class Compiled(NamedTuple):
  """What the compiler says of one program, per device and in bytes.

  Attributes:
    arguments, outputs: an output that takes an argument's place is not counted.
    temporary, code: what it needs besides.
    cost: None where it did not fit.
    exceeds: bytes that it would need where it did not fit, else 0.
    seconds: that compiling took.
  """

  name: str
  arguments: int = 0
  outputs: int = 0
  temporary: int = 0
  code: int = 0
  cost: costs.Cost | None = None
  exceeds: float = 0.0
  seconds: float = 0.0


def stage_on(config: Config, devices: Sequence[Any], host: Sequence[Any] = ()) -> Stage:
  """Resolves one stage for these devices.

  Args:
    host: Topology.host.

  Raises:
    UserError: what the run would stumble over before its first step, tasks and texts aside.
  """
  algorithm = make_algorithm(config.algorithm)
  check_lag(config, algorithm)
  model = model_of(config)
  meshes = build.make_meshes(config, devices)
  check_rows(config, meshes.train)
  layout = sharding.param_shardings(model, meshes.train)
  rollout = meshes.rollout[0]
  make = lambda mesh: build.make_programs(
    config, model, mesh, sharding.param_shardings(model, mesh),
    None,  # type: ignore[arg-type]  # nothing is launched
  )  # fmt: skip
  sampler = lowered = make(rollout)
  if rollout.size == len(host) < len(devices):
    lowered = make(sharding.make_mesh(**rollout.shape, devices=host))
  dtype = jnp.dtype(config.model.param_dtype)
  params = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s),
    params_lib.abstract(model),
    layout,
  )
  spec = pack_spec(config, algorithm)
  return Stage(config, algorithm, model, meshes, layout, sampler, lowered, spec, params)


def model_of(config: Config) -> ModelConfig:
  """As the run finds it; besides, model.path may name a published model, such as Qwen3-8B."""
  path = config.model.path
  if path in PRESETS and not Path(path).is_dir():
    return PRESETS[path]
  if path and not Path(path).is_dir():
    raise UserError(
      f"config.model.path = {path!r}: neither a folder with a config.json nor one of "
      f"{', '.join(PRESETS)}{suggestion(path, PRESETS)}"
    )
  return check.model_config(config)


def programs(stage: Stage) -> dict[str, tuple[Callable[[], jax.stages.Lowered], tuple[float, ...]]]:
  """Name -> (what lowers it, trips of its loops whose bound is not compiled)."""
  sampler, spec = stage.lowered, stage.sampler.spec
  published = published_params(stage)
  P, T = max(sampler.prompt_counts) * sampler.shards, max(sampler.prompt_lengths)
  ends = (0, *spec.live_lengths)
  at_once = sum(min(b - a, BLOCK) for a, b in zip(ends, ends[1:]))
  mesh = stage.meshes.train
  rows = stage.spec.rows * max(stage.spec.row_lengths) // shards_of(mesh)
  head = -(-rows // (512 if mesh.devices.flat[0].platform == "cpu" else LOGIT_ROWS))
  out: dict[str, tuple[Callable[[], jax.stages.Lowered], tuple[float, ...]]] = {
    # Micro-batches, and in each of them the live rows that the head takes at a time.
    "train step": (lambda: train_step(stage), (float(stage.micros), float(head))),
    "publish": (lambda: publish(stage), ()),
  }
  if stage.config.sampler.engine != "native":
    return out
  return out | {
    "prefill": (
      lambda: sampler.lower(("extend", P, T), published), (float(-(-T // at_once)),)
    ),
    "decode": (lambda: sampler.lower(("generate", spec.cache_length), published), ()),
    "prepare": (lambda: sampler.lower("prepare", published), ()),
  }  # fmt: skip


def published_params(stage: Stage) -> Any:
  """The parameters as published, as shapes."""
  m = stage.config.model
  dtype = jnp.dtype(m.rollout_dtype or m.dtype)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), stage.params)


def train_step(stage: Stage) -> jax.stages.Lowered:
  """Of the longest rows."""
  config, algorithm, mesh = stage.config, stage.algorithm, stage.meshes.train
  policy = build.policy_of(config, stage.model)
  # The models beside the policy are scored by programs of their own.
  parts = make_parts(config, algorithm, policy, mesh, frozen={}, critic=None)
  extras = extras_of(
    algorithm,
    teacher=algorithm.needs_teacher and bool(config.algorithm.teacher),
    scores=parts.scores,
  )
  longest = dataclasses.replace(stage.spec, row_lengths=stage.spec.row_lengths[-1:])
  offload = config.trainer.offload == "optimizer"
  state = abstract_state(stage.params, parts.optimizer, mesh, offload=offload)
  return lower_step(parts, state, pack([], longest, extras=extras))


def publish(stage: Stage) -> jax.stages.Lowered:
  m = stage.config.model
  cast = synchronizer.publishing(stage.layout, jnp.dtype(m.rollout_dtype or m.dtype))
  return cast.lower(stage.params)


def compile_all(stage: Stage, note: Callable[[str], None] = lambda line: None) -> list[Compiled]:
  """Compiles the programs one after the other; `note` hears of each."""
  out = []
  platform = stage.meshes.train.devices.flat[0].platform
  for name, (lower, dynamic) in programs(stage).items():
    begin = time.monotonic()
    found = _compiled(name, lower, dynamic, platform)
    out.append(found._replace(seconds=time.monotonic() - begin))
    note(f"{name} compiled in {out[-1].seconds:.0f} s")
  return out


def _compiled(
  name: str, lower: Callable[[], jax.stages.Lowered], dynamic: Sequence[float], platform: str
) -> Compiled:
  try:
    done, text = _compile(lower(), platform)
  except jax.errors.JaxRuntimeError as e:
    needed = exceeded(str(e))
    if not needed:
      raise
    return Compiled(name, exceeds=needed)
  memory: Any = done.memory_analysis()
  return Compiled(
    name,
    memory.argument_size_in_bytes,
    memory.output_size_in_bytes - memory.alias_size_in_bytes,
    memory.temp_size_in_bytes,
    memory.generated_code_size_in_bytes,
    costs.cost(text, dynamic),
  )


def _compile(lowered: jax.stages.Lowered, platform: str) -> tuple[jax.stages.Compiled, str]:
  """A compiled program and its text."""
  if platform != "tpu":
    done = lowered.compile()
    return done, done.as_text() or ""
  # jaxlib cannot read back what libtpu says of work that it gives to SparseCores.
  with tempfile.TemporaryDirectory(prefix="plan") as folder:
    done = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
    found = Path(folder).rglob("*.after_optimizations.txt")
    return done, max(found, key=lambda p: p.stat().st_size).read_text()


def exceeded(message: str) -> float:
  """Bytes that a program needs, of the compiler's words that it does not fit; 0 of others."""
  found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
  return float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1) if found else 0.0
