"""The probe: equal on every mesh, different for another model of the same weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trinity_jax.errors import RunFailed
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import params as params_lib
from trinity_jax.models import sharding
from trinity_jax.models.presets import ModelConfig
from trinity_jax.probe import Probe, make_probe

MODEL = ModelConfig("qwen3", 64, 32, 1, 4, 2, 16, 48, qk_norm=True, tie_word_embeddings=True)


def test_it_agrees_across_meshes_and_notices_another_model():
  meshes = [
    sharding.make_mesh(1, 2, 1, jax.devices()[:2]),
    sharding.make_mesh(1, 1, 2, jax.devices()[2:4]),
  ]
  layouts = [sharding.param_shardings(MODEL, m) for m in meshes]
  make = jax.jit(lambda: params_lib.init(jax.random.key(0), MODEL, jnp.bfloat16))
  params = [jax.device_put(make(), layout) for layout in layouts]
  probes = [make_probe(MODEL, LaunchOrder(m)) for m in meshes]
  recorded = probes[0].record(3, params[0])
  assert len(recorded["tokens"]) == 32 and len(recorded["logprobs"]) == 31
  assert probes[1].check(3, params[1], recorded) < 1e-5
  other = make_probe(dataclasses.replace(MODEL, rope_theta=100.0), LaunchOrder(meshes[1]))
  with pytest.raises(
    RunFailed, match=r"version 3: the log-prob of the probe's token \d+ is .* layout"
  ):
    other.check(3, params[1], recorded)


def test_tolerance_and_what_is_missing_or_not_finite():
  tokens = np.arange(4, dtype=np.int32)
  probe = Probe(lambda params, tokens: np.full(3, params, np.float32), tokens, tolerance=0.1)
  recorded = probe.record(1, -1.0)
  assert recorded == {"tokens": [0, 1, 2, 3], "logprobs": [-1.0, -1.0, -1.0]}
  assert probe.check(1, -1.0625, recorded) == 0.0625
  for far in (-1.125, np.nan, np.inf):
    with pytest.raises(RunFailed, match="version 1: the log-prob of .* they may differ by 0.1"):
      probe.check(1, far, recorded)
  with pytest.raises(RunFailed, match="version 1: it was published without a probe"):
    probe.check(1, -1.0, {})
  with pytest.raises(RunFailed, match="version 2: the weights give a log-prob that is not finite"):
    probe.record(2, np.nan)
