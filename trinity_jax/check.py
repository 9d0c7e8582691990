"""Before a run: everything that can be found wrong without running, and --mode=check's plan."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from trinity_jax import build
from trinity_jax.algorithms.algorithm import Algorithm
from trinity_jax.algorithms.algorithm import make as make_algorithm
from trinity_jax.buffer import recorded
from trinity_jax.buffer.store import check_url
from trinity_jax.config import Config, TasksetConfig, stage_configs
from trinity_jax.config_checks import check_lag, check_rows
from trinity_jax.errors import UserError
from trinity_jax.experience import Task
from trinity_jax.explorer.rewards import make_reward
from trinity_jax.explorer.workflows import find_workflow
from trinity_jax.memory import memory_per_device
from trinity_jax.models import hf, params, sharding
from trinity_jax.models.presets import ModelConfig
from trinity_jax.models.tokenizer import Tokenizer, write_byte_tokenizer
from trinity_jax.sampler.programs import Programs
from trinity_jax.tasks.prompts import check_given, check_prompts
from trinity_jax.tasks.taskset import Taskset
from trinity_jax.trainer.packing import PackSpec
from trinity_jax.trainer.trainer import pack_spec


class Plan(NamedTuple):
  """A stage, resolved, with nothing of it on a device."""

  config: Config
  algorithm: Algorithm
  mesh: Mesh
  model: ModelConfig
  layout: Any  # pytree of NamedSharding that mirrors the parameters
  programs: Programs
  spec: PackSpec
  taskset: Taskset
  held_out: list[tuple[TasksetConfig, Sequence[Task]]]


def plan(config: Config) -> Plan:
  """Resolves one stage: names, files, rows, mesh, shapes. Loads no weights and no tokenizer.

  Raises:
    UserError: what the run would stumble over.
  """
  algorithm = make_algorithm(config.algorithm)
  check_lag(config, algorithm)
  meshes = build.make_meshes(config)
  mesh = meshes.train
  check_rows(config, mesh)
  model = model_config(config)
  layout = sharding.param_shardings(model, mesh)
  rollout = meshes.rollout[0]
  programs = build.make_programs(
    config, model, rollout, sharding.param_shardings(model, rollout),
    None,  # type: ignore[arg-type]  # nothing is launched
  )  # fmt: skip
  if not algorithm.supervised:
    make_reward(config.taskset.reward, config.taskset.reward_args)
    find_workflow(config.taskset.workflow)
    check_url(config.buffer.url)
  if config.buffer.replay:
    recorded.find(config.buffer.replay)
  taskset = build.training_taskset(config, algorithm)
  build.expert_taskset(config, algorithm)
  build.held_out_texts(config, algorithm)
  held_out = []
  for i in range(len(config.eval.tasksets)):
    own, tasks, _ = build.held_out_taskset(config, i)
    find_workflow(own.workflow)
    held_out.append((own, tasks))
  spec = pack_spec(config, algorithm)
  return Plan(config, algorithm, mesh, model, layout, programs, spec, taskset, held_out)


def check_texts(stage: Plan, tokenizer: Tokenizer) -> list[str]:
  """Tokenises a sample of the stage's texts; returns warnings.

  Raises:
    UserError: a demonstration that does not fit, or a taskset of which no prompt fits.
  """
  limits = stage.config.sampler
  sampled = list(stage.held_out)
  if stage.algorithm.supervised:
    check_given(stage.algorithm.data, stage.taskset.tasks, tokenizer, limits)
  else:
    sampled.insert(0, (stage.config.taskset, stage.taskset.tasks))
  found = [check_prompts(c, tasks, tokenizer, limits.max_prompt_length) for c, tasks in sampled]
  return [f"stage {stage.config.name!r}: {warning}" for warning in found if warning]


def model_config(config: Config) -> ModelConfig:
  """The model's architecture, from its folder's config.json or from config.model.tiny."""
  if config.model.path:
    model_folder(config)
    return hf.load_config(config.model.path)
  return tiny(config)


def tiny(config: Config) -> ModelConfig:
  """The architecture that config.model.tiny describes."""
  sizes = {k: v for k, v in config.model.tiny.items() if k not in ("seed", "dtype", "words")}
  try:
    return hf.tiny_config(**sizes)
  except (TypeError, UserError) as e:  # TypeError: an argument that does not exist
    raise UserError(f"config.model.tiny = {dict(config.model.tiny)!r}: {e}") from e


def model_folder(config: Config) -> Path:
  """config.model.path; raises UserError when it is no folder."""
  path = Path(config.model.path)
  if not path.is_dir():
    raise UserError(
      f"config.model.path = {config.model.path!r}: no such folder; give a Hugging Face model "
      "folder (config.json, *.safetensors, tokenizer files)"
    )
  return path


def check(config: Config) -> str:
  """Returns the plan of every stage: data, model, shapes, memory per device, steps.

  Raises:
    UserError: what the run would stumble over.
  """
  plans = [plan(stage) for stage in stage_configs(config)]
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path(config.model.path or scratch)
    if not config.model.path:
      model = plans[0].model
      words = config.model.tiny.get("words", ())
      length = model.max_position_embeddings
      write_byte_tokenizer(folder, vocab_size=model.vocab_size, max_length=length, words=words)
    tokenizer = Tokenizer.load(folder)
    warnings = [w for stage in plans for w in check_texts(stage, tokenizer)]
  return "\n\n".join([*map(render, plans), *(f"warning: {w}" for w in warnings)])


def render(stage: Plan) -> str:
  """The plan of one stage as lines `name  value`."""
  config, spec, programs, model = stage.config, stage.spec, stage.programs, stage.model
  steps, updates = config.trainer.total_steps, config.trainer.minibatches
  tasks = build.tasks_per_step(config, stage.algorithm)
  epochs = steps * tasks / len(stage.taskset)
  size = sum(math.prod(s.shape) for s in jax.tree.leaves(params.abstract(model)))
  memory = memory_per_device(
    config, model, stage.mesh, stage.layout, programs, spec, stage.algorithm
  )
  longest = config.sampler.max_prompt_length + config.sampler.max_response_length
  beyond = longest > model.max_position_embeddings
  lines = {
    "stage": config.name,
    "algorithm": f"{stage.algorithm.name} ({stage.algorithm.policy_loss.name} loss, "
    f"{stage.algorithm.aggregation})",
    "model": f"{model.family}, {size:,} parameters, {model.num_layers} layers",
    "devices": f"{stage.mesh.size} {jax.devices()[0].device_kind}, mesh {dict(stage.mesh.shape)}",
    "tasks": f"{len(stage.taskset)}, {tasks} a step, {epochs:.2f} epochs",
    "held out": ", ".join(f"{c.name} ({len(t)})" for c, t in stage.held_out) or "nothing",
    "steps": f"{steps} of {spec.sequences * updates} experiences"
    f"{f' in {updates} updates' if updates > 1 else ''}, saved every "
    f"{config.trainer.save_interval}",
    "rows": f"{spec.rows} x {spec.row_lengths} a micro-batch, at most {spec.micros} micro-batches",
    "sampler": f"{config.sampler.slots} slots x {programs.spec.cache_length} tokens, prompts "
    f"{programs.prompt_lengths}, {programs.prompt_counts} a prefill and part of the mesh",
    "programs": f"{programs.count} of the sampler, decoding over {programs.live_lengths} entries; "
    f"{len(spec.row_lengths)} train",
    "memory": "per device, estimated: " + ", ".join(f"{k} {_bytes(v)}" for k, v in memory.items()),
  }
  if beyond:
    lines["beware"] = (
      f"sequences of {longest} tokens, but the model was made for {model.max_position_embeddings}"
    )
  limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
  if limit and memory["peak"] > limit:
    lines["beware"] = f"the estimated peak is more than the device's {_bytes(limit)}"
  width = max(map(len, lines))
  return "\n".join(f"{k:<{width}}  {v}" for k, v in lines.items())


def _bytes(n: float) -> str:
  for unit in ("B", "KB", "MB", "GB"):
    if n < 1000:
      return f"{n:.3g} {unit}"
    n /= 1000
  return f"{n:.3g} TB"
