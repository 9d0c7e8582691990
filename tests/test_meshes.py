"""Who computes where: samplers on the training mesh, on parts of it, on devices of their own."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import jax
import pytest

from trinity_jax import build
from trinity_jax.check import tiny
from trinity_jax.config import base_config, resolve
from trinity_jax.errors import RunFailed, UserError
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import params as params_lib
from trinity_jax.models import sharding
from trinity_jax.monitor.writers import read_jsonl
from trinity_jax.run import run

SUMS = "trinity_jax.tasks.arithmetic:generate"


def config(mesh=(1, 1, 1), context=1, **sampler):
  c = base_config()
  c.model.tiny = dict(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=64)
  c.monitor.progress, c.monitor.tensorboard = "none", False
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor, c.mesh.context = *mesh, context
  c.taskset.generate, c.taskset.generate_args = SUMS, dict(split="rl", rows=16)
  c.taskset.reward = "arithmetic"
  c.sampler.max_prompt_length, c.sampler.max_response_length, c.sampler.slots = 9, 4, 8
  c.sampler.prefill_batches, c.sampler.cache_buckets = (4,), (13,)
  c.sampler.prompt_buckets = (9,)
  c.explorer.batch_size, c.explorer.group_size = 4, 4
  c.trainer.row_lengths, c.trainer.rows_per_micro, c.trainer.total_steps = (16,), 8, 3
  c.trainer.save_hf = "never"
  for key, value in sampler.items():
    c.sampler[key] = value
  return resolve(c)


@pytest.mark.parametrize(
  ("mesh", "keys", "train", "rollout"),
  [
    ((2, 2, 2), {}, range(8), [range(8)]),
    ((-1, 2, 1), {"context": 2}, range(8), [range(8)]),
    ((2, 1, 2), {"devices": 4, "replicas": 2}, range(4), [range(4, 6), range(6, 8)]),
    ((-1, 1, 2), {"devices": 2, "tensor": 1}, range(6), [range(6, 8)]),
    ((8, 1, 1), {"replicas": 4, "tensor": 1}, range(8), [range(i, i + 2) for i in (0, 2, 4, 6)]),
  ],
)
def test_devices_are_split(mesh, keys, train, rollout):
  meshes = build.make_meshes(config(mesh, **keys))
  ids = lambda m: sorted(d.id for d in m.devices.flat)
  assert ids(meshes.train) == list(train)
  assert [ids(m) for m in meshes.rollout] == [list(r) for r in rollout]
  assert meshes.shared == ("devices" not in keys)
  assert meshes.train.shape["context"] == keys.get("context", 1)
  if "tensor" in keys:
    assert all(m.shape["tensor"] == keys["tensor"] for m in meshes.rollout)


@pytest.mark.parametrize(
  ("keys", "expected"),
  [
    ({"devices": 8}, "config.sampler.devices = 8: there are 8 devices, and training needs some"),
    ({"devices": 4, "replicas": 3}, "config.sampler.replicas = 3: must divide the samplers' 4"),
    ({"devices": 4, "tensor": 3}, "does not fit 4 device"),
    ({"tensor": 2}, "config.sampler.tensor = 2: the sampler shares the training mesh"),
  ],
)
def test_devices_that_cannot_be_split(keys, expected):
  with pytest.raises(UserError, match=expected):
    build.make_meshes(config((-1, 1, 1), **keys))


@pytest.mark.parametrize(
  ("mesh", "keys", "data", "tensor"),
  [
    ((-1, 16, 1), {}, 8, 1), ((4, 16, 4), {"tensor": 2}, 4, 2), ((2, 1, 1), {"devices": 64}, 8, 1),
    ((2, 2, 2), {}, 2, 2),  # which fits
  ],
)  # fmt: skip
def test_an_explorer_on_a_machine_unlike_the_trainers(mesh, keys, data, tensor):
  """The launchers give it the trainer's keys: it ended with exit code 1, and all with it."""
  said = []
  meshes = build.make_sampling_meshes(config(mesh, **keys), said.append)
  (rollout,) = meshes.rollout
  assert rollout is meshes.train and rollout.shape["data"] == data
  assert rollout.shape["tensor"] == tensor
  if mesh == (2, 2, 2):
    assert not said
  else:
    assert "the trainer's layout is not for this machine (" in said[0]


def test_samplers_that_cannot_be_split_anywhere():
  with pytest.raises(UserError, match="config.sampler.tensor = 3: must divide the 8 devices of"):
    build.make_sampling_meshes(config((-1, 16, 1), tensor=3), print)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
  """Metrics of each step of a run whose training and sampling share one device."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "devices", lambda all_of_them=jax.devices: all_of_them()[:1])
    return _rows(config(), tmp_path_factory.mktemp("one"))


def _rows(c, workdir):
  run(c, workdir)
  rows = read_jsonl(workdir / "metrics.jsonl")
  return [r for r in rows if "reward/mean" in r]


@pytest.mark.parametrize(
  ("mesh", "keys"),
  [
    ((2, 1, 2), {"devices": 4, "replicas": 2, "tensor": 2}),
    pytest.param((4, 2, 1), {"replicas": 2, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param((2, 2, 1), {"context": 2}, marks=pytest.mark.slow),
  ],
)
def test_a_run_is_the_same_whoever_samples(one_device, tmp_path, mesh, keys):
  rows = _rows(config(mesh, **keys), tmp_path)
  assert [r["step"] for r in rows] == [1, 2, 3]
  for row, expected in zip(rows, one_device):
    # Weights arrived whole, and every request drew what it would have drawn anywhere.
    assert row["logprob_diff/max"] < 2e-5
    assert row["reward/mean"] == pytest.approx(expected["reward/mean"])
    assert row["response_length/mean"] == pytest.approx(expected["response_length/mean"])
    assert row["staleness/max"] == 0
  assert rows[-1]["compile/after_warmup"] == 0


def test_weights_that_arrive_damaged_at_a_samplers_own_devices(monkeypatch):
  c = config((4, 1, 1), devices=4, tensor=2)
  meshes = build.make_meshes(c)
  model = tiny(c)
  layout = lambda mesh: sharding.param_shardings(model, mesh)
  source, own = LaunchOrder(meshes.train), LaunchOrder(meshes.rollout[0])
  put = jax.device_put
  published = put(params_lib.init(jax.random.key(0), model), layout(meshes.train))
  programs = build.make_programs(
    c, model, meshes.rollout[0], layout(meshes.rollout[0]), own, source=source
  )

  def damaged(tree, shardings):
    return put({**tree, "embed": tree["embed"].at[3, 1].add(1e-3)}, shardings)

  monkeypatch.setattr(jax, "device_put", damaged)
  with pytest.raises(RunFailed, match="weights on the sampler's devices: .*: embed has checksum"):
    programs.prepare(published)


def test_a_cpu_runs_as_several_devices():
  code = (
    "from trinity_jax import build; from trinity_jax.config import base_config, resolve\n"
    "c = base_config(); c.model.tiny = {'hidden': 32}; c.taskset.path = 'none'\n"
    "c.mesh.cpu_devices = 3; c = resolve(c)\n"
    "print(build.make_meshes(c).train.shape['data'], build.make_meshes(c).train.size)"
  )
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
  assert done.stdout.split() == ["3", "3"], done.stderr


def test_a_cpu_that_runs_as_other_devices_already():
  c = config((-1, 1, 1))
  c = dataclasses.replace(c, mesh=dataclasses.replace(c.mesh, cpu_devices=3))
  with pytest.raises(UserError, match="cpu_devices = 3: JAX runs as 8 CPU devices already"):
    build.make_meshes(c)
