"""Another process's sampler: what it is asked and answers is what a sampler here would."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from types import SimpleNamespace

import key_value_store
import numpy as np
import pytest

from trinity_jax.distributed import World
from trinity_jax.errors import RunFailed, UserError
from trinity_jax.experience import StopReason
from trinity_jax.sampler.pool import SamplerPool
from trinity_jax.sampler.remote import Host, RemoteSampler

STEP = 20  # seconds for what takes none


def two():
  """(store, both processes' worlds)"""
  store = key_value_store.Store()
  return store, World(0, 2, store), World(1, 2, store)


@contextlib.contextmanager
def served(sampler, weights=lambda version: (version, f"params {version}"), processes=None):
  """A RemoteSampler in front of a started sampler, and its Host."""
  store, first, second = processes or two()
  remote = RemoteSampler(first.channel(1), sampler.spec)
  host = Host(second.channel(0), sampler, weights)
  remote.start()
  host.start()
  try:
    yield remote, host
  finally:
    remote.close()
    host.close()
  if remote.error is None:
    assert not store.values, "what was said has been read"


async def batch(sampler, requests):
  """As the explorer does: all enter, each asks once and leaves."""

  async def one(request):
    try:
      return await sampler.generate(request)
    finally:
      sampler.leave()

  for _ in requests:
    sampler.enter()
  async with asyncio.timeout(STEP):
    return await asyncio.gather(*(one(r) for r in requests))


def test_deterministic_admission_is_that_of_a_sampler_here(fakes):
  requests = [fakes.request(i, limit=i % 7 + 1) for i in range(40)]
  plans = []
  for remote in (False, True):
    programs = fakes.FakePrograms(slots=5)
    with fakes.sampler_on(programs, deterministic=True, version=None) as sampler:
      with served(sampler) if remote else contextlib.nullcontext((sampler, None)) as (asked, _):
        asked.set_params(0, "params 0")
        for part in (requests[:25], requests[25:]):
          for done, r in zip(asyncio.run(batch(asked, part)), part):
            fakes.check(done, r)
            assert done.logprobs.dtype == np.float32 and done.mixed.dtype == bool
      assert fakes.idle(sampler)
    plans.append(programs.plan)
  assert plans[0] == plans[1]


def test_everything_a_request_says_arrives(fakes):
  programs = fakes.FakePrograms()
  r = fakes.request(
    3, stop_ids=(7, 9), temperature=0.5, top_p=0.9, min_p=0.1, top_k=5, priority=-1, salt=(4,)
  )
  r = dataclasses.replace(r, order=(np.int64(0), 3), deadline=time.monotonic() + 1000)
  with fakes.sampler_on(programs) as sampler, served(sampler) as (remote, _):
    seen, submit = [], sampler.submit
    sampler.submit = lambda request: seen.append(request) or submit(request)
    asyncio.run(batch(remote, [r]))
  (found,) = seen
  for field in dataclasses.fields(r):
    expected, value = getattr(r, field.name), getattr(found, field.name)
    if field.name == "deadline":
      assert value == pytest.approx(expected, abs=1)
    else:
      np.testing.assert_array_equal(value, expected)
      assert type(value) is type(expected), field.name


def test_cancelling_frees_the_slot_and_a_deadline_ends_with_what_is_there(fakes):
  programs = fakes.FakePrograms(slots=1)
  late = fakes.request(1, deadline=time.monotonic())
  with fakes.sampler_on(programs) as sampler, served(sampler) as (remote, _):

    async def main():
      programs.gate.clear()
      first = asyncio.create_task(batch(remote, [fakes.request(0)]))
      await asyncio.to_thread(programs.reached.acquire)
      first.cancel()
      await asyncio.wait([first])
      programs.gate.set()
      (second,) = await batch(remote, [fakes.request(2)])
      (third,) = await batch(remote, [late])
      return first, second, third

    first, second, third = asyncio.run(main())
    assert first.cancelled()
    fakes.check(second, fakes.request(2))
    assert third.stop_reason is StopReason.TIMEOUT
  assert fakes.idle(sampler)


def test_requests_that_do_not_fit_and_scores_of_a_sampler_without(fakes):
  with fakes.sampler_on(fakes.FakePrograms()) as sampler, served(sampler) as (remote, _):
    with pytest.raises(UserError, match="prompt of 14 tokens"):
      asyncio.run(remote.generate(fakes.request(0, (1,) * 14)))
    sampler.spec.model = SimpleNamespace(vocab_size=50)
    with pytest.raises(UserError, match="process 1: log-probs of given tokens need config.sampler"):
      asyncio.run(remote.logprobs([1, 2]))
    fakes.check(asyncio.run(batch(remote, [fakes.request(1)]))[0], fakes.request(1))
  assert fakes.idle(sampler)


def test_a_dead_sampler_fails_who_waits_and_who_comes(fakes):
  programs = fakes.FakePrograms()
  programs.fail["generate"] = ValueError("out of luck")
  with fakes.sampler_on(programs) as sampler, served(sampler) as (remote, _):
    for _ in range(2):
      with pytest.raises(RunFailed, match="process 1: the sampler thread has died: .*out of luck"):
        asyncio.run(batch(remote, [fakes.request(0)]))


def test_weights_that_do_not_come_end_both(fakes):
  def never(version):
    raise RunFailed("waited 1 s for version 3")

  with fakes.sampler_on(fakes.FakePrograms()) as sampler, served(sampler, never) as (remote, _):
    remote.set_params(3, None)
    with pytest.raises(RunFailed, match="sampler of process 1 is lost: .*waited 1 s for version 3"):
      asyncio.run(batch(remote, [fakes.request(0)]))
    assert isinstance(remote.error, RunFailed)
    with pytest.raises(RunFailed, match="is lost"):
      remote.set_params(4, None)


def test_the_runtime_ends(fakes):
  processes = two()
  with fakes.sampler_on(fakes.FakePrograms(), version=None) as sampler:
    with served(sampler, processes=processes) as (remote, _):
      asked = batch(remote, [fakes.request(0)])

      async def main():
        task = asyncio.create_task(asked)
        await asyncio.sleep(0)
        processes[0].end()
        return await task

      with pytest.raises(RunFailed, match="sampler of process 1 is lost: .*DEADLINE_EXCEEDED"):
        asyncio.run(main())


def test_versions(fakes):
  """The one that is asked for where it is kept, a newer one where it is not, never an older one."""
  kept = {0, 1, 2}
  weights = lambda version: (v := version if version in kept else max(kept), f"params {v}")
  programs = fakes.FakePrograms()
  with fakes.sampler_on(programs, version=None) as sampler:
    with served(sampler, weights) as (remote, host):
      versions = []
      for version, now_kept in ((0, {0, 1}), (1, {2, 3}), (2, {2, 3}), (3, {3, 4}), (3, {4, 5})):
        kept = now_kept
        remote.set_params(version, None)
        (done,) = asyncio.run(batch(remote, [fakes.request(1)]))
        versions.append(set(done.versions.tolist()))
        assert host.asked == version
        assert remote.version == sampler.version
      with pytest.raises(ValueError, match="version 2 offered to a sampler that has 3"):
        remote.set_params(2, None)
  assert versions == [{0}, {3}, {3}, {3}, {5}]


def test_a_pool_of_both(fakes):
  here, there = fakes.FakePrograms(), fakes.FakePrograms()
  requests = [fakes.request(i) for i in range(10)]
  with fakes.sampler_on(there, version=None) as other, served(other) as (remote, _):
    with fakes.sampler_on(here, version=None) as sampler:
      pool = SamplerPool([sampler, remote])
      assert pool.stats.keys() == sampler.stats.keys()  # the other has said nothing yet
      pool.set_params(0, "params 0")

      async def main():
        members = [pool.member(r.order) for r in requests]
        return await asyncio.gather(*(batch(m, [r]) for m, r in zip(members, requests)))

      for (done,), r in zip(asyncio.run(main()), requests):
        fakes.check(done, r)
      assert len(here.admitted()) == len(there.admitted()) == 5
      assert pool.stats["sampled_tokens"] == sum(len(fakes.answer_to(r)) for r in requests)
      assert pool.version == 0 and pool.error is None
      assert pool.metrics()["sampler/running"] == 0
      assert "sampler 1: sampler of process 1 at version 0: 0 requests open" in pool.describe()
  with pytest.raises(RunFailed, match="the sampler of process 1 was closed"):
    asyncio.run(batch(remote, [fakes.request(0)]))


def test_stage_after_stage(fakes):
  processes = two()
  for version in range(3):
    with fakes.sampler_on(fakes.FakePrograms(), version=None) as sampler:
      with served(sampler, processes=processes) as (remote, _):
        remote.set_params(version, None)
        requests = [fakes.request(i) for i in range(5)]
        for done, r in zip(asyncio.run(batch(remote, requests)), requests):
          fakes.check(done, r)
          assert set(done.versions.tolist()) == {version}
