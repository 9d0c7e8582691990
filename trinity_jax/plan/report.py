"""--mode=plan's answer: memory and time per device, and what to change where it does not fit."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import jax

from trinity_jax.config import Config, resolve, stage_configs
from trinity_jax.errors import UserError
from trinity_jax.memory import memory_per_device
from trinity_jax.models import params as params_lib
from trinity_jax.plan.costs import Cost
from trinity_jax.plan.lowering import Compiled, Stage, compile_all, stage_on
from trinity_jax.plan.topologies import Chip, Topology, find
from trinity_jax.sampler import roofline


class Times(NamedTuple):
  """Seconds of one run of a program: an estimate.

  Attributes:
    compute, memory: at the chip's peak rates.
    waiting: for collectives during which nothing else runs.
    hidden: of collectives beside which the program goes on.
  """

  compute: float
  memory: float
  waiting: float
  hidden: float

  @property
  def total(self) -> float:
    """The larger of compute and memory, and what of the links does not hide behind it."""
    busy = max(self.compute, self.memory)
    return busy + self.waiting + max(0.0, self.hidden - busy)


class Plan(NamedTuple):
  """A stage's plan.

  Attributes:
    memory: bytes per device by what they hold, see memory.memory_per_device; the compiler's own
      numbers for `training` and `sampling`; `publishing` besides.
    estimate: the same before anything was compiled.
    times: by program.
    step: seconds of an optimizer step by part.
  """

  topology: Topology
  chip: Chip
  stage: Stage
  compiled: dict[str, Compiled]
  memory: dict[str, int]
  estimate: dict[str, int]
  times: dict[str, Times]
  step: dict[str, float]

  @property
  def peak(self) -> float:
    """Bytes per device; where a program did not fit, what its compiler asked for."""
    return max(self.memory["peak"], *(c.exceeds for c in self.compiled.values()))

  @property
  def fits(self) -> bool:
    return self.peak <= self.chip.memory


def plan(config: Config, topology: str, note: Callable[[str], None] = lambda line: None) -> str:
  """The plans of all stages, as text.

  Raises:
    UserError: devices that there are none of, or what the run would stumble over.
  """
  target = find(topology)
  plans = [make_plan(stage, target, note) for stage in stage_configs(config)]
  return "\n\n".join(map(render, plans))


def make_plan(
  config: Config, topology: Topology, note: Callable[[str], None] = lambda line: None
) -> Plan:
  """Compiles one stage's programs and sums up what they need."""
  stage = stage_on(config, topology.devices, topology.host)
  chip = topology.chip or measured(stage)
  compiled = {c.name: c for c in compile_all(stage, note)}
  times = {n: times_of(c.cost, chip) for n, c in compiled.items() if c.cost is not None}
  return Plan(
    topology, chip, stage, compiled, memory_of(stage, compiled), estimate(stage), times,
    step_seconds(stage, times, chip),
  )  # fmt: skip


def times_of(cost: Cost, chip: Chip) -> Times:
  links = {False: 0.0, True: 0.0}
  for c in cost.collectives:
    links[c.overlaps] += c.sent / chip.rate(c.group)
  return Times(cost.flops / chip.flops, cost.bytes / chip.bandwidth, links[False], links[True])


