"""The scheduler thread: who gets a slot and when, weights, cancellation, death, exactness.

Most tests run it over a fake engine in numpy that decodes a known function of the request and
fails when the scheduler breaks a rule; the last ones over the real engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_jax.errors import RunFailed, UserError
from trinity_jax.experience import StopReason
from trinity_jax.monitor.compiles import CompileCounter
from trinity_jax.sampler.sampling import request_key
from trinity_jax.sampler.scheduler import Request, Sampler

WAIT = 30  # seconds before a future that never comes fails a test


def token_at(prompt, key, position) -> int:
  """The fake policy: what is sampled at a position, whatever the slot or the neighbours."""
  text = f"{list(map(int, prompt))},{list(map(int, key))},{position}"
  return zlib.crc32(text.encode()) % 50


def answer_to(request: Request) -> list[int]:
  out = []
  while len(out) < request.limit:
    out.append(token_at(request.tokens, request.key, len(request.tokens) + len(out)))
    if out[-1] in request.stop_ids:
      break
  return out


@dataclasses.dataclass
class FakeState:
  slots: list  # per slot (prompt, key, limit, stop ids) or None
  active: np.ndarray
  generated: np.ndarray
  stop_reason: np.ndarray
  tokens: np.ndarray
  logprobs: np.ndarray
  versions: np.ndarray


class FakePrograms:
  """The engine's rules, checked; `plan` is what it was asked to do."""

  def __init__(self, slots=4, max_prompt=6, max_response=8, counts=(1, 3)):
    self.spec = SimpleNamespace(
      slots=slots, cache_length=max_prompt + max_response, max_response=max_response
    )
    self.prompt_counts, self.prompt_lengths = counts, (2, max_prompt)
    self.live_lengths = (5, self.spec.cache_length)
    self.plan: list[tuple] = []
    self.fail: dict[str, BaseException] = {}
    self.gate = threading.Event()  # generate waits for it
    self.gate.set()
    self.reached = threading.Semaphore(0)  # one per generate that has begun

  def init_state(self):
    S, R = self.spec.slots, self.spec.max_response
    ints = lambda *shape: np.zeros(shape, np.int32)
    return FakeState(
      [None] * S, np.zeros(S, bool), ints(S), ints(S), ints(S, R), np.zeros((S, R)), ints(S, R)
    )

  def _record(self, s, slot, version):
    prompt, key, limit, stop_ids = s.slots[slot]
    n = s.generated[slot]
    token = token_at(prompt, key, len(prompt) + n)
    s.tokens[slot, n], s.logprobs[slot, n], s.versions[slot, n] = token, -token / 7, version
    s.generated[slot] = n + 1
    if token in stop_ids or n + 1 >= limit:
      s.active[slot] = False
      s.stop_reason[slot] = StopReason.STOP if token in stop_ids else StopReason.LENGTH

  def _check(self, name, params, version):
    if name in self.fail:
      raise self.fail[name]
    assert params == f"params {version}", (params, version)

  def admit(self, params, state, tokens, lengths, source, requests, version):
    self._check("admit", params, version)
    P, T = tokens.shape
    assert P in self.prompt_counts and T in self.prompt_lengths
    rows = sorted(set(source[source >= 0].tolist()))
    prompts = [tuple(tokens[r, : lengths[r]].tolist()) for r in rows]
    assert rows == list(range(len(rows))) and len(set(prompts)) == len(prompts), "rows are shared"
    for slot in np.flatnonzero(source >= 0):
      assert not state.active[slot], f"slot {slot} is taken"
      state.slots[slot] = (
        prompts[source[slot]], requests.key[slot].copy(), int(requests.limit[slot]),
        set(requests.stop_ids[slot].tolist()) - {-1},
      )  # fmt: skip
      state.active[slot], state.generated[slot] = True, 0
      self._record(state, slot, version)
    self.plan.append(("admit", P, T, tuple(source.tolist()), tuple(prompts), version))
    return state

  def generate(self, params, state, version, max_steps, enough_free, live):
    self.reached.release()
    assert self.gate.wait(WAIT)
    self._check("generate", params, version)
    assert live in self.live_lengths
    enough, step = min(enough_free, self.spec.slots), 0
    while step < max_steps and self.spec.slots - state.active.sum() < enough:
      for slot in np.flatnonzero(state.active):
        assert len(state.slots[slot][0]) + state.generated[slot] <= live, "outgrew `live`"
        self._record(state, slot, version)
      step += 1
    self.plan.append(("generate", step, live, version))
    return state

  def release(self, state, mask):
    state.active[mask] = False
    self.plan.append(("release", tuple(np.flatnonzero(mask).tolist())))
    return state

  def admitted(self) -> list[tuple]:
    return [p for entry in self.plan if entry[0] == "admit" for p in entry[4]]


