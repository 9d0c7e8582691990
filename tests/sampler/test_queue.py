"""Requests on their way: order, deadlines, abort, a full queue, draining, streams, failures."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time

import numpy as np
import pytest

from trinity_jax.errors import RunFailed
from trinity_jax.experience import StopReason
from trinity_jax.sampler.desk import Overloaded
from trinity_jax.sampler.request import join
from trinity_jax.sampler.scheduler import Sampler


def soon(condition) -> None:
  """Waits for something that the sampler's thread is about to do."""
  end = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < end, "never came"
    threading.Event().wait(0.001)


def run(coroutine):
  return asyncio.run(asyncio.wait_for(coroutine, 30))


# --- order --------------------------------------------------------------------------------------


def test_order_of_admission_is_priority_then_begun_then_order(fakes):
  programs = fakes.FakePrograms(slots=1)
  with fakes.sampler_on(programs, version=None) as sampler:
    whole = fakes.answer_to(fakes.request(6, (6, 6)))
    begun = join([], StopReason.RUNNING)
    begun = dataclasses.replace(
      begun, tokens=np.array(whole[:2], np.int32), logprobs=-np.array(whole[:2], np.float32) / 7,
      versions=np.zeros(2, np.int32), mixed=np.zeros(2, bool),
    )  # fmt: skip
    asked = [
      (fakes.request(5, (5,), priority=0), None), (fakes.request(4, (4,), priority=1), None),
      (fakes.request(3, (3,), priority=0), None), (fakes.request(6, (6, 6), priority=0), begun),
      (fakes.request(9, (9,), priority=-1), None),
    ]  # fmt: skip
    futures = [fakes.ask(sampler, r, so_far=so_far) for r, so_far in asked]
    sampler.set_params(0, "params 0")
    for future, (r, _) in zip(futures, asked):
      fakes.check(future.result(fakes.WAIT), r)
  assert programs.admitted() == [(9,), (6, 6, *whole[:2]), (3,), (5,), (4,)]


def test_a_long_prompt_starves_nobody_and_is_not_starved(fakes):
  programs = fakes.FakePrograms(
    slots=3, max_prompt=400, max_response=6, counts=(1,), lengths=(8, 20), lives=(100, 406)
  )
  long = fakes.request(0, tuple(i % 7 for i in range(400)), limit=6)
  short = [fakes.request(i, (i % 9, i % 11), limit=3 + i % 4) for i in range(1, 60)]
  with fakes.sampler_on(programs, version=None, steps=4) as sampler:
    futures = [fakes.ask(sampler, r) for r in (long, *short)]
    sampler.set_params(0, "params 0")
    for future, r in zip(futures, (long, *short)):
      fakes.check(future.result(fakes.WAIT), r)
  mine = [i for i, e in enumerate(programs.plan) if e[0] == "extend" and len(e[3][0][2]) == 20]
  assert len(mine) == 20
  between = [programs.plan[a:b] for a, b in zip(mine, mine[1:])]
  assert all(len(part) > 1 for part in between), "the others had to wait"
  assert sum(e[0] == "generate" for part in between for e in part) >= 19 // 2
  assert max(map(len, between)) <= 12, "the long prompt had to wait"


# --- deadlines and aborts -----------------------------------------------------------------------


@pytest.mark.parametrize("held_by", ["slot", "pause", "participant", "weights"])
def test_a_deadline_passes_while_waiting(fakes, held_by):
  programs = fakes.FakePrograms(slots=1)
  deterministic = held_by == "participant"
  version = None if held_by == "weights" else 0
  with fakes.sampler_on(programs, version=version, deterministic=deterministic) as sampler:
    if held_by == "slot":
      programs.gate.clear()
      other = fakes.ask(sampler, fakes.request(1))
      assert programs.reached.acquire(timeout=fakes.WAIT)
    elif held_by == "pause":
      sampler.pause()
    elif held_by == "participant":
      sampler.enter()
    late = fakes.ask(sampler, fakes.request(2, deadline=time.monotonic() + 0.02))
    if held_by == "slot":
      due = time.monotonic() + 0.03
      soon(lambda: time.monotonic() > due)
      programs.gate.set()
      fakes.check(other.result(fakes.WAIT), fakes.request(1))
      sampler.leave()
    got = late.result(fakes.WAIT)
    assert got.stop_reason is StopReason.TIMEOUT and len(got.tokens) == 0
    sampler.leave()
    if held_by == "participant":
      sampler.leave()
    assert fakes.idle(sampler)
  assert (3, 3, 3) not in programs.admitted()


