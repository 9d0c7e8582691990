"""Lengths that programs are compiled for, and what is written to the cache, beside numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_jax.errors import UserError
from trinity_jax.sampler import cache as cache_lib
from trinity_jax.sampler.cache import aligned, bucket_for, buckets

_QUICK = {"xla_backend_optimization_level": 0}  # halves the compile time, which is the test's
S, K, A, ENDS = 3, 2, 4, (4, 12, 16)
C = ENDS[-1]


@given(st.integers(1, 5000), st.integers(1, 300))
def test_default_buckets_double_up_to_the_longest(longest, smallest):
  got = buckets(longest, smallest=smallest)
  assert got[-1] == longest and list(got) == sorted(set(got))
  assert all(b == 2 * a for a, b in zip(got, got[1:-1]))
  for n in (1, longest // 2 + 1, longest):
    chosen = bucket_for(n, got)
    assert chosen >= n and all(b < n for b in got if b < chosen)


def test_declared_buckets_are_sorted_and_cut_at_the_longest():
  assert buckets(100, (256, 32, 100)) == (32, 100)
  assert buckets(9, (9,)) == (9,)
  for declared in ((32, 64), (0, 200), (-1, 100)):
    with pytest.raises(UserError, match="must be positive and reach 100; add 100"):
      buckets(100, declared)


def test_a_length_beyond_the_largest_is_an_error():
  with pytest.raises(UserError, match="length 101 exceeds the largest compiled length 100"):
    bucket_for(101, (50, 100))


@given(st.lists(st.integers(1, 9000), min_size=1))
def test_aligned_lengths_hold_what_was_asked_in_blocks(lengths):
  got = aligned(lengths)
  assert list(got) == sorted(set(got))
  for n in lengths:
    up = bucket_for(n, got)
    assert up - n < cache_lib.ALIGN and (n > 4 * cache_lib.ALIGN or up == n)
  assert all(n % cache_lib.ALIGN == 0 for n in got if n > 4 * cache_lib.ALIGN)


# --- the cache of one layer beside a dense numpy model -------------------------------------------


def dense(layer):
  """Segments -> k, v [S, K, C, A] (and the scales [S, K, C] of int8), as numpy."""
  k = np.concatenate([np.asarray(x.k).swapaxes(2, 3) for x in layer], axis=2)
  v = np.concatenate([np.asarray(x.v) for x in layer], axis=2)
  if layer[0].k_scale is None:
    return [k, v]
  scales = [
    np.concatenate([np.asarray(x[i]) for x in layer], axis=2)
    for i in (2, 3)
  ]  # fmt: skip
  return [k, v, *scales]


def filled(dtype, seed):
  """A layer that already holds something everywhere."""
  rng = np.random.default_rng(seed)
  (layer,) = cache_lib.init(1, S, K, A, ENDS, dtype)
  draw = lambda x: rng.integers(-100, 100, x.shape).astype(x.dtype)  # exact in every dtype
  return jax.tree.map(draw, layer)


def encoded(x, dtype):
  """x f32[..., A] as the cache stores it, with its scale [...] (int8 only): numpy."""
  if dtype != "int8":
    return np.asarray(jnp.asarray(x, dtype)), None
  scale = np.maximum(np.abs(x).max(axis=-1), 1e-20) / np.float32(127)
  return np.round(x / scale[..., None]).astype(np.int8), scale


def put(model, dtype, slot, entry, k, v):
  """Writes k, v [K, A] to one entry of the dense model."""
  for i, x in enumerate((k, v)):
    value, scale = encoded(x, dtype)
    model[i][slot, :, entry] = value
    if scale is not None:
      model[2 + i][slot, :, entry] = scale


def same(layer, model):
  for i, (got, want) in enumerate(zip(dense(layer), model, strict=True)):
    assert got.dtype == want.dtype
    if got.dtype == np.int8:  # a last bit of the scale may move a half
      assert np.abs(got.astype(int) - want).max() <= 1
    elif i >= 2:
      np.testing.assert_allclose(got, want, rtol=1e-6)
    else:
      np.testing.assert_array_equal(got, want)


@functools.cache
def jitted(name, *static):
  return jax.jit(getattr(cache_lib, name), static_argnums=static, compiler_options=_QUICK)


DTYPES = st.sampled_from(["float32", "bfloat16", "int8"])


@settings(deadline=None, max_examples=150)
@given(
  DTYPES,
  st.sampled_from([1, 6, 20]),
  st.permutations([0, 1, 2, -1, S, -1]).map(lambda x: x[:3]),
  st.lists(st.integers(0, C + 2), min_size=3, max_size=3),
  st.integers(0, 2**31),
)
def test_write_chunks(dtype, T, slots, starts, seed):
  """Chunks that cross segments, end at or beyond the cache's end, rows of padding."""
  rng = np.random.default_rng(seed)
  k, v = rng.normal(size=(2, 3, T, K, A)).astype(np.float32)
  layer = filled(dtype, seed)
  model = dense(layer)
  for p, (slot, start) in enumerate(zip(slots, starts)):
    if 0 <= slot < S:
      for t in range(min(T, C - start)):
        put(model, dtype, slot, start + t, k[p, t], v[p, t])
  got = jitted("write_chunks")(layer, np.array(slots, np.int32), np.array(starts, np.int32), k, v)
  same(got, model)