@contextlib.contextmanager
def sampler_on(programs, *, deterministic=False, steps=3, refill=0.3, version=0):
  sampler = Sampler(
    programs, steps_per_dispatch=steps, refill_fraction=refill, deterministic=deterministic
  )
  sampler.start()
  if version is not None:
    sampler.set_params(version, f"params {version}")
  try:
    yield sampler
  finally:
    programs.gate.set()
    sampler.close()


def request(i, prompt=None, limit=8, stop_ids=()) -> Request:
  prompt = (i % 5 + 1,) * (i % 6 + 1) if prompt is None else prompt
  return Request(np.array(prompt, np.int32), request_key(i), (0, i), limit, stop_ids)


def ask(sampler, r: Request):
  """Submits as a participant that asks once; the caller leaves for it."""
  sampler.enter()
  return sampler.submit(r)


def check(completion, r: Request):
  want = answer_to(r)
  assert completion.tokens.tolist() == want
  np.testing.assert_allclose(completion.logprobs, -np.array(want) / 7, rtol=1e-6)
  stopped = want[-1] in r.stop_ids
  assert completion.stop_reason is (StopReason.STOP if stopped else StopReason.LENGTH)


def idle(sampler) -> bool:
  return sampler._busy == 0 and not sampler._waiting and not any(sampler._slots)


# --- completion ---------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
def test_soak_every_request_completes_exactly_once(deterministic):
  rng = np.random.default_rng(0)
  programs = FakePrograms(slots=5)
  requests = [
    request(i, limit=int(rng.integers(1, 9)), stop_ids=tuple(rng.integers(0, 50, 3).tolist()))
    for i in range(300)
  ]
  times = [0] * 300

  with sampler_on(programs, deterministic=deterministic) as sampler:

    async def one(i, pause):
      with contextlib.ExitStack() as stack:
        stack.callback(sampler.leave)
        for _ in range(pause):
          await asyncio.sleep(0)
        check(await sampler.generate(requests[i]), requests[i])
        times[i] += 1

    async def main():
      for _ in requests:
        sampler.enter()
      await asyncio.gather(*(one(i, int(p)) for i, p in enumerate(rng.integers(0, 9, 300))))

    asyncio.run(asyncio.wait_for(main(), WAIT))
    assert times == [1] * 300
    assert idle(sampler)
  assert sampler.stats["sampled_tokens"] == sum(len(answer_to(r)) for r in requests)
  assert 0 < sampler.stats["busy_slot_steps"] <= sampler.stats["slot_steps"]


@given(
  st.lists(st.tuples(st.integers(0, 9), st.integers(1, 8), st.integers(0, 49)), max_size=25),
  st.integers(1, 4), st.integers(1, 9), st.floats(0, 1), st.sampled_from([(1,), (1, 3), (4,)]),
)  # fmt: skip
@settings(deadline=None, max_examples=30)
def test_any_load_completes_on_any_shape(load, slots, steps, refill, counts):
  programs = FakePrograms(slots=slots, counts=tuple(min(c, slots) for c in counts))
  requests = [request(p, limit=n, stop_ids=(stop,)) for p, n, stop in load]
  with sampler_on(programs, steps=steps, refill=refill) as sampler:
    futures = [ask(sampler, r) for r in requests]
    for future, r in zip(futures, requests):
      check(future.result(WAIT), r)
      sampler.leave()
    assert idle(sampler)


