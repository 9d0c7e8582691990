"""Parts from a config, and the checks that need more than the config alone."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from trinity_jax.algorithms.algorithm import Algorithm
from trinity_jax.config import Config, taskset_config
from trinity_jax.errors import UserError
from trinity_jax.explorer.rewards import make_reward
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models.presets import ModelConfig
from trinity_jax.sampler.cache import aligned, buckets
from trinity_jax.sampler.engine import EngineSpec
from trinity_jax.sampler.programs import Programs, shards_of
from trinity_jax.tasks.taskset import load_taskset
from trinity_jax.trainer.step import Policy


def policy_of(config: Config, model: ModelConfig) -> Policy:
  """How train steps evaluate the model."""
  m = config.model
  return Policy(model, jnp.dtype(m.dtype), m.remat, m.unroll or model.num_layers)


def make_programs(
  config: Config, model: ModelConfig, mesh: Mesh, layout: Any, launch: LaunchOrder
) -> Programs:
  """The sampler programs a config declares."""
  s = config.sampler
  cache = s.max_prompt_length + s.max_response_length
  spec = EngineSpec(
    model,
    s.slots,
    aligned(buckets(cache, s.cache_buckets, smallest=64)),
    s.max_response_length,
    jnp.dtype(config.model.rollout_dtype or config.model.dtype),
    jnp.dtype(s.cache_dtype) if s.cache_dtype else None,
  )
  chunk = min(s.max_prompt_length, s.prefill_chunk)
  return Programs(
    spec,
    mesh,
    layout,
    launch,
    prompt_lengths=buckets(chunk, s.prompt_buckets),
    prompt_counts=tuple(
      sorted({min(n, max(1, s.slots // shards_of(mesh))) for n in s.prefill_batches})
    ),
  )


def held_out_taskset(config: Config, index: int):
  """(config, all tasks, grade) of one evaluation taskset."""
  own = taskset_config(config.eval.tasksets[index], f"eval.tasksets[{index}]")
  reward = make_reward(own.reward, own.reward_args, workers=config.explorer.reward_workers)
  tasks = load_taskset(own, seed=config.seed, is_eval=True, require=("truth",)).tasks
  return own, tasks, lambda response, task: reward.grade(response, task.truth, task)


def check_rows(config: Config, mesh: Mesh) -> None:
  """Rows of a micro-batch are split over data x fsdp."""
  over = mesh.shape["data"] * mesh.shape["fsdp"]
  rows = config.trainer.rows_per_micro
  if rows % over:
    raise UserError(
      f"config.trainer.rows_per_micro = {rows}: must be a multiple of the {over} devices of "
      f"mesh.data x mesh.fsdp; use {-(-rows // over) * over}"
    )


def check_lag(config: Config, algorithm: Algorithm) -> None:
  """Off-policy data needs an objective that knows which policy sampled it."""
  lag = config.sync.interval + config.sync.offset - 1
  if lag and not algorithm.supervised and not algorithm.uses_ratio:
    raise UserError(
      f"config.sync gives rollouts that are up to {lag} versions old, but algorithm "
      f"{algorithm.name!r} neither clips nor corrects the ratio; use sync.interval=1 and "
      "sync.offset=0, or policy_loss='ppo'"
    )
  per_step = config.explorer.batch_size * config.explorer.group_size
  if not algorithm.supervised and config.trainer.batch_size not in (0, per_step):
    raise UserError(
      f"config.trainer.batch_size = {config.trainer.batch_size}: one optimizer step takes one "
      f"explorer step of {per_step} experiences (explorer.batch_size x group_size); use 0"
    )
  if algorithm.needs_group and config.explorer.group_size == 1:
    raise UserError(
      f"config.explorer.group_size = 1: algorithm {algorithm.name!r} compares the runs of a task; "
      "use at least 2"
    )
