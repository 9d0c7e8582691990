"""Prefill, then decode token by token through the cache = the full forward."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trinity_jax.models import transformer
from trinity_jax.models.presets import ModelConfig

_QUICK = {"xla_backend_optimization_level": 0}  # halves the compile time, which is the test's
_S, _T, _C = 4, 12, 16
QWEN3 = ModelConfig("qwen3", 64, 32, 3, 4, 2, 16, 48, qk_norm=True, tie_word_embeddings=True)
CONFIGS = {"plain": QWEN3, "window": dataclasses.replace(QWEN3, sliding_window=3)}


@functools.cache
def _model(name: str):
  """(params with every leaf perturbed, tokens [S, T], logits of the full forward)."""
  config = CONFIGS[name]
  params = jax.jit(functools.partial(transformer.init, config=config))(jax.random.key(0))
  leaves, treedef = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  params = treedef.unflatten(
    [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
  )
  tokens = jax.random.randint(jax.random.key(2), (_S, _T), 0, config.vocab_size)
  positions = jnp.broadcast_to(jnp.arange(_T)[None], (_S, _T))

  @functools.partial(jax.jit, compiler_options=_QUICK)
  def full(params):
    hidden = transformer.forward(params, config, tokens, positions, jnp.ones_like(positions))
    return transformer.logits(params, config, hidden)

  return params, tokens, full(params)


def _decode(config, donate=True):
  def step(params, tokens, positions, k, v):
    hidden, k, v = transformer.decode(params, config, tokens, positions, k, v, live=_C - 2)
    return transformer.logits(params, config, hidden), k, v

  return jax.jit(step, donate_argnums=(3, 4) if donate else (), compiler_options=_QUICK)


@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.slow), "window"])
def test_prefill_then_decode_equals_forward(name):
  config = CONFIGS[name]
  params, tokens, want = _model(name)
  lengths = jnp.array([5, 1, 3, 4])
  prefill = jax.jit(transformer.prefill, static_argnums=1, compiler_options=_QUICK)
  hidden, k, v = prefill(params, config, tokens[:, :5], lengths)
  slots = np.arange(_S)
  np.testing.assert_allclose(
    transformer.logits(params, config, hidden), want[slots, lengths - 1], atol=1e-5
  )
  # Entries beyond a prompt's length are rubbish that decode must overwrite before reading.
  shape = (config.num_layers, _S, config.num_kv_heads, _C, config.head_dim)
  cache = [jnp.full(shape, 1e3).at[:, :, :, :5].set(x) for x in (k, v)]
  step, positions = _decode(config), np.asarray(lengths)
  for _ in range(_T - 5):
    out, *cache = step(params, tokens[slots, positions], positions, *cache)
    np.testing.assert_allclose(out, want[slots, positions], atol=1e-5)
    positions = positions + 1


def test_decode_updates_a_donated_cache_in_place():
  config = CONFIGS["window"]
  params, tokens, _ = _model("window")
  shape = (config.num_layers, _S, config.num_kv_heads, 4096, config.head_dim)
  cache = jax.ShapeDtypeStruct(shape, jnp.float32)
  ids = jax.ShapeDtypeStruct((_S,), jnp.int32)

  def step(params, tokens, positions, k, v):
    return transformer.decode(params, config, tokens, positions, k, v, live=64)

  compiled = jax.jit(step, donate_argnums=(3, 4)).lower(params, ids, ids, cache, cache).compile()
  memory = compiled.memory_analysis()
  size = 4 * np.prod(shape)
  assert memory.alias_size_in_bytes >= 2 * size
  assert memory.temp_size_in_bytes < size / 4, "the cache is copied"


def test_an_entry_beyond_the_cache_is_dropped_and_bounds_are_checked():
  config = CONFIGS["window"]
  params, tokens, _ = _model("window")
  shape = (config.num_layers, _S, config.num_kv_heads, _C, config.head_dim)
  cache = jnp.ones(shape)
  _, k, v = _decode(config, donate=False)(params, tokens[:, 0], jnp.full(_S, _C), cache, cache)
  np.testing.assert_array_equal(k, cache)
  np.testing.assert_array_equal(v, cache)
  for live in (0, _C + 1):
    with pytest.raises(ValueError, match=f"live = {live}, expected 1..{_C}"):
      transformer.decode(params, config, tokens[:, 0], tokens[:, 0], cache, cache, live=live)