def test_equal_prompts_share_a_prefill_row_and_order_decides():
  programs = FakePrograms(slots=4, counts=(1, 2))
  a, b, c = (1, 2), (3,), (4, 4, 4)
  with sampler_on(programs, version=None) as sampler:
    # Nothing can start without weights, so the order of arrival is not that of admission.
    arriving = [(5, c), (3, b), (0, a), (4, a), (1, a), (2, b)]
    futures = [ask(sampler, request(i, prompt)) for i, prompt in arriving]
    assert "0 decoding" in sampler.describe() and "6 waiting" in sampler.describe()
    sampler.set_params(0, "params 0")
    for f in futures:
      f.result(WAIT)
  first = programs.plan[0]
  assert first[:2] == ("admit", 2) and first[3] == (0, 0, 1, 1) and first[4] == (a, b)
  assert programs.admitted() == [a, b, a, c]  # 4 and 5 followed, in order
  assert sampler.stats["prompt_tokens"] == 3 + 5


def test_more_prompts_than_a_prefill_holds_take_several():
  programs = FakePrograms(slots=4, counts=(1, 3))
  with sampler_on(programs, version=None) as sampler:
    futures = [ask(sampler, request(i, (i + 1,))) for i in range(4)]
    sampler.set_params(0, "params 0")
    for f in futures:
      f.result(WAIT)
  assert [entry[:4] for entry in programs.plan[:2]] == [
    ("admit", 3, 2, (0, 1, 2, -1)), ("admit", 1, 2, (-1, -1, -1, 0)),
  ]  # fmt: skip


def test_requests_that_do_not_fit_are_refused_by_name():
  programs = FakePrograms()
  with sampler_on(programs) as sampler:
    for bad, message in (
      (request(0, (1,) * 7), r"prompt of 7 tokens: sampler\.max_prompt_length allows 1 to 6"),
      (request(0, ()), r"prompt of 0 tokens: sampler\.max_prompt_length allows 1 to 6"),
      (request(0, limit=9), r"limit 9 .* must be 1 to 8 \(sampler\.max_response_length\)"),
      (request(0, limit=0), r"limit 0 .* must be 1 to 8"),
      (request(0, stop_ids=tuple(range(9))), r"9 stop tokens: at most 8"),
    ):
      sampler.enter()
      with pytest.raises(UserError, match=message):
        sampler.submit(bad)
      sampler.leave()
    assert idle(sampler)
    check(ask(sampler, request(1)).result(WAIT), request(1))  # it lives on


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
def test_cancelling_frees_slot_and_waiter(state, deterministic):
  programs = FakePrograms(slots=1)
  with sampler_on(programs, deterministic=deterministic, steps=1) as sampler:
    programs.gate.clear()
    first, second = request(1), request(2)

    def in_generate():
      assert programs.reached.acquire(timeout=WAIT)

    async def main():
      if state == "decoding":
        await cancelled(sampler, first, in_generate)
      else:
        other = ask(sampler, first)  # holds the only slot
        await asyncio.to_thread(in_generate)
        await cancelled(sampler, second, lambda: None)
      programs.gate.set()
      if state == "queued":
        check(await asyncio.wrap_future(other), first)
        sampler.leave()
      sampler.enter()
      check(await sampler.generate(request(3)), request(3))
      sampler.leave()

    asyncio.run(asyncio.wait_for(main(), WAIT))
    assert idle(sampler) and not sampler._cancelled
  assert ("release", (0,)) in programs.plan or state == "queued"
  prompts = programs.admitted()
  assert (tuple(second.tokens.tolist()) in prompts) is False


