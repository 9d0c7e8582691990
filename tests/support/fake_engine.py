"""A fake engine in numpy: samples a known function of the context, fails when a rule is broken.

Its cache holds the tokens themselves, each with the version that computed it, so it knows what a
slot would really attend to: a wrong, stale or missing prefix is an error or another token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np

from trinity_jax.experience import StopReason
from trinity_jax.sampler.request import Request
from trinity_jax.sampler.sampling import request_key
from trinity_jax.sampler.scheduler import Sampler

WAIT = 30  # seconds before a future that never comes fails a test
NOTHING = -1  # in the cache: never written, or what padding left behind


def token_at(context: np.ndarray, key: np.ndarray, position: int) -> int:
  """The fake policy: a function of the whole context, whatever the slot or the neighbours."""
  text = f"{zlib.crc32(np.asarray(context, np.int32).tobytes())},{key.tolist()},{position}"
  return zlib.crc32(text.encode()) % 50


def answer_to(r: Request) -> list[int]:
  """What the fake policy samples for a request that nobody disturbs."""
  context = np.asarray(r.tokens, np.int32).tolist()
  out: list[int] = []
  while len(out) < r.limit:
    out.append(token_at(np.array(context, np.int32), np.asarray(r.key), len(context)))
    context.append(out[-1])
    if out[-1] in r.stop_ids:
      break
  return out


@dataclasses.dataclass
class FakeState:
  """As engine.DecodeState; `cache` is (tokens, versions), each i64[S, C]."""

  cache: tuple[np.ndarray, np.ndarray]
  length: np.ndarray
  token: np.ndarray
  active: np.ndarray
  generated: np.ndarray
  stop_reason: np.ndarray
  asked: list  # per slot (key, limit, stop ids)
  tokens: np.ndarray
  logprobs: np.ndarray
  versions: np.ndarray
  written: np.ndarray  # the slot was an extend's or a copy's target since it last started
  used_up: bool = False


class FakePrograms:
  """The engine's rules, checked.

  Attributes:
    plan: what it was asked to do, in order.
    fail: program -> exception that its next call raises.
    truth: with `audit`, (key, position) -> (version, really mixed) of every token sampled.
    gate: `generate` waits for it; reached: one per `generate` that has begun.
  """

  def __init__(
    self, slots=4, max_prompt=6, max_response=8, counts=(1, 3), lengths=None, lives=None, shards=1,
    audit=False,
  ):  # fmt: skip
    C = max_prompt + max_response
    self.live_lengths = lives or (5, C)
    assert self.live_lengths[-1] == C and slots % shards == 0
    self.spec = SimpleNamespace(
      slots=slots, cache_length=C, max_response=max_response, live_lengths=self.live_lengths
    )
    self.prompt_counts, self.prompt_lengths = counts, lengths or (2, max_prompt)
    self.shards, self.per_shard, self.scores = shards, slots // shards, False
    self.plan: Any = []
    self.fail: dict[str, BaseException] = {}
    self.audit, self.truth = audit, {}
    self.gate = threading.Event()
    self.gate.set()
    self.reached = threading.Semaphore(0)

  def _enter(self, name: str, state: FakeState | None = None) -> Any:
    """Fails if asked to; hands a donated state on."""
    if name in self.fail:
      raise self.fail[name]
    if state is None:
      return None
    assert not state.used_up, "a donated state was used again"
    state.used_up = True
    return dataclasses.replace(state, used_up=False)

  def init_state(self) -> FakeState:
    self._enter("init")
    S, R, C = self.spec.slots, self.spec.max_response, self.spec.cache_length
    ints = lambda *shape: np.zeros(shape, np.int32)
    return FakeState(
      (np.full((S, C), NOTHING), np.full((S, C), NOTHING)), ints(S), ints(S), np.zeros(S, bool),
      ints(S), ints(S), [None] * S, ints(S, R), np.zeros((S, R), np.float32), ints(S, R),
      np.zeros(S, bool),
    )  # fmt: skip

  def prepare(self, params: str) -> str:
    self._enter("prepare")
    self.plan.append(("prepare", params))
    return f"prepared {params}"

  def extend(self, params, state, tokens, starts, counts, slots):
    s = self._enter("extend", state)
    version = int(params.removeprefix("prepared params "))
    P, T = tokens.shape
    rows = P // self.shards
    assert P % self.shards == 0 and rows in self.prompt_counts and T in self.prompt_lengths
    assert len(starts) == len(counts) == len(slots) == P
    held, origin = s.cache
    logits: list[Any] = [None] * P
    booked, seen = [], set()
    for p, slot in enumerate(slots):
      if slot == -1:
        assert counts[p] == 0, "a row of padding counts"
        continue
      assert 0 <= slot < self.per_shard, f"slot {slot} of a shard of {self.per_shard}"
      g, a, b = p // rows * self.per_shard + slot, starts[p], starts[p] + counts[p]
      assert g not in seen, f"slot {g} has two rows"
      seen.add(g)
      assert not s.active[g], f"slot {g} is decoding"
      assert 1 <= counts[p] <= T and b <= self.spec.cache_length
      assert (held[g, :a] != NOTHING).all(), f"slot {g} does not hold {a} entries"
      assert (origin[g, :a] == version).all(), f"slot {g} holds entries of another version"
      held[g, a:b], origin[g, a:b] = tokens[p, : counts[p]], version
      held[g, b : a + T] = origin[g, b : a + T] = NOTHING  # the chunk's padding
      s.written[g] = True
      logits[p] = (version, tuple(held[g, :b].tolist()))
      booked.append((int(g), int(a), tuple(tokens[p, : counts[p]].tolist())))
    assert booked, "an extend of nothing"
    self.plan.append(("extend", P, T, tuple(booked), version))
    out = np.empty(P, object)
    out[:] = logits
    return s, out

  def copy(self, state, source, target, count, live):
    s = self._enter("copy", state)
    assert live in self.live_lengths
    assert len(source) == len(target) == self.spec.slots and len(count) == self.shards
    pairs = []
    for d in range(self.shards):
      first = d * self.per_shard
      assert 0 <= count[d] <= self.per_shard
      for a, b in zip(source[first:][: count[d]], target[first:][: count[d]]):
        assert 0 <= a < self.per_shard and 0 <= b < self.per_shard and a != b, (a, b)
        a, b = int(first + a), int(first + b)
        assert not s.active[b], f"slot {b} is decoding"
        for x in s.cache:
          x[b, :live] = x[a, :live]
        s.written[b] = True
        pairs.append((a, b))
    assert pairs and len({b for _, b in pairs}) == len(pairs)
    self.plan.append(("copy", tuple(pairs), live))
    return s

  def start(self, state, logits, rows, lengths, requests, version):
    s = self._enter("start", state)
    P = logits.shape[0]
    assert P // self.shards in self.prompt_counts
    held, origin = s.cache
    started = []
    for g in np.flatnonzero(rows >= 0):
      assert rows[g] < P // self.shards, f"row {rows[g]} of {P // self.shards}"
      assert not s.active[g] and s.written[g], f"slot {g} is started twice"
      n = lengths[g]
      made_by, context = logits[g // self.per_shard * (P // self.shards) + rows[g]]
      assert made_by == version
      assert context == tuple(held[g, :n].tolist()), f"slot {g} does not hold what its row has"
      assert (origin[g, :n] == version).all(), f"slot {g} holds entries of another version"
      stop_ids = set(requests.stop_ids[g].tolist()) - {-1}
      s.asked[g] = (requests.key[g].copy(), int(requests.limit[g]), stop_ids)
      assert 1 <= s.asked[g][1] <= min(self.spec.max_response, self.spec.cache_length - n)
      s.written[g], s.length[g], s.generated[g] = False, n, 0
      self._record(s, g, held[g, :n], version, mixed=False)
      started.append((int(g), context))
    assert started, "a start of nothing"
    self.plan.append(("start", P, tuple(started), version))
    return s

  def _record(self, s: FakeState, g, context, version, *, mixed):
    key, limit, stop_ids = s.asked[g]
    token, n = token_at(context, key, len(context)), s.generated[g]
    s.tokens[g, n], s.logprobs[g, n], s.versions[g, n] = token, -token / 7, version
    s.token[g], s.generated[g] = token, n + 1
    s.active[g] = token not in stop_ids and n + 1 < limit
    reason = StopReason.STOP if token in stop_ids else StopReason.LENGTH
    s.stop_reason[g] = StopReason.RUNNING if s.active[g] else reason
    if self.audit:
      name = (key.tobytes(), len(context))
      assert name not in self.truth, "sampled twice"
      self.truth[name] = (version, bool(mixed))

  def generate(self, params, state, version, max_steps, enough_free, live):
    self.reached.release()
    assert self.gate.wait(WAIT)
    s = self._enter("generate", state)
    assert params == f"prepared params {version}", (params, version)
    assert live in self.live_lengths and max_steps >= 1
    held, origin = s.cache
    enough, step = min(enough_free, self.spec.slots), 0
    while step < max_steps and self.spec.slots - s.active.sum() < enough:
      for g in np.flatnonzero(s.active):
        n = s.length[g]
        assert n < live, "outgrew `live`"
        held[g, n], origin[g, n] = s.token[g], version
        s.length[g] = n + 1
        context = held[g, : n + 1]
        assert (context != NOTHING).all()
        self._record(s, g, context, version, mixed=(origin[g, : n + 1] != version).any())
      step += 1
    self.plan.append(("generate", step, live, version))
    return s, step

  def release(self, state, mask):
    s = self._enter("release", state)
    assert s.active[mask].all(), "released a slot that was not decoding"
    s.active[mask] = False
    self.plan.append(("release", tuple(np.flatnonzero(mask).tolist())))
    return s

  def of(self, name: str) -> list[tuple]:
    """The plan's entries of one program."""
    return [entry for entry in self.plan if entry[0] == name]

  def admitted(self) -> list[tuple]:
    """Prompts in the order in which their sequences started; twins apart."""
    return [context for entry in self.of("start") for _, context in entry[2]]


