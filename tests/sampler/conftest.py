"""A tiny decoder with its compiled sampler programs, driven by hand."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import fake_engine
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_engine

from trinity_jax.experience import StopReason
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import sharding, transformer
from trinity_jax.models.presets import ModelConfig
from trinity_jax.sampler import engine as engine_lib
from trinity_jax.sampler import sampling
from trinity_jax.sampler.cache import bucket_for
from trinity_jax.sampler.engine import EngineSpec, Requests
from trinity_jax.sampler.programs import Programs
from trinity_jax.sampler.sampling import request_key

MODEL = ModelConfig("qwen3", 64, 32, 2, 4, 2, 16, 48, qk_norm=True, tie_word_embeddings=True)
SPEC = EngineSpec(MODEL, slots=8, live_lengths=(12, 40), max_response=12)
PROMPT = 8  # longest chunk
NEAR = 1e-4  # top-2 margin of the (perturbed) logits below which the last bits may decide
_QUICK = {"xla_backend_optimization_level": 0}  # halves the compile time, which is the test's


@dataclasses.dataclass
class Engine:
  """Programs on a mesh, with parameters laid out for them."""

  programs: Any
  params: Any  # as published
  launch: LaunchOrder | None = None

  @functools.cached_property
  def prepared(self) -> Any:
    return self.programs.prepare(self.params)


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


def draw(model: ModelConfig, seed: int = 0) -> Any:
  """Parameters far from uniform, so that greedy choices are clear."""
  make = jax.jit(functools.partial(transformer.init, config=model), compiler_options=_QUICK)
  leaves, treedef = jax.tree.flatten(jax.device_get(make(jax.random.key(seed))))
  rng = np.random.default_rng(seed + 1)
  return treedef.unflatten([(x + rng.normal(0, 0.3, x.shape)).astype(np.float32) for x in leaves])


@pytest.fixture(scope="session")
def params():
  return draw(MODEL)


def build(params, sizes, counts, prompts, spec=SPEC) -> Engine:
  data, fsdp, tensor, context = sizes
  devices = jax.devices()[: data * fsdp * tensor * context]
  mesh = sharding.make_mesh(data, fsdp, tensor, devices, context=context)
  layout = sharding.param_shardings(spec.model, mesh)
  launch = LaunchOrder(mesh)
  programs = Programs(spec, mesh, layout, launch, prompt_counts=counts, prompt_lengths=prompts)
  placed = jax.device_put(params, layout)
  programs.warmup(placed)
  return Engine(programs, placed, launch)


@pytest.fixture(scope="session")
def engine(params) -> Engine:
  """One device; two prefill sizes, two live lengths."""
  return build(params, (1, 1, 1, 1), (1, 4), (PROMPT,))


@pytest.fixture(scope="session")
def meshed(params):
  """(data, fsdp, tensor, context) -> Engine on 8 devices."""
  return lambda sizes: build(params, sizes, (2,), (PROMPT,))


class Jitted:
  """What Programs offers, on one device, compiled when first used and with little optimisation."""

  shards = 1

  def __init__(self, spec: EngineSpec, prompt_counts, prompt_lengths):
    self.spec, self.live_lengths = spec, spec.live_lengths
    self.prompt_counts, self.prompt_lengths = prompt_counts, prompt_lengths
    jit = functools.partial(jax.jit, compiler_options=_QUICK)
    self.init_state = jit(functools.partial(engine_lib.init_state, spec))
    self.prepare = jit(functools.partial(transformer.unstack, config=spec.model))
    self.extend = jit(functools.partial(engine_lib.extend, spec), donate_argnums=1)
    self.start = jit(engine_lib.start, donate_argnums=0)
    self._copy = jit(engine_lib.copy, static_argnames="live", donate_argnums=0)
    self._generate = jit(
      functools.partial(engine_lib.generate, spec), static_argnames="live", donate_argnums=1
    )
    self.release = jit(engine_lib.release, donate_argnums=0)

  def copy(self, state, source, target, count, live):
    return self._copy(state, source, target, count, live=live)

  def generate(self, params, state, version, max_steps, enough_free, live):
    return self._generate(params, state, version, max_steps, enough_free, live=live)


class Drive:
  """Extends, copies, starts and decodes by hand, slot by slot; slots count over all shards."""

  def __init__(self, engine: Engine):
    self.engine, self.programs = engine, engine.programs
    self.state = self.programs.init_state()
    self.slots = self.programs.spec.slots
    self.per_shard = self.slots // self.programs.shards

  def extend(self, chunks: Mapping[int, tuple[int, Sequence[int]]], rows: int | None = None):
    """Slot -> (entries before, new tokens), at once; (logits, row within the shard per slot)."""
    p, per_shard = self.programs, self.per_shard
    row, used = {}, [0] * p.shards
    for slot in chunks:
      row[slot] = used[slot // per_shard]
      used[slot // per_shard] += 1
    R = rows or bucket_for(max(used), p.prompt_counts)
    T = bucket_for(max(len(new) for _, new in chunks.values()), p.prompt_lengths)
    tokens = np.zeros((R * p.shards, T), np.int32)
    starts, counts, slots = np.zeros((3, R * p.shards), np.int32)
    slots -= 1
    for slot, (start, new) in chunks.items():
      i = slot // per_shard * R + row[slot]
      tokens[i, : len(new)] = new
      starts[i], counts[i], slots[i] = start, len(new), slot % per_shard
    self.state, logits = p.extend(self.engine.prepared, self.state, tokens, starts, counts, slots)
    return logits, row

  def logits(self, slot: int, start: int, new: Sequence[int]) -> np.ndarray:
    """f32[V] after an extend of one slot."""
    logits, row = self.extend({slot: (start, new)})
    R = logits.shape[0] // self.programs.shards
    return np.asarray(logits)[slot // self.per_shard * R + row[slot]]

  def copy(self, pairs: Sequence[tuple[int, int]], live: int | None = None) -> None:
    """(source, target) of one shard each."""
    p = self.programs
    source, target = np.zeros((2, p.shards, self.per_shard), np.int32)
    count = np.zeros(p.shards, np.int32)
    for a, b in pairs:
      d = b // self.per_shard
      assert d == a // self.per_shard
      source[d, count[d]], target[d, count[d]] = a % self.per_shard, b % self.per_shard
      count[d] += 1
    live = live or p.live_lengths[-1]
    self.state = p.copy(self.state, source.ravel(), target.ravel(), count, live)

  def start(self, logits, asks: Mapping[int, Ask], rows, lengths, version: int = 0) -> None:
    """Slot -> request, row of logits within the shard, entries in the cache."""
    at, length = np.full(self.slots, -1, np.int32), np.zeros(self.slots, np.int32)
    r = Requests.empty(self.slots)
    for slot, a in asks.items():
      at[slot], length[slot] = rows[slot], lengths[slot]
      r.key[slot] = request_key(a.key)
      for name in ("limit", "temperature", "top_p", "min_p", "top_k"):
        getattr(r, name)[slot] = getattr(a, name)
      r.stop_ids[slot, : len(a.stop_ids)] = a.stop_ids
    self.state = self.programs.start(self.state, logits, at, length, r, np.int32(version))

  def admit(
    self,
    asks: Mapping[int, Ask],
    version: int = 0,
    rows: int | None = None,
    split: Sequence[int] = (),
  ) -> None:
    """Prefills and starts; equal prompts of a shard share a row.

    Args:
      split: lengths of the first chunks of every prompt; what is left goes in as long ones.
    """
    first = {}
    for slot, a in asks.items():
      first.setdefault((slot // self.per_shard, a.prompt), slot)
    todo = {slot: pieces(prompt, split, PROMPT) for (_, prompt), slot in first.items()}
    while todo:
      chunks = {slot: own[0] for slot, own in todo.items()}
      logits, row = self.extend(chunks, rows)
      ready = [slot for slot, own in todo.items() if len(own) == 1]
      todo = {slot: own[1:] for slot, own in todo.items() if len(own) > 1}
      leader = {s: first[s // self.per_shard, a.prompt] for s, a in asks.items()}
      group = {s: asks[s] for s in asks if leader[s] in ready}
      twins = [(leader[s], s) for s in group if leader[s] != s]
      if twins:
        self.copy(twins)
      if group:
        lengths = {s: len(a.prompt) for s, a in group.items()}
        self.start(logits, group, {s: row[leader[s]] for s in group}, lengths, version)

  def decode(self, steps: int = 99, version: int = 0, enough: int = 99, live: int | None = None):
    p = self.programs
    live = live or p.live_lengths[-1]
    args = (self.engine.prepared, self.state, version, steps, enough, live)
    self.state, self.steps = p.generate(*args)
    return self

  def release(self, *slots: int) -> None:
    self.state = self.programs.release(self.state, np.isin(np.arange(self.slots), slots))

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

  def cached(self, slot: int) -> list[np.ndarray]:
    """Everything the cache holds for a slot."""
    return [np.asarray(x)[slot].copy() for x in jax.tree.leaves(self.state.cache)]


def pieces(prompt: Sequence[int], split: Sequence[int], longest: int):
  """[(start, tokens)] of a prompt: chunks as `split` says, then of at most `longest`."""
  out, start, sizes = [], 0, list(split)
  while start < len(prompt):
    n = sizes.pop(0) if sizes else longest
    out.append((start, prompt[start : start + n]))
    start += n
  return out


@functools.cache
def _full_forward(model: ModelConfig):
  def forward(params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden = transformer.forward(params, model, tokens, positions, jnp.ones_like(tokens))
    return transformer.logits(params, model, hidden)

  return jax.jit(forward, compiler_options=_QUICK)


@functools.cache
def _noise(vocab: int):
  return jax.jit(functools.partial(sampling.position_noise, vocab=vocab), compiler_options=_QUICK)


def full_forward(model: ModelConfig, params, logs: Sequence[Sequence[int]], length: int):
  """f32[n, length, V]: logits of one forward pass over whole sequences, without a cache."""
  tokens = np.zeros((len(logs), length), np.int32)
  for row, log in zip(tokens, logs):
    row[: len(log)] = log
  return np.asarray(_full_forward(model)(params, tokens))


def perturbed(
  model: ModelConfig,
  params,
  asks: Sequence[Ask],
  answers: Sequence[Sequence[int]],
  length: int,
) -> list[np.ndarray]:
  """f32[n, V] per request: what its tokens are the argmax of, by a full forward pass."""
  whole = [[*a.prompt, *tokens] for a, tokens in zip(asks, answers, strict=True)]
  out = []
  for a, log, logits in zip(asks, whole, full_forward(model, params, whole, length)):
    assert (a.top_k, a.top_p, a.min_p) == (0, 1.0, 0.0), "not for truncated distributions"
    n = len(a.prompt)
    scores = logits[n - 1 : len(log) - 1]
    if a.temperature > 0:
      keys = np.broadcast_to(request_key(a.key), (length, 2))
      noise = np.asarray(_noise(model.vocab_size)(keys, np.arange(length, dtype=np.int32)))
      scores = scores / np.float32(a.temperature) + noise[n : len(log)]
    out.append(scores)
  return out


@dataclasses.dataclass
class Agreement:
  """Tokens compared, and how often they differed where the margin is below NEAR."""

  tokens: int = 0
  exceptions: int = 0

  def chosen(self, scores: np.ndarray, tokens: Sequence[int]) -> None:
    """Every token is the argmax of its row of scores f32[n, V], or nearly."""
    for t, token in enumerate(tokens):
      self._judge(scores[t], int(scores[t].argmax()), int(token), t)

  def same(self, first: Sequence[int], second: Sequence[int], scores: np.ndarray) -> None:
    """Two streams of one request are equal; scores f32[n, V] of the first.

    What follows a difference has another context and is not compared.
    """
    for t, (a, b) in enumerate(zip(first, second)):
      if self._judge(scores[t], int(a), int(b), t):
        return
    assert len(first) == len(second)

  def _judge(self, scores, a: int, b: int, t: int) -> bool:
    self.tokens += 1
    if a == b:
      return False
    top2 = np.sort(scores)[-2:]
    assert top2[1] - top2[0] < NEAR, f"token {t}: {a} and {b}, margin {top2[1] - top2[0]}"
    assert {a, b} == set(np.argsort(scores)[-2:].tolist()), f"token {t}: neither of the top two"
    self.exceptions += 1
    return True

  def check(self, at_least: int) -> None:
    """At most one exception in 10,000 tokens (one, where fewer were compared)."""
    assert self.tokens >= at_least
    assert self.exceptions <= max(1, self.tokens // 10_000), self


@pytest.fixture(scope="session")
def tools():
  """What test modules of this folder share (they cannot import one another)."""

  class Tools:
    ask, drive, spec, model, prompt = Ask, Drive, SPEC, MODEL, PROMPT
    engine, jitted, draw, pieces, agreement = Engine, Jitted, draw, pieces, Agreement
    full_forward, perturbed = staticmethod(full_forward), staticmethod(perturbed)

    @staticmethod
    def run(engine: Engine, asks: dict[int, Ask], **kwargs) -> dict[int, Answer]:
      """Admits together and decodes to the end."""
      drive = Drive(engine)
      drive.admit(asks, **kwargs)
      drive.decode()
      assert not drive.active()
      return {slot: drive.answer(slot) for slot in asks}

  return Tools


# --- a fake engine ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def fakes():
  """A numpy engine that checks the scheduler, and helpers to ask it; see support/fake_engine.py."""
  return fake_engine.fakes


@pytest.fixture(scope="session")
def tiny():
  """A decoder with room for dialogues and three policies; see support/tiny_engine.py."""
  return tiny_engine.TinyEngine()
