"""Programs compiled for a TPU slice that is not there, with libtpu on any machine (make aot-check).

A v5e slice of 2 x 2: the train step and the decode loop of a small model, sharded over fsdp and
tensor, must compile, and the compiler's own count of memory says that they are split.
"""

from __future__ import annotations

import dataclasses
import os

import pytest

pytestmark = pytest.mark.aot
TOPOLOGY = "v5e:2x2"


@pytest.fixture(scope="module")
def devices():
  pytest.importorskip("libtpu", reason="libtpu is not installed (make aot-check installs it)")
  # No TPU is asked for or waited for: the metadata server of a TPU machine is not there.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  from jax.experimental import topologies

  return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices


@pytest.fixture(scope="module")
def parts(devices):
  """Config, model, mesh and abstract parameters; nothing exists on a device."""
  import jax

  from trinity_jax.config import base_config, resolve
  from trinity_jax.models import hf, params, sharding

  c = base_config()
  c.model.tiny = dict(hidden=256, layers=2, heads=4, kv_heads=2, head_dim=128, intermediate=512,
                      vocab_size=512)  # fmt: skip
  c.model.dtype = "bfloat16"
  c.model.remat = "full"
  c.taskset.generate = "trinity_jax.tasks.arithmetic:generate"
  c.sampler.slots = 8
  c.sampler.max_prompt_length = 128
  c.sampler.max_response_length = 128
  c.sampler.prompt_buckets = (128,)
  c.sampler.cache_buckets = (256,)
  c.sampler.prefill_batches = (4,)
  c.mesh.fsdp = 2
  c.mesh.tensor = 2
  config = resolve(c)
  model = hf.tiny_config(**config.model.tiny)
  mesh = sharding.make_mesh(1, 2, 2, devices)
  layout = sharding.param_shardings(model, mesh)
  shapes = jax.eval_shape(lambda: params.init(jax.random.key(0), model))
  return config, model, mesh, layout, shapes


def test_train_step(parts):
  import jax
  import numpy as np

  from trinity_jax.algorithms.algorithm import make
  from trinity_jax.build import policy_of
  from trinity_jax.models.params import abstract
  from trinity_jax.trainer import state as state_lib
  from trinity_jax.trainer import step as train
  from trinity_jax.trainer.optimizer import make_optimizer
  from trinity_jax.trainer.packing import pack
  from trinity_jax.trainer.trainer import pack_spec

  config, model, mesh, layout, shapes = parts
  algorithm = make(config.algorithm)
  optimizer = make_optimizer(config.optimizer, 10, abstract(model))
  zero = jax.ShapeDtypeStruct((), np.int32)
  fields = [f.name for f in dataclasses.fields(state_lib.TrainState)][2:]
  state = state_lib.TrainState(
    shapes, jax.eval_shape(optimizer.init, shapes), **dict.fromkeys(fields, zero)
  )
  shardings = state_lib.state_shardings(state, layout, optimizer, mesh)
  spec = pack_spec(config)
  batch = pack([], spec)
  step = train.compile_step(
    mesh, shardings, batch, policy=policy_of(config, model), algorithm=algorithm,
    optimizer=optimizer, num_groups=spec.sequences,
    max_response=config.sampler.max_response_length,
  )  # fmt: skip
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), batch)
  compiled = step.lower(state, batch).compile()
  memory = compiled.memory_analysis()
  numbers = model.num_params()
  # Parameters and two moments in float32 over 4 chips (norms are on each), and the batch.
  assert 3 * 4 * numbers / 4 <= memory.argument_size_in_bytes < 3 * 4 * numbers / 4 + 2**20
  assert memory.alias_size_in_bytes >= 3 * 4 * numbers / 4  # the state is donated
  assert "all-reduce" in compiled.as_text() or "reduce-scatter" in compiled.as_text()


def test_decode_and_prefill(parts):
  import jax
  import jax.numpy as jnp

  from trinity_jax.build import make_programs

  config, model, mesh, layout, shapes = parts
  programs = make_programs(config, model, mesh, layout, None)  # type: ignore[arg-type]
  published = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes)
  programs.warmup(published)
  names = set(programs._compiled)
  assert names == {"init", "release", ("admit", 4, 128), ("generate", 256)}
  memory = programs._compiled["generate", 256].memory_analysis()
  cache = 2 * 2 * model.num_layers * 8 * model.num_kv_heads * 256 * model.head_dim // 4
  assert memory.alias_size_in_bytes >= cache  # the cache is updated in place
  assert memory.temp_size_in_bytes < memory.argument_size_in_bytes + 2**24
