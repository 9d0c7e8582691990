"""How much memory a stage needs on each device, from shapes and shardings alone.

What stays for the whole stage is exact. What exists only within a step is estimated from the
largest arrays; left out are the compiler's workspaces and fragmentation, buffers of collectives,
and packed batches (a few bytes a token). `--mode=plan` of a compiled program would say more.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from trinity_jax.config import Config
from trinity_jax.models import params as params_lib
from trinity_jax.models.presets import ModelConfig
from trinity_jax.sampler import engine
from trinity_jax.sampler.programs import Programs
from trinity_jax.schedule import Schedule
from trinity_jax.trainer.packing import PackSpec

LOGITS = 2**25  # bytes of one chunk of float32 logits in linear_logprob, when T x V is larger


def memory_per_device(
  config: Config,
  model: ModelConfig,
  mesh: Mesh,
  layout: Any,
  programs: Programs,
  spec: PackSpec,
  reference: bool,
) -> dict[str, int]:
  """Bytes per device.

  Args:
    layout: pytree of NamedSharding that mirrors the parameters.
    reference: whether a reference model is kept.

  Returns:
    parameters, optimizer, published (every version kept), reference, cache: kept for the whole
    stage; training, sampling: within a step; peak: the first five plus the larger phase.
  """
  numbers = held(params_lib.abstract(model), layout)
  master = numbers * jnp.dtype(config.model.param_dtype).itemsize
  rollout = jnp.dtype(config.model.rollout_dtype or config.model.dtype).itemsize
  versions = Schedule(config.sync.interval, config.sync.offset).max_lag + 1
  state = jax.eval_shape(lambda: engine.init_state(programs.spec))
  cache = sum(
    math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(programs.state_shardings))
  )
  out = {
    "parameters": master,
    "optimizer": 0 if config.optimizer.name == "sgd" else 2 * master,
    "published": versions * numbers * rollout,
    "reference": master if reference else 0,
    "cache": cache,
  }
  kept = sum(out.values())
  # The float32 sum over micro-batches, and one micro-batch's gradient.
  out["training"] = 4 * numbers + master + activations(config, model, mesh, spec)
  out["sampling"] = sampling(config, model, mesh, programs)
  return {**out, "peak": kept + max(out["training"], out["sampling"])}


def held(specs: Any, layout: Any) -> int:
  """Numbers on one device of a pytree of ParamSpec."""
  leaves, tree = jax.tree.flatten(specs)
  shardings = tree.flatten_up_to(layout)
  return sum(math.prod(s.shard_shape(spec.shape)) for spec, s in zip(leaves, shardings))


def activations(config: Config, model: ModelConfig, mesh: Mesh, spec: PackSpec) -> int:
  """What backward of one micro-batch keeps: bytes on one device.

  Per token and layer, besides its input: with remat none the norms, q, k, v, the attention's
  output and scores, and three arrays of the mlp; with dots the matmuls' outputs; with full
  nothing, one layer at a time being computed again.
  """
  T = max(spec.row_lengths)
  tokens = T * spec.rows // (mesh.shape["data"] * mesh.shape["fsdp"])
  tensor, size = mesh.shape["tensor"], jnp.dtype(config.model.dtype).itemsize
  D, F, H = model.hidden_size, model.intermediate_size, model.num_heads
  heads = (H + model.num_kv_heads) * model.head_dim * 2
  scores = 4 * H * T // tensor
  inside = size * (3 * D + (heads + 3 * F) // tensor) + scores
  dots = size * (2 * D + (heads + 2 * F) // tensor) + scores
  kept = {"none": inside, "dots": dots, "full": 0}[config.model.remat]
  layers = model.num_layers * (size * D + kept) + (inside if config.model.remat != "none" else 0)
  head = min(4 * tokens * model.vocab_size, LOGITS) + 2 * size * tokens * D
  return tokens * layers + head


def sampling(config: Config, model: ModelConfig, mesh: Mesh, programs: Programs) -> int:
  """The larger of a decode step's logits and a prefill's cache, logits and mlp, on one device."""
  over = mesh.shape["data"] * mesh.shape["fsdp"]
  size = jnp.dtype(programs.spec.dtype).itemsize
  prompts, T = max(programs.prompt_counts), max(programs.prompt_lengths)
  decode = 2 * 4 * (config.sampler.slots // over) * model.vocab_size
  kv = 2 * model.num_layers * model.num_kv_heads * model.head_dim // mesh.shape["tensor"]
  layer = 3 * (model.hidden_size + model.intermediate_size // mesh.shape["tensor"])
  prefill = prompts * (T * size * (kv + layer) + 4 * model.vocab_size)
  return max(decode, prefill)
