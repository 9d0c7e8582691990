"""The TPU kernels, interpreted: values and gradients against float64 numpy; what is left out."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from trinity_jax.kernels.linear_logprob import pallas_tpu as kernel
from trinity_jax.kernels.linear_logprob import pallas_tpu_tiles as tiling

SMALL = ((16, 128),)  # a tile, so that a few rows and columns are several blocks


@pytest.fixture
def small_tiles(monkeypatch):
  monkeypatch.setattr(tiling, "TILES", SMALL)


def logits_of(hidden, weight, temperature, softcap):
  raw = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64)
  slope = np.ones_like(raw)
  if softcap is not None:
    bent = np.tanh(raw / softcap)
    raw, slope = softcap * bent, 1 - bent**2
  return raw / temperature[:, None], slope / temperature[:, None]


def numpy_forward(hidden, weight, targets, mask, temperature, softcap):
  l, _ = logits_of(hidden, weight, temperature, softcap)
  top = l.max(1, keepdims=True)
  lse = top[:, 0] + np.log(np.exp(l - top).sum(1))
  mean = (np.exp(l - lse[:, None]) * l).sum(1)
  inside = (targets >= 0) & (targets < l.shape[1])
  target = np.where(inside, l[np.arange(len(l)), np.where(inside, targets, 0)], 0)
  return [np.where(mask, x, 0) for x in (target, lse, mean)]


def numpy_backward(
  hidden, weight, targets, mask, temperature, lse, entropy, cotangents, softcap
):  # fmt: skip
  """From dlogp_v/dl = 1[v] - p and so on, written as sums of outer terms per output."""
  l, slope = logits_of(hidden, weight, temperature, softcap)
  g, h, z = (np.zeros(len(l)) if c is None else np.asarray(c, np.float64) for c in cotangents)
  log_p = l - lse[:, None]
  p = np.exp(log_p)
  one_hot = np.arange(l.shape[1])[None] == targets[:, None]
  d = g[:, None] * (one_hot - p)
  d += h[:, None] * -(p * (log_p + entropy[:, None]))
  d += z[:, None] * p
  d = np.where(mask[:, None], d * slope, 0)
  return d @ np.asarray(weight, np.float64).T, np.asarray(hidden, np.float64).T @ d


def inputs(T, D, V, mask, seed=0, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  hidden = jnp.asarray(rng.normal(size=(T, D)), dtype)
  weight = jnp.asarray(rng.normal(size=(D, V)) / np.sqrt(D) * 2, dtype)
  targets = rng.integers(-V // 4, V + V // 4, T).astype(np.int32)  # some of other shards
  if T > 2:
    targets[:2] = V, -1  # the first column beyond V lies in the last tile
  mask = {
    "all": np.ones(T, bool), "none": np.zeros(T, bool), "one": np.arange(T) == T // 2,
    "some": rng.random(T) < 0.5,
  }[mask]  # fmt: skip
  return hidden, weight, targets, mask, rng.uniform(0.5, 1.5, T).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("softcap", "uses", "interpret", "by_rows"))
def run(h, w, y, m, t, lse, entropy, cotangents, softcap, uses, interpret, by_rows):
  # Masked rows: neither what they hold nor what flows back into them is read.
  bad = lambda x, value: jnp.where(m if x.ndim == 1 else m[:, None], x, value)
  args = bad(h, jnp.nan), w, bad(y, -7), m, bad(t, 0)
  given = [bad(c, jnp.nan) if use else None for c, use in zip(cotangents, uses)]
  how = dict(softcap=softcap, interpret=interpret, by_rows=by_rows)
  out = kernel.forward(*args, **how)
  return out, kernel.backward(*args, bad(lse, jnp.nan), bad(entropy, jnp.nan), given, **how)


def check(
  T, D, V, mask, softcap=None, uses=(True, True, True), dtype=jnp.float32, interpret=True,
  by_rows=None,
):  # fmt: skip
  h, w, y, m, t = inputs(T, D, V, mask, dtype=dtype)
  rng = np.random.default_rng(1)
  c = rng.normal(size=(3, T)).astype(np.float32)
  h64, w64 = (np.asarray(x.astype(jnp.float32), np.float64) for x in (h, w))
  want = numpy_forward(h64, w64, y, m, t, softcap)
  # Normalised over more columns than these, as on a shard of the vocabulary.
  lse = want[1] + rng.uniform(0.1, 1, T)
  entropy = lse - want[2] * 0.9
  given = [x if use else None for x, use in zip(c, uses)]
  want_grads = numpy_backward(h64, w64, y, m, t, lse, entropy, given, softcap)
  statistics = (lse.astype(np.float32), entropy.astype(np.float32))
  out, grads = run(h, w, y, m, t, *statistics, c, softcap, uses, interpret, by_rows)
  assert all(x.dtype == jnp.float32 for x in out)
  for a, b in zip(out, want):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
    assert not np.any(np.asarray(a)[~m])
  assert [g.dtype for g in grads] == [h.dtype, w.dtype]
  # In bfloat16, what is multiplied by the operands (d logits) and the result are rounded.
  error = 1e-2 if dtype == jnp.bfloat16 else 2e-6
  for a, b in zip(grads, want_grads):
    a = np.asarray(a.astype(jnp.float32))
    assert np.linalg.norm(a - b) <= error * np.linalg.norm(b)
  assert not np.any(np.asarray(grads[0].astype(jnp.float32))[~m])


@pytest.mark.parametrize(
  ("T", "D", "V", "mask", "softcap", "dtype"),
  [
    (32, 128, 256, "all", None, jnp.float32),
    (32, 128, 300, "some", None, jnp.float32),  # the weight as [V, D]
    (48, 128, 384, "some", 3.0, jnp.float32),
    (37, 72, 300, "some", None, jnp.float32),
    (37, 72, 300, "one", 2.0, jnp.bfloat16),
    (37, 72, 300, "none", None, jnp.float32),
    (5, 200, 129, "some", 3.0, jnp.bfloat16),
    (1, 3, 2, "all", None, jnp.float32),
  ],
)
def test_value_and_gradient(small_tiles, T, D, V, mask, softcap, dtype):
  check(T, D, V, mask, softcap, dtype=dtype)


@pytest.mark.parametrize("only", [0, 1, 2])
def test_cotangents_that_are_absent(small_tiles, only):
  check(20, 16, 130, "some", 4.0, uses=tuple(i == only for i in range(3)))


@pytest.mark.parametrize("by_rows", [False, True])
def test_either_way_round(small_tiles, by_rows):
  check(20, 24, 130, "some", by_rows=by_rows)


def test_tiles_of_a_chip():
  check(40, 24, 520, "some")


def test_rows_and_a_weight_of_two_dtypes():
  """Multiplied in the wider: with one size up the compiler asked for 56.9 and 66.2 MiB of 56."""
  rows = lambda D: jax.ShapeDtypeStruct((16384, D), jnp.bfloat16)
  weight = lambda D, dtype: jax.ShapeDtypeStruct((D, 2048), dtype)
  tile = lambda D, dtype: tiling.tile_of(tiling.FORWARD, rows(D), weight(D, dtype), None)
  assert tile(4096, jnp.bfloat16) == (1024, 512)
  assert tile(4096, jnp.float32) == (512, 512)
  assert tile(8192, jnp.float32) == (256, 512)


@pytest.mark.parametrize(
  ("params", "mask"),
  [
    (pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager"), "some"),
    (pltpu.InterpretParams(), "one"),
    (pltpu.InterpretParams(), "none"),
  ],
)
def test_under_the_simulator_of_a_tpu(small_tiles, params, mask):
  """Memory that nothing wrote is NaN there, transfers happen when they are waited for."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

  check(37, 16, 300, mask, 3.0, interpret=params)
  if params.detect_races:
    assert simulator.races is not None and not simulator.races.races_found


