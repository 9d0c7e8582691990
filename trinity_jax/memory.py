"""How much memory a stage needs on each device, from shapes and shardings alone.

What stays for the whole stage is exact. What exists only within a step is estimated from the
largest arrays; left out are the compiler's workspaces and fragmentation, and packed batches (a few
bytes a token). `--mode=plan` compiles the programs and says more.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from trinity_jax.algorithms.algorithm import Algorithm
from trinity_jax.build import kept_versions
from trinity_jax.config import Config
from trinity_jax.models import hf, sharding
from trinity_jax.models import params as params_lib
from trinity_jax.models.presets import ModelConfig
from trinity_jax.sampler import engine
from trinity_jax.sampler.programs import Programs
from trinity_jax.schedule import make_schedule
from trinity_jax.trainer.packing import PackSpec

BLOCK = 512  # cache entries that an extend attends to at once, see kernels/attention/cached.py
LOGIT_ROWS = 2048  # rows of float32 logits that linear_logprob holds at a time, at most


def memory_per_device(
  config: Config,
  model: ModelConfig,
  mesh: Mesh,
  layout: Any,
  programs: Programs,
  spec: PackSpec,
  algorithm: Algorithm,
  *,
  training: int | None = None,
  within: int | None = None,
) -> dict[str, int]:
  """Bytes per device.

  Args:
    layout: pytree of NamedSharding that mirrors the parameters.
    algorithm: which other models it needs.
    training, within: what a train step and the sampler's programs need within a step, where their
      compiler has said it; None: an estimate.

  Returns:
    parameters, optimizer, published (every version kept), reference, teacher, critic (with its
    optimizer), sampler (the rollout weights again, one array a layer), cache (and what else the
    sampler keeps per slot): kept for the whole stage; training, sampling:
    within a step; peak: what is kept plus the larger phase; with sampler.release the sampler counts
    for its own phase only; host, with trainer.offload: the optimizers' moments, which are in host
    memory but for their update. Where samplers have devices of their
    own, published weights pass through there, and the peak is that of the fuller device.
  """
  numbers = held(params_lib.abstract(model), layout)
  master = numbers * jnp.dtype(config.model.param_dtype).itemsize
  rollout = jnp.dtype(config.model.rollout_dtype or config.model.dtype).itemsize
  versions = kept_versions(make_schedule(config.sync))
  own = held(params_lib.abstract(model), sharding.param_shardings(model, programs.mesh)) * rollout
  state = jax.eval_shape(lambda: engine.init_state(programs.spec))
  cache = sum(
    math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(programs.state_shardings))
  )
  train = {
    "parameters": master,
    "optimizer": moments(config, master),
    "published": versions * numbers * rollout,
    **beside(config, algorithm, model, mesh),
  }
  host, update = 0, 0  # bytes in host memory; moments of an update, as they were and will be
  if config.trainer.offload == "optimizer":
    critics = train["critic"] - train["critic"] // (1 + moments(config, 1))
    host, update = train["optimizer"] + critics, 2 * max(train["optimizer"], critics)
    train |= {"optimizer": 0, "critic": train["critic"] - critics}
  if config.sampler.engine != "native":  # another server samples
    own = cache = within = 0
  sample = {"sampler": own, "cache": cache}
  if training is None:  # the float32 sum over micro-batches, and one micro-batch's gradient
    step = activations(config, model, mesh, spec)
    layer = one_layer(model, mesh, config.model.dtype)
    step += 2 * layer  # gathered; its gradient before it is reduced
    training = 4 * numbers + master + max(step, update)
  within = sampling(model, programs) if within is None else within
  kept, kept_there = sum(train.values()), sum(sample.values())
  if set(mesh.devices.flat).isdisjoint(programs.mesh.devices.flat):
    peak = max(kept + training, kept_there + max(own, within))
  elif config.sampler.release:
    peak = kept + max(training, kept_there + within)
  else:
    peak = kept + kept_there + max(training, within)
  out = {**train, **sample, "training": training, "sampling": within, "peak": peak}
  return out | ({"host": host} if host else {})


def moments(config: Config, parameters: int) -> int:
  """What the optimizer keeps beside so much of parameters."""
  return 0 if config.optimizer.name == "sgd" else 2 * parameters


def beside(
  config: Config, algorithm: Algorithm, model: ModelConfig, mesh: Mesh
) -> dict[str, int]:
  """Bytes on one device of the models beside the policy; 0 where there is none.

  With algorithm.offload a frozen model is on the devices only while it is evaluated, as if it were
  kept: that it shares the time with nothing but activations is not counted.
  """

  def size(folder: str) -> int:
    other = hf.load_config(folder) if folder else model
    numbers = held(params_lib.abstract(other), sharding.param_shardings(other, mesh))
    return numbers * jnp.dtype(config.model.param_dtype).itemsize

  c = config.algorithm
  critic = size(config.critic.path) if algorithm.needs_critic else 0
  return {
    "reference": size(c.reference) if algorithm.needs_reference else 0,
    "teacher": size(c.teacher) if algorithm.needs_teacher and c.teacher else 0,
    "critic": critic + moments(config, critic),
  }


def held(specs: Any, layout: Any) -> int:
  """Numbers on one device of a pytree of ParamSpec."""
  leaves, tree = jax.tree.flatten(specs)
  shardings = tree.flatten_up_to(layout)
  return sum(math.prod(s.shard_shape(spec.shape)) for spec, s in zip(leaves, shardings))


def one_layer(model: ModelConfig, mesh: Mesh, dtype: Any) -> int:
  """Bytes on one device of one layer's parameters, gathered over all axes but tensor."""
  layers = jax.tree.leaves(params_lib.abstract(model)["layers"])
  numbers = sum(math.prod(spec.shape[1:]) for spec in layers)
  return jnp.dtype(dtype).itemsize * numbers // mesh.shape["tensor"]


