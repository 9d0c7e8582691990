"""What a slot's cache holds: prompts in chunks, next turns, copies, parked prefixes, dtypes."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

CLOSE = 2e-5
LOG = (3, 9, 27, 17, 51, 22, 5, 40)


@pytest.fixture(scope="module")
def forward(tools, params):
  """log -> f32[V], logits after its last token, without a cache."""
  length = tools.spec.cache_length
  return lambda log: tools.full_forward(tools.model, params, [log], length)[0, len(log) - 1]


def compositions(n: int):
  """Every way to cut n tokens into chunks."""
  for cuts in itertools.product((False, True), repeat=n - 1):
    at = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), n]
    yield [b - a for a, b in zip(at, at[1:])]


def test_every_split_of_a_prompt_gives_the_logits_of_one_chunk(tools, engine, forward):
  want = forward(LOG)
  drive = tools.drive(engine)
  whole = drive.logits(0, 0, LOG)
  np.testing.assert_allclose(whole, want, atol=CLOSE, rtol=0)
  splits = list(compositions(len(LOG)))
  assert len(splits) == 128
  for i, split in enumerate(splits):
    slot = i % tools.spec.slots  # holds what an earlier split has left there
    for start, new in tools.pieces(LOG, split, tools.prompt):
      got = drive.logits(slot, start, new)
    np.testing.assert_allclose(got, whole, atol=CLOSE, rtol=0, err_msg=str(split))


def test_a_prompt_over_both_segments_in_chunks_of_several_sizes(tools, engine, forward):
  log = tuple((7 * i * i + 3) % 64 for i in range(39))  # segments end at 12 and 40
  want = forward(log)
  drive = tools.drive(engine)
  for slot, split in enumerate(((), (5,), (4, 8, 1, 8), (8, 4, 8), (1,) * 39, (8, 8, 8, 8, 6))):
    for start, new in tools.pieces(log, split, tools.prompt):
      got = drive.logits(slot, start, new)
    np.testing.assert_allclose(got, want, atol=CLOSE, rtol=0, err_msg=str(split))


def test_rows_of_different_starts_share_an_extend(tools, engine, forward):
  logs = {s: tuple((s + 5) * (i + 2) % 64 for i in range(n)) for s, n in enumerate((9, 14, 21, 3))}
  drive = tools.drive(engine)
  for slot, log in logs.items():
    for start, new in tools.pieces(log[:-2], (), tools.prompt):
      drive.extend({slot: (start, new)})
  got, row = drive.extend({s: (len(log) - 2, log[-2:]) for s, log in logs.items()})
  for slot, log in logs.items():
    np.testing.assert_allclose(got[row[slot]], forward(log), atol=CLOSE, rtol=0)


def test_the_next_turn_continues_behind_what_was_decoded(tools, engine, forward):
  drive = tools.drive(engine)
  asks = {s: tools.ask(LOG[: s + 2], key=s, limit=3 + s) for s in range(4)}
  drive.admit(asks)
  drive.decode()
  new = (11, 7, 30, 2)
  for slot, a in asks.items():
    sampled = drive.answer(slot).tokens
    held = len(a.prompt) + len(sampled) - 1  # the last token was sampled, not run
    assert int(drive.state.length[slot]) == held
    got = drive.logits(slot, held, (sampled[-1], *new))
    np.testing.assert_allclose(got, forward((*a.prompt, *sampled, *new)), atol=CLOSE, rtol=0)
  # ... and the turn after that is decoded like any other.
  a, sampled = asks[2], drive.answer(2).tokens
  log = (*a.prompt, *sampled, *new)
  again = tools.ask(log, key=9, limit=8)
  logits, row = drive.extend({2: (len(log) - 1, log[-1:])})
  drive.start(logits, {2: again}, row, {2: len(log)})
  drive.decode()
  fresh = tools.run(engine, {6: again})[6]
  assert drive.answer(2).tokens == fresh.tokens
  np.testing.assert_allclose(drive.answer(2).logprobs, fresh.logprobs, atol=1e-5)


def test_a_copied_prefix_is_continued_like_the_original(tools, engine, forward):
  drive = tools.drive(engine)
  long = tuple((5 * i + 1) % 64 for i in range(17))
  for prefix, live in ((LOG, 12), (LOG, 40), (long, 40)):
    for start, new in tools.pieces(prefix, (), tools.prompt):
      drive.extend({1: (start, new)})
    before = {s: drive.cached(s) for s in (0, 1, 4)}
    drive.copy([(1, 3), (1, 7), (3, 6)], live=live)
    for slot, old in before.items():
      for a, b in zip(old, drive.cached(slot)):
        np.testing.assert_array_equal(a, b)
    for slot, new in ((3, (1, 2)), (7, (50,)), (6, (9, 9, 9)), (1, (33,))):
      got = drive.logits(slot, len(prefix), new)
      np.testing.assert_allclose(got, forward((*prefix, *new)), atol=CLOSE, rtol=0)


def test_what_idle_slots_hold_survives_the_work_of_others(tools, engine, forward):
  drive = tools.drive(engine)
  drive.extend({2: (0, LOG), 5: (0, LOG[:5])})
  drive.admit({7: tools.ask(LOG[:3], limit=6)})
  drive.decode()  # 7 has ended and is parked too
  parked = {s: drive.cached(s) for s in (2, 5, 7)}
  for live, limit in ((12, 3), (40, 12)):
    drive.admit({0: tools.ask(LOG[:6], limit=limit), 4: tools.ask(LOG[:2], key=1, limit=limit)})
    drive.decode(live=live)
    drive.extend({3: (0, LOG)})
    drive.copy([(3, 6)], live=live)
    for slot, old in parked.items():
      for a, b in zip(old, drive.cached(slot), strict=True):
        np.testing.assert_array_equal(a, b)
  got = drive.logits(2, len(LOG), (8,))
  np.testing.assert_allclose(got, forward((*LOG, 8)), atol=CLOSE, rtol=0)


def test_rubbish_beyond_a_sequence_is_never_seen(tools, engine, forward):
  """Entries of an earlier sequence, however large, are overwritten before they are read."""
  drive = tools.drive(engine)
  clean = tools.run(engine, {0: tools.ask(LOG[:5], key=3)})[0]
  wild = jax.tree.map(lambda x: jax.device_put(x * 0 + 1e4, x.sharding), drive.state.cache)
  drive.state = dataclasses.replace(drive.state, cache=wild)
  drive.admit({0: tools.ask(LOG[:5], key=3)}, split=(2,))
  drive.decode()
  assert drive.answer(0).tokens == clean.tokens
  np.testing.assert_array_equal(drive.answer(0).logprobs, clean.logprobs)


# name -> (cache dtype, bytes of an entry's key of A = 16 numbers, tolerance of log-probs)
DTYPES = {"bfloat16": (2 * 16, 0.06), "int8": (16 + 4, 0.12), "float32": (4 * 16, 1e-5)}


@pytest.mark.parametrize("name", DTYPES)
def test_cache_dtypes(tools, params, name):
  """Log-probs of greedy tokens beside those of a forward pass that has no cache.

  The tolerance is absolute, for logits that differ by tens; a bf16 entry is off by up to 1/256 of
  itself, an int8 one by 1/254 of the largest of its vector.
  """
  size, tolerance = DTYPES[name]
  spec = tools.spec._replace(cache_dtype=jnp.dtype(name))
  engine = tools.engine(tools.jitted(spec, (8,), (8,)), params)
  drive = tools.drive(engine)
  leaves = jax.tree.leaves(drive.state.cache)
  assert {x.dtype for x in leaves if x.ndim == 4} == {jnp.dtype(name)}
  entries = 2 * 2 * spec.slots * 2 * spec.cache_length  # k and v, layers, slots, heads, length
  assert sum(x.nbytes for x in leaves) == entries * size
  assert len(leaves) == (16 if name == "int8" else 8)
  asks = {
    s: tools.ask(tuple((s + 3) * (i + 1) % 64 for i in range(2 + s)), key=s, temperature=0.0)
    for s in range(8)
  }
  drive.admit(asks, split=(3,))
  drive.decode()
  worst, apart = 0.0, 0.0
  for slot, a in asks.items():
    got, n = drive.answer(slot), len(a.prompt)
    logits = tools.full_forward(tools.model, params, [[*a.prompt, *got.tokens]], spec.cache_length)[
      0, n - 1 : n + 11
    ]
    want = np.asarray(jax.nn.log_softmax(logits))[np.arange(12), got.tokens]
    worst = max(worst, np.abs(got.logprobs - want).max())
    apart = max(apart, np.ptp(logits))
    # Greedy among what is as good as the best.
    assert np.all(want >= np.asarray(jax.nn.log_softmax(logits)).max(axis=-1) - 2 * tolerance)
  assert worst <= tolerance and apart > 10, (worst, apart)
  if name != "float32":
    assert worst > 1e-5, "the cache was not rounded at all"


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_narrow_caches_do_not_depend_on_the_split(tools, params, name):
  """What is stored is read back by the chunk that stores it, so chunks see what later ones see."""
  spec = tools.spec._replace(cache_dtype=jnp.dtype(name))
  engine = tools.engine(tools.jitted(spec, (8,), (8,)), params)
  drive = tools.drive(engine)
  log = (*LOG, *LOG[::-1])
  want = None
  for slot, split in enumerate(((), (1,) * 16, (4, 5, 6), (8, 3))):
    for start, new in tools.pieces(log, split, tools.prompt):
      got = drive.logits(slot, start, new)
    want = got if want is None else want
    np.testing.assert_allclose(got, want, atol=0.05, rtol=0, err_msg=str(split))


def test_an_engine_in_bfloat16(tools, params):
  """Weights, activations and cache in bf16; log-probs in fp32 and close to those of fp32."""
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
  spec = tools.spec._replace(dtype=jnp.bfloat16)
  engine = tools.engine(tools.jitted(spec, (8,), (8,)), params)
  drive = tools.drive(engine)
  assert {x.dtype for x in jax.tree.leaves(drive.state.cache)} == {jnp.dtype("bfloat16")}
  asks = {s: tools.ask(LOG[: 2 + s % 4], key=s) for s in range(8)}
  drive.admit(asks)
  drive.decode()
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  worst = 0.0
  for slot, a in asks.items():
    got, n = drive.answer(slot), len(a.prompt)
    assert got.logprobs.dtype == np.float32
    log = [*a.prompt, *got.tokens]
    logits = tools.full_forward(tools.model, exact, [log], spec.cache_length)[0, n - 1 : n + 11]
    want = np.asarray(jax.nn.log_softmax(logits))[np.arange(12), got.tokens]
    worst = max(worst, np.abs(got.logprobs - want).max())
  assert 1e-4 < worst <= 0.15
