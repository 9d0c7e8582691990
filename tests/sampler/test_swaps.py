"""Weights change, samplers pause and hand over while sequences are under way."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from typing import Any

import jax
import numpy as np
import pytest

from trinity_jax.errors import RunFailed, UserError
from trinity_jax.experience import StopReason
from trinity_jax.sampler.request import Request, join
from trinity_jax.sampler.sampling import request_key
from trinity_jax.sampler.scheduler import SWAPS, Sampler


def hooked(programs, name, then) -> Any:
  """A proxy whose program `name` calls then(n) before its n-th call (from 1)."""

  class Hooked:
    calls = 0

    def __getattr__(self, attribute):
      return getattr(programs, attribute)

  proxy = Hooked()

  def call(*args, **kwargs):
    proxy.calls += 1
    then(proxy.calls)
    return getattr(programs, name)(*args, **kwargs)

  setattr(proxy, name, call)
  return proxy


class Halt:
  """Stops the sampler's thread before the n-th call of a program until told to go on."""

  def __init__(self, n):
    self.n, self.there, self.go = n, threading.Event(), threading.Event()

  def __call__(self, n):
    if n == self.n:
      self.there.set()
      assert self.go.wait(30)


# --- swaps, on the fake -------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("on_swap", SWAPS)
def test_versions_and_flags_are_what_the_engine_knows(fakes, on_swap, shards):
  fake = fakes.FakePrograms(
    slots=4, max_prompt=60, max_response=20, counts=(1, 2), lengths=(4, 16), lives=(30, 80),
    shards=shards, audit=True,
  )  # fmt: skip
  rng = np.random.default_rng(0)
  requests = [
    fakes.request(
      i, (i % 2,) * int(rng.integers(1, 60)), limit=int(rng.integers(1, 21)), stop_ids=(i % 50,)
    )
    for i in range(60)
  ]

  def swap(n):
    if n % 3 == 0:
      sampler.set_params(n, f"params {n}")

  with fakes.sampler_on(
    hooked(fake, "generate", swap), version=None, steps=4, on_swap=on_swap
  ) as sampler:
    futures = [fakes.ask(sampler, r) for r in requests]
    sampler.set_params(0, "params 0")
    results = [f.result(fakes.WAIT) for f in futures]
    for _ in futures:
      sampler.leave()
    assert fakes.idle(sampler)
  for got, r in zip(results, requests):
    fakes.check(got, r)
    fakes.check_truth(fake, got, r)
  assert not fake.truth, "a token was sampled that nobody got"
  assert len({v for c in results for v in c.versions.tolist()}) > 5
  several = [c for c in results if len(set(c.versions.tolist())) > 1]
  mixed = [c for c in results if c.mixed.any()]
  assert bool(several) == (on_swap != "drain")
  assert bool(mixed) == (on_swap == "keep")
  assert bool(fake.of("release")) == (on_swap == "recompute")


@pytest.mark.parametrize("on_swap", SWAPS)
def test_a_swap_in_the_middle_of_a_long_prompt(fakes, on_swap):
  """Half by one version and half by another would be neither's."""
  fake = fakes.FakePrograms(
    slots=2, max_prompt=60, max_response=4, counts=(1,), lengths=(8,), audit=True
  )
  halt = Halt(5)
  with fakes.sampler_on(hooked(fake, "extend", halt), on_swap=on_swap, steps=1) as sampler:
    r = fakes.request(1, tuple(range(60)), limit=4)
    future = fakes.ask(sampler, r)
    assert halt.there.wait(fakes.WAIT)
    sampler.set_params(1, "params 1")
    halt.go.set()
    got = future.result(fakes.WAIT)
  fakes.check(got, r)
  fakes.check_truth(fake, got, r)
  assert set(got.versions.tolist()) == ({0} if on_swap == "drain" else {1})
  assert not got.mixed.any()


def test_a_drain_swap_admits_nobody_until_it_is_done(fakes):
  fake = fakes.FakePrograms(slots=2)
  halt = Halt(1)
  with fakes.sampler_on(hooked(fake, "generate", halt), on_swap="drain", steps=1) as sampler:
    first = fakes.ask(sampler, fakes.request(1))
    assert halt.there.wait(fakes.WAIT)
    sampler.set_params(1, "params 1")
    second = fakes.ask(sampler, fakes.request(2))
    halt.go.set()
    assert set(first.result(fakes.WAIT).versions.tolist()) == {0}
    assert set(second.result(fakes.WAIT).versions.tolist()) == {1}


