"""linear_logprob: implementations under test, inputs, and an independent float64 computation."""

from __future__ import annotations

import functools

import numpy as np

from trinity_jax.kernels.linear_logprob import implementation, pallas_tpu, xla

# name -> what `implementation` may be. The tiles are small, so that a few rows and columns make
# several of them, with a rest; "xla" holds all logits where they are so few.
TABLE = {
  "reference": "reference",
  "xla": "xla",
  "tiles": implementation.xla_tiles(xla.Tile(4, 6)),
  "tiles_transposed": implementation.xla_tiles(xla.Tile(5, 16, transpose=True)),
  "pallas_tpu": implementation.pallas()._replace(
    forward=functools.partial(pallas_tpu.forward, interpret=True),
    backward=functools.partial(pallas_tpu.backward, interpret=True),
    platforms=None,
  ),
}
FLOAT64 = [name for name in TABLE if name != "pallas_tpu"]


def inputs(seed, count, width, vocabulary, share=0.6, dtype=np.float32):
  """(hidden, weight, targets, mask, temperature)"""
  rng = np.random.default_rng(seed)
  return (
    rng.normal(size=(count, width)).astype(dtype),
    rng.normal(size=(width, vocabulary)).astype(dtype),
    rng.integers(0, vocabulary, count).astype(np.int32),
    rng.random(count) < share,
    rng.uniform(0.5, 1.5, count).astype(dtype),
  )


def cotangents(seed, count, dtype=np.float32):
  return tuple(np.random.default_rng(seed).normal(size=(3, count)).astype(dtype))


def numpy_values(hidden, weight, targets, mask, temperature, softcap=None):
  """Row by row in float64 -> [3, T]; see numpy_gradients."""
  return _numpy(hidden, weight, targets, mask, temperature, softcap)[0]


def numpy_gradients(hidden, weight, targets, mask, temperature, cotangents, softcap=None):
  """-> (d_hidden, d_weight), in closed form, row by row in float64."""
  return _numpy(hidden, weight, targets, mask, temperature, softcap, cotangents)[1:]


def _numpy(hidden, weight, targets, mask, temperature, softcap, cotangents=None):
  hidden, weight = np.asarray(hidden, np.float64), np.asarray(weight, np.float64)
  temperature = np.broadcast_to(temperature, len(targets)).astype(np.float64)
  out = np.zeros((3, len(targets)))
  d_hidden, d_weight = np.zeros(hidden.shape), np.zeros(weight.shape)
  for i in np.flatnonzero(mask):
    raw = hidden[i] @ weight
    capped = raw if softcap is None else softcap * np.tanh(raw / softcap)
    l = capped / temperature[i]
    lse = l.max() + np.log(np.exp(l - l.max()).sum())
    p = np.exp(l - lse)
    entropy = -(p * (l - lse)).sum()
    out[:, i] = l[targets[i]] - lse, entropy, lse
    if cotangents is None:
      continue
    g, h, z = (float(c[i]) for c in cotangents)
    one = np.arange(len(p)) == targets[i]
    # d logprob = 1[target] - p; d entropy = -p (log p + H); d lse = p.
    d = g * (one - p) - h * p * (l - lse + entropy) + z * p
    d = d / temperature[i]
    if softcap is not None:
      d = d / np.cosh(raw / softcap) ** 2
    d_hidden[i] = weight @ d
    d_weight += np.outer(hidden[i], d)
  return out, d_hidden, d_weight


def close(got, expected, tolerance):
  """Each array within `tolerance` of its size, or of 1."""
  for a, b in zip(got, expected, strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    error = np.linalg.norm(a - b)
    assert error <= tolerance * max(1.0, np.linalg.norm(b)), error
