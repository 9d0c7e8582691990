"""Sampling against float64 numpy, frequencies, and what the noise depends on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import stats

from trinity_jax.sampler import sampling

_QUICK = {"xla_backend_optimization_level": 0}
sample = jax.jit(sampling.sample, compiler_options=_QUICK)
truncate = jax.jit(sampling.truncate, compiler_options=_QUICK)


def expected_logprobs(logits, temperature, top_k, top_p, min_p):
  """float64[V] log-probs of the truncated, renormalised distribution; -inf outside it."""
  x = np.asarray(logits, np.float64) / (temperature if temperature > 0 else 1.0)
  p = np.exp(x - x.max())
  p /= p.sum()
  keep = np.ones(len(x), bool)
  if top_k > 0:
    keep &= p >= np.sort(p)[::-1][min(top_k, len(p)) - 1]
  if top_p < 1:
    # A token is inside while those strictly more probable have not reached the mass.
    keep &= np.array([p[p > own].sum() < top_p for own in p]) | (p == p.max())
  if min_p > 0:
    keep &= p >= min(min_p, 1.0) * p.max() * (1 - 1e-12)
  with np.errstate(divide="ignore"):
    return np.log(np.where(keep, p, 0.0) / p[keep].sum())


def near_a_boundary(logits, temperature, top_p, min_p) -> bool:
  """Whether float32 may rightly decide otherwise than float64 at a threshold."""
  x = np.asarray(logits, np.float64) / (temperature if temperature > 0 else 1.0)
  ratio = np.exp(x - x.max())
  mass = np.cumsum(np.sort(ratio / ratio.sum())[::-1])
  return bool(
    (top_p < 1 and (np.abs(mass - top_p) < 1e-5).any())
    or (min_p > 0 and (np.abs(ratio[ratio < 1] - min(min_p, 1.0)) < 1e-5).any())
  )


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, keys=None, positions=None):
  """sample() with one setting (or one per row) for logits [S, V]."""
  S = len(logits)
  keys = np.array([sampling.request_key(i) for i in range(S)]) if keys is None else keys
  positions = np.zeros(S, np.int32) if positions is None else np.asarray(positions, np.int32)
  row = lambda x, dtype: np.broadcast_to(np.asarray(x, dtype), (S,))
  token, logprob = sample(
    np.asarray(logits, np.float32), keys, positions, row(temperature, np.float32),
    row(top_k, np.int32), row(top_p, np.float32), row(min_p, np.float32),
  )  # fmt: skip
  return np.asarray(token), np.asarray(logprob)


SETTINGS = [
  dict(temperature=1.0),
  dict(temperature=0.3),
  dict(temperature=2.5),
  dict(top_k=1),
  dict(top_k=3, temperature=1.7),
  dict(top_k=99),
  dict(top_p=0.5),
  dict(top_p=0.9, temperature=0.6),
  dict(top_p=1e-6),
  dict(min_p=0.2),
  dict(min_p=1.0),
  dict(top_k=4, top_p=0.8, min_p=0.05, temperature=1.3),
]


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_greedy_is_argmax_with_the_log_prob_of_temperature_1(temperature):
  logits = np.random.default_rng(0).normal(0, 3, (50, 17)).astype(np.float32)
  token, logprob = draw(logits, temperature)
  np.testing.assert_array_equal(token, logits.argmax(-1))
  want = [expected_logprobs(x, 1.0, 0, 1.0, 0.0)[t] for x, t in zip(logits, token)]
  np.testing.assert_allclose(logprob, want, atol=1e-6)


def test_greedy_rows_beside_sampled_rows_and_ties():
  logits = np.zeros((4, 9), np.float32)  # all tied: greedy takes the first
  token, logprob = draw(logits, temperature=[0.0, 1.0, 0.0, 1.0])
  assert token[0] == token[2] == 0
  np.testing.assert_allclose(logprob, -np.log(9), atol=1e-6)
  logits[:, 3:5] = 2.0  # two tied at the top: both stay inside every truncation
  for setting in (dict(top_k=1), dict(top_p=0.01), dict(min_p=1.0)):
    seen = set()
    for key in range(20):
      keys = np.array([sampling.request_key(key, i) for i in range(4)])
      token, logprob = draw(logits, keys=keys, **setting)
      np.testing.assert_allclose(logprob, -np.log(2), atol=1e-6)
      seen |= set(token.tolist())
    assert seen == {3, 4}


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_log_prob_is_that_of_the_distribution_sampled_from(setting):
  logits = np.random.default_rng(1).normal(0, 2, (64, 17)).astype(np.float32)
  s = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) | setting
  clear = [
    i for i, x in enumerate(logits)
    if not near_a_boundary(x, s["temperature"], s["top_p"], s["min_p"])
  ]  # fmt: skip
  assert len(clear) > 50
  token, logprob = draw(logits, **s)
  want = np.array([expected_logprobs(x, **s)[t] for x, t in zip(logits, token)])
  assert np.isfinite(want[clear]).all(), "a token outside the truncated set"
  np.testing.assert_allclose(logprob[clear], want[clear], atol=2e-6)


@given(
  st.sampled_from([(1, 1), (2, 9), (5, 4)]), st.integers(0, 2**31), st.floats(0.1, 4),
  st.integers(0, 12), st.floats(0.01, 1), st.floats(0, 1),
)  # fmt: skip
@example((1, 1), 0, 1.0, 5, 0.5, 1.0)
@settings(deadline=None, max_examples=100)
def test_any_shape_and_setting(shape, seed, temperature, top_k, top_p, min_p):
  temperature, top_p, min_p = (float(np.float32(x)) for x in (temperature, top_p, min_p))
  logits = np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)
  assume(not any(near_a_boundary(x, temperature, top_p, min_p) for x in logits))
  setting = [np.full(shape[0], x, d) for x, d in zip((top_k, top_p, min_p), "iff")]
  kept = np.asarray(truncate(logits / np.float32(temperature), *setting)) > sampling.NEGATIVE
  token, logprob = draw(logits, temperature, top_k, top_p, min_p)
  for row, x in enumerate(logits):
    want = expected_logprobs(x, temperature, top_k, top_p, min_p)
    np.testing.assert_array_equal(kept[row], np.isfinite(want))
    assert kept[row, x.argmax()]
    np.testing.assert_allclose(logprob[row], want[token[row]], atol=5e-6)


def test_a_min_p_above_1_still_keeps_the_most_probable_token():
  logits = np.random.default_rng(2).normal(0, 2, (20, 9)).astype(np.float32)
  token, logprob = draw(logits, min_p=1.5)
  np.testing.assert_array_equal(token, logits.argmax(-1))
  np.testing.assert_allclose(logprob, 0, atol=1e-6)


@pytest.mark.parametrize(
  "setting", [{}, dict(temperature=0.5, top_k=5, top_p=0.95, min_p=0.02)], ids=["plain", "cut"]
)
@pytest.mark.parametrize("vary", ["key", "position"])
def test_frequencies_match_probabilities(setting, vary):
  """Chi-square over 8,192 draws with fixed seeds: over keys, and over positions of one key."""
  n, V = 8192, 7
  logits = np.tile(np.random.default_rng(3).normal(0, 1, V).astype(np.float32), (n, 1))
  if vary == "key":
    keys, positions = np.array([sampling.request_key(7, i) for i in range(n)]), np.full(n, 5)
  else:
    keys, positions = np.tile(sampling.request_key(7), (n, 1)), np.arange(n)
  s = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) | setting
  token, _ = draw(logits, keys=keys, positions=positions, **s)
  p = np.exp(expected_logprobs(logits[0], **s))
  counts = np.bincount(token, minlength=V)
  assert counts[p == 0].sum() == 0
  assert stats.chisquare(counts[p > 0], n * p[p > 0]).pvalue > 1e-3


def test_noise_depends_on_key_and_position_only():
  logits = np.random.default_rng(4).normal(0, 1, (6, 33)).astype(np.float32)
  keys = np.array([sampling.request_key(1, i) for i in range(6)])
  positions = np.arange(6) * 3
  noise = np.asarray(sampling.position_noise(keys, jnp.asarray(positions), 33))
  order = np.array([3, 0, 5, 1, 4, 2])
  again = np.asarray(sampling.position_noise(keys[order], jnp.asarray(positions[order]), 33))
  np.testing.assert_array_equal(again, noise[order])
  alone = np.asarray(sampling.position_noise(keys[2:3], jnp.asarray(positions[2:3]), 33))
  np.testing.assert_array_equal(alone[0], noise[2])
  moved = np.asarray(sampling.position_noise(keys, jnp.asarray(positions + 1), 33))
  assert (moved != noise).mean() > 0.99
  tokens, _ = draw(logits, keys=keys, positions=positions)
  shuffled, _ = draw(logits[order], keys=keys[order], positions=positions[order])
  np.testing.assert_array_equal(shuffled, tokens[order])


def test_request_keys_differ_and_are_stable():
  keys = {tuple(sampling.request_key(*parts)) for parts in np.ndindex(4, 5, 6)}
  assert len(keys) == 120
  assert tuple(sampling.request_key(1, 23)) != tuple(sampling.request_key(12, 3))
  # Resumes and other machines depend on this value.
  assert sampling.request_key(0, 1, 2, 3).tolist() == [3130573100, 1871772536]
  assert sampling.request_key(np.int64(0), 1, 2, 3).tolist() == [3130573100, 1871772536]