@contextlib.contextmanager
def sampler_on(
  programs, *, deterministic=False, steps=3, refill=0.3, version: int | None = 0, **kw
):
  """A started sampler with weights, closed at the end."""
  sampler = Sampler(
    programs, steps_per_dispatch=steps, refill_fraction=refill, deterministic=deterministic, **kw
  )
  sampler.start()
  if version is not None:
    sampler.set_params(version, f"params {version}")
  try:
    yield sampler
  finally:
    programs.gate.set()
    sampler.close()


def request(i, prompt=None, limit=8, stop_ids=(), **kw) -> Request:
  prompt = (i % 5 + 1,) * (i % 6 + 1) if prompt is None else prompt
  return Request(np.array(prompt, np.int32), request_key(i), (0, i), limit, stop_ids, **kw)


def ask(sampler, r: Request, **kw):
  """Submits as a participant that asks once; the caller leaves for it."""
  sampler.enter()
  return sampler.submit(r, **kw)


def check(completion, r: Request):
  """Complete and as the fake policy says."""
  want = answer_to(r)
  check_part(completion, r)
  assert len(completion.tokens) == len(want)
  stopped = want[-1] in r.stop_ids
  assert completion.stop_reason is (StopReason.STOP if stopped else StopReason.LENGTH)


def check_part(completion, r: Request):
  """A beginning of what the fake policy says, all columns of one length."""
  n = len(completion.tokens)
  want = answer_to(r)[:n]
  assert completion.tokens.tolist() == want
  np.testing.assert_allclose(completion.logprobs, -np.array(want) / 7, rtol=1e-6)
  assert len(completion.versions) == len(completion.mixed) == n
  assert (np.diff(completion.versions) >= 0).all()


def check_truth(programs: FakePrograms, completion, r: Request):
  """Versions and `mixed` are what the fake engine knows; forgets it afterwards."""
  for i, (version, mixed) in enumerate(zip(completion.versions, completion.mixed)):
    name = (np.asarray(r.key).tobytes(), len(r.tokens) + i)
    assert programs.truth.pop(name) == (version, mixed), (i, version, mixed)


def idle(sampler) -> bool:
  slots = sampler._driver.slots
  return (
    sampler._busy == 0 and not sampler._accepted and not sampler._waiting
    and not any(s.open or s.source for s in slots)
  )  # fmt: skip


fakes = SimpleNamespace(
  FakePrograms=FakePrograms, sampler_on=sampler_on, request=request, ask=ask, check=check,
  check_part=check_part, check_truth=check_truth, idle=idle, answer_to=answer_to, WAIT=WAIT,
)  # fmt: skip