@settings(deadline=None, max_examples=100)
@given(
  DTYPES,
  st.lists(st.one_of(st.integers(-1, C + 3), st.sampled_from(ENDS)), min_size=S, max_size=S),
  st.integers(0, 2**31),
)
def test_write_entries(dtype, positions, seed):
  """Positions outside of the layer are dropped."""
  rng = np.random.default_rng(seed)
  k, v = rng.normal(size=(2, S, K, A)).astype(np.float32)
  layer = filled(dtype, seed)
  model = dense(layer)
  for slot, entry in enumerate(positions):
    if 0 <= entry < C:
      put(model, dtype, slot, entry, k[slot], v[slot])
  same(jitted("write_entries")(layer, np.array(positions, np.int32), k, v), model)


@settings(deadline=None, max_examples=100)
@given(
  DTYPES,
  st.sampled_from(ENDS),
  st.lists(st.tuples(st.integers(0, S - 1), st.integers(0, S - 1)), min_size=S, max_size=S),
  st.integers(0, S),
  st.integers(0, 2**31),
)
def test_copy_rows(dtype, live, pairs, count, seed):
  """One pair after another, also from what a pair before it has received."""
  layer = filled(dtype, seed)
  model = dense(layer)
  for source, target in pairs[:count]:
    for x in model:
      x[target, :, :live] = x[source, :, :live]
  source, target = np.array(pairs, np.int32).T
  same(jitted("copy_rows", 1)(layer, live, source, target, np.int32(count)), model)


def test_an_empty_cache():
  cache = cache_lib.init(2, S, K, A, ENDS, "int8")
  assert len(cache) == 2 and [x.size for x in cache[0]] == [4, 8, 4]
  for segment in cache[1]:
    n = segment.size
    assert segment.k.shape == (S, K, A, n) and segment.v.shape == (S, K, n, A)
    assert segment.k_scale.shape == segment.v_scale.shape == (S, K, n)
    assert segment.k.dtype == jnp.int8 and segment.v_scale.dtype == jnp.float32


def test_live_lengths_are_where_segments_end():
  (layer,) = cache_lib.init(1, S, K, A, ENDS, jnp.float32)
  assert [len(cache_lib.up_to(layer, n)) for n in ENDS] == [1, 2, 3]
  for live in (0, 5, 17):
    message = f"live = {live}: not among the lengths where a segment ends .up to 16"
    with pytest.raises(UserError, match=message):
      cache_lib.up_to(layer, live)
