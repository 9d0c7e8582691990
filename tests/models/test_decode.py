"""with_cache, whatever keeps its past, equals the full forward; unstack gives the same numbers.

The past is kept here in the plainest way, one dense array a layer, and looked at with the
reference attention: what the sampler's cache does is tested in tests/sampler.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trinity_jax import ops
from trinity_jax.models import transformer
from trinity_jax.models.presets import ModelConfig, RopeScaling

_QUICK = {"xla_backend_optimization_level": 0}  # halves the compile time, which is the test's
_B, _T = 4, 12
QWEN3 = ModelConfig("qwen3", 64, 32, 3, 4, 2, 16, 48, qk_norm=True, tie_word_embeddings=True)
CONFIGS = {
  "qwen3": QWEN3,
  "qwen3-window": dataclasses.replace(QWEN3, sliding_window=3),
  "qwen2": ModelConfig("qwen2", 64, 32, 2, 4, 1, 8, 48, qkv_bias=True),
  "llama": ModelConfig(
    "llama", 64, 32, 2, 4, 4, 8, 48, rope_scaling=RopeScaling("llama3", 8.0, 8, 1.0, 4.0)
  ),
}


@functools.cache
def _model(name: str):
  """(params with every leaf perturbed, tokens [B, T], logits of the full forward)."""
  config = CONFIGS[name]
  params = jax.jit(functools.partial(transformer.init, config=config))(jax.random.key(0))
  leaves, treedef = jax.tree.flatten(jax.device_get(params))
  rng = np.random.default_rng(1)
  params = treedef.unflatten([(x + rng.normal(0, 0.1, x.shape)).astype(x.dtype) for x in leaves])
  tokens = rng.integers(0, config.vocab_size, (_B, _T)).astype(np.int32)
  positions = np.broadcast_to(np.arange(_T, dtype=np.int32), (_B, _T))

  @functools.partial(jax.jit, compiler_options=_QUICK)
  def full(params):
    hidden = transformer.forward(params, config, tokens, positions, jnp.ones_like(positions))
    return transformer.logits(params, config, hidden)

  return params, tokens, np.asarray(full(params))


def _step(config):
  """(unstacked params, tokens [B, n], first position of each row, past) -> (logits, past)."""

  def run(params, tokens, starts, past):
    n = tokens.shape[1]
    past = list(past)
    rows = np.arange(_B)[:, None]
    positions = starts[:, None] + jnp.arange(n)[None]

    def attend(i, q, k, v):
      keys, values = (x.at[rows, positions].set(new) for x, new in zip(past[i], (k, v)))
      past[i] = (keys, values)
      queries = jnp.zeros((_B, _T, *q.shape[2:])).at[rows, positions].set(q)
      at = jnp.broadcast_to(jnp.arange(_T)[None], (_B, _T))
      out = ops.attention(
        queries, keys, values, positions=at, segment_ids=jnp.ones_like(at),
        window=config.sliding_window, implementation="reference",
      )  # fmt: skip
      return out[rows, positions]

    hidden = transformer.with_cache(params, config, tokens, positions, attend)
    return transformer.logits(params, config, hidden), past

  return jax.jit(run, compiler_options=_QUICK)


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_behind_what_is_kept_equal_the_forward(name):
  config = CONFIGS[name]
  params, tokens, want = _model(name)
  params = transformer.unstack(params, config)
  shape = (_B, _T, config.num_kv_heads, config.head_dim)
  past = [(jnp.full(shape, 1e3),) * 2 for _ in range(config.num_layers)]
  step, starts, rows = _step(config), np.array([0, 0, 0, 0], np.int32), np.arange(_B)[:, None]
  # Rows are at different places from the second step on: what is beyond them is rubbish.
  seen = np.zeros((_B, _T), bool)
  for n, ahead in ((4, (4, 1, 3, 2)), *[(1, (1, 1, 1, 1))] * 4, (4, (4, 4, 4, 4))):
    at = starts[:, None] + np.arange(n)
    logits, past = step(params, tokens[rows, at], starts, past)
    np.testing.assert_allclose(logits, want[rows, at], atol=1e-5)
    seen[rows, at] = True
    starts = starts + np.array(ahead, np.int32)
  assert seen[0].all() and seen.sum() > 40


def test_one_token_a_row_without_a_chunk_axis():
  """Decoding passes [S] tokens; shapes inside follow."""
  config = CONFIGS["qwen3"]
  params, tokens, want = _model("qwen3")
  attended = []

  def attend(i, q, k, v):  # at position 0 there is nothing but the token itself
    attended.append((i, q.shape, k.shape, v.shape))
    return jnp.repeat(v, config.num_heads // config.num_kv_heads, axis=-2)

  hidden = transformer.with_cache(
    transformer.unstack(params, config), config, tokens[:, 0], np.zeros(_B, np.int32), attend
  )
  assert attended == [(i, (_B, 4, 16), (_B, 2, 16), (_B, 2, 16)) for i in range(3)]
  np.testing.assert_allclose(transformer.logits(params, config, hidden), want[:, 0], atol=1e-5)


def test_compute_dtype():
  config = CONFIGS["qwen3"]
  params, tokens, _ = _model("qwen3")
  dtypes = []

  def attend(i, q, k, v):
    dtypes.append({q.dtype, k.dtype, v.dtype})
    return jnp.repeat(v, 2, axis=-2)

  hidden = transformer.with_cache(
    transformer.unstack(params, config), config, tokens[:, 0], np.zeros(_B, np.int32), attend,
    dtype=jnp.bfloat16,
  )  # fmt: skip
  assert hidden.dtype == jnp.bfloat16 and dtypes == [{jnp.dtype("bfloat16")}] * 3


def test_unstack_takes_layers_apart_and_keeps_the_rest():
  for name, config in CONFIGS.items():
    params, *_ = _model(name)
    out = transformer.unstack(params, config)
    assert len(out["layers"]) == config.num_layers
    for i, layer in enumerate(out["layers"]):
      assert layer.keys() == params["layers"].keys()
      for key, x in layer.items():
        np.testing.assert_array_equal(x, params["layers"][key][i])
    assert {k: v for k, v in out.items() if k != "layers"}.keys() == params.keys() - {"layers"}
    assert out["embed"] is params["embed"]
