"""The optimizer's state in host memory: the same bits, elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from trinity_jax.config import OptimizerConfig
from trinity_jax.errors import UserError
from trinity_jax.models import params as params_lib
from trinity_jax.trainer import state as state_lib
from trinity_jax.trainer import step as train
from trinity_jax.trainer.optimizer import make_optimizer


def _trained(tools, offload, mesh, steps=3):
  """The state after some steps on one batch, and each step's gradient norm."""
  mesh = tools.mesh_of(*mesh)
  config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip_norm=1.0)
  optimizer = make_optimizer(config, 10, params_lib.abstract(tools.MODEL))
  state = state_lib.init_state(tools.params_on(mesh), optimizer, mesh, offload=offload)
  packed = tools.pack_with_reference(tools.make_experiences(), tools.PackSpec((48,), 4, 12))
  program = train.compile_step(
    mesh, jax.tree.map(lambda x: x.sharding, state), packed, policy=tools.POLICY,
    algorithm=tools.algorithm_of("grpo"), optimizer=optimizer, num_groups=8,
    max_response=tools.MAX_RESPONSE, offload=offload,
  )  # fmt: skip
  batch = jax.device_put(packed, train.batch_shardings(packed, mesh))
  norms = []
  with jax.set_mesh(mesh):
    for _ in range(steps):
      state, out = program(state, batch, np.int32(1))
      norms.append(float(out["metrics"]["grad_norm"]))
  return state, norms


def _moments(state):
  """Leaves of the optimizer's state that mirror parameters."""
  return [x for x in jax.tree.leaves(state.opt_state) if x.ndim]


@pytest.mark.parametrize(
  "mesh",
  [
    pytest.param((1, 1, 1), marks=pytest.mark.slow),
    pytest.param((1, 2, 2), marks=pytest.mark.nightly),
  ],
  ids=str,
)
def test_training_is_bit_equal(tools, mesh):
  here, norms = _trained(tools, False, mesh)
  there, other = _trained(tools, True, mesh)
  assert norms == other and len(set(norms)) == 3
  for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
    np.testing.assert_array_equal(a, b)
  assert len(_moments(here)) == 2 * len(jax.tree.leaves(here.params))
  assert {x.sharding.memory_kind for x in _moments(here)} == {"device"}
  assert {x.sharding.memory_kind for x in _moments(there)} == {state_lib.HOST}
  assert {x.sharding.memory_kind for x in jax.tree.leaves(there.params)} == {"device"}


def test_devices_without_host_memory_are_named():
  device = SimpleNamespace(
    device_kind="abacus", addressable_memories=lambda: [SimpleNamespace(kind="beads")]
  )
  mesh: Any = SimpleNamespace(devices=np.array([[device]]))
  with pytest.raises(
    UserError, match=r"offload = 'optimizer': abacus .*no 'pinned_host'.*\(.*beads"
  ):
    state_lib.check_host_memory(mesh)
