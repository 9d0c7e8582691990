"""Programs compiled for a TPU slice that is not there, with libtpu on any machine (make aot-check).

A v5e slice of 2 x 2: the train step of a small model, sharded over fsdp and tensor, and the
sampler's programs over data and tensor must compile; the compiler's own count of memory says that
they are split, and its text that the cache stays where it is.
"""

from __future__ import annotations

import dataclasses
import math
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
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
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


def train_step(parts, mesh, offload=False):
  """The train step of `parts` on a mesh, compiled; and the shape of its micro-batches."""
  import jax
  import numpy as np

  from trinity_jax.algorithms.algorithm import make
  from trinity_jax.build import policy_of
  from trinity_jax.models import sharding
  from trinity_jax.models.params import abstract
  from trinity_jax.trainer import state as state_lib
  from trinity_jax.trainer import step as train
  from trinity_jax.trainer.optimizer import make_optimizer
  from trinity_jax.trainer.packing import pack
  from trinity_jax.trainer.trainer import pack_spec

  config, model, _, _, shapes = parts
  algorithm = make(config.algorithm)
  optimizer = make_optimizer(config.optimizer, 10, abstract(model))
  zero = jax.ShapeDtypeStruct((), np.int32)
  coef = jax.ShapeDtypeStruct((), np.float32)
  state = state_lib.TrainState(
    shapes, jax.eval_shape(optimizer.init, shapes), zero, zero, zero, coef
  )
  layout = sharding.param_shardings(model, mesh)
  shardings = state_lib.state_shardings(state, layout, optimizer, mesh, offload=offload)
  spec = pack_spec(config, algorithm)
  batch = pack([], spec)
  step = train.compile_step(
    mesh, shardings, batch, policy=policy_of(config, model), algorithm=algorithm,
    optimizer=optimizer, num_groups=spec.sequences,
    max_response=config.sampler.max_response_length, offload=offload,
  )  # fmt: skip
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), batch)
  with jax.set_mesh(mesh):  # as the trainer does: kernels are split over the mesh in context
    return step.lower(state, batch, zero).compile(), spec


def test_train_step(parts):
  compiled, _ = train_step(parts, parts[2])
  memory = compiled.memory_analysis()
  numbers = parts[1].num_params()
  # Parameters and two moments in float32 over 4 chips (norms are on each), and the batch.
  assert 3 * 4 * numbers / 4 <= memory.argument_size_in_bytes < 3 * 4 * numbers / 4 + 2**20
  assert memory.alias_size_in_bytes >= 3 * 4 * numbers / 4  # the state is donated
  assert "all-reduce" in compiled.as_text() or "reduce-scatter" in compiled.as_text()


def test_train_step_with_split_rows_and_offloaded_moments(parts, devices):
  """Two chips share each row, and gather its keys and values: no activations, nor the weights."""
  from trinity_jax.models import sharding
  from trinity_jax.plan import costs

  model = parts[1]
  mesh = sharding.make_mesh(1, 2, 1, devices, context=2)
  compiled, spec = train_step(parts, mesh, offload=True)
  text, memory, numbers = compiled.as_text(), compiled.memory_analysis(), model.num_params()
  assert 4 * numbers / 2 <= memory.argument_size_in_bytes < 4 * numbers / 2 + 2**20
  assert 2 * 4 * numbers / 2 <= memory.host_argument_size_in_bytes < 2 * 4 * numbers / 2 + 2**20
  assert memory.host_alias_size_in_bytes >= 2 * 4 * numbers / 2  # written where it was read
  rows, (T,) = spec.rows // 2, spec.row_lengths
  keys = rows * T * model.num_kv_heads * model.head_dim
  matrix = model.hidden_size * model.intermediate_size
  assert matrix < rows * T * model.hidden_size  # or activations would pass for weights
  found = [x for x in costs.cost(text).collectives if x.kind == "all-gather"]
  places = [x for x in found if "attention" in x.op_name and "shard_map/all_gather" in x.op_name]
  assert max(x.largest for x in places) == keys
  assert max(x.largest for x in found if x not in places) <= matrix