@pytest.mark.parametrize("how", ["deadline", "abort"])
def test_what_was_sampled_is_kept(fakes, how):
  programs = fakes.FakePrograms(slots=2, audit=True)
  with fakes.sampler_on(programs, steps=2) as sampler:
    programs.gate.clear()
    r = fakes.request(1)
    if how == "deadline":
      r = dataclasses.replace(r, deadline=time.monotonic() + 0.6)
    future = fakes.ask(sampler, r)
    neighbour = fakes.ask(sampler, fakes.request(2))
    assert programs.reached.acquire(timeout=fakes.WAIT)
    if how == "abort":
      sampler.abort(future)
      sampler.abort(future)  # twice changes nothing
      assert sampler._busy == 1, "its run is busy from the moment it gave up"
    else:
      soon(lambda: time.monotonic() > (r.deadline or 0))
    programs.gate.set()
    got = future.result(fakes.WAIT)
    want = StopReason.TIMEOUT if how == "deadline" else StopReason.ABORTED
    assert got.stop_reason is want and len(got.tokens) == 3  # the first, and two of the dispatch
    fakes.check_part(got, r)
    fakes.check_truth(programs, got, r)
    fakes.check(neighbour.result(fakes.WAIT), fakes.request(2))
    sampler.leave()
    sampler.leave()
    assert fakes.idle(sampler)
  assert programs.of("release") == [("release", (0,))]


def test_abort_and_result_in_any_order_count_once(fakes):
  programs = fakes.FakePrograms(slots=1, lives=(14,))
  with fakes.sampler_on(programs, deterministic=True, steps=20) as sampler:
    programs.gate.clear()
    r = fakes.request(1)
    future = fakes.ask(sampler, r)
    assert programs.reached.acquire(timeout=fakes.WAIT)
    sampler.abort(future)  # this dispatch ends it anyway: then the result
    programs.gate.set()
    fakes.check(future.result(fakes.WAIT), r)
    assert sampler._busy == 1
    sampler.abort(future)  # the result, then this
    assert sampler._busy == 1
    sampler.leave()
    assert fakes.idle(sampler)


@pytest.mark.parametrize("program", ["generate", "release", "extend", "prepare"])
def test_an_abort_is_not_lost_while_a_swap_has_its_request_between_slot_and_queue(fakes, program):
  """Whatever runs when the abort comes; with two participants, one of whom thinks."""
  programs = fakes.FakePrograms(slots=2)
  with fakes.sampler_on(programs, deterministic=True, steps=1, on_swap="recompute") as sampler:
    inside, go = threading.Event(), threading.Event()
    first, ready = getattr(programs, program), threading.Event()

    def slow(*args):
      if ready.is_set() and not inside.is_set():
        inside.set()
        assert go.wait(fakes.WAIT)
      return first(*args)

    setattr(programs, program, slow)
    programs.gate.clear()
    future = fakes.ask(sampler, fakes.request(1))
    assert programs.reached.acquire(timeout=fakes.WAIT)
    sampler.set_params(1, "params 1")
    ready.set()
    programs.gate.set()
    assert inside.wait(fakes.WAIT)
    sampler.abort(future)
    assert sampler._busy == 1
    go.set()
    got = future.result(fakes.WAIT)
    assert got.stop_reason is StopReason.ABORTED and len(got.tokens) < 8
    fakes.check_part(got, fakes.request(1))
    sampler.leave()
    assert fakes.idle(sampler)


# --- a full queue -------------------------------------------------------------------------------


