"""Attention over a cache in segments, against the reference in float64 over dense arrays."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trinity_jax import ops
from trinity_jax.kernels.attention import cached, reference
from trinity_jax.ops import Segment

_QUICK = {"xla_backend_optimization_level": 0}  # halves the compile time, which is the test's
TOLERANCE = {"float32": 3e-6, "bfloat16": 3e-2, "int8": 3e-6}  # int8: of what is stored

# sizes of the segments, (H, K, A), window
CASES = {
  "one segment": ((24,), (4, 2, 8), None),
  "three segments": ((8, 4, 12), (4, 2, 8), None),
  "window": ((8, 16), (4, 4, 8), 5),
  "window of one": ((8, 8, 8), (2, 1, 8), 1),
  "one kv head": ((16, 8), (6, 1, 4), None),
}

EVERY = [("float32", name) for name in CASES]  # one dtype goes through everything
EVERY += [(d, name) for d in ("bfloat16", "int8") for name in ("three segments", "window")]


def _cache(sizes, K, A, S, dtype, seed):
  """(segments, dense k and v float64[S, C, K, A]: exactly what the segments stand for)."""
  rng = np.random.default_rng(seed)
  segments, dense = [], []
  for n in sizes:
    k, v = rng.normal(size=(2, S, K, n, A)).astype(np.float32)
    if dtype == "int8":
      (k, k_scale), (v, v_scale) = (tuple(map(np.asarray, ops.quantize(x))) for x in (k, v))
      whole = [x.astype(np.float64) * s[..., None] for x, s in ((k, k_scale), (v, v_scale))]
      scales = k_scale, v_scale
    else:
      k, v = (np.asarray(jnp.asarray(x, dtype)) for x in (k, v))
      whole = [x.astype(np.float64) for x in (k, v)]
      scales = ()
    segments.append(Segment(k.swapaxes(2, 3), v, *scales))
    dense.append(whole)
  k, v = (np.concatenate(x, axis=2).swapaxes(1, 2) for x in zip(*dense))
  return segments, k, v


def _want(q, k, v, slots, positions, counts, window):
  """float64[P, T, H, A]; q [P, T, H, A] at positions[P, T], of which counts[p] are real."""
  P, T, H, A = q.shape
  C = k.shape[1]
  queries = np.zeros((P, C, H, A))
  segment_ids = np.zeros((P, C), np.int32)
  for p in range(P):
    queries[p, positions[p, : counts[p]]] = q[p, : counts[p]]
    segment_ids[p, : positions[p, counts[p] - 1] + 1] = 1
  at = np.broadcast_to(np.arange(C, dtype=np.int32), (P, C))
  with jax.enable_x64(True):
    out = reference.attention(
      *(jnp.asarray(x, jnp.float64) for x in (queries, k[slots], v[slots])),
      positions=jnp.asarray(at), segment_ids=jnp.asarray(segment_ids), window=window,
    )  # fmt: skip
    out = np.asarray(out)
  assert out.dtype == np.float64
  return out[np.arange(P)[:, None], np.minimum(positions, C - 1)]


def _queries(shape, dtype, seed):
  q = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  return np.asarray(jnp.asarray(q, "float32" if dtype == "int8" else dtype))


def _spoil(segments, first, block, value):
  """The cache with `value` in every block that begins at or beyond entry `first`."""
  out, begin = [], 0
  for s in segments:
    size = s.size if s.size <= block else np.gcd(s.size, block)
    kept = min(s.size, max(0, -(-(first - begin) // size) * size))
    fields = [x if x is None else x.copy() for x in s]
    for i, x in enumerate(fields):
      if x is not None and x.dtype != np.int8:
        x[(np.s_[:],) * (3 if i == 0 else 2) + (np.s_[kept:],)] = value
    out.append(Segment(*fields))
    begin += s.size
  return out


@pytest.mark.parametrize(
  ("dtype", "name", "block"), [*((*x, 4) for x in EVERY), *(("float32", n, 512) for n in CASES)]
)
def test_extend(monkeypatch, dtype, name, block):
  sizes, (H, K, A), window = CASES[name]
  monkeypatch.setattr(cached, "_BLOCK", block)
  S, P, T, C = 5, 4, 4, sum(sizes)
  segments, k, v = _cache(sizes, K, A, S, dtype, seed=1)
  run = jax.jit(functools.partial(cached.extend, window=window), compiler_options=_QUICK)
  # Histories that end inside and at the ends of blocks and segments; the last fills the cache.
  starts_of = [(0, 0, 0), (3, 4, 5), (7, 8, 9), (8, 0, 12), (11, 12, 13), (C - T, C - 4, 1)]
  for seed, starts in enumerate(starts_of):
    slots = np.array([3, 0, 4, -1], np.int32)  # the last row is padding
    starts, counts = np.array([*starts, 0], np.int32), np.array([4, 1, 3, 0], np.int32)
    positions = starts[:, None] + np.arange(T, dtype=np.int32)
    needed = int(np.max(starts[:3] + counts[:3]))
    q = _queries((P, T, H, A), dtype, seed)
    want = _want(q[:3], k, v, slots[:3], positions[:3], counts[:3], window)
    clean = run(q, segments, slots, positions, np.int32(needed))
    spoilt = _spoil(segments, needed, block, np.nan)
    got = np.asarray(run(q, spoilt, slots, positions, np.int32(needed)))
    assert got.dtype == q.dtype and np.all(np.isfinite(got.astype(np.float32)))
    np.testing.assert_array_equal(got, clean)
    for p in range(3):
      n = counts[p]
      np.testing.assert_allclose(
        got[p, :n].astype(np.float64), want[p, :n], atol=TOLERANCE[dtype], rtol=0
      )


def test_the_spoiler_spoils(monkeypatch):
  """NaN within what is needed does show: the test above can fail."""
  monkeypatch.setattr(cached, "_BLOCK", 4)
  segments, *_ = _cache((8, 16), 2, 8, 2, "float32", seed=0)
  q = _queries((1, 1, 4, 8), "float32", 0)
  spoilt = _spoil(segments, 9, 4, np.nan)
  assert not np.isnan(spoilt[1].v[:, :, :4]).any() and np.isnan(spoilt[1].v[:, :, 4:]).all()
  at = np.array([[8]], np.int32)
  run = lambda needed: np.asarray(cached.extend(q, spoilt, np.array([0]), at, np.int32(needed)))
  assert np.isfinite(run(9)).all() and np.isnan(run(13)).all()


@pytest.mark.parametrize(("dtype", "name"), EVERY)
def test_decode(dtype, name):
  sizes, (H, K, A), window = CASES[name]
  S, C = 7, sum(sizes)
  segments, k, v = _cache(sizes, K, A, S, dtype, seed=2)
  run = jax.jit(functools.partial(cached.decode, window=window), compiler_options=_QUICK)
  for seed, some in enumerate([(0, 1, 3, 4, 7, 8), (9, 11, 12, 13, C - 1, C - 2)]):
    positions = np.array([*some, C], np.int32)  # the last slot is idle
    q = _queries((S, H, A), dtype, seed)
    one = positions[:, None]
    want = _want(q[:6, None], k, v, np.arange(6), one[:6], np.ones(6, int), window)[:, 0]
    got = np.asarray(run(q, segments, positions))
    assert got.dtype == q.dtype and np.all(np.isfinite(got.astype(np.float32)))
    np.testing.assert_allclose(got[:6].astype(np.float64), want, atol=TOLERANCE[dtype], rtol=0)
    # What lies beyond a slot's own position does not reach it, however large.
    loud = [Segment(*(None if x is None else x.copy() for x in s)) for s in segments]
    begin = 0
    for s in loud:
      for slot, position in enumerate(positions):
        local = max(0, position + 1 - begin)
        if s.k_scale is None:
          s.k[slot, :, :, local:], s.v[slot, :, local:] = 1e4, 1e4
        else:
          s.k_scale[slot, :, local:], s.v_scale[slot, :, local:] = 1e4, 1e4
      begin += s.size
    np.testing.assert_array_equal(run(q, loud, positions), got)


def test_extend_of_one_token_is_decode():
  sizes, S, H, K, A = (8, 12), 5, 4, 2, 8
  segments, *_ = _cache(sizes, K, A, S, "float32", seed=4)
  positions = np.array([0, 7, 8, 13, 19], np.int32)
  q = _queries((S, H, A), "float32", 5)
  one = cached.decode(q, segments, positions)
  other = ops.extend_attention(
    q[:, None], segments, np.arange(S, dtype=np.int32), positions[:, None], np.int32(20)
  )
  np.testing.assert_allclose(other[:, 0], one, atol=2e-6)
  np.testing.assert_array_equal(ops.decode_attention(q, segments, positions), one)


def test_quantize():
  rng = np.random.default_rng(0)
  x = (rng.normal(size=(3, 50, 16)) * 10.0 ** rng.integers(-6, 6, (3, 50, 1))).astype(np.float32)
  x[0, 0] = 0
  x[0, 1] = 5.0
  q, scale = ops.quantize(jnp.asarray(x))
  assert q.dtype == jnp.int8 and scale.dtype == jnp.float32 and scale.shape == (3, 50)
  q, scale = np.asarray(q, np.float64), np.asarray(scale, np.float64)[..., None]
  peak = np.abs(x).max(axis=-1, keepdims=True)
  np.testing.assert_allclose(scale * 127, np.maximum(peak, 1e-20), rtol=1e-6)
  assert np.all(np.abs(x - q * scale) <= 0.5001 * scale)
  assert np.all(np.abs(q).max(axis=-1)[peak[..., 0] > 0] == 127) and not q[0, 0].any()


@pytest.mark.parametrize(
  ("size", "block"), [(24, 24), (512, 512), (640, 128), (4096, 512), (513, 1)]
)
def test_blocks_divide_segments(size, block):
  assert cached._block(size) == block
