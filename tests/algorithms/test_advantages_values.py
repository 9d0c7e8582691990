"""Every advantage against float64 numpy on plain lists, padded and packed, in batches of steps.

The references are those of advantage_cases.
"""

from __future__ import annotations

import functools

import algorithm_steps as steps
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from advantage_cases import CASES, estimate

from trinity_jax.algorithms import advantage, stats
from trinity_jax.algorithms.advantages import ADVANTAGES, to_tokens, value_targets
from trinity_jax.algorithms.parts import resolve

SEEDS = range(6)


def compute(part, num_groups, sequences, tokens):
  """(token advantages, finished stats) of one step."""
  arrays = sequences | tokens
  values, out = part(**arrays, num_groups=num_groups, num_sequences=sequences["valid"].shape[0])
  return to_tokens(values, tokens["mask"], tokens["sequence_index"]), stats.finish(out)


def test_every_advantage_has_a_case():
  assert {name for name, *_ in CASES} == ADVANTAGES.keys()


@functools.cache
def layouts():
  """(steps, stacked sequences, then per layout its stacked arrays and places).

  The last step has no valid sequence and no action token.
  """
  all_steps = [steps.random_step(seed) for seed in SEEDS]
  all_steps[-1].sequences["valid"][:] = False
  all_steps[-1].action = [np.zeros(len(a), bool) for a in all_steps[-1].action]
  stack = lambda dicts: {k: np.stack([d[k] for d in dicts]) for k in dicts[0]}
  out = [all_steps, stack([s.sequences for s in all_steps])]
  for layout in (steps.packed, steps.padded):
    arrays, places = zip(*(layout(s) for s in all_steps))
    out.append((stack(arrays), places))
  return out


@pytest.mark.parametrize(
  "name, reference, options", CASES, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(CASES)]
)
def test_values(name, reference, options):
  all_steps, sequences, *arrangements = layouts()
  part = resolve("advantage", name, ADVANTAGES, options)
  f = jax.jit(
    jax.vmap(functools.partial(compute, part, all_steps[0].num_groups)),
    compiler_options={"xla_backend_optimization_level": 0},  # compile time is all there is
  )
  single = lambda d: {k: v.astype(np.float32) if v.dtype == float else v for k, v in d.items()}
  first = (name, reference, options) == next(c for c in CASES if c[0] == name)
  by_token = bool({*steps.TOKEN_NAMES, "mask"} & part.inputs)
  for tokens, places in arrangements if first and by_token else arrangements[:1]:
    with jax.enable_x64(True):
      got, out = f(sequences, tokens)
      assert got.dtype == jnp.float64
    assert all(np.isfinite(x).all() for x in out.values()), out
    np.testing.assert_array_equal(np.asarray(got)[~tokens["mask"]], 0)
    for s, step in enumerate(all_steps):
      expected = reference(step, **options)
      for i, (want, have) in enumerate(zip(expected, steps.gather(got[s], places[s], step))):
        want = np.broadcast_to(want, have.shape)
        np.testing.assert_allclose(have, want, rtol=1e-11, atol=1e-11, err_msg=f"{s}, {i}")
  if first:
    near, _ = f(single(sequences), single(tokens))
    assert near.dtype == jnp.float32
    np.testing.assert_allclose(near, got, rtol=2e-5, atol=2e-5)