def test_cancelling_after_completion_changes_nothing():
  programs = FakePrograms(slots=1)
  with sampler_on(programs) as sampler:

    submitted, submit = [], sampler.submit
    sampler.submit = lambda r: submitted.append(submit(r)) or submitted[-1]

    async def main():
      sampler.enter()
      task = asyncio.create_task(sampler.generate(request(1)))
      await asyncio.sleep(0)
      submitted[0].result(WAIT)  # blocks the loop: the task cannot have seen its result
      task.cancel()
      with pytest.raises(asyncio.CancelledError):
        await task
      sampler.leave()
      sampler.enter()
      check(await sampler.generate(request(2)), request(2))
      sampler.leave()

    asyncio.run(asyncio.wait_for(main(), WAIT))
    assert idle(sampler) and not sampler._cancelled
  assert all(entry[0] != "release" for entry in programs.plan)


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 12)), min_size=1, max_size=20))
@settings(deadline=None, max_examples=25)
def test_random_cancellations_leak_nothing(load):
  programs = FakePrograms(slots=2)
  with sampler_on(programs, deterministic=True, steps=1) as sampler:

    async def one(i, limit, patience):
      r = request(i, limit=limit)
      try:
        if patience == 12:
          check(await sampler.generate(r), r)
        else:
          with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience / 4000):
              check(await sampler.generate(r), r)
      finally:
        sampler.leave()

    async def main():
      for _ in load:
        sampler.enter()
      await asyncio.gather(*(one(i, n, p) for i, (n, p) in enumerate(load)))
      sampler.enter()  # all that was cancelled is gone when this has been served
      await sampler.generate(request(99))
      sampler.leave()

    asyncio.run(asyncio.wait_for(main(), WAIT))
    assert idle(sampler) and not sampler._cancelled


# --- weights ------------------------------------------------------------------------------------


def test_weights_swap_between_dispatches_and_every_token_knows_its_version():
  programs = FakePrograms(slots=2)
  with sampler_on(programs, steps=2) as sampler:
    programs.gate.clear()
    r = request(1, limit=8)
    future = ask(sampler, r)
    assert programs.reached.acquire(timeout=WAIT)
    sampler.set_params(3, "params 3")  # in the middle of a dispatch: FakePrograms compares both
    sampler.set_params(4, "params 4")  # 3 is never used
    assert sampler.version == 0
    programs.gate.set()
    got = future.result(WAIT)
    assert got.versions.tolist() == [0, 0, 0] + 5 * [4]
    assert sampler.version == 4
    sampler.leave()
    check(got, r)


def test_versions_never_go_back():
  programs = FakePrograms()
  with sampler_on(programs, version=5) as sampler:
    with pytest.raises(ValueError, match="version 4 offered to a sampler that has 5"):
      sampler.set_params(4, "params 4")
    sampler.set_params(5, "params 5")
    ask(sampler, request(0)).result(WAIT)
    with pytest.raises(ValueError, match="version 3 offered"):
      sampler.set_params(3, "params 3")


# --- the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["admit", "generate"])
def test_death_of_the_thread_reaches_everyone_with_its_cause(where):
  programs = FakePrograms(slots=2)
  cause = MemoryError(f"in {where}")
  programs.fail[where] = cause
  with sampler_on(programs, version=None) as sampler:
    futures = [ask(sampler, request(i)) for i in range(7)]  # some in slots, some queued

    async def waits():
      sampler.enter()
      await sampler.generate(request(8))

    async def main():
      task = asyncio.create_task(waits())
      await asyncio.sleep(0)
      sampler.set_params(0, "params 0")
      with pytest.raises(RunFailed, match=f"has died: MemoryError: in {where}") as e:
        await task
      assert e.value.__cause__ is cause

    asyncio.run(asyncio.wait_for(main(), WAIT))
    seen = [f.exception(WAIT) for f in futures]
    assert all(isinstance(e, RunFailed) and e.__cause__ is cause for e in seen)
    assert len(set(map(id, seen))) == len(seen), "one exception raised in several tasks"
    assert sampler.error is cause
    for call in (lambda: sampler.submit(request(9)), lambda: sampler.set_params(1, "params 1")):
      with pytest.raises(RunFailed, match="has died") as e:
        call()
      assert e.value.__cause__ is cause


