"""Requests and threads that end early: cancelled, dead, closed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_jax.errors import RunFailed
from trinity_jax.sampler.scheduler import Sampler

# --- cancellation -------------------------------------------------------------------------------


async def cancelled(sampler, r, when):
  """Starts a run, cancels it when `when` says so, and leaves as a run does."""

  async def run():
    try:
      await sampler.generate(r)
    finally:
      sampler.leave()

  sampler.enter()
  task = asyncio.create_task(run())
  await asyncio.sleep(0)
  await asyncio.to_thread(when)
  task.cancel()
  with pytest.raises(asyncio.CancelledError):
    await task


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("state", ["queued", "decoding"])
def test_cancelling_frees_slot_and_waiter(fakes, state, deterministic):
  programs = fakes.FakePrograms(slots=1)
  with fakes.sampler_on(programs, deterministic=deterministic, steps=1) as sampler:
    programs.gate.clear()
    first, second = fakes.request(1), fakes.request(2)

    def in_generate():
      assert programs.reached.acquire(timeout=fakes.WAIT)

    async def main():
      if state == "decoding":
        await cancelled(sampler, first, in_generate)
      else:
        other = fakes.ask(sampler, first)  # holds the only slot
        await asyncio.to_thread(in_generate)
        await cancelled(sampler, second, lambda: None)
      programs.gate.set()
      if state == "queued":
        fakes.check(await asyncio.wrap_future(other), first)
        sampler.leave()
      sampler.enter()
      fakes.check(await sampler.generate(fakes.request(3)), fakes.request(3))
      sampler.leave()

    asyncio.run(asyncio.wait_for(main(), fakes.WAIT))
    assert fakes.idle(sampler)
  assert ("release", (0,)) in programs.plan or state == "queued"
  prompts = programs.admitted()
  assert (tuple(second.tokens.tolist()) in prompts) is False


def test_cancelling_after_completion_changes_nothing(fakes):
  programs = fakes.FakePrograms(slots=1)
  with fakes.sampler_on(programs) as sampler:

    async def main():
      sampler.enter()
      task = asyncio.create_task(sampler.generate(fakes.request(1)))
      await asyncio.sleep(0)
      (future,) = sampler._accepted
      future.result(fakes.WAIT)  # blocks the loop: the task cannot have seen its result
      task.cancel()
      with pytest.raises(asyncio.CancelledError):
        await task
      sampler.leave()
      sampler.enter()
      fakes.check(await sampler.generate(fakes.request(2)), fakes.request(2))
      sampler.leave()

    asyncio.run(asyncio.wait_for(main(), fakes.WAIT))
    assert fakes.idle(sampler)
  assert all(entry[0] != "release" for entry in programs.plan)


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 12)), min_size=1, max_size=20))
@settings(deadline=None, max_examples=25)
def test_random_cancellations_leak_nothing(fakes, load):
  programs = fakes.FakePrograms(slots=2)
  with fakes.sampler_on(programs, deterministic=True, steps=1) as sampler:

    async def one(i, limit, patience):
      r = fakes.request(i, limit=limit)
      try:
        if patience == 12:
          fakes.check(await sampler.generate(r), r)
        else:
          with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience / 4000):
              fakes.check(await sampler.generate(r), r)
      finally:
        sampler.leave()

    async def main():
      for _ in load:
        sampler.enter()
      await asyncio.gather(*(one(i, n, p) for i, (n, p) in enumerate(load)))
      sampler.enter()  # all that was cancelled is gone when this has been served
      await sampler.generate(fakes.request(99))
      sampler.leave()

    asyncio.run(asyncio.wait_for(main(), fakes.WAIT))
    assert fakes.idle(sampler)


# --- the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["prepare", "extend", "start", "generate"])
def test_death_of_the_thread_reaches_everyone_with_its_cause(fakes, where):
  programs = fakes.FakePrograms(slots=2)
  cause = MemoryError(f"in {where}")
  programs.fail[where] = cause
  with fakes.sampler_on(programs, version=None) as sampler:
    futures = [fakes.ask(sampler, fakes.request(i)) for i in range(7)]  # some in slots, some queued

    async def waits():
      sampler.enter()
      await sampler.generate(fakes.request(8))

    async def main():
      task = asyncio.create_task(waits())
      await asyncio.sleep(0)
      sampler.set_params(0, "params 0")
      with pytest.raises(RunFailed, match=f"has died: MemoryError: in {where}") as e:
        await task
      assert e.value.__cause__ is cause

    asyncio.run(asyncio.wait_for(main(), fakes.WAIT))
    seen = [f.exception(fakes.WAIT) for f in futures]
    assert all(isinstance(e, RunFailed) and e.__cause__ is cause for e in seen)
    assert len(set(map(id, seen))) == len(seen), "one exception raised in several tasks"
    assert sampler.error is cause
    late = fakes.request(9)
    for call in (lambda: sampler.submit(late), lambda: sampler.set_params(1, "params 1")):
      with pytest.raises(RunFailed, match="has died") as e:
        call()
      assert e.value.__cause__ is cause


def test_a_request_that_breaks_the_scheduler_is_not_lost(fakes):
  """It fails on its way from the queue to a slot."""
  programs = fakes.FakePrograms()
  with fakes.sampler_on(programs) as sampler:
    bad = dataclasses.replace(fakes.request(0), key=np.zeros(5, np.uint32))
    with pytest.raises(RunFailed, match="has died: ValueError"):
      fakes.ask(sampler, bad).result(fakes.WAIT)


@pytest.mark.parametrize("started", [True, False])
def test_closing_while_someone_waits(fakes, started):
  programs = fakes.FakePrograms()
  sampler = Sampler(programs, steps_per_dispatch=1, refill_fraction=0, deterministic=False)
  if started:
    sampler.start()

  async def main():
    sampler.enter()
    waiting = asyncio.create_task(sampler.generate(fakes.request(0)))  # there are no weights
    await asyncio.sleep(0)
    await asyncio.to_thread(sampler.close)
    with pytest.raises(RunFailed, match="the sampler was closed"):
      await waiting
    with pytest.raises(RunFailed, match="the sampler was closed"):
      await sampler.generate(fakes.request(1))

  asyncio.run(asyncio.wait_for(main(), fakes.WAIT))
  sampler.close()  # twice is fine
  assert sampler.error is None


def test_a_loop_that_has_gone_disturbs_nobody(fakes, caplog):
  """The explorer's thread ends while its request is being decoded."""
  programs = fakes.FakePrograms(slots=1)
  with fakes.sampler_on(programs) as sampler:
    programs.gate.clear()

    async def main():
      sampler.enter()
      task = asyncio.create_task(sampler.generate(fakes.request(1)))
      await asyncio.to_thread(programs.reached.acquire)
      del task  # asyncio.run cancels it

    asyncio.run(main())
    programs.gate.set()
    fakes.check(fakes.ask(sampler, fakes.request(2)).result(fakes.WAIT), fakes.request(2))
  assert sampler.error is None and not caplog.records