# --- pause, hand over, continue -----------------------------------------------------------------


@pytest.mark.parametrize("on_swap", SWAPS)
def test_pause_and_resume_change_nothing(fakes, on_swap):
  fake = fakes.FakePrograms(slots=2, audit=True)
  with fakes.sampler_on(fake, steps=1, on_swap=on_swap) as sampler:
    requests = [fakes.request(i) for i in range(12)]
    futures = [fakes.ask(sampler, r) for r in requests]
    for _ in range(10):
      sampler.pause()
      before = list(fake.plan)
      assert "paused" in sampler.describe()
      sampler.pause()  # twice is fine
      assert fake.plan == before
      sampler.resume()
    for future, r in zip(futures, requests):
      got = future.result(fakes.WAIT)
      fakes.check(got, r)
      fakes.check_truth(fake, got, r)
      assert not got.mixed.any()


@pytest.mark.parametrize("on_swap", SWAPS)
@pytest.mark.parametrize("when", [1, 3, 5])
def test_hand_over_and_adopt(fakes, when, on_swap):
  """Twice: to a second sampler with newer weights and more shards, and on to a third."""
  fake = [fakes.FakePrograms(slots=4, shards=s, audit=True) for s in (1, 2, 4)]
  requests = [fakes.request(i) for i in range(14)]
  halts = [Halt(when), Halt(when), Halt(10**9)]
  samplers = [
    Sampler(
      hooked(f, "generate", h), steps_per_dispatch=1, refill_fraction=0.3, deterministic=False,
      on_swap=on_swap,
    )
    for f, h in zip(fake, halts)
  ]  # fmt: skip
  chunks = {i: [] for i in range(0, 14, 3)}
  futures = [
    fakes.ask(samplers[0], r, sink=chunks[i].append if i in chunks else None)
    for i, r in enumerate(requests)
  ]
  for v, (sampler, halt) in enumerate(zip(samplers, halts)):
    sampler.start()
    sampler.set_params(v, f"params {v}")
    if v == 2:
      break
    assert halt.there.wait(fakes.WAIT)
    pausing = threading.Thread(target=sampler.pause)  # hand_over has to wait for the dispatch
    pausing.start()
    while not sampler._paused:
      threading.Event().wait(0.001)
    halt.go.set()
    opens = sampler.hand_over()
    pausing.join(fakes.WAIT)
    if v == 1:
      samplers[0].abort(futures[9])  # in nobody's hands; by where its caller once asked
    samplers[v + 1].adopt(opens)
    if v == 0:
      samplers[0].abort(futures[12])  # in the second's hands
    with pytest.raises(RunFailed, match="closed"):
      fakes.ask(sampler, requests[0])
  for i, (future, r) in enumerate(zip(futures, requests)):
    got = future.result(fakes.WAIT)
    (fakes.check_part if i in (9, 12) else fakes.check)(got, r)
    if i in (9, 12) and len(got.tokens) < 8:
      assert got.stop_reason is StopReason.ABORTED
    truth = {name: x for f in fake for name, x in f.truth.items()}
    names = [(r.key.tobytes(), len(r.tokens) + n) for n in range(len(got.tokens))]
    assert [truth[n] for n in names] == list(zip(got.versions.tolist(), got.mixed.tolist()))
    assert not got.mixed.any(), "the next sampler computed the context again"
    if i in chunks and len(got.tokens) == 8:
      assert join(chunks[i], got.stop_reason).tokens.tolist() == got.tokens.tolist()
  sampled = sum(len(f.truth) for f in fake)
  assert sampled == sum(len(f.result().tokens) for f in futures), "twice or for nobody"
  assert any(len(set(f.result().versions.tolist())) > 1 for f in futures)
  for s in samplers:
    s.close()
    assert s.error is None and not s._accepted


def test_an_adopted_request_keeps_its_deadline_and_its_run(fakes):
  first, second = fakes.FakePrograms(), fakes.FakePrograms()
  with fakes.sampler_on(first, version=None) as a, fakes.sampler_on(second, version=None) as b:
    r = fakes.request(1, deadline=time.monotonic() + 0.05)
    future = fakes.ask(a, r)
    assert a._busy == 0
    b.adopt(a.hand_over())
    assert future.result(fakes.WAIT).stop_reason is StopReason.TIMEOUT
    assert a._busy == 1 and b._busy == 0