def test_a_request_that_breaks_the_scheduler_is_not_lost():
  """It fails on its way from the queue to a slot."""
  programs = FakePrograms()
  with sampler_on(programs) as sampler:
    bad = dataclasses.replace(request(0), key=np.zeros(5, np.uint32))
    with pytest.raises(RunFailed, match="has died: ValueError"):
      ask(sampler, bad).result(WAIT)


@pytest.mark.parametrize("started", [True, False])
def test_closing_while_someone_waits(started):
  programs = FakePrograms()
  sampler = Sampler(programs, steps_per_dispatch=1, refill_fraction=0, deterministic=False)
  if started:
    sampler.start()

  async def main():
    sampler.enter()
    waiting = asyncio.create_task(sampler.generate(request(0)))  # there are no weights
    await asyncio.sleep(0)
    await asyncio.to_thread(sampler.close)
    with pytest.raises(RunFailed, match="the sampler was closed"):
      await waiting
    with pytest.raises(RunFailed, match="the sampler was closed"):
      await sampler.generate(request(1))

  asyncio.run(asyncio.wait_for(main(), WAIT))
  sampler.close()  # twice is fine
  assert sampler.error is None


def test_a_loop_that_has_gone_disturbs_nobody(caplog):
  """The explorer's thread ends while its request is being decoded."""
  programs = FakePrograms(slots=1)
  with sampler_on(programs) as sampler:
    programs.gate.clear()

    async def main():
      sampler.enter()
      task = asyncio.create_task(sampler.generate(request(1)))
      await asyncio.to_thread(programs.reached.acquire)
      del task  # asyncio.run cancels it

    asyncio.run(main())
    programs.gate.set()
    check(ask(sampler, request(2)).result(WAIT), request(2))
  assert sampler.error is None and not caplog.records


# --- determinism --------------------------------------------------------------------------------


def test_admission_waits_for_every_participant():
  programs = FakePrograms()
  with sampler_on(programs, deterministic=True) as sampler:
    sampler.enter()  # one that thinks
    future = ask(sampler, request(1))
    assert not programs.reached.acquire(timeout=0.05) and not programs.plan
    with sampler.participant():
      sampler.leave()  # the thinker ends, but another has come
      assert not programs.reached.acquire(timeout=0.05)
    check(future.result(WAIT), request(1))


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
def test_the_plan_is_a_function_of_the_requests_not_of_the_clock(seed, slots, steps):
  plans = []
  for s in (seed, seed + 1):
    programs = FakePrograms(slots=slots, counts=(1, min(2, slots)))
    with sampler_on(programs, deterministic=True, steps=steps) as sampler:
      out = play(sampler, 7, s, 2, lambda i, turn: (i % 3 + 1,) * (turn + 1))
      assert len(out) == 11 and idle(sampler)
    plans.append(programs.plan)
  assert plans[0] == plans[1]


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_real_engine_repeats_itself_bit_by_bit(engine, deterministic):
  results = []
  for seed in (0, 1, 2):
    sampler = Sampler(
      engine.programs, steps_per_dispatch=4, refill_fraction=0.3, deterministic=deterministic
    )
    sampler.start()
    sampler.set_params(seed, engine.params)
    with CompileCounter() as compiles:
      results.append(
        play(sampler, 24, seed, 2, lambda i, turn: [(i // 3 + j) % 64 for j in range(2 + 4 * turn)])
      )
    assert compiles.count == 0 and idle(sampler)
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
