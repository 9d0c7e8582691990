"""Schedules by hand, decay on matrices only, clipping, and three steps beside torch."""

from __future__ import annotations

import math

import jax
import numpy as np
import optax
import pytest

from trinity_jax.config import OptimizerConfig
from trinity_jax.models import params as params_lib
from trinity_jax.trainer.optimizer import decay_mask, learning_rate, make_optimizer


def rates(total, steps, **keys):
  schedule = learning_rate(OptimizerConfig(learning_rate=1.0, **keys), total)
  return [float(schedule(i)) for i in steps]


def test_constant():
  assert rates(10, [0, 5, 99], schedule="constant") == [1, 1, 1]


def test_linear():
  assert rates(10, [0, 5, 10, 50], schedule="linear") == pytest.approx([1, 0.5, 0, 0])
  assert rates(10, [0, 5, 10], schedule="linear", min_ratio=0.2) == pytest.approx([1, 0.6, 0.2])


def test_cosine():
  half = lambda x, low: low + (1 - low) * 0.5 * (1 + math.cos(math.pi * x))
  assert rates(8, [0, 2, 4, 8, 20], schedule="cosine") == pytest.approx(
    [1, half(0.25, 0), 0.5, 0, 0], abs=1e-6
  )
  assert rates(8, [2, 8], schedule="cosine", min_ratio=0.1) == pytest.approx(
    [half(0.25, 0.1), 0.1]
  )


def test_warmup_learns_from_the_first_step_and_ends_at_the_peak():
  got = rates(14, range(6), warmup_steps=4)
  assert got == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
  got = rates(14, [0, 1, 2, 3, 4, 9, 14], warmup_steps=4, schedule="linear")
  assert got == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.5, 0])
  assert rates(10, [0, 1, 2], warmup_steps=1) == [1, 1, 1]
  assert rates(2, [0, 1, 9], warmup_steps=5, schedule="linear") == pytest.approx([0.2, 0.4, 0])


def test_decay_touches_matrices_only(tools):
  mask = decay_mask(params_lib.abstract(tools.MODEL))
  flat = {jax.tree_util.keystr(p, simple=True, separator="."): m
          for p, m in jax.tree_util.tree_leaves_with_path(mask)}  # fmt: skip
  decayed = {k for k, m in flat.items() if m}
  assert decayed == {"embed", *(f"layers.{w}" for w in
                     ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"))}  # fmt: skip
  assert {"final_norm", "layers.attn_norm", "layers.q_norm"} <= flat.keys() - decayed

  # And so it does in an update: with a zero gradient, decay is all there is.
  config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
  optimizer = make_optimizer(config, 10, params_lib.abstract(tools.MODEL))
  params = jax.tree.map(np.ones_like, tools.base_params())
  zero = jax.tree.map(np.zeros_like, params)
  updates, _ = optimizer.update(zero, optimizer.init(params), params)
  for (path, u), m in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(mask)):
    np.testing.assert_allclose(u, -0.05 if m else 0.0, rtol=1e-6, err_msg=str(path))


@pytest.mark.parametrize("norm, scale", [(0.5, 1.0), (4.0, 0.5)])
def test_clipping_is_global(tools, norm, scale):
  """One factor for all tensors, and none below the limit."""
  config = OptimizerConfig(name="sgd", learning_rate=1.0, clip_norm=2.0)
  params = tools.base_params()
  optimizer = make_optimizer(config, 10, params_lib.abstract(tools.MODEL))
  rng = np.random.default_rng(0)
  grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
  grads = jax.tree.map(lambda g: g * (norm / float(optax.tree.norm(grads))), grads)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
    np.testing.assert_allclose(u, -scale * g, rtol=1e-5)


def test_adamw_beside_torch(tools):
  """Three steps with decay, clipping and warm-up."""
  torch = pytest.importorskip("torch")
  config = OptimizerConfig(
    learning_rate=0.01, weight_decay=0.1, beta1=0.8, beta2=0.95, eps=1e-6, clip_norm=1.0,
    warmup_steps=2,
  )  # fmt: skip
  specs = params_lib.abstract(tools.MODEL)
  optimizer = make_optimizer(config, 10, specs)
  params = tools.base_params()
  theirs = [torch.nn.Parameter(torch.tensor(p)) for p in jax.tree.leaves(params)]
  mask = jax.tree.leaves(decay_mask(specs))
  groups = [
    {"params": [t for t, m in zip(theirs, mask) if m == decayed],
     "weight_decay": 0.1 if decayed else 0.0}
    for decayed in (True, False)
  ]  # fmt: skip
  adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6)
  rng = np.random.default_rng(0)
  state = optimizer.init(params)
  for rate in (0.005, 0.01, 0.01):
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
    updates, state = optimizer.update(grads, state, params)
    params = jax.device_get(optax.apply_updates(params, updates))
    for t, g in zip(theirs, jax.tree.leaves(grads), strict=True):
      t.grad = torch.tensor(g)
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    for group in adamw.param_groups:
      group["lr"] = rate
    adamw.step()
    for ours, t in zip(jax.tree.leaves(params), theirs, strict=True):
      np.testing.assert_allclose(ours, t.detach().numpy(), rtol=1e-5, atol=1e-6)