def test_a_full_queue_refuses_submit_and_keeps_generate_waiting(fakes):
  programs = fakes.FakePrograms(slots=1)
  with fakes.sampler_on(programs, max_waiting=2) as sampler:
    programs.gate.clear()
    futures = [fakes.ask(sampler, fakes.request(0))]
    assert programs.reached.acquire(timeout=fakes.WAIT)
    futures += [fakes.ask(sampler, fakes.request(i)) for i in (1, 2)]
    sampler.enter()
    with pytest.raises(Overloaded, match=r"2 requests wait for a slot \(max_waiting\)"):
      sampler.submit(fakes.request(3))
    assert sampler._busy == 1, "what was refused is still its run's to ask"
    sampler.leave()

    async def main():
      async def one(i):
        with sampler.participant():
          fakes.check(await sampler.generate(fakes.request(i)), fakes.request(i))

      tasks = [asyncio.create_task(one(i)) for i in range(4, 20)]
      await asyncio.sleep(0)
      tasks[3].cancel()  # one that still waits
      programs.gate.set()
      results = await asyncio.gather(*tasks, return_exceptions=True)
      cancelled = [isinstance(r, asyncio.CancelledError) for r in results]
      assert cancelled == [i == 3 for i in range(16)]
      assert all(r is None for i, r in enumerate(results) if i != 3)

    run(main())
    for i, future in enumerate(futures):
      fakes.check(future.result(fakes.WAIT), fakes.request(i))
      sampler.leave()
    assert fakes.idle(sampler)


def test_cancelling_everybody_who_waits_for_room_stops_nobody(fakes):
  """A cancelled waiter used to kill the thread or keep those behind it asleep."""
  programs = fakes.FakePrograms(slots=1)
  with fakes.sampler_on(programs, max_waiting=1, steps=1) as sampler:

    async def one(i, patience):
      with sampler.participant():
        try:
          async with asyncio.timeout(patience):
            await sampler.generate(fakes.request(i, limit=1 + i % 3))
        except TimeoutError:
          pass

    async def main():
      rng = np.random.default_rng(0)
      await asyncio.gather(*(one(i, p) for i, p in enumerate(rng.exponential(0.01, 300))))
      with sampler.participant():
        fakes.check(await sampler.generate(fakes.request(7)), fakes.request(7))

    run(main())
    soon(lambda: fakes.idle(sampler))
    assert sampler.error is None


def test_a_deadline_counts_while_waiting_for_room(fakes):
  programs = fakes.FakePrograms(slots=1)
  with fakes.sampler_on(programs, max_waiting=1, version=None) as sampler:

    async def main():
      asked = [fakes.request(i, deadline=time.monotonic() + 0.01 * i) for i in range(1, 6)]
      for _ in asked:
        sampler.enter()
      return await asyncio.gather(*(sampler.generate(r) for r in asked))

    got = run(main())
    assert [c.stop_reason for c in got] == [StopReason.TIMEOUT] * 5


# --- closing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["running", "paused", "busy participant"])
def test_a_drain_finishes_what_was_accepted_and_refuses_the_rest(fakes, state):
  programs = fakes.FakePrograms(slots=2)
  with fakes.sampler_on(programs, deterministic=state == "busy participant") as sampler:
    if state == "paused":
      sampler.pause()
    if state == "busy participant":
      sampler.enter()
    futures = [fakes.ask(sampler, fakes.request(i)) for i in range(9)]
    closing = threading.Thread(target=sampler.close, kwargs={"drain": True})
    closing.start()
    soon(lambda: sampler._draining)
    with pytest.raises(RunFailed, match="closed"):
      sampler.submit(fakes.request(10))
    with pytest.raises(RunFailed, match="closed"):
      sampler.adopt([])
    for i, future in enumerate(futures):
      fakes.check(future.result(fakes.WAIT), fakes.request(i))
    closing.join(fakes.WAIT)
    assert not closing.is_alive() and not sampler._thread.is_alive()


def test_a_drain_without_weights_ends(fakes):
  with fakes.sampler_on(fakes.FakePrograms(), version=None) as sampler:
    future = fakes.ask(sampler, fakes.request(0))
    closing = threading.Thread(target=sampler.close, kwargs={"drain": True})
    closing.start()
    with pytest.raises(RunFailed, match="closed"):
      future.result(fakes.WAIT)
    closing.join(fakes.WAIT)
    assert not closing.is_alive()