@pytest.mark.parametrize("when", ["in nobody's hands", "waiting", "decoding"])
def test_abort_where_it_was_asked_reaches_the_sampler_that_has_it(fakes, when):
  fake = fakes.FakePrograms()
  version = 0 if when == "decoding" else None  # without weights it sleeps
  with (
    fakes.sampler_on(fakes.FakePrograms(), version=None) as a,
    fakes.sampler_on(fake, version=version) as b,
  ):
    fake.gate.clear()
    future = fakes.ask(a, fakes.request(1))
    opens = a.hand_over()
    if when != "in nobody's hands":
      b.adopt(opens)
    if when == "decoding":
      assert fake.reached.acquire(timeout=fakes.WAIT)
    threading.Event().wait(0.05)  # so that it sleeps again, and has to be woken
    a.abort(future)
    a.abort(future)
    b.abort(future)
    assert a._busy == 1
    if when == "in nobody's hands":
      b.adopt(opens)
    fake.gate.set()
    got = future.result(fakes.WAIT)
    assert got.stop_reason is StopReason.ABORTED and len(got.tokens) < 8
    a.abort(future)
    assert a._busy == 1 and b._busy == 0 and not b._accepted


def test_a_smaller_sampler_adopts_nothing(fakes):
  small = fakes.FakePrograms(max_prompt=2, max_response=3, lives=(5,))
  with fakes.sampler_on(fakes.FakePrograms(), version=None) as a, fakes.sampler_on(small) as b:
    futures = [fakes.ask(a, fakes.request(0, (1,), limit=2)), fakes.ask(a, fakes.request(5))]
    opens = a.hand_over()
    with pytest.raises(UserError, match="prompt of 6 tokens"):
      b.adopt(opens)
    b.adopt(opens[:1])
    fakes.check(futures[0].result(fakes.WAIT), opens[0].request)
    assert not futures[1].done()


def test_hand_over_races_with_deadlines_and_aborts(fakes):
  """Both used to take requests out of the same slots at once."""
  rng = np.random.default_rng(0)
  for round_ in range(25):
    fake = [fakes.FakePrograms(slots=3, audit=True) for _ in range(2)]
    with fakes.sampler_on(fake[0], steps=1) as a, fakes.sampler_on(fake[1], version=1) as b:
      now = time.monotonic()
      requests = [
        fakes.request(i, deadline=now + rng.exponential(0.004) if i % 2 else None)
        for i in range(24)
      ]
      futures = [fakes.ask(a, r) for r in requests]
      aborting = threading.Thread(target=lambda a=a, f=futures[::5]: [*map(a.abort, f)])
      aborting.start()
      time_to_go = now + 0.0003 * round_
      while time.monotonic() < time_to_go:
        threading.Event().wait(0.0002)
      b.adopt(a.hand_over())
      aborting.join(fakes.WAIT)
      for future, r in zip(futures, requests):
        fakes.check_part(future.result(fakes.WAIT), r)
      total = sum(len(f.result().tokens) for f in futures)
      assert total == len(fake[0].truth) + len(fake[1].truth)
      assert a.error is None and b.error is None
      assert a._busy == 24 and b._busy == 0


