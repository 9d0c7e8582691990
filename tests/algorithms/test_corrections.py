"""Off-policy corrections against float64 numpy, whole and split into micro-batches."""

from __future__ import annotations

import functools

import algorithm_steps as steps
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trinity_jax.algorithms import stats
from trinity_jax.algorithms.corrections import CORRECTIONS, loglinear
from trinity_jax.algorithms.parts import resolve
from trinity_jax.errors import UserError


def geometric(w):
  return np.exp(np.clip(w.mean(), -20, 20)) if len(w) else 1.0


def product(w):
  return np.exp(np.clip(w.sum(), -20, 20))


def ratio(w):
  return np.exp(np.clip(w, -20, 20))


def band(x, low, high):
  return (low <= x) & (x <= high)


# name, options, the weights of one sequence's tokens.
CASES = [
  ("token_tis", {"cap": 1.5}, lambda w: np.minimum(ratio(w), 1.5)),
  ("sequence_tis", {}, lambda w: np.full(len(w), min(product(w), 3.0))),
  ("geometric_tis", {"cap": 1.2}, lambda w: np.full(len(w), min(geometric(w), 1.2))),
  ("icepop", {}, lambda w: np.where(band(ratio(w), 0.5, 5), ratio(w), 0)),
  ("geometric_mask", {"low": 0.8, "high": 1.3}, lambda w: 0 * w + band(geometric(w), 0.8, 1.3)),
  (
    "geometric_mask",
    {"low": 0.8, "high": 1.3, "cap": 1.1},
    lambda w: np.minimum(ratio(w), 1.1) * band(geometric(w), 0.8, 1.3),
  ),
  ("sequence_mask", {}, lambda w: 0 * w + band(product(w), 0.5, 2)),
  (
    "sequence_mask",
    {"by": "token", "low": 0.2, "high": 5.0, "cap": 2.0},
    lambda w: np.minimum(ratio(w), 2.0) * band(ratio(w), 0.2, 5.0).all(),
  ),
]


def extreme_step(seed):
  """Some sequences with tiny, some with huge log ratios, one with ratios of exactly 1."""
  step = steps.random_step(seed)
  scale = np.resize([0.05, 0.5, 1000.0, 0.0], step.count)
  step.tokens["log_weight"] = [x * s for x, s in zip(step.tokens["log_weight"], scale)]
  return step


@functools.partial(jax.jit, static_argnums=(0, 1))
def compute(name, options, tokens):
  part = resolve("correction", name, CORRECTIONS, dict(options))
  weight, out = part(**tokens, num_sequences=14)
  return weight, out


@pytest.mark.parametrize(
  "name, options, reference", CASES, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(CASES)]
)
def test_against_numpy(name, options, reference):
  options = tuple(options.items())
  for seed in range(4):
    step = extreme_step(seed)
    wanted = ("log_weight", "mask", "sequence_index")
    expected = [reference(w) for w in steps.actions(step, "log_weight")]
    results = []
    for layout in (steps.padded, steps.packed):
      tokens, places = layout(step)
      tokens = {k: tokens[k] for k in wanted}
      with jax.enable_x64(True):
        weight, out = compute(name, options, tokens)
        out = stats.finish(out)
      for want, got in zip(expected, steps.gather(weight, places, step)):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-300)
      np.testing.assert_array_equal(np.asarray(weight)[~tokens["mask"]], 0)
      results.append(out)
    for k, v in results[0].items():
      np.testing.assert_allclose(v, results[1][k], rtol=1e-9, err_msg=k)
    w = np.concatenate(steps.actions(step, "log_weight"))
    near = np.clip(w, -20, 20)
    np.testing.assert_allclose(out["correction/k1"], -near.mean(), rtol=1e-12)
    np.testing.assert_allclose(out["correction/k3"], (np.exp(near) - 1 - near).mean(), rtol=1e-12)
    whole = name in ("sequence_tis", "geometric_tis")
    units = np.array([x[0] for x in expected if len(x)]) if whole else np.concatenate(expected)
    np.testing.assert_allclose(
      out["correction/ess"], units.sum() ** 2 / (units**2).sum() / len(units), rtol=1e-12
    )
    np.testing.assert_allclose(out["correction/weight_mean"], units.mean(), rtol=1e-12)
    np.testing.assert_allclose(out["correction/weight_max"], units.max(), rtol=1e-12)
    sequences = [x for x in expected if len(x)]
    rejected = (
      [(x == 0).all() for x in sequences] if "mask" in name else np.concatenate(expected) == 0
    )
    np.testing.assert_allclose(
      out["correction/rejected"], 0 if name.endswith("tis") else np.mean(rejected), rtol=1e-12
    )
    # In float32 no weight is far off, bounds apart.
    single, _ = compute(name, options, tokens | {"log_weight": tokens["log_weight"].astype("f4")})
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, weight, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_micro_batches_merge_to_the_whole(name):
  """Stats of the rows of a packed step, merged, are those of the step; weights are the same."""
  step = extreme_step(7)
  tokens, _ = steps.packed(step)
  tokens = {k: tokens[k] for k in ("log_weight", "mask", "sequence_index")}
  with jax.enable_x64(True):
    weight, out = compute(name, (), tokens)
    merged = stats.neutral(out)
    for m in range(3):
      part, found = compute(name, (), {k: v[m] for k, v in tokens.items()})
      np.testing.assert_allclose(part, weight[m], rtol=1e-13)
      merged = stats.merge(merged, found)
    for k, v in stats.finish(merged).items():
      np.testing.assert_allclose(v, stats.finish(out)[k], rtol=1e-10, err_msg=k)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_no_gradient_and_nothing_at_all(name):
  mask = np.zeros((2, 3), bool)
  mask[0, :2] = True
  index = np.zeros((2, 3), np.int32)
  args = {"mask": mask, "sequence_index": index}
  f = lambda w: compute(name, (), args | {"log_weight": w})[0].sum()
  np.testing.assert_array_equal(jax.grad(f)(jnp.full((2, 3), 0.1)), np.zeros((2, 3)))
  nothing = args | {"mask": ~mask & False, "log_weight": jnp.full((2, 3), jnp.nan)}
  weight, out = compute(name, (), nothing)
  np.testing.assert_array_equal(weight, np.zeros((2, 3)))
  assert all(v == 0 for v in stats.finish(out).values())