def activations(config: Config, model: ModelConfig, mesh: Mesh, spec: PackSpec) -> int:
  """What backward of one micro-batch keeps: bytes on one device.

  Per token and layer, besides its input: with remat none the norms, q, k, v, the attention's
  output, and three arrays of the mlp; with dots the matmuls' outputs; with full nothing, one layer
  at a time being computed again. Of scores there are one layer's, with their weights' and their own
  gradient; on a TPU a few tiles only.
  """
  T = max(spec.row_lengths)
  parts = mesh.shape["context"]
  tokens = T * spec.rows // (mesh.shape["data"] * mesh.shape["fsdp"] * parts)
  tensor, size = mesh.shape["tensor"], jnp.dtype(config.model.dtype).itemsize
  D, F, H = model.hidden_size, model.intermediate_size, model.num_heads
  heads, keys = H * model.head_dim * 2, model.num_kv_heads * model.head_dim * 2
  scores = 0 if mesh.devices.flat[0].platform == "tpu" else 3 * 4 * H * T // tensor
  inside = size * (3 * D + (heads + parts * keys + 3 * F) // tensor)  # keys of the whole row
  dots = size * (2 * D + (heads + keys + 2 * F) // tensor)
  kept = {"none": inside, "dots": dots, "full": 0}[config.model.remat]
  layers = model.num_layers * (size * D + kept) + scores
  layers += inside if config.model.remat != "none" else 0
  head = 4 * min(tokens, LOGIT_ROWS) * model.vocab_size // tensor + 2 * size * tokens * D
  return tokens * layers + head


def sampling(model: ModelConfig, programs: Programs) -> int:
  """The larger of a decode step's and an extend's logits, scores and mlp, on one device.

  Both work in the cache itself. An extend's scores are of one block of entries at a time. Weights
  that are split over fsdp are gathered: a layer's, the next one's, and those of the vocabulary.
  """
  spec, tensor = programs.spec, programs.mesh.shape["tensor"]
  size, C, H = jnp.dtype(spec.dtype).itemsize, spec.cache_length, model.num_heads // tensor
  qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
  layer = size * (3 * model.hidden_size + (qkv + 3 * model.intermediate_size) // tensor)
  logits = 2 * 4 * model.vocab_size
  decode = spec.slots // programs.shards * (layer + 4 * H * C + logits)
  rows, T = max(programs.prompt_counts), max(programs.prompt_lengths)
  extend = rows * (T * (layer + 4 * H * min(C, BLOCK)) + logits)
  gathered = 0
  if programs.mesh.shape["fsdp"] > 1:
    vocabulary = size * model.vocab_size * model.hidden_size // tensor
    gathered = 2 * one_layer(model, programs.mesh, spec.dtype) + vocabulary
  return gathered + max(decode, extend)