def test_two_samplers_that_swap_requests_do_not_wait_for_each_other(fakes):
  """Their results are given back to the other's participants, and aborts go to the other."""
  for _ in range(10):
    fake = [fakes.FakePrograms(slots=2) for _ in range(4)]
    with (
      fakes.sampler_on(fake[0], version=None) as a, fakes.sampler_on(fake[1], version=None) as b,
      fakes.sampler_on(fake[2]) as c, fakes.sampler_on(fake[3]) as d,
    ):  # fmt: skip
      futures = [fakes.ask(s, fakes.request(i)) for i in range(40) for s in (a, b)]

      def give_up(*samplers, futures=futures):
        for f in futures[::3]:
          for s in samplers:
            s.abort(f)

      from_a, from_b = a.hand_over(), b.hand_over()
      threads = [
        threading.Thread(target=c.adopt, args=(from_a[::2] + from_b[::2],)),
        threading.Thread(target=d.adopt, args=(from_a[1::2] + from_b[1::2],)),
        threading.Thread(target=give_up, args=(a, b)),
        threading.Thread(target=give_up, args=(c, d)),
      ]
      for t in threads:
        t.start()
      for t in threads:
        t.join(fakes.WAIT)
        assert not t.is_alive()
      for i, future in enumerate(futures):
        fakes.check_part(future.result(fakes.WAIT), fakes.request(i // 2))


@pytest.mark.parametrize("n", [1, 5, 7])
def test_a_partial_result_is_continued_elsewhere(fakes, n):
  r = fakes.request(3)
  fake = [fakes.FakePrograms(audit=True) for _ in range(2)]
  halt = Halt(n)
  with fakes.sampler_on(hooked(fake[0], "generate", halt), steps=1) as a:
    future = fakes.ask(a, r)
    assert halt.there.wait(fakes.WAIT)
    a.abort(future)
    halt.go.set()
    part = future.result(fakes.WAIT)
  with fakes.sampler_on(fake[1], version=4) as b:
    if n == 7:
      assert part.stop_reason is StopReason.LENGTH
      with pytest.raises(UserError, match="so_far has 8 tokens of 8, .* nothing is left"):
        b.submit(r, so_far=part)
      return
    assert part.stop_reason is StopReason.ABORTED and len(part.tokens) == n + 1
    got = fakes.ask(b, r, so_far=part).result(fakes.WAIT)
    fakes.check(got, r)
    assert got.versions.tolist() == [0] * (n + 1) + [4] * (7 - n)
    assert not got.mixed.any()
    stopped = dataclasses.replace(r, stop_ids=(int(part.tokens[-1]),))
    with pytest.raises(UserError, match="so_far .* nothing is left"):
      b.submit(stopped, so_far=part)


# --- the real engine ----------------------------------------------------------------------------

SWAP_AT = (3, 5, 9)  # before these dispatches


def real_requests(count, limit=30, seed=0):
  rng = np.random.default_rng(seed)
  return [
    Request(
      rng.integers(0, 64, 3 + 5 * i).astype(np.int32), request_key(seed, i), (i,), limit - i, ()
    )
    for i in range(count)
  ]


def run(tiny, requests, *, on_swap="keep", swaps=(), steps=3):
  """swaps: (before this dispatch, version, params)."""
  at = {n: rest for n, *rest in swaps}

  def swap(n):
    if n in at:
      sampler.set_params(*at[n])

  sampler = Sampler(
    hooked(tiny.programs, "generate", swap), steps_per_dispatch=steps, refill_fraction=0.5,
    deterministic=False, on_swap=on_swap,
  )  # fmt: skip
  futures = [(sampler.enter(), sampler.submit(r))[1] for r in requests]
  sampler.start()
  sampler.set_params(0, tiny.params[0])
  try:
    return [f.result(120) for f in futures]
  finally:
    sampler.close()


def check_scores(tiny, r, got, params_of, tokens=slice(None)):
  """Log-probs are those of a forward pass of each token's version."""
  for v in set(got.versions[tokens].tolist()):
    mine = np.zeros(len(got.tokens), bool)
    mine[tokens] = got.versions[tokens] == v
    scores = tiny.score(params_of[v], r.tokens, got.tokens)
    np.testing.assert_allclose(got.logprobs[mine], scores[mine], atol=2e-5)


def test_kept_caches_score_as_a_replay_that_swaps_at_the_same_token(tiny):
  requests = real_requests(3)
  swaps = [(n, n, tiny.params[(i + 1) % 3]) for i, n in enumerate(SWAP_AT)]
  params_of = {0: tiny.params[0]} | {v: p for _, v, p in swaps}
  results = run(tiny, requests, swaps=swaps)
  # All of them started together, so each swap came at one token of all.
  firsts = {v: int(np.argmax(results[0].versions == v)) for v in params_of}
  replayed = tiny.replay(requests, [(firsts[v], v, p) for v, p in params_of.items()])
  for r, got, again in zip(requests, results, replayed):
    np.testing.assert_array_equal(got.tokens, again.tokens)
    np.testing.assert_array_equal(got.versions, again.versions)
    np.testing.assert_allclose(got.logprobs, again.logprobs, atol=2e-5)
    assert got.mixed.tolist() == (got.versions != 0).tolist()
    check_scores(tiny, r, got, params_of, ~got.mixed)
    # The flag means something: a forward pass of their version says something else.
    with pytest.raises(AssertionError):
      check_scores(tiny, r, got, params_of, got.mixed)


@pytest.mark.parametrize("on_swap", ["recompute", "drain"])
def test_recomputed_and_drained_sequences_score_as_their_version_does(tiny, on_swap):
  requests = real_requests(7)  # more than slots
  swaps = [(n, n, tiny.params[(i + 1) % 3]) for i, n in enumerate(SWAP_AT)]
  params_of = {0: tiny.params[0]} | {v: p for _, v, p in swaps}
  results = run(tiny, requests, swaps=swaps, on_swap=on_swap)
  for r, got in zip(requests, results):
    assert len(got.tokens) == r.limit and not got.mixed.any()
    check_scores(tiny, r, got, params_of)
    assert on_swap != "drain" or len(set(got.versions.tolist())) == 1
  assert len({v for c in results for v in c.versions.tolist()}) >= (2 if on_swap == "drain" else 4)


@pytest.mark.parametrize("on_swap", SWAPS)
def test_swaps_to_equal_weights_change_no_token(tiny, on_swap):
  requests = real_requests(6)
  alone = run(tiny, requests)
  swapped = run(
    tiny, requests, on_swap=on_swap, swaps=[(n, n, tiny.params[0]) for n in range(1, 40, 2)]
  )
  for a, b in zip(alone, swapped):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)
    assert a.stop_reason is b.stop_reason and not a.versions.any()
  assert len({v for c in swapped for v in c.versions.tolist()}) > (1 if on_swap == "drain" else 4)


def test_a_restarted_sampler_continues_where_the_old_one_was(tiny):
  """By hand_over and adopt; and, as after a crash, by submit(so_far=...)."""
  requests = real_requests(6)
  alone = run(tiny, requests)
  halt = Halt(4)
  new = lambda programs: Sampler(
    programs, steps_per_dispatch=3, refill_fraction=0.5, deterministic=False
  )
  a, b, c = new(hooked(tiny.programs, "generate", halt)), new(tiny.programs), new(tiny.programs)
  futures = [(a.enter(), a.submit(r))[1] for r in requests]
  a.start()
  a.set_params(0, tiny.params[0])
  assert halt.there.wait(60)
  a.abort(futures[1])
  halt.go.set()
  part = futures[1].result(60)
  assert part.stop_reason is StopReason.ABORTED and 0 < len(part.tokens) < 29
  opens = a.hand_over()
  assert any(o.parts for o in opens)
  for s in (b, c):
    s.start()
    s.set_params(5, tiny.params[0])
  b.adopt(opens)
  c.enter()
  futures[1] = c.submit(requests[1], so_far=part)
  for want, future in zip(alone, futures):
    got = future.result(60)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=2e-5)
    assert set(got.versions.tolist()) <= {0, 5} and not got.mixed.any()
  assert any(len(set(f.result().versions.tolist())) == 2 for f in futures)
  b.close()
  c.close()