def test_closing_hard_ends_a_drain(fakes):
  programs = fakes.FakePrograms(slots=1)
  with fakes.sampler_on(programs) as sampler:
    programs.gate.clear()
    future = fakes.ask(sampler, fakes.request(0, limit=8))
    assert programs.reached.acquire(timeout=fakes.WAIT)
    draining = threading.Thread(target=sampler.close, kwargs={"drain": True})
    draining.start()
    soon(lambda: sampler._draining)
    hard = threading.Thread(target=sampler.close)
    hard.start()
    soon(lambda: sampler._stopping)
    programs.gate.set()
    with pytest.raises(RunFailed, match="closed"):
      future.result(fakes.WAIT)
    for thread in (draining, hard):
      thread.join(fakes.WAIT)
      assert not thread.is_alive()


# --- streams ------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_swap", ["keep", "recompute", "drain"])
def test_the_chunks_of_a_stream_are_the_result(fakes, on_swap):
  programs = fakes.FakePrograms(slots=2, max_response=20)
  generate, loops = programs.generate, []

  def after_the_loop(*args):
    """Not before the consumers have had their turn, however slow their thread is."""
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0.001), loops[0]).result(fakes.WAIT)
    return generate(*args)

  programs.generate = after_the_loop
  with fakes.sampler_on(programs, steps=2, on_swap=on_swap) as sampler:

    async def one(i):
      r, chunks = fakes.request(i, limit=20), []
      sampler.enter()
      async for chunk in sampler.stream(r):
        chunks.append(chunk)
        if i == 1 and len(chunks) == 3:
          sampler.set_params(1, "params 1")
      sampler.leave()
      assert len(chunks) > 3
      assert all(c.stop_reason is StopReason.RUNNING for c in chunks[:-1])
      fakes.check(join(chunks, chunks[-1].stop_reason), r)

    async def main():
      loops.append(asyncio.get_running_loop())
      await asyncio.gather(*map(one, range(5)))

    run(main())
    assert fakes.idle(sampler)


def waits_after_one_dispatch(programs) -> threading.Event:
  """Until the consumer has acted on the first chunk."""
  acted, generate, calls = threading.Event(), programs.generate, []

  def slow(*args):
    calls.append(1)
    assert len(calls) == 1 or acted.wait(30)
    return generate(*args)

  programs.generate = slow
  return acted


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_a_consumer_that_stops_early_frees_the_slot(fakes, how):
  programs = fakes.FakePrograms(slots=1, max_response=400, lives=(50, 406))
  acted = waits_after_one_dispatch(programs)
  with fakes.sampler_on(programs, steps=1) as sampler:

    async def consume():
      sampler.enter()
      stream = sampler.stream(fakes.request(1, limit=400))
      try:
        async for _ in stream:
          if how == "close":
            break
          first.set()
      finally:
        await stream.aclose()
        sampler.leave()
        acted.set()

    async def main():
      task = asyncio.create_task(consume())
      if how == "cancel":
        await first.wait()
        task.cancel()
      await asyncio.wait([task])
      sampler.enter()
      fakes.check(await sampler.generate(fakes.request(2)), fakes.request(2))
      sampler.leave()

    first = asyncio.Event()
    run(main())
    assert fakes.idle(sampler)
    assert len(programs.of("release")) == 1


def test_a_stream_says_why_it_broke(fakes):
  programs = fakes.FakePrograms(slots=1)
  acted = waits_after_one_dispatch(programs)
  with fakes.sampler_on(programs, steps=1) as sampler:

    async def main():
      sampler.enter()
      async for _ in sampler.stream(fakes.request(1)):
        programs.fail["generate"] = MemoryError("full")
        acted.set()

    with pytest.raises(RunFailed, match="MemoryError: full"):
      run(main())


# --- failures at any point ----------------------------------------------------------------------


