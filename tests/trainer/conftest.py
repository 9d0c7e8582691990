"""A tiny model, experiences and compiled programs that the trainer's tests share.

Axis letters: M micro-batches, B rows, T row length, N sequences.
"""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from trinity_jax.algorithms.algorithm import make
from trinity_jax.experience import Experience, ExperienceId, Source, StopReason
from trinity_jax.models import params as params_lib
from trinity_jax.models import sharding
from trinity_jax.models.presets import ModelConfig
from trinity_jax.trainer import step as train
from trinity_jax.trainer.packing import PackSpec, pack

MODEL = ModelConfig(
  family="qwen3", vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
  head_dim=8, intermediate_size=48, qk_norm=True, tie_word_embeddings=True,
)  # fmt: skip
MAX_RESPONSE = 16


def make_experience(rng, length, prompt, *, id=(1, 0, 0, 0), reward=0.0, temperature=1.0):
  """A sequence of random tokens whose log-probs are near those of an untrained model."""
  mask = np.arange(length) >= prompt
  return Experience(
    tokens=rng.integers(0, MODEL.vocab_size, length),
    action_mask=mask,
    logprobs=np.where(mask, -np.log(MODEL.vocab_size) + 0.3 * rng.normal(size=length), 0.0),
    versions=np.where(mask, 0, -1),
    id=ExperienceId(*id),
    reward=reward,
    temperature=temperature,
  )


def make_experiences(seed=0, groups=4, size=3, low=9, high=16):
  """Groups of runs with mixed rewards and temperatures; the last run of group 1 has failed."""
  rng = np.random.default_rng(seed)
  out = []
  for g in range(groups):
    for r in range(size):
      length = int(rng.integers(low, high + 1))
      out.append(
        make_experience(
          rng, length, int(rng.integers(1, 5)), id=(1, g, r, 0),
          reward=float(rng.integers(0, 3)), temperature=(1.0, 0.7)[g % 2],
        )
      )  # fmt: skip
  if groups > 1:
    out[2 * size - 1] = Experience.failed(ExperienceId(1, 1, size - 1, 0), StopReason.ERROR, {})
  return out


def pack_with_reference(experiences, spec):
  """Packs; reference log-probs are a function of the behaviour's, so no split can move them."""
  batch = pack(experiences, spec)
  reference = np.where(batch.action_mask, 0.9 * batch.logprobs - 0.3, 0).astype(np.float32)
  return dataclasses.replace(batch, ref_logprobs=reference)


@functools.cache
def mesh_of(data, fsdp, tensor, context=1):
  devices = jax.devices()[: data * fsdp * tensor * context]
  return sharding.make_mesh(data, fsdp, tensor, devices, context=context)


@functools.cache
def base_params():
  """Every leaf away from its neutral value, so that no gradient is zero by symmetry."""
  key = jax.random.key(0)
  params = jax.jit(lambda: params_lib.init(key, MODEL))()
  rng = np.random.default_rng(7)
  return jax.tree.map(
    lambda x: np.asarray(x) + 0.05 * rng.normal(size=x.shape).astype(np.float32), params
  )


def params_on(mesh):
  """The same parameters on a mesh; a new copy each time (train steps donate them)."""
  layout = sharding.param_shardings(MODEL, mesh)
  return jax.tree.map(lambda x, s: jax.device_put(np.array(x), s), base_params(), layout)


POLICY = train.Policy(MODEL, unroll=1)


@functools.cache
def grads_program(algorithm_name, mesh):
  """jitted (params, batch, whole) -> loss_and_grads; the aggregation is in the weights."""
  algorithm = algorithm_of(algorithm_name)

  def run(params, batch, whole):
    return train.loss_and_grads(params, POLICY, algorithm, batch, whole, 0)

  del mesh  # one cache entry per mesh: jit would recompile anyway
  # Half the compile time; what is compared are our splits, not LLVM's passes.
  return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def algorithm_of(name, aggregation="", **keys):
  if name == "grpo":
    keys = {"kl": "k3", "kl_coef": 0.1, "entropy_coef": 0.02, **keys}
  return make(name, aggregation=aggregation, **keys)


@functools.cache
def prepare_program(name, aggregation):
  algorithm = algorithm_of(name, aggregation)
  return jax.jit(
    lambda batch: train.prepare(algorithm, batch, num_groups=8, max_response=MAX_RESPONSE)
  )


def whole_step(experiences, spec, *, name="grpo", aggregation="token-mean", mesh=None):
  """(loss, grads as numpy, stats, batch, weights, logprobs) of one step, gradient only."""
  mesh = mesh or mesh_of(1, 1, 1)
  packed = pack_with_reference(experiences, spec)
  batch = jax.device_put(packed, train.batch_shardings(packed, mesh))
  batch, whole, _ = prepare_program(name, aggregation)(batch)
  with jax.set_mesh(mesh):  # as the trainer does
    loss, grads, out, logprobs = grads_program(name, mesh)(params_on(mesh), batch, whole)
  return SimpleNamespace(
    loss=float(loss), grads=jax.device_get(grads), stats=out, batch=jax.device_get(batch),
    whole=jax.device_get(whole), weights=np.asarray(whole["weights"]),
    logprobs=np.asarray(logprobs), packed=packed,
  )  # fmt: skip


@pytest.fixture(scope="session")
def tools():
  """The functions above: test modules cannot import a conftest."""
  return SimpleNamespace(
    MODEL=MODEL, POLICY=POLICY, MAX_RESPONSE=MAX_RESPONSE, PackSpec=PackSpec, Source=Source,
    make_experience=make_experience, make_experiences=make_experiences,
    pack_with_reference=pack_with_reference, mesh_of=mesh_of, params_on=params_on,
    base_params=base_params, algorithm_of=algorithm_of, whole_step=whole_step,
    grads_program=grads_program, prepare_program=prepare_program,
  )  # fmt: skip