def test_gae_by_hand():
  # One row: action, observation, action of sequence 0; padding; action of sequence 1.
  mask = jnp.array([[True, False, True, False, True]])
  index = jnp.array([[0, 0, 0, 7, 1]])
  rewards = jnp.array([[0.0, jnp.nan, 1.0, jnp.inf, 3.0]])
  values = jnp.array([[0.5, jnp.nan, 0.25, jnp.inf, 2.0]])
  # Last tokens: 1 - 0.25 = 0.75 and 3 - 2 = 1. The first token's next one is the third:
  # delta = 0 + 0.5 * 0.25 - 0.5 = -0.375, A = -0.375 + 0.5 * 0.5 * 0.75 = -0.1875.
  gae = resolve("advantage", "gae", ADVANTAGES, {"gamma": 0.5, "lam": 0.5, "whitening": False})
  arrays = {"token_rewards": rewards, "values": values, "mask": mask, "sequence_index": index}
  got, _ = jax.jit(lambda a: gae(**a))(arrays)
  np.testing.assert_allclose(got, [[-0.1875, 0, 0.75, 0, 1]], atol=1e-7)
  returns, out = jax.jit(lambda a: value_targets(**a, gamma=0.5, lam=0.5))(arrays)
  np.testing.assert_allclose(returns, [[0.3125, 0, 1, 0, 3]], atol=1e-7)
  out = stats.finish(out)
  np.testing.assert_allclose(out["critic/returns_mean"], 4.3125 / 3, rtol=1e-6)
  error, target = np.array([-0.1875, 0.75, 1]), np.array([0.3125, 1, 3])
  np.testing.assert_allclose(
    out["critic/explained_variance"], 1 - error.var() / target.var(), rtol=1e-5
  )


def test_gae_does_not_see_what_lies_between_or_beside():
  """Observations inserted between actions, and other sequences in the row, change nothing."""
  rng = np.random.default_rng(0)
  r, v = rng.normal(size=6), rng.normal(size=6)
  part = resolve("advantage", "gae", ADVANTAGES, {"gamma": 0.9, "lam": 0.7, "whitening": False})
  gae = jax.jit(lambda **arrays: part(**arrays))
  with jax.enable_x64(True):
    plain, _ = gae(
      token_rewards=r[None], values=v[None], mask=np.ones((1, 6), bool),
      sequence_index=np.zeros((1, 6), int),
    )  # fmt: skip
    np.testing.assert_allclose(plain[0], estimate(r, v, 0.9, 0.7), rtol=1e-12)
    at = np.array([2, 3, 7, 8, 9, 12])  # action tokens among observations, neighbours before, after
    wide = lambda x, fill: np.put_along_axis(w := np.full(16, fill), at, x, 0) or w[None]
    mask = wide(np.ones(6, bool), False)
    mask[0, [0, 14]] = True
    index = np.full((1, 16), 5)
    index[0, 2:13], index[0, 14] = 1, 0
    got, _ = gae(token_rewards=wide(r, 3.0), values=wide(v, -2.0), mask=mask, sequence_index=index)
  np.testing.assert_allclose(got[0, at], plain[0], rtol=1e-12)


def test_whitening_of_equal_values_is_exactly_zero():
  f = resolve("advantage", "reinforce++", ADVANTAGES)
  mask = np.ones((3, 7), bool)
  rewards = np.zeros((3, 7), np.float32)
  rewards[:, -1] = 0.1
  index = np.broadcast_to(np.arange(3)[:, None], (3, 7))
  got, _ = jax.jit(lambda r: f(token_rewards=r, mask=mask, sequence_index=index))(rewards)
  np.testing.assert_array_equal(got, np.zeros((3, 7)))


def test_notebook_form():
  mask = np.array([[1, 1, 0], [0, 1, 1]], bool)
  arrays = {"token_rewards": np.array([[0.0, 1, 9], [9, 0, 0]]), "values": np.zeros((2, 3))}
  got = jax.jit(functools.partial(advantage("gae", whitening=False), mask=mask))(**arrays)
  np.testing.assert_allclose(got, [[1, 1, 0], [0, 0, 0]])
  old = np.array([[-1.0, -1, 0], [0, -2, -2]])
  grpo = functools.partial(advantage("grpo", rank_penalty=0.5, std=False), mask=mask)
  got = jax.jit(grpo)(rewards=np.ones(2), group_ids=np.zeros(2), old_logprob=old)
  # The likelier one keeps 1 - 0.5 / 2 = 0.75 of its reward: mean 0.875.
  np.testing.assert_allclose(got, [[-0.125, -0.125, 0], [0, 0.125, 0.125]])
