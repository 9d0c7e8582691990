"""Deterministic admission: results are a function of the requests, not of the clock."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_jax.monitor.compiles import CompileCounter
from trinity_jax.sampler.request import Request
from trinity_jax.sampler.sampling import request_key
from trinity_jax.sampler.scheduler import Sampler

# --- determinism --------------------------------------------------------------------------------


def test_admission_waits_for_every_participant(fakes):
  programs = fakes.FakePrograms()
  with fakes.sampler_on(programs, deterministic=True) as sampler:
    sampler.enter()  # one that thinks
    future = fakes.ask(sampler, fakes.request(1))
    assert not programs.reached.acquire(timeout=0.05) and not programs.plan
    with sampler.participant():
      sampler.leave()  # the thinker ends, but another has come
      assert not programs.reached.acquire(timeout=0.05)
    fakes.check(future.result(fakes.WAIT), fakes.request(1))


@pytest.mark.parametrize("held_by", ["participant", "pause", "weights"])
def test_requests_that_can_only_wait_wake_nobody(fakes, monkeypatch, held_by):
  """Each look goes over all that wait: one for each new request would be quadratic."""
  looks, due = [], Sampler._due
  monkeypatch.setattr(Sampler, "_due", lambda self: looks.append(1) or due(self))
  programs = fakes.FakePrograms()
  version = None if held_by == "weights" else 0
  with fakes.sampler_on(programs, version=version, deterministic=True) as sampler:
    if held_by == "pause":
      sampler.pause()
    sampler.enter()
    futures = []
    for i in range(50):
      futures.append(fakes.ask(sampler, fakes.request(i)))
      futures[-1].add_done_callback(lambda _: sampler.leave())
      assert not programs.reached.acquire(timeout=0.001)  # time for a look
    assert len(looks) < 5
    if held_by == "weights":
      sampler.set_params(0, "params 0")
    sampler.resume()
    sampler.leave()
    for i, future in enumerate(futures):
      fakes.check(future.result(fakes.WAIT), fakes.request(i))


def play(sampler, runs, seed, turns, prompt_of):
  """`runs` participants that ask `turns` times each and dawdle at random; returns all answers."""
  rng = np.random.default_rng(seed)
  pauses = rng.exponential(0.0004, (runs, turns + 1))
  order = rng.permutation(runs)
  out = {}

  async def one(i):
    try:
      for turn in range(turns - i % 2):
        await asyncio.sleep(pauses[i, turn])
        r = Request(
          np.array(prompt_of(i, turn), np.int32), request_key(i, turn), (i, turn),
          2 + (3 * i + turn) % 7, stop_ids=(7, i % 50),
        )  # fmt: skip
        out[i, turn] = await sampler.generate(r)
      await asyncio.sleep(pauses[i, -1])
    finally:
      sampler.leave()

  async def main():
    for _ in range(runs):
      sampler.enter()
    await asyncio.gather(*(one(i) for i in order))

  asyncio.run(asyncio.wait_for(main(), 60))
  return out


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 4))
def test_the_plan_is_a_function_of_the_requests_not_of_the_clock(fakes, seed, slots, steps):
  plans = []
  for s in (seed, seed + 1):
    programs = fakes.FakePrograms(slots=slots, counts=(1, min(2, slots)))
    with fakes.sampler_on(programs, deterministic=True, steps=steps) as sampler:
      out = play(sampler, 7, s, 2, lambda i, turn: (i % 3 + 1,) * (turn + 1))
      assert len(out) == 11 and fakes.idle(sampler)
    plans.append(programs.plan)
  assert plans[0] == plans[1]


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_real_engine_repeats_itself_bit_by_bit(fakes, tiny, deterministic):
  results = []
  for seed in (0, 1, 2):
    sampler = Sampler(
      tiny.programs, steps_per_dispatch=4, refill_fraction=0.3, deterministic=deterministic
    )
    sampler.start()
    sampler.set_params(seed, tiny.params[0])
    with CompileCounter() as compiles:
      results.append(
        play(sampler, 24, seed, 2, lambda i, turn: [(i // 3 + j) % 64 for j in range(2 + 4 * turn)])
      )
    assert compiles.count == 0 and fakes.idle(sampler)
    sampler.close()
    assert {int(v) for c in results[-1].values() for v in c.versions} == {seed}
  assert len(results[0]) == 36
  for other in results[1:]:
    for name, completion in results[0].items():
      np.testing.assert_array_equal(completion.tokens, other[name].tokens)
      if deterministic:
        np.testing.assert_array_equal(completion.logprobs, other[name].logprobs)
      else:
        np.testing.assert_allclose(completion.logprobs, other[name].logprobs, atol=1e-5)