def test_dead_blocks_are_left_out(small_tiles):
  """Only blocks of rows with an active one are asked for, each kind as often as the grid says."""
  T, D, V = 64, 16, 256  # 4 blocks of rows, 2 of columns
  tile = tiling.Tile(16, 128)
  h, w = jnp.zeros((T, D)), jnp.zeros((D, V))
  shape = tiling.Shape(h, w, tile, None, False, None)
  row, column = shape.hidden().index_map, shape.weight().index_map
  for live, rows, fetches in ((2, [0, 0, 1, 1, 1, 1, 1, 1], 4), (0, [0] * 8, 1)):
    steps = [(i, j) for i in range(4) for j in range(2)]
    n = np.array([live])
    assert [int(row(i, j, n)[0]) for i, j in steps] == rows
    tiles = [int(column(i, j, n)[1]) for i, j in steps]
    changes = 1 + sum(a != b for a, b in zip(tiles, tiles[1:]))
    assert changes == fetches  # a block that stays the same is not fetched again


def test_what_is_not_supported():
  with jax.enable_x64(True):
    bad = jnp.zeros((4, 8), jnp.float64)
    assert "hidden is float64" in (kernel.unsupported(bad, jnp.zeros((8, 9))) or "")
  assert kernel.unsupported(jnp.zeros((4, 8)), jnp.zeros((8, 9), jnp.bfloat16)) is None
  wide = jax.ShapeDtypeStruct((4, 1 << 20), jnp.float32)
  weight = jax.ShapeDtypeStruct((1 << 20, 9), jnp.float32)
  assert "leaves no room" in (kernel.unsupported(wide, weight) or "")
  y, m, t = jnp.zeros(4, jnp.int32), jnp.ones(4, bool), jnp.ones(4)
  with pytest.raises(ValueError, match="'pallas_tpu' cannot run: hidden is float16"):
    kernel.forward(jnp.zeros((4, 8), jnp.float16), jnp.zeros((8, 9)), y, m, t)
  with pytest.raises(ValueError, match="chip 'v1' is not one of"):
    kernel.forward(jnp.zeros((4, 8)), jnp.zeros((8, 9)), y, m, t, chip="v1")
