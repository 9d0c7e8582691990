"""Models that are only evaluated: the reference and the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from trinity_jax.algorithms.algorithm import Algorithm
from trinity_jax.config import Config
from trinity_jax.errors import UserError
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import hf, sharding
from trinity_jax.placement import fetch, place
from trinity_jax.trainer.scoring import Policy


class Frozen:
  """Parameters that never change, on the devices or in host memory.

  Args:
    policy: how to evaluate them.
    params: sharded arrays.
    offload: keep them in host memory; `params` then copies them for each use.
  """

  def __init__(self, policy: Policy, params: Any, offload: bool):
    self.policy = policy
    self._shardings = jax.tree.map(lambda p: p.sharding, params)
    self._kept, self._offload = fetch(params) if offload else params, offload

  @property
  def params(self) -> Any:
    """The parameters as sharded arrays; copies, where they are kept in host memory."""
    return place(self._kept, self._shardings) if self._offload else self._kept


def frozen_models(
  config: Config,
  algorithm: Algorithm,
  policy: Policy,
  params: Any,
  mesh: Mesh,
  launch: LaunchOrder,
) -> dict[str, Frozen]:
  """The models that the algorithm compares with, by the array that each gives.

  Args:
    policy, params: of the trained model as the stage begins, which is the reference unless
      algorithm.reference names another.

  Raises:
    UserError: a folder that does not fit, or an algorithm that needs a teacher without one.
  """
  c, out = config.algorithm, {}
  if algorithm.needs_reference:
    if c.reference:
      loaded, its = load_other(c.reference, "algorithm.reference", config, policy, mesh)
      out["ref_logprob"] = Frozen(its, loaded, c.offload)
    else:
      shardings = jax.tree.map(lambda p: p.sharding, params)
      copy = jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=shardings)
      out["ref_logprob"] = Frozen(policy, launch(copy, params), c.offload)
  if algorithm.needs_teacher and c.teacher:
    loaded, its = load_other(c.teacher, "algorithm.teacher", config, policy, mesh)
    out["teacher_logprob"] = Frozen(its, loaded, c.offload)
  return out


def load_other(
  folder: str, key: str, config: Config, policy: Policy, mesh: Mesh
) -> tuple[Any, Policy]:
  """Another model beside the policy: its sharded parameters and how to evaluate them.

  Args:
    key: the config key that named the folder.

  Raises:
    UserError: no such folder, or a smaller vocabulary than the policy's.
  """
  if not Path(folder).is_dir():
    raise UserError(f"config.{key} = {folder!r}: no such folder; give a Hugging Face model folder")
  model = hf.load_config(folder)
  if model.vocab_size < policy.config.vocab_size:
    raise UserError(
      f"config.{key} = {folder!r}: its vocabulary has {model.vocab_size} tokens, the policy's "
      f"{policy.config.vocab_size}; they must share a tokenizer"
    )
  dtype = jnp.dtype(config.model.param_dtype)
  params, _ = hf.load(folder, dtype=dtype, shardings=sharding.param_shardings(model, mesh))
  unroll = policy.unroll and (config.model.unroll or model.num_layers)
  return params, policy._replace(config=model, unroll=unroll)