def test_by_hand():
  # Ratios 4 and 1/2 of one sequence, 1 of another: products 2 and 1, geometric mean sqrt(2).
  w = jnp.log(jnp.array([[4.0, 0.5, 1.0]]))
  tokens = {
    "log_weight": w,
    "mask": jnp.ones((1, 3), bool),
    "sequence_index": jnp.array([[0, 0, 1]]),
  }
  weight = lambda name, **options: compute(name, tuple(options.items()), tokens)
  got, out = weight("token_tis")
  np.testing.assert_allclose(got, [[2, 0.5, 1]], rtol=1e-6)
  np.testing.assert_allclose(stats.finish(out)["correction/truncated"], 1 / 3, rtol=1e-6)
  np.testing.assert_allclose(
    stats.finish(out)["correction/ess"], 3.5**2 / (3 * (4 + 0.25 + 1)), rtol=1e-6
  )
  np.testing.assert_allclose(weight("sequence_tis", cap=1.5)[0], [[1.5, 1.5, 1]], rtol=1e-6)
  np.testing.assert_allclose(weight("geometric_tis")[0], [[2**0.5, 2**0.5, 1]], rtol=1e-6)
  np.testing.assert_allclose(weight("icepop", high=3.0)[0], [[0, 0.5, 1]], rtol=1e-6)
  got, out = weight("geometric_mask")
  np.testing.assert_array_equal(got, [[0, 0, 1]])
  assert stats.finish(out)["correction/rejected"] == 0.5  # of sequences
  np.testing.assert_array_equal(weight("sequence_mask", high=2.5)[0], [[1, 1, 1]])
  np.testing.assert_array_equal(weight("sequence_mask", by="token")[0], [[0, 0, 1]])


def test_bounds_are_inside():
  """A ratio of exactly 1 passes a band of width 0."""
  tokens = {"log_weight": jnp.zeros((1, 2)), "mask": jnp.ones((1, 2), bool),
            "sequence_index": jnp.zeros((1, 2), jnp.int32)}  # fmt: skip
  for name in ("icepop", "geometric_mask", "sequence_mask"):
    weight, _ = compute(name, (("low", 1.0), ("high", 1.0)), tokens)
    np.testing.assert_array_equal(weight, [[1, 1]])


def test_loglinear():
  rng = np.random.default_rng(0)
  current, old = -rng.exponential(size=(2, 5)), -rng.exponential(size=(2, 5))
  versions = np.array([[10, 9, 8, 2, -1], [9, 9, 9, 10, 11]])
  mask = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 1, 1]], bool)
  d = np.array([[0, 1, 2, 8, 0], [1, 1, 1, 0, 0]])
  share = np.where(d > 0, 1 - 1 / np.maximum(d, 1), 1)
  expected = np.where(mask, old + share * (current - old), 0)
  poisoned = np.where(mask, old, np.nan)
  with jax.enable_x64(True):
    f = jax.jit(lambda c, s: loglinear(c, poisoned, versions, s, mask))
    got = f(current, 10)
    np.testing.assert_allclose(got, expected, rtol=1e-14)
    # Staleness 1 is the policy that sampled, 0 the current one, to the last bit.
    np.testing.assert_array_equal(np.asarray(got)[d == 1], np.where(mask, old, 0)[d == 1])
    np.testing.assert_array_equal(np.asarray(got)[d == 0], current[d == 0])
    np.testing.assert_array_equal(jax.grad(lambda c: f(c, 10).sum())(current), np.zeros((2, 5)))


@pytest.mark.parametrize(
  "name, options, message",
  [
    ("token_tis", {"cap": 0.0}, "cap = 0.0"),
    ("sequence_tis", {"cap": -1.0}, "cap = -1.0"),
    ("icepop", {"low": 1.5}, "low = 1.5, high = 5.0: expected 0 <= low <= 1 <= high"),
    ("geometric_mask", {"high": 0.5}, "low = 0.99, high = 0.5"),
    ("sequence_mask", {"by": "words"}, "by = 'words': expected one of product, token"),
    ("sequence_mask", {"cap": 0.0}, "cap = 0.0"),
  ],
)
def test_errors(name, options, message):
  tokens = {"log_weight": jnp.zeros((1, 2)), "mask": jnp.ones((1, 2), bool),
            "sequence_index": jnp.zeros((1, 2), jnp.int32)}  # fmt: skip
  with pytest.raises(UserError, match=message):
    resolve("correction", name, CORRECTIONS, options)(**tokens, num_sequences=1)
