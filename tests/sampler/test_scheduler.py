"""The scheduler thread: who gets a slot and when, and whose weights sample."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_jax.errors import UserError

# --- completion ---------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
def test_soak_every_request_completes_exactly_once(fakes, deterministic):
  rng = np.random.default_rng(0)
  programs = fakes.FakePrograms(slots=5)
  requests = [
    fakes.request(i, limit=int(rng.integers(1, 9)), stop_ids=tuple(rng.integers(0, 50, 3).tolist()))
    for i in range(300)
  ]
  times = [0] * 300

  with fakes.sampler_on(programs, deterministic=deterministic) as sampler:

    async def one(i, pause):
      with contextlib.ExitStack() as stack:
        stack.callback(sampler.leave)
        for _ in range(pause):
          await asyncio.sleep(0)
        fakes.check(await sampler.generate(requests[i]), requests[i])
        times[i] += 1

    async def main():
      for _ in requests:
        sampler.enter()
      await asyncio.gather(*(one(i, int(p)) for i, p in enumerate(rng.integers(0, 9, 300))))

    asyncio.run(asyncio.wait_for(main(), fakes.WAIT))
    assert times == [1] * 300
    assert fakes.idle(sampler)
  assert sampler.stats["sampled_tokens"] == sum(len(fakes.answer_to(r)) for r in requests)
  assert 0 < sampler.stats["busy_slot_steps"] <= sampler.stats["slot_steps"]


@given(
  st.lists(st.tuples(st.integers(0, 9), st.integers(1, 8), st.integers(0, 49)), max_size=25),
  st.integers(1, 4), st.integers(1, 9), st.floats(0, 1), st.sampled_from([(1,), (1, 3), (4,)]),
)  # fmt: skip
@settings(deadline=None, max_examples=30)
def test_any_load_completes_on_any_shape(fakes, load, slots, steps, refill, counts):
  programs = fakes.FakePrograms(slots=slots, counts=tuple(min(c, slots) for c in counts))
  requests = [fakes.request(p, limit=n, stop_ids=(stop,)) for p, n, stop in load]
  with fakes.sampler_on(programs, steps=steps, refill=refill) as sampler:
    futures = [fakes.ask(sampler, r) for r in requests]
    for future, r in zip(futures, requests):
      fakes.check(future.result(fakes.WAIT), r)
      sampler.leave()
    assert fakes.idle(sampler)


def test_equal_prompts_share_a_prefill_row_and_order_decides(fakes):
  programs = fakes.FakePrograms(slots=4, counts=(1, 2))
  a, b, c = (1, 2), (3,), (4, 4, 4)
  with fakes.sampler_on(programs, version=None) as sampler:
    # Nothing can start without weights, so the order of arrival is not that of admission.
    arriving = [(5, c), (3, b), (0, a), (4, a), (1, a), (2, b)]
    futures = [fakes.ask(sampler, fakes.request(i, prompt)) for i, prompt in arriving]
    assert "0 decoding" in sampler.describe() and "6 waiting" in sampler.describe()
    sampler.set_params(0, "params 0")
    for f in futures:
      f.result(fakes.WAIT)
  # One row for the three of `a` that were first, one for `b`; their twins get copies.
  extend, copy, start = programs.plan[1:4]
  assert extend[:4] == ("extend", 2, 2, ((0, 0, a), (2, 0, b)))
  assert copy[:2] == ("copy", ((0, 1), (2, 3)))
  assert start[2] == ((0, a), (1, a), (2, b), (3, b))
  assert programs.admitted() == [a, a, b, b, a, c]  # 4 and 5 followed, in order
  assert sampler.stats["prompt_tokens"] == 3 + 5
  assert sampler.stats["reused_tokens"] == 3


def test_more_prompts_than_a_prefill_holds_take_several(fakes):
  programs = fakes.FakePrograms(slots=4, counts=(1, 3))
  with fakes.sampler_on(programs, version=None) as sampler:
    futures = [fakes.ask(sampler, fakes.request(i, (i + 1,))) for i in range(4)]
    sampler.set_params(0, "params 0")
    for f in futures:
      f.result(fakes.WAIT)
  assert [entry[:4] for entry in programs.of("extend")] == [
    ("extend", 3, 2, ((0, 0, (1,)), (1, 0, (2,)), (2, 0, (3,)))),
    ("extend", 1, 2, ((3, 0, (4,)),)),
  ]
  assert [entry[0] for entry in programs.plan[:4]] == ["prepare", "extend", "start", "extend"]


def test_requests_that_do_not_fit_are_refused_by_name(fakes):
  programs = fakes.FakePrograms()
  with fakes.sampler_on(programs) as sampler:
    for bad, message in (
      (fakes.request(0, (1,) * 14), r"prompt of 14 tokens: .*max_prompt_length .* allows 1 to 13"),
      (fakes.request(0, ()), r"prompt of 0 tokens: .*max_prompt_length .* allows 1 to 13"),
      (fakes.request(0, (1,) * 13, limit=2), r"limit 2 after .* of 13 tokens: must be 1 to 1"),
      (fakes.request(0, limit=9), r"limit 9 .* must be 1 to 8 \(sampler\.max_response_length\)"),
      (fakes.request(0, limit=0), r"limit 0 .* must be 1 to 8"),
      (fakes.request(0, stop_ids=tuple(range(9))), r"9 stop tokens: at most 8"),
    ):
      sampler.enter()
      with pytest.raises(UserError, match=message):
        sampler.submit(bad)
      sampler.leave()
    assert fakes.idle(sampler)
    fakes.check(fakes.ask(sampler, fakes.request(1)).result(fakes.WAIT), fakes.request(1))


# --- weights ------------------------------------------------------------------------------------


def test_weights_swap_between_dispatches_and_every_token_knows_its_version(fakes):
  programs = fakes.FakePrograms(slots=1)
  with fakes.sampler_on(programs, steps=2) as sampler:
    programs.gate.clear()
    r = fakes.request(1, limit=8)
    future = fakes.ask(sampler, r)
    assert programs.reached.acquire(timeout=fakes.WAIT)
    sampler.set_params(3, "params 3")  # in the middle of a dispatch: FakePrograms compares both
    sampler.set_params(4, "params 4")  # 3 is never used
    assert sampler.version == 0
    programs.gate.set()
    got = future.result(fakes.WAIT)
    assert got.versions.tolist() == [0, 0, 0] + 5 * [4]
    assert sampler.version == 4
    sampler.leave()
    fakes.check(got, r)


def test_versions_never_go_back(fakes):
  programs = fakes.FakePrograms()
  with fakes.sampler_on(programs, version=5) as sampler:
    with pytest.raises(ValueError, match="version 4 offered to a sampler that has 5"):
      sampler.set_params(4, "params 4")
    sampler.set_params(5, "params 5")
    fakes.ask(sampler, fakes.request(0)).result(fakes.WAIT)
    with pytest.raises(ValueError, match="version 3 offered"):
      sampler.set_params(3, "params 3")


def test_versions_do_not_go_back_while_one_is_being_taken(fakes, monkeypatch):
  programs, begun, go = fakes.FakePrograms(), threading.Event(), threading.Event()
  with fakes.sampler_on(programs) as sampler:
    fakes.ask(sampler, fakes.request(0)).result(fakes.WAIT)
    prepare = programs.prepare

    def slow(params):
      begun.set()
      assert go.wait(fakes.WAIT)
      return prepare(params)

    monkeypatch.setattr(programs, "prepare", slow)
    sampler.set_params(7, "params 7")
    future = fakes.ask(sampler, fakes.request(1))
    assert begun.wait(fakes.WAIT)
    with pytest.raises(ValueError, match="version 6 offered to a sampler that has 7"):
      sampler.set_params(6, "params 6")
    go.set()
    assert set(future.result(fakes.WAIT).versions) == {7}


def test_a_dispatch_stops_where_a_shorter_live_length_is_full(fakes):
  programs = fakes.FakePrograms(slots=1, max_prompt=6, max_response=8, lives=(8, 14))
  with fakes.sampler_on(programs, steps=8) as sampler:
    r = fakes.request(2, (1, 2, 3))
    fakes.check(fakes.ask(sampler, r).result(fakes.WAIT), r)
    sampler.leave()
  dispatches = [(entry[1], entry[2]) for entry in programs.plan if entry[0] == "generate"]
  assert dispatches == [(5, 8), (2, 14)]  # (steps, live): entries 3 to 7, then the rest