def test_a_stream_goes_on_in_the_next_sampler(fakes):
  first, second = fakes.FakePrograms(slots=1), fakes.FakePrograms(slots=1)
  with fakes.sampler_on(first, steps=1) as a, fakes.sampler_on(second, version=1) as b:

    async def main():
      r, chunks = fakes.request(1), []
      a.enter()
      async for chunk in a.stream(r):
        chunks.append(chunk)
        if len(chunks) == 1:
          b.adopt(await asyncio.to_thread(a.hand_over))
      fakes.check(join(chunks, chunks[-1].stop_reason), r)

    asyncio.run(asyncio.wait_for(main(), fakes.WAIT))


def test_weights_that_are_not_finite_leave_nothing_behind(tiny):
  requests = real_requests(6)
  spoiled = jax.tree.map(lambda x: x * np.nan, tiny.params[0])
  sampler = Sampler(tiny.programs, steps_per_dispatch=4, refill_fraction=0.5, deterministic=False)
  sampler.start()
  try:
    runs = []
    for version, params in enumerate((tiny.params[0], spoiled, tiny.params[0])):
      sampler.set_params(version, params)
      runs.append([f.result(60) for f in [sampler.submit(r) for r in requests]])
  finally:
    sampler.close()
  assert all(np.isnan(c.logprobs).all() for c in runs[1])
  for first, again in zip(runs[0], runs[2]):
    assert np.isfinite(again.logprobs).all()
    np.testing.assert_array_equal(first.tokens, again.tokens)