def test_plan(parts):
  """Every program compiles, every kernel is counted, nothing larger than a layer is gathered."""
  from trinity_jax.plan import report
  from trinity_jax.plan.topologies import find

  config = parts[0]
  made = report.make_plan(config, find(TOPOLOGY))
  assert made.fits and set(made.times) == {"train step", "publish", "prefill", "decode", "prepare"}
  assert not any(c.cost.unknown for c in made.compiled.values())
  tokens = report.tokens_per_device(made.stage)
  work = made.compiled["train step"].cost.flops
  # Forward, again for remat, and twice as much backward: 8 FLOPs a weight and token; the head's 10.
  assert work == pytest.approx(8 * made.stage.model.num_params() * tokens, rel=0.35)
  assert float(report.gathered_layers(made)) <= 1
  text = report.render(made)
  assert "v5e:2x2: 4 x 197 TFLOP/s, 16 GB" in text and "fits" in text


def test_plan_of_several_hosts(parts):
  """Each has a sampler, of its own devices, which is compiled for those."""
  from trinity_jax.plan import lowering
  from trinity_jax.plan.topologies import find

  limits = dataclasses.replace(parts[0].trainer, rows_per_micro=16)
  mesh = dataclasses.replace(parts[0].mesh, fsdp=16, tensor=1)
  config = dataclasses.replace(parts[0], trainer=limits, mesh=mesh)
  target = find("v6e:4x4")
  stage = lowering.stage_on(config, target.devices, target.host)
  assert stage.samplers == stage.sampler.mesh.size == stage.lowered.mesh.size == 4
  lower, _ = lowering.programs(stage)["decode"]
  assert lower().compile().memory_analysis().temp_size_in_bytes > 0


@pytest.mark.parametrize("program", [("extend", 64, 1024), ("generate", 2048)])
def test_sampling_over_a_whole_slice(program):
  """Llama-3.1-70B, which no host of v5e holds: weights over 256 chips, gathered a layer at a time.

  Several processes sample host by host; this is for one that drives all devices.
  """
  import jax
  import jax.numpy as jnp

  from trinity_jax.build import make_programs
  from trinity_jax.config import base_config, resolve
  from trinity_jax.models import params, sharding
  from trinity_jax.models.presets import PRESETS
  from trinity_jax.plan import costs
  from trinity_jax.plan.topologies import find

  c = base_config()
  c.model.path, c.model.dtype, c.model.unroll = "Llama-3.1-70B", "bfloat16", 1
  c.taskset.generate = "trinity_jax.tasks.arithmetic:generate"
  c.sampler.max_prompt_length = c.sampler.max_response_length = c.sampler.prefill_chunk = 1024
  c.sampler.prompt_buckets, c.sampler.cache_buckets = (1024,), (2048,)
  c.sampler.prefill_batches, c.sampler.slots = (1,), 64
  target, model = find("v5e:16x16"), PRESETS["Llama-3.1-70B"]
  mesh = sharding.make_mesh(1, 64, 4, target.devices)
  layout = sharding.param_shardings(model, mesh)
  programs = make_programs(resolve(c), model, mesh, layout, None)  # type: ignore[arg-type]
  abstract = params.abstract(model)
  weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), abstract)
  compiled = programs.lower(program, weights).compile()
  memory = compiled.memory_analysis()
  used = (memory.argument_size_in_bytes + memory.output_size_in_bytes
          - memory.alias_size_in_bytes + memory.temp_size_in_bytes)  # fmt: skip
  # Of the decode step the compiler would gather 15 GB of layers ahead; the trainer keeps 5 of 16.
  assert 2 * model.num_params() / 256 < used < 0.2 * target.chip.memory
  found = costs.cost(compiled.as_text()).collectives
  layer = sum(math.prod(x.shape[1:]) for x in jax.tree.leaves(abstract["layers"]))
  assert 0 < max(x.largest for x in found if x.kind == "all-gather") <= layer


def test_plan_of_a_gpu(parts):
  """Compiled with jax's CUDA plugin, where it is installed (make aot-check does)."""
  pytest.importorskip("jax_cuda12_plugin", reason="jax's CUDA plugin is not installed")
  from trinity_jax.plan import report
  from trinity_jax.plan.topologies import find

  made = report.make_plan(parts[0], find("h100x4"))
  assert made.fits and not any(c.cost.unknown for c in made.compiled.values())
  tokens = report.tokens_per_device(made.stage)
  work = made.compiled["train step"].cost.flops
  assert work == pytest.approx(8 * made.stage.model.num_params() * tokens, rel=0.35)


