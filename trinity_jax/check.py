"""--mode=check: validates a config and shows the plan without running it."""

from __future__ import annotations

import math
from pathlib import Path

from trinity_jax.config import Config, stage_configs
from trinity_jax.errors import UserError


def check(config: Config) -> str:
  """Returns the resolved plan of every stage: data, model, memory per device, shapes, steps.

  Raises:
    UserError: what a run would stumble over: files, model, mesh, shapes, objectives.
  """
  return "\n\n".join(_stage_plan(stage) for stage in stage_configs(config))


def _stage_plan(config: Config) -> str:
  import jax

  from trinity_jax import stage as parts
  from trinity_jax.algorithms.algorithm import make
  from trinity_jax.models import sharding
  from trinity_jax.sampler.programs import state_shardings
  from trinity_jax.tasks.taskset import load_taskset
  from trinity_jax.trainer.trainer import pack_spec

  algorithm = make(config.algorithm)
  parts.check_lag(config, algorithm)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  parts.check_rows(config, mesh)
  model = _model_config(config)
  layout = sharding.param_shardings(model, mesh)
  programs = parts.make_programs(config, model, mesh, layout, None)
  state_shardings(programs.spec, mesh)
  require = ("response",) if algorithm.supervised else ()
  taskset = load_taskset(config.taskset, seed=config.seed, require=require)
  held_out = [parts.held_out_taskset(config, i) for i in range(len(config.eval.tasksets))]
  spec = pack_spec(config)
  memory = memory_per_device(config, model, mesh, algorithm.needs_reference)

  steps = config.trainer.total_steps
  tasks = spec.sequences if algorithm.supervised else config.explorer.batch_size
  lines = {
    "stage": config.name,
    "algorithm": f"{algorithm.name} ({algorithm.policy_loss.name} loss, {algorithm.aggregation})",
    "model": f"{model.family}, {model.num_params():,} parameters, {model.num_layers} layers",
    "devices": f"{len(jax.devices())} {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}",
    "tasks": f"{len(taskset)}, {tasks} a step, {steps * tasks / len(taskset):.2f} epochs",
    "held out": ", ".join(f"{c.name} ({len(t)})" for c, t, _ in held_out) or "nothing",
    "steps": f"{steps} of {spec.sequences} experiences, saved every {config.trainer.save_interval}",
    "rows": f"{spec.rows} x {spec.row_lengths} a micro-batch, at most {spec.micros} micro-batches",
    "sampler": f"{config.sampler.slots} slots x {programs.spec.cache_length} tokens, prompts "
    f"{programs.prompt_lengths}, {programs.prompt_counts} a prefill",
    "programs": f"{len(programs.prompt_lengths) * len(programs.prompt_counts)} prefill, "
    f"{len(programs.live_lengths)} decode, {len(spec.row_lengths)} train",
    "memory": ", ".join(f"{k} {_bytes(v)}" for k, v in memory.items()) + " per device (estimate)",
  }
  width = max(map(len, lines))
  return "\n".join(f"{k:<{width}}  {v}" for k, v in lines.items())


def _model_config(config: Config):
  from trinity_jax.models import hf

  if config.model.path:
    if not Path(config.model.path).is_dir():
      raise UserError(
        f"config.model.path = {config.model.path!r}: no such folder; give a Hugging Face model "
        "folder (config.json, *.safetensors, tokenizer files)"
      )
    return hf.load_config(config.model.path)
  try:
    return hf.tiny_config(**{k: v for k, v in config.model.tiny.items() if k not in ("seed", "dtype")})
  except TypeError as e:
    raise UserError(f"config.model.tiny = {config.model.tiny!r}: {e}") from e


def memory_per_device(config: Config, model, mesh, reference: bool) -> dict[str, int]:
  """Bytes per device, from shapes and shardings (activations only roughly).

  Returns:
    parameters, optimizer, gradients, published copy, reference, cache, logits of a micro-batch.
  """
  import jax.numpy as jnp

  split = mesh.shape["fsdp"] * mesh.shape["tensor"]
  params = math.ceil(model.num_params() / split)
  master = params * jnp.dtype(config.model.param_dtype).itemsize
  rollout = jnp.dtype(config.model.rollout_dtype or config.model.dtype).itemsize
  moments = 0 if config.optimizer.name == "sgd" else 2
  s, slots_over = config.sampler, mesh.shape["data"] * mesh.shape["fsdp"]
  entries = s.slots * (s.max_prompt_length + s.max_response_length) // slots_over
  kv = 2 * model.num_layers * model.num_kv_heads * model.head_dim // mesh.shape["tensor"]
  return {
    "parameters": master,
    "optimizer": moments * master,
    "gradients": master,
    "published": params * rollout,
    "reference": master if reference else 0,
    "cache": entries * kv * rollout,
  }


def _bytes(n: float) -> str:
  for unit in ("B", "KB", "MB", "GB"):
    if n < 1000:
      return f"{n:.3g} {unit}"
    n /= 1000
  return f"{n:.3g} TB"
