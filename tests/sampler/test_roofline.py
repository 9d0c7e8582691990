"""The least time of a decode step, by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from trinity_jax.models.presets import ModelConfig
from trinity_jax.sampler import roofline
from trinity_jax.sampler.engine import EngineSpec

MODEL = ModelConfig("qwen3", 64, 32, 2, 4, 2, 16, 48, qk_norm=True, tie_word_embeddings=True)


@pytest.mark.parametrize(("dtype", "entry"), [(None, 16 * 4), (jnp.bfloat16, 32), (jnp.int8, 20)])
def test_work_of_a_step(dtype, entry):
  work = roofline.work(EngineSpec(MODEL, 8, (16,), 4, cache_dtype=dtype))
  # q and o 32 x 64, k and v 32 x 32, mlp 3 x 32 x 48; two layers, and 64 x 32 of the output.
  weights = 2 * (2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 48) + 64 * 32
  assert work.flops == 2 * 8 * weights
  assert work.weight_bytes == 4 * weights
  assert work.entry_bytes == 2 * 2 * 2 * entry  # k and v, layers, kv heads


def test_the_slower_of_computing_and_reading():
  work = roofline.Work(flops=100, weight_bytes=10, entry_bytes=2)
  step = lambda matmul, copy, devices: roofline.step_seconds(
    work, roofline.Rates(matmul, copy), devices, entries=20
  )
  assert step(10, 1000, 1) == 10
  assert step(1000, 10, 1) == 5
  assert step(1000, 10, 4) == 1.25


def test_measured_rates_are_of_this_world():
  rates = roofline.measure(EngineSpec(MODEL, 8, (16,), 4), 8, jax.devices()[:2], repeats=1)
  assert 1e6 < rates.matmul < 1e16 and 1e6 < rates.copy < 1e14