@pytest.mark.parametrize("on_swap", ["keep", "recompute", "drain"])
@pytest.mark.parametrize(
  "program", ["prepare", "extend", "copy", "start", "generate", "release", "init"]
)
def test_no_future_is_lost_when_a_program_fails(fakes, program, on_swap):
  """At the n-th call: in the middle of swaps, aborts, deadlines, streams, twins."""
  for n in range(0, 12, 3):
    programs = fakes.FakePrograms(slots=3)
    cause, calls, plain = MemoryError(program), [0], programs._enter

    def enter(name, state=None, calls=calls, cause=cause, plain=plain, n=n):
      calls[0] += name == program
      if name == program and calls[0] > n:
        raise cause
      return plain(name, state)

    programs._enter = enter
    sampler = Sampler(
      programs, steps_per_dispatch=1, refill_fraction=0.3, deterministic=False, on_swap=on_swap
    )
    futures = [
      fakes.ask(
        sampler,
        fakes.request(i, (i // 3,), deadline=time.monotonic() + 0.005 if i % 7 == 5 else None),
        sink=(lambda c: None) if i % 2 else None,
      )
      for i in range(40)
    ]
    sampler.start()
    try:
      for v in range(20):
        sampler.set_params(v, f"params {v}")
        sampler.abort(futures[2 * v])
        threading.Event().wait(0.0005)
    except RunFailed:
      pass
    try:
      for i, future in enumerate(futures):
        e = future.exception(fakes.WAIT)
        assert e is None or (isinstance(e, RunFailed) and e.__cause__ is cause)
        if e is None:
          fakes.check_part(future.result(), fakes.request(i, (i // 3,)))
    finally:
      sampler.close()
    assert not sampler._accepted and sampler._busy == 40, "each run is busy again, once"
    assert sampler.error in (cause, None)


def test_a_failure_half_way_through_admission_is_no_duplicate(fakes):
  """The first was in a slot and still in the queue: its second failure hid all the others."""
  with fakes.sampler_on(fakes.FakePrograms(), version=None) as sampler:
    good = fakes.ask(sampler, fakes.request(0))
    bad = fakes.ask(sampler, dataclasses.replace(fakes.request(1), salt=3))
    more = fakes.ask(sampler, fakes.request(2))
    sampler.set_params(0, "params 0")
    for future in (good, bad, more):
      with pytest.raises(RunFailed, match="has died: TypeError"):
        future.result(fakes.WAIT)


# --- from many threads --------------------------------------------------------------------------


def test_everything_at_once_from_many_threads(fakes):
  programs = fakes.FakePrograms(slots=3, audit=True)
  with fakes.sampler_on(programs, steps=2, on_swap="recompute") as sampler:
    stop, errors = threading.Event(), []

    def guarded(f):
      def loop():
        try:
          f()
        except BaseException as e:
          errors.append(e)
          raise

      return threading.Thread(target=loop)

    def asks(t):
      rng = np.random.default_rng(t)
      for k in range(60):
        r = fakes.request(1000 * t + k, limit=int(rng.integers(1, 9)))
        if rng.random() < 0.2:
          r = dataclasses.replace(r, deadline=time.monotonic() + rng.exponential(0.003))
        future = fakes.ask(sampler, r)
        if rng.random() < 0.3:
          sampler.abort(future)
        got = future.result(fakes.WAIT)
        fakes.check_part(got, r)
        fakes.check_truth(programs, got, r)
        sampler.leave()

    def pauses():
      while not stop.is_set():
        sampler.pause()
        before = len(programs.of("generate"))
        assert "paused" in sampler.describe() and sampler.metrics()
        assert len(programs.of("generate")) == before, "decoded while paused"
        sampler.resume()
        stop.wait(0.002)

    def swaps():
      v = 1
      while not stop.is_set():
        sampler.set_params(v, f"params {v}")
        v += 1
        stop.wait(0.003)

    askers = [guarded(lambda t=t: asks(t)) for t in range(6)]
    others = [guarded(pauses), guarded(swaps)]
    for thread in askers + others:
      thread.start()
    for thread in askers:
      thread.join(fakes.WAIT)
      assert not thread.is_alive(), sampler.describe()
    stop.set()
    for thread in others:
      thread.join(fakes.WAIT)
      assert not thread.is_alive()
    assert not errors and fakes.idle(sampler) and not programs.truth