@pytest.fixture(scope="module", params=["bfloat16", "int8"])
def sampler(parts, devices, request):
  """Programs of a sampler with slots over data and heads over tensor, compiled."""
  import jax
  import jax.numpy as jnp

  from trinity_jax.build import make_programs
  from trinity_jax.models import sharding

  config, model, _, _, shapes = parts
  limits = dataclasses.replace(
    config.sampler, slots=16, cache_dtype=request.param, max_prompt_length=768,
    max_response_length=256, prompt_buckets=(128,), prefill_chunk=128, cache_buckets=(256, 1024),
  )  # fmt: skip
  config = dataclasses.replace(config, sampler=limits)
  mesh = sharding.make_mesh(2, 1, 2, devices)
  layout = sharding.param_shardings(model, mesh)
  programs = make_programs(config, model, mesh, layout, None)  # type: ignore[arg-type]
  programs.warmup(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes))
  return programs


def test_decode_copies_no_keys(parts, devices):
  """Left to the compiler, a loop lays the keys out anew on its way in and out: half the cache."""
  import jax
  import jax.numpy as jnp

  from trinity_jax.models import params, sharding
  from trinity_jax.sampler import engine
  from trinity_jax.sampler.programs import Programs

  model = dataclasses.replace(parts[1], num_heads=16, num_kv_heads=8)
  mesh = sharding.make_mesh(4, 1, 1, devices)
  spec = engine.EngineSpec(model, 64, (256, 1024, 2048), 256, jnp.bfloat16)
  programs = Programs(
    spec, mesh, sharding.param_shardings(model, mesh), None,  # type: ignore[arg-type]
    prompt_lengths=(256,), prompt_counts=(1,),
  )  # fmt: skip
  weights = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16), params.abstract(model)
  )
  cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(
    jax.eval_shape(lambda: engine.init_state(spec)).cache)) / 4  # fmt: skip
  for name in (("generate", 2048), ("extend", 4, 256), ("copy", 2048)):
    memory = programs.lower(name, weights).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache, f"{name}: the cache is not updated in place"
    assert memory.temp_size_in_bytes < 0.1 * cache, f"{name}: keys or values are copied"


def test_sampler_programs(sampler):
  import jax

  from trinity_jax.plan import costs
  from trinity_jax.sampler import engine

  spec = sampler.spec
  assert sampler.prompt_lengths == (128,) and sampler.prompt_counts == (4,)
  assert set(sampler._compiled) == {
    "init", "prepare", "release", ("extend", 8, 128), ("start", 8),
    ("generate", 256), ("copy", 256), ("generate", 1024), ("copy", 1024),
  }  # fmt: skip
  assert sampler.count == len(sampler._compiled)
  state = jax.eval_shape(lambda: engine.init_state(spec))
  arrays = [
    (x, s.shard_shape(x.shape)) for x, s in zip(
      jax.tree.leaves(state.cache), jax.tree.leaves(sampler.state_shardings.cache), strict=True
    )
  ]  # fmt: skip
  cache = sum(math.prod(shape) * x.dtype.itemsize for x, shape in arrays)
  whole = sum(math.prod(x.shape) * x.dtype.itemsize for x, _ in arrays)
  assert cache * 4 == whole  # split over all four chips
  numbers = min(math.prod(s) for _, s in arrays if len(s) == 4)  # of one layer's shortest segment
  for name, program in sampler._compiled.items():
    if name in ("init", "prepare"):
      continue
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= cache, f"{name}: the cache is not updated in place"
    assert memory.temp_size_in_bytes < 0.75 * cache, f"{name}: the cache is copied"
    # Nothing of the cache travels, in whole or in part: hidden states and logits do.
    moved = costs.cost(program.as_text()).collectives
    large = [x for x in moved if x.largest >= numbers]
    assert not large, f"{name}: {large}"
    if name[0] in ("extend", "generate"):
      assert any(x.kind == "all-reduce" for x in moved), "heads are split, sums are not shared?"
