"""Keys that contradict each other once the algorithm or the devices are known."""

from __future__ import annotations

from jax.sharding import Mesh

from trinity_jax.algorithms.algorithm import Algorithm
from trinity_jax.build import tasks_per_step
from trinity_jax.config import Config
from trinity_jax.errors import UserError
from trinity_jax.schedule import make_schedule


def check_rows(config: Config, mesh: Mesh) -> None:
  """Rows of a micro-batch are split over data x fsdp, their tokens over context.

  Raises:
    UserError: a number that does not divide.
  """
  over = mesh.shape["data"] * mesh.shape["fsdp"]
  rows = config.trainer.rows_per_micro
  if rows % over:
    raise UserError(
      f"config.trainer.rows_per_micro = {rows}: must be a multiple of the {over} devices of "
      f"mesh.data x mesh.fsdp; use {-(-rows // over) * over}"
    )
  parts = mesh.shape["context"]
  for length in config.trainer.row_lengths:
    if length % parts:
      raise UserError(
        f"config.trainer.row_lengths: {length} must be a multiple of mesh.context = {parts}, over "
        f"which the tokens of a row are split; use {-(-length // parts) * parts}"
      )


def check_lag(config: Config, algorithm: Algorithm) -> None:
  """Off-policy data needs an objective that knows which policy sampled it.

  Raises:
    UserError: keys of the config that do not go with the algorithm.
  """
  lag = make_schedule(config.sync).max_lag
  if config.buffer.replay and not (algorithm.supervised or algorithm.uses_ratio or algorithm.stale):
    raise UserError(
      f"config.buffer.replay: other policies sampled it, but algorithm {algorithm.name!r} neither "
      "clips nor corrects the ratio; use policy_loss='ppo', or algorithm.correction='token_tis'"
    )
  knows = algorithm.uses_ratio or algorithm.stale or config.sync.allow_uncorrected
  if lag and not algorithm.supervised and not knows:
    raise UserError(
      f"config.sync gives rollouts that are up to {lag} versions old, but algorithm "
      f"{algorithm.name!r} neither clips nor corrects the ratio; use sync.interval=1 and "
      "sync.offset=0, policy_loss='ppo', or algorithm.correction='token_tis'"
    )
  per_step = config.explorer.batch_size * config.explorer.group_size
  if not algorithm.supervised and config.trainer.batch_size not in (0, per_step):
    raise UserError(
      f"config.trainer.batch_size = {config.trainer.batch_size}: one optimizer step takes one "
      f"explorer step of {per_step} experiences (explorer.batch_size x group_size); use 0"
    )
  if config.explorer.min_runs > config.explorer.group_size:
    raise UserError(
      f"config.explorer.min_runs = {config.explorer.min_runs}: a group has explorer.group_size = "
      f"{config.explorer.group_size} runs; use at most that"
    )
  if algorithm.needs_group and config.explorer.group_size == 1:
    raise UserError(
      f"config.explorer.group_size = 1: algorithm {algorithm.name!r} compares the runs of a task; "
      "use at least 2"
    )
  if algorithm.needs_greedy and config.explorer.group_size == 1:
    raise UserError(
      f"config.explorer.group_size = 1: algorithm {algorithm.name!r} samples the first run of each "
      "task greedily, as a baseline for the others; use at least 2"
    )
  updates = config.trainer.minibatches
  tasks = tasks_per_step(config, algorithm)
  for key, count in (("tasks of a step", tasks), ("experts.batch_size", config.experts.batch_size)):
    if count % updates:
      raise UserError(
        f"config.trainer.minibatches = {updates}: must divide the {count} {key}, so that groups "
        "stay whole"
      )
  if config.algorithm.kl_target and not algorithm.kl_coef:
    raise UserError(
      f"config.algorithm.kl_target = {config.algorithm.kl_target}: algorithm {algorithm.name!r} "
      "has no KL penalty to adapt; set algorithm.kl and algorithm.kl_coef"
    )
  if config.critic.warmup and not algorithm.needs_critic:
    raise UserError(
      f"config.critic.warmup = {config.critic.warmup}: algorithm {algorithm.name!r} has no critic"
    )
