"""The newest policy that a run has, behind a running sampler: for --mode=debug and --mode=serve."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp

from trinity_jax import build, run
from trinity_jax.algorithms.algorithm import find_row
from trinity_jax.config import Config, stage_configs
from trinity_jax.errors import UserError
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import hf, sharding
from trinity_jax.sampler.rollout_engine import RolloutEngine


def exploring_stage(config: Config) -> Config:
  """The first stage that samples.

  Raises:
    UserError: there is none.
  """
  for stage in stage_configs(config):
    if not find_row(stage.algorithm.name).supervised and not stage.buffer.replay:
      return stage
  raise UserError(
    f"--mode={config.mode}: no stage of this config explores; it only trains on given data"
  )


def newest_model(config: Config, workdir: Path) -> Path:
  """The last stage's model that WORKDIR holds in Hugging Face form, else the first one's start."""
  stages = stage_configs(config)
  for stage in reversed(stages):
    found = run.stage_directory(config, workdir, stage) / "hf"
    if (found / "config.json").is_file():
      return found
  workdir.mkdir(parents=True, exist_ok=True)
  return run.first_model(stages[0], workdir)


@contextlib.contextmanager
def sampling(stage: Config, model_path: Path) -> Iterator[RolloutEngine]:
  """A running engine with the model's weights; it answers requests as they come."""
  stage = dataclasses.replace(
    stage, explorer=dataclasses.replace(stage.explorer, deterministic=False)
  )
  model, meshes = hf.load_config(model_path), build.make_meshes(stage)
  launch = LaunchOrder(meshes.train)
  engine = build.make_engine(stage, model, meshes, launch, tokenizer_dir=model_path)
  engine.start()
  try:
    dtype = jnp.dtype(stage.model.rollout_dtype or stage.model.dtype)
    layout = sharding.param_shardings(model, meshes.train)
    engine.set_params(0, hf.load(model_path, dtype=dtype, shardings=layout)[0])
    yield engine
  finally:
    engine.close()
