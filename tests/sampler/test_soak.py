"""Everything at once, for long: nothing lost, duplicated or mis-versioned, memory flat."""

from __future__ import annotations

import collections
import dataclasses
import gc
import time
import tracemalloc

import numpy as np
import pytest

from trinity_jax.experience import StopReason
from trinity_jax.sampler.prefix import BLOCK
from trinity_jax.sampler.request import Request
from trinity_jax.sampler.sampling import request_key
from trinity_jax.sampler.scheduler import SWAPS, Sampler

SWAP_COUNT = 50
MEMORY = 400_000  # bytes that may be held more at the end than after a fifth of the way


@dataclasses.dataclass
class Entry:
  request: Request
  at_version: int
  aborted: bool = False


class Soak:
  """Keeps requests under way until `count` have ended; looks at each result as it comes.

  Args:
    longest: (prompt, response).
    params: version -> what set_params is given.
    verify: (completion, request) -> None.
  """

  def __init__(self, sampler, count, seed, longest, params, verify, in_flight=40):
    self.sampler, self.count, self.params, self.verify = sampler, count, params, verify
    self.rng, self.longest, self.in_flight = np.random.default_rng(seed), longest, in_flight
    self.open: dict = {}
    self.made, self.version = 0, 0
    self.reasons: collections.Counter = collections.Counter()
    self.sampled = 0
    self.talks: collections.deque = collections.deque(maxlen=12)  # contexts to go on with
    self.answered = bytearray(count)  # allocated at once: the memory of this test stays flat too

  def prompt(self) -> np.ndarray:
    rng, (P, _) = self.rng, self.longest
    kind = rng.random()
    if kind < 0.4 and self.talks:  # the next turn, a branch of it, or the same question again
      base = self.talks[rng.integers(len(self.talks))]
      tail = rng.integers(0, 40, rng.integers(0, 8))
      return np.concatenate([base, tail]).astype(np.int32)[:P]
    if kind < 0.7:  # one of few system prompts
      shared = np.full(rng.integers(1, P), rng.integers(3), np.int32)
      return np.concatenate([shared, rng.integers(0, 40, 6)]).astype(np.int32)[:P]
    return rng.integers(0, 40, rng.integers(1, P + 1)).astype(np.int32)

  def submit(self) -> None:
    rng, i = self.rng, self.made
    late = rng.random() < 0.08
    r = Request(
      self.prompt(),
      request_key(12345, i),
      (int(rng.integers(9)), i),
      int(rng.integers(1, self.longest[1] + 1)),
      tuple(rng.integers(0, 40, 2).tolist()),
      priority=int(rng.integers(-1, 2)),
      deadline=time.monotonic() + rng.exponential(0.01) if late else None,
      salt=(int(rng.integers(2)),),
    )
    self.made += 1
    self.sampler.enter()
    entry = Entry(r, self.version)
    future = self.sampler.submit(r)
    future.add_done_callback(lambda _: self.sampler.leave())
    self.open[future] = entry
    if rng.random() < 0.05:
      entry.aborted = True
      self.sampler.abort(future)

  def harvest(self) -> None:
    """Waits for the oldest, then takes all that are done; gives some of the others up."""
    next(iter(self.open)).result(60)
    for future in [f for f in self.open if f.done()]:
      entry, got = self.open.pop(future), future.result()
      self.answered[entry.request.order[1]] += 1
      self.look(entry, got)
    if self.open and self.rng.random() < 0.3:
      future = list(self.open)[self.rng.integers(len(self.open))]
      self.open[future].aborted = True
      self.sampler.abort(future)

  def look(self, entry: Entry, got) -> None:
    r, n = entry.request, len(got.tokens)
    self.verify(got, r)
    self.reasons[got.stop_reason] += 1
    self.sampled += n
    if got.stop_reason is StopReason.ABORTED:
      assert entry.aborted
    elif got.stop_reason is StopReason.TIMEOUT:
      assert r.deadline is not None and time.monotonic() >= r.deadline
    elif got.stop_reason is StopReason.STOP:
      assert got.tokens[-1] in r.stop_ids
    else:
      assert got.stop_reason is StopReason.LENGTH and n == r.limit
    assert not np.isin(got.tokens[:-1], r.stop_ids).any()
    assert (np.diff(got.versions) >= 0).all()
    assert n == 0 or entry.at_version - 1 <= got.versions[0] <= got.versions[-1] <= self.version
    if n and len(r.tokens) + n < self.longest[0]:
      self.talks.append(np.concatenate([r.tokens, got.tokens]))

  def run(self, warm=lambda: None) -> None:
    swap_every = self.count // SWAP_COUNT
    ended, swaps = 0, 0
    self.sampler.set_params(0, self.params(0))
    while ended < self.count:
      while len(self.open) < self.in_flight and self.made < self.count:
        self.submit()
      before = len(self.open)
      self.harvest()
      ended += before - len(self.open)
      if ended >= self.count // 5:
        warm()
        warm = lambda: None
      while swaps < min(SWAP_COUNT, ended // swap_every):
        swaps += 1
        self.version += 1
        self.sampler.set_params(self.version, self.params(self.version))
    assert swaps == SWAP_COUNT and not self.open
    assert set(self.answered) == {1}, "lost, or answered twice"
    assert all(self.reasons[k] for k in (StopReason.STOP, StopReason.LENGTH, StopReason.ABORTED))


def memory() -> int:
  gc.collect()
  return tracemalloc.get_traced_memory()[0]


SOAKS = [
  (1500, 1),
  (1500, 4),
  pytest.param(10_000, 1, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
  pytest.param(10_000, 4, marks=[pytest.mark.nightly, pytest.mark.timeout(1200)]),
]


@pytest.mark.parametrize("on_swap", SWAPS)
@pytest.mark.parametrize("count, shards", SOAKS)
def test_soak_on_the_fake_engine(fakes, count, on_swap, shards):
  P, R = 100, 24
  programs = fakes.FakePrograms(
    slots=8, max_prompt=P, max_response=R, counts=(1, 2), lengths=(8, 32), lives=(40, P + R),
    shards=shards, audit=True,
  )  # fmt: skip
  programs.plan = collections.deque(maxlen=20)
  mixed = [0]

  def verify(got, r):
    done = got.stop_reason in (StopReason.STOP, StopReason.LENGTH)
    (fakes.check if done else fakes.check_part)(got, r)
    fakes.check_truth(programs, got, r)
    mixed[0] += int(got.mixed.sum())
    assert on_swap != "drain" or len(set(got.versions.tolist())) <= 1

  with fakes.sampler_on(programs, version=None, steps=4, on_swap=on_swap) as sampler:
    soak = Soak(sampler, count, 7, (P, R), "params {}".format, verify)
    held = [0]
    traced = count > 1500 or (on_swap, shards) == ("keep", 1)  # it takes most of the time
    if traced:
      tracemalloc.start()
    try:
      soak.run(warm=lambda: held.append(memory()))
      held.append(memory())
    finally:
      tracemalloc.stop()
    assert fakes.idle(sampler) and sampler.error is None
    slots = sampler._driver.slots
    assert len(slots.index) <= 8 * (P + R) // BLOCK
    assert len(slots.index._slots) <= len(slots.index)
    assert not programs.truth, "a token was sampled that nobody got"
    assert sampler.stats["sampled_tokens"] == soak.sampled
    assert sampler.stats["reused_tokens"] > 0
    assert soak.reasons[StopReason.TIMEOUT]
    assert bool(mixed[0]) == (on_swap == "keep")
    assert held[2] - held[1] < MEMORY, f"{held[2] - held[1]} bytes more than after a fifth"
    assert bool(held[1]) == traced


@pytest.mark.slow
@pytest.mark.parametrize("on_swap", SWAPS)
def test_soak_on_the_real_engine(fakes, tiny, on_swap):
  """Log-probs against forward passes of each token's version, on every tenth result."""
  params = lambda v: tiny.params[v % 3]
  seen = [0]

  def verify(got, r):
    seen[0] += 1
    if seen[0] % 10 or not len(got.tokens):
      return
    for v in set(got.versions.tolist()):
      mine = (got.versions == v) & ~got.mixed
      scores = tiny.score(params(v), r.tokens, got.tokens)
      np.testing.assert_allclose(got.logprobs[mine], scores[mine], atol=1e-4)
    assert on_swap == "keep" or not got.mixed.any()

  sampler = Sampler(
    tiny.programs, steps_per_dispatch=4, refill_fraction=0.3, deterministic=False, on_swap=on_swap
  )
  sampler.start()
  try:
    soak = Soak(sampler, 1000, 3, (80, 24), params, verify, in_flight=12)
    soak.run()
    assert fakes.idle(sampler) and sampler.error is None
    assert sampler.stats["sampled_tokens"] == soak.sampled
    assert len(sampler._driver.slots.index) <= 4 * 128 // BLOCK
  finally:
    sampler.close()
