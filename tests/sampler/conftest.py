"""A tiny decoder with its compiled sampler programs, driven by hand; a fake engine in numpy."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import zlib
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from trinity_jax.experience import StopReason
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import sharding, transformer
from trinity_jax.models.presets import ModelConfig
from trinity_jax.sampler.engine import EngineSpec, Requests
from trinity_jax.sampler.programs import Programs
from trinity_jax.sampler.sampling import request_key
from trinity_jax.sampler.scheduler import Request, Sampler

MODEL = ModelConfig("qwen3", 64, 32, 2, 4, 2, 16, 48, qk_norm=True, tie_word_embeddings=True)
SPEC = EngineSpec(MODEL, slots=8, cache_length=20, max_response=12)
PROMPT = 8  # longest


@dataclasses.dataclass
class Engine:
  """Programs on a mesh, with parameters laid out for them."""

  programs: Programs
  params: Any
  launch: LaunchOrder


@dataclasses.dataclass
class Ask:
  """A request as a test writes it."""

  prompt: tuple[int, ...]
  key: int = 0
  limit: int = 12
  temperature: float = 1.0
  top_p: float = 1.0
  min_p: float = 0.0
  top_k: int = 0
  stop_ids: tuple[int, ...] = ()


@dataclasses.dataclass
class Answer:
  tokens: list[int]
  logprobs: np.ndarray
  versions: list[int]
  reason: StopReason


@pytest.fixture(scope="session")
def params():
  """Far from uniform, so that greedy choices are clear."""
  make = jax.jit(functools.partial(transformer.init, config=MODEL))
  leaves, treedef = jax.tree.flatten(jax.device_get(make(jax.random.key(0))))
  rng = np.random.default_rng(1)
  return treedef.unflatten(
    [(x + rng.normal(0, 0.3, x.shape)).astype(np.float32) for x in leaves]
  )


def build(params, data, fsdp, tensor, counts, prompts, lives) -> Engine:
  mesh = sharding.make_mesh(data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])
  layout = sharding.param_shardings(MODEL, mesh)
  launch = LaunchOrder(mesh)
  programs = Programs(
    SPEC, mesh, layout, launch,
    prompt_counts=counts, prompt_lengths=prompts, live_lengths=lives,
  )  # fmt: skip
  placed = jax.device_put(params, layout)
  programs.warmup(placed)
  return Engine(programs, placed, launch)


@pytest.fixture(scope="session")
def engine(params) -> Engine:
  """One device; two prefill sizes, two live lengths."""
  return build(params, 1, 1, 1, (1, 4), (PROMPT,), (12, SPEC.cache_length))


@pytest.fixture(scope="session")
def meshed(params):
  """(data, fsdp, tensor) -> Engine on 8 devices."""
  return lambda sizes: build(params, *sizes, (4,), (PROMPT,), (SPEC.cache_length,))


class Drive:
  """Admits and decodes by hand, slot by slot."""

  def __init__(self, engine: Engine):
    self.engine, self.state = engine, engine.programs.init_state()

  def admit(self, asks: dict[int, Ask], version: int = 0, rows: int | None = None) -> None:
    """Slot -> request, in one prefill; equal prompts share a row."""
    p = self.engine.programs
    prompts = list(dict.fromkeys(a.prompt for a in asks.values()))
    P = rows or next(n for n in p.prompt_counts if n >= len(prompts))
    T = next(n for n in p.prompt_lengths if n >= max(map(len, prompts)))
    tokens, lengths = np.zeros((P, T), np.int32), np.ones(P, np.int32)
    source, r = np.full(SPEC.slots, -1, np.int32), Requests.empty(SPEC.slots)
    for i, prompt in enumerate(prompts):
      tokens[i, : len(prompt)], lengths[i] = prompt, len(prompt)
    for slot, a in asks.items():
      source[slot] = prompts.index(a.prompt)
      r.key[slot] = request_key(a.key)
      for name in ("limit", "temperature", "top_p", "min_p", "top_k"):
        getattr(r, name)[slot] = getattr(a, name)
      r.stop_ids[slot, : len(a.stop_ids)] = a.stop_ids
    self.state = p.admit(self.engine.params, self.state, tokens, lengths, source, r, version)

  def decode(self, steps: int = 99, version: int = 0, enough: int = 99, live: int | None = None):
    p = self.engine.programs
    live = live or p.live_lengths[-1]
    self.state = p.generate(self.engine.params, self.state, version, steps, enough, live)
    return self

  def release(self, *slots: int) -> None:
    mask = np.isin(np.arange(SPEC.slots), slots)
    self.state = self.engine.programs.release(self.state, mask)

  def active(self) -> list[int]:
    return np.flatnonzero(jax.device_get(self.state.active)).tolist()

  def answer(self, slot: int) -> Answer:
    s = self.state
    n, reason, tokens, logprobs, versions = jax.device_get(
      (s.generated, s.stop_reason, s.tokens, s.logprobs, s.versions)
    )
    n = int(n[slot])
    return Answer(
      tokens[slot, :n].tolist(), logprobs[slot, :n].copy(), versions[slot, :n].tolist(),
      StopReason(int(reason[slot])),
    )  # fmt: skip


@pytest.fixture(scope="session")
def tools():
  """What test modules of this folder share (they cannot import one another)."""

  class Tools:
    ask, drive, spec, model, prompt = Ask, Drive, SPEC, MODEL, PROMPT

    @staticmethod
    def run(engine: Engine, asks: dict[int, Ask], **kwargs) -> dict[int, Answer]:
      """Admits in one prefill and decodes to the end."""
      drive = Drive(engine)
      drive.admit(asks, **kwargs)
      drive.decode()
      assert not drive.active()
      return {slot: drive.answer(slot) for slot in asks}

  return Tools


# --- a fake engine: decodes a known function of the request, fails when a rule is broken ----------

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


@pytest.fixture(scope="session")
def fakes():
  """A numpy engine that checks the scheduler, and helpers to ask it."""
  return SimpleNamespace(
    FakePrograms=FakePrograms, sampler_on=sampler_on, request=request, ask=ask, check=check,
    idle=idle, answer_to=answer_to, WAIT=WAIT,
  )  # fmt: skip
