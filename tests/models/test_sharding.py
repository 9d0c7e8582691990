"""Meshes and shardings: eight devices give what one gives; what does not fit is refused by name."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from trinity_jax import ops
from trinity_jax.errors import UserError
from trinity_jax.models import sharding, transformer
from trinity_jax.models.presets import PRESETS, ModelConfig

_QUICK = {"xla_backend_optimization_level": 0}  # halves the compile time, which is the test's
CONFIG = ModelConfig("qwen3", 64, 32, 2, 4, 2, 16, 48, qk_norm=True)


def _batch(rows: int = 8, length: int = 12):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, CONFIG.vocab_size, (rows, length)).astype(np.int32)
  positions = np.broadcast_to(np.arange(length, dtype=np.int32) % 7, tokens.shape)
  segment_ids = np.broadcast_to(1 + np.arange(length, dtype=np.int32) // 7, tokens.shape)
  return tokens, positions, segment_ids


def _loss(params, tokens, positions, segment_ids):
  hidden = transformer.forward(params, CONFIG, tokens, positions, segment_ids)
  logits = transformer.logits(params, CONFIG, hidden)
  return -jnp.mean(jax.nn.log_softmax(logits)[..., 3])


@functools.cache
def _alone():
  params = transformer.init(jax.random.key(0), CONFIG)
  return params, *jax.jit(jax.value_and_grad(_loss), compiler_options=_QUICK)(params, *_batch())


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 8, 1), marks=pytest.mark.slow)])
def test_loss_and_gradients_equal_one_device(sizes):
  params, want, want_grads = _alone()
  mesh = sharding.make_mesh(*sizes)
  shardings = sharding.param_shardings(CONFIG, mesh)
  rows = NamedSharding(mesh, sharding.partition_spec(("batch", None)))
  placed = jax.device_put(params, shardings)
  batch = jax.device_put(_batch(), rows)
  with jax.set_mesh(mesh):
    step = jax.jit(
      jax.value_and_grad(_loss), out_shardings=(None, shardings), compiler_options=_QUICK
    )
    value, grads = step(placed, *batch)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads)):
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_with_cache_equals_one_device():
  """The model around an attention that knows of no mesh; the sampler's is tested beside it."""
  params, *_ = _alone()
  mesh = sharding.make_mesh(2, 2, 2)
  tokens, positions, segment_ids = _batch()

  @functools.partial(jax.jit, compiler_options=_QUICK)
  def run(params, tokens, positions, segment_ids):
    attend = functools.partial(ops.attention, positions=positions, segment_ids=segment_ids)
    hidden = transformer.with_cache(
      transformer.unstack(params, CONFIG), CONFIG, tokens, positions,
      lambda i, q, k, v: attend(q, k, v),
    )  # fmt: skip
    return hidden, transformer.logits(params, CONFIG, hidden)

  def waits(params) -> int:
    return run.lower(params, tokens, positions, segment_ids).as_text().count("optimization_barrier")

  want = run(params, tokens, positions, segment_ids)
  assert waits(params) == 0
  placed = jax.device_put(params, sharding.param_shardings(CONFIG, mesh))
  rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
  with jax.set_mesh(mesh):
    got = run(placed, *jax.device_put((tokens, positions, segment_ids), rows))
    assert waits(placed) == CONFIG.num_layers - 1  # gathers of a layer wait for the one before
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, atol=1e-5)
  hidden = transformer.forward(params, CONFIG, tokens, positions, segment_ids)
  np.testing.assert_allclose(want[0], hidden, atol=1e-5)


def test_weights_are_split_as_the_rules_say():
  mesh = sharding.make_mesh(2, 2, 2)
  shardings = sharding.param_shardings(CONFIG, mesh)
  assert shardings["embed"].spec == PartitionSpec("tensor", "fsdp")
  assert shardings["layers"]["w_down"].spec == PartitionSpec(None, "tensor", "fsdp")
  assert shardings["layers"]["q_norm"].spec == PartitionSpec(None, None)
  for config in PRESETS.values():
    sharding.param_shardings(config, mesh)


def test_mesh_takes_the_rest():
  sizes = {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
  assert dict(sharding.make_mesh(-1, 2, 2).shape) == sizes
  sizes = {"data": 2, "fsdp": 1, "context": 4, "tensor": 1}
  assert dict(sharding.make_mesh(context=4).shape) == sizes
  one = sharding.make_mesh(devices=jax.devices()[:1])
  assert dict(one.shape) == {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ((3, 1, 1), "mesh data=3, fsdp=1, context=1, tensor=1 does not fit 8"),
    ((-1, 3, 1), "mesh data=-1, fsdp=3, context=1, tensor=1 does not fit 8"),
    ((-1, -1, 1), "at most one may be -1"),
    ((8, 0, 1), "sizes must be positive"),
  ],
)
def test_mesh_that_does_not_divide(sizes, message):
  with pytest.raises(UserError, match=message):
    sharding.make_mesh(*sizes)


def test_bad_rules_are_refused_with_both_specs():
  mesh = sharding.make_mesh(1, 4, 2)
  rules = {**sharding.RULES, "mlp": "fsdp"}
  with pytest.raises(UserError, match=r"w_down.*'mlp', 'embed'.*'fsdp', 'fsdp'.*used twice"):
    sharding.param_shardings(CONFIG, mesh, rules)
  rules = {k: v for k, v in sharding.RULES.items() if k != "norm"}
  with pytest.raises(UserError, match=r"no sharding rule for \['norm'\]"):
    sharding.param_shardings(CONFIG, mesh, rules)
  with pytest.raises(UserError, match=r"mesh axis \['pipe'\] does not exist"):
    sharding.param_shardings(CONFIG, mesh, {**sharding.RULES, "vocab": "pipe"})


def test_dimension_that_does_not_divide():
  with pytest.raises(UserError, match="num_heads = 4 does not divide over .*tensor of size 8"):
    sharding.param_shardings(CONFIG, sharding.make_mesh(1, 1, 8))
  with pytest.raises(UserError, match="num_kv_heads = 2 does not divide over .*tensor of size 4"):
    sharding.param_shardings(CONFIG, sharding.make_mesh(1, 2, 4))
  odd = ModelConfig("llama", 65, 32, 2, 4, 4, 8, 48)
  with pytest.raises(UserError, match=r"embed \(65, 32\): vocab = 65 does not divide"):
    sharding.param_shardings(odd, sharding.make_mesh(1, 4, 2))


def test_constrain_is_a_hint_inside_a_mesh():
  x = jnp.ones((8, 6))
  assert sharding.constrain(x, ("batch", None)) is x
  mesh = sharding.make_mesh(2, 2, 2)
  pin = lambda axes, x: jax.jit(lambda x: sharding.constrain(x, axes))(x).sharding
  with jax.set_mesh(mesh):
    want = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None))
    assert pin(("batch", "whole"), x).is_equivalent_to(want, 2)
    # Three rows do not divide over four devices: left alone, not refused.
    assert pin(("batch", None), x[:3]).is_fully_replicated
    with pytest.raises(UserError, match="no sharding rule"):
      sharding.constrain(x, ("rows", None))