def measured(stage: Stage) -> Chip:
  """The figures of devices that stand in no data sheet, from a short measurement."""
  mesh, spec = stage.meshes.rollout[0], stage.sampler.spec
  devices = mesh.local_devices
  rates = roofline.measure(spec, max(1, spec.slots // stage.sampler.shards), devices)
  limit = (devices[0].memory_stats() or {}).get("bytes_limit")
  if limit is None:
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(jax.devices())
  return Chip(rates.matmul, limit, rates.copy, rates.copy, source="measured on these devices")


# --- memory ---------------------------------------------------------------------------------------


def estimate(stage: Stage) -> dict[str, int]:
  """From shapes alone, as --mode=check has it."""
  return memory_per_device(
    stage.config, stage.model, stage.meshes.train, stage.layout, stage.sampler, stage.spec,
    stage.algorithm,
  )  # fmt: skip


def memory_of(stage: Stage, compiled: dict[str, Compiled]) -> dict[str, int]:
  """As the compiler has it."""
  if any(c.exceeds for c in compiled.values()):
    return estimate(stage)
  need = {n: c.temporary + c.code + c.outputs for n, c in compiled.items()}
  within = max(need.get("prefill", 0), need.get("decode", 0))
  out = memory_per_device(
    stage.config, stage.model, stage.meshes.train, stage.layout, stage.sampler, stage.spec,
    stage.algorithm, training=need["train step"], within=within,
  )  # fmt: skip
  beside = ["training", "sampling", "peak", "host"] + ["sampler", "cache"] * _released(stage)
  kept = sum(v for k, v in out.items() if k not in beside)
  out["publishing"] = need["publish"]  # before the oldest version goes
  if stage.sampler.mesh is not stage.meshes.train:
    out["publishing"] = max(need["publish"], out["sampler"])  # on its way into the sampler
  out["peak"] = max(out["peak"], kept + out["publishing"])
  return out


def _released(stage: Stage) -> bool:
  return stage.config.sampler.release or not stage.meshes.shared


# --- time -----------------------------------------------------------------------------------------


def step_seconds(stage: Stage, times: dict[str, Times], chip: Chip) -> dict[str, float]:
  """Of a step whose prompts and responses are all of them as long as they may be."""
  c, sampler = stage.config, stage.sampler
  out = {}
  if not stage.algorithm.supervised and "prefill" in times and "decode" in times:
    chunk, rows = max(sampler.prompt_lengths), max(sampler.prompt_counts) * sampler.shards
    calls = -(-c.explorer.batch_size // (rows * stage.samplers))  # the runs of a group share one
    chunks = -(-c.sampler.max_prompt_length // chunk)
    runs = c.explorer.batch_size * c.explorer.group_size
    waves = -(-runs // (c.sampler.slots * stage.samplers))
    out["prefill"] = calls * chunks * times["prefill"].total
    out["decode"] = waves * c.sampler.max_response_length * times["decode"].total
  if "train step" in times:
    out["train"] = c.trainer.minibatches * times["train step"].total
  if "publish" in times and "prepare" in times:
    out["publish"] = times["publish"].total + times["prepare"].total
    if stage.sampler.mesh is not stage.meshes.train:  # laid out anew by a transfer, no program
      out["publish"] += estimate(stage)["sampler"] / chip.link
  return out


def model_flops_share(made: Plan) -> float:
  """6 x parameters x tokens over what the chips could do while the train step runs (MFU)."""
  tokens = tokens_per_device(made.stage) * made.stage.meshes.train.size
  work = 6.0 * made.stage.model.num_params() * tokens
  return work / (made.times["train step"].total * made.chip.flops * made.stage.meshes.train.size)


def tokens_per_device(stage: Stage) -> float:
  """Of an update; a row is shared by the devices of the tensor axis."""
  tokens = stage.micros * stage.spec.rows * max(stage.spec.row_lengths)
  return tokens / stage.meshes.train.size


# --- what to change -------------------------------------------------------------------------------


def advice(made: Plan) -> list[str]:
  """Changes of one key each, with the estimated peak under them; those that fit come first."""
  stage = made.stage
  scale = made.peak / made.estimate["peak"]  # what the compiler takes for what was estimated
  found = []
  for key, value in _changes(stage):
    group, name = key.split(".")
    changed = dataclasses.replace(getattr(stage.config, group), **{name: value})
    config = dataclasses.replace(stage.config, **{group: changed})
    try:
      config = resolve(dataclasses.asdict(config))
      peak = estimate(stage_on(config, made.topology.devices))["peak"] * scale
    except UserError:  # not with the other keys, or these devices
      continue
    if peak < 0.98 * made.peak:
      found.append((peak > made.chip.memory, f"config.{key} = {value!r}: about {_gb(peak)} GB"))
  found.sort(key=lambda f: f[0])
  return [text + ("" if over else ", fits") for over, text in found] or ["use more devices"]


def _changes(stage: Stage) -> list[tuple[str, object]]:
  c, train = stage.config, stage.meshes.train.shape
  out: list[tuple[str, object]] = []
  if c.model.remat != "full":
    out.append(("model.remat", "full"))
  if not c.sampler.release:
    out.append(("sampler.release", True))
  if c.trainer.offload == "none" and c.optimizer.name != "sgd":
    out.append(("trainer.offload", "optimizer"))
  out.append(("trainer.rows_per_micro", max(1, c.trainer.rows_per_micro // 2)))
  if stage.algorithm.needs_reference and not c.algorithm.offload:
    out.append(("algorithm.offload", True))
  if c.mesh.data == -1 and train["data"] > 1:
    out.append(("mesh.fsdp", 2 * train["fsdp"]))
  if c.mesh.fsdp == -1 and train["fsdp"] > 1 or c.mesh.data == -1 and train["data"] > 1:
    out.append(("mesh.tensor", 2 * train["tensor"]))
  out.append(("sampler.slots", c.sampler.slots // 2))
  if c.sampler.cache_dtype != "int8":
    out.append(("sampler.cache_dtype", "int8"))
  return out


# --- the table ------------------------------------------------------------------------------------


def render(made: Plan) -> str:
  stage, chip, topology = made.stage, made.chip, made.topology
  config, model, spec = stage.config, stage.model, stage.spec
  mesh = ", ".join(f"{k} {v}" for k, v in stage.meshes.train.shape.items())
  rollout = stage.meshes.rollout[0]
  head = {
    "stage": config.name,
    "model": f"{config.model.path or 'tiny'}: {model.num_params():,} parameters",
    "devices": f"{topology.name}: {len(topology.devices)} x {chip.flops / 1e12:.3g} TFLOP/s, "
    f"{_gb(chip.memory)} GB at {chip.bandwidth / 1e9:.4g} GB/s, links {chip.link / 1e9:.3g} GB/s "
    f"({chip.source})",
    "mesh": mesh
    + ("" if rollout is stage.meshes.train else f"; {stage.samplers} samplers of "
       f"{', '.join(f'{k} {v}' for k, v in rollout.shape.items())}"),
    "step": f"{spec.sequences} sequences of up to {stage.longest} tokens: {stage.micros} "
    f"micro-batches of {spec.rows} x {max(spec.row_lengths)}, "
    f"{tokens_per_device(stage):,.0f} tokens a device",
  }  # fmt: skip
  width = max(map(len, head))
  lines = [f"{k:<{width}}  {v}" for k, v in head.items()]
  return "\n".join([*lines, "", *_programs(made), "", *_memory(made), "", *_time(made)])


def _programs(made: Plan) -> list[str]:
  lines = [
    f"{'program':<11} {'TFLOP':>8} {'memory GB':>10} {'sent GB':>8} {'temporary GB':>13} "
    f"{'compute ms':>11} {'memory ms':>10} {'links ms':>9} {'hidden ms':>10} {'total ms':>9}"
  ]
  for name, c in made.compiled.items():
    if c.cost is None:
      lines.append(f"{name:<11} does not fit: its compiler asks for {_gb(c.exceeds)} GB")
      continue
    t, sent = made.times[name], sum(c.cost.sent().values())
    lines.append(
      f"{name:<11} {c.cost.flops / 1e12:8.3f} {c.cost.bytes / 1e9:10.3f} {sent / 1e9:8.3f} "
      f"{c.temporary / 1e9:13.3f} {1e3 * t.compute:11.3f} {1e3 * t.memory:10.3f} "
      f"{1e3 * t.waiting:9.3f} {1e3 * t.hidden:10.3f} {1e3 * t.total:9.3f}"
    )
  for name, c in made.compiled.items():
    if c.cost is not None and c.cost.collectives:
      kinds = ", ".join(f"{k} {_gb(v)}" for k, v in sorted(c.cost.sent().items()) if v)
      lines.append(f"  {name} sends in GB: {kinds}; {_largest(c.cost)}")
    if c.cost is not None and c.cost.unknown:
      lines.append(f"  {name}: not counted is the work of {', '.join(sorted(c.cost.unknown))}")
  return lines


def _largest(cost: Cost) -> str:
  gathered = [c.largest for c in cost.collectives if c.kind == "all-gather"]
  return f"the largest all-gather has {max(gathered):,} elements" if gathered else "no all-gather"


def gathered_layers(made: Plan) -> str:
  """Elements of the train step's largest all-gather over one layer's parameters."""
  cost = made.compiled["train step"].cost
  if cost is None:
    return "-"
  largest = max((c.largest for c in cost.collectives if c.kind == "all-gather"), default=0)
  layers = params_lib.abstract(made.stage.model)["layers"]
  one = sum(math.prod(spec.shape[1:]) for spec in jax.tree.leaves(layers))
  return f"{largest / one:.2f}"


def _memory(made: Plan) -> list[str]:
  lines = ["GB per device, kept: "]
  names = [k for k in made.memory if k not in ("training", "sampling", "publishing", "peak")]
  lines[0] += ", ".join(f"{k} {_gb(made.memory[k])}" for k in names if made.memory[k])
  if all(c.cost is not None for c in made.compiled.values()):
    within = ", ".join(f"{k} {_gb(made.memory[k])}" for k in ("training", "sampling", "publishing"))
    lines.append(f"within a phase, the compiler's temporaries, code and results: {within}")
  verdict = "fits" if made.fits else "does NOT fit"
  lines.append(
    f"peak {_gb(made.peak)} of {_gb(made.chip.memory)} GB: {verdict}; estimated without compiling "
    f"(--mode=check): {_gb(made.estimate['peak'])}"
  )
  if not made.fits:
    lines += [f"  change {x}" for x in advice(made)]
  return lines


def _time(made: Plan) -> list[str]:
  lines = []
  if made.step:
    parts = ", ".join(f"{k} {v:.3g}" for k, v in made.step.items())
    lines.append(f"estimate of a step: {sum(made.step.values()):.3g} s ({parts})")
    if left_out := _left_out(made.stage):
      lines.append(f"not in this estimate: {', '.join(left_out)}")
  if "train step" in made.times:
    lines.append(f"train step at this estimate: MFU {100 * model_flops_share(made):.0f} %")
  lines.append(
    "An estimate: the larger of FLOPs and memory traffic at the rates above, and collectives that "
    "do not overlap; every sequence as long as it may be, no waiting of the host, no environment."
  )
  return lines


def _left_out(stage: Stage) -> list[str]:
  """Passes over a step's tokens that are not among the programs that plan compiles."""
  algorithm, c = stage.algorithm, stage.config
  out = {
    "the reference's log-probs": algorithm.needs_reference,
    "the teacher's": algorithm.needs_teacher and bool(c.algorithm.teacher),
    "the critic's values and its update": algorithm.needs_critic,
  }
  return [what for what, there in out.items() if there]


def _gb(n: float) -> str:
  return f"{n / 1e9:.3g}"
