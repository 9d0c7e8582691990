"""A tiny decoder with its compiled sampler programs, driven by hand."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import fake_engine
import jax
import numpy as np
import pytest
import tiny_engine

from trinity_jax.experience import StopReason
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import sharding, transformer
from trinity_jax.models.presets import ModelConfig
from trinity_jax.sampler.engine import EngineSpec, Requests
from trinity_jax.sampler.programs import Programs
from trinity_jax.sampler.sampling import request_key

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


# --- a fake engine ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def fakes():
  """A numpy engine that checks the scheduler, and helpers to ask it; see support/fake_engine.py."""
  return fake_engine.fakes


@pytest.fixture(scope="session")
def tiny():
  """A decoder with room for dialogues and three policies; see support/tiny_engine.py."""
  return tiny_engine.TinyEngine()
