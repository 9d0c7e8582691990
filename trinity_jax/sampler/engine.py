"""The sampler's device part: pure `prefill`, `insert`, `generate` over a fixed number of slots.

A slot holds one sequence being decoded. Whatever a request can ask for (temperature, top-k, stop
tokens, limits, randomness) is a traced array of the state, so nothing recompiles. Tokens,
log-probs and versions are collected on the device and read when a sequence has ended.
Axis letters: S slots, C cache length, R response limit, P prompts of one prefill, T their length,
L layers, K kv heads, A head dim, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from trinity_jax.experience import StopReason
from trinity_jax.models import transformer
from trinity_jax.models.presets import ModelConfig
from trinity_jax.sampler import sampling

STOP_IDS = 8  # stop tokens a request may name


class EngineSpec(NamedTuple):
  """Static shapes and dtypes of an engine."""

  model: ModelConfig
  slots: int  # S
  cache_length: int  # C = longest prompt + longest response
  max_response: int  # R
  dtype: Any = jnp.float32
  unroll: int | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests:
  """What each slot was asked for.

  Attributes:
    key: u32[S, 2], threefry key data; temperature, top_p, min_p: f32[S]; top_k: i32[S].
    limit: i32[S], most tokens to sample; stop_ids: i32[S, STOP_IDS], -1 where unused.
  """

  key: Any
  temperature: Any
  top_p: Any
  min_p: Any
  top_k: Any
  limit: Any
  stop_ids: Any

  @classmethod
  def empty(cls, slots: int) -> Requests:
    """Host-side (numpy) defaults to fill in."""
    return cls(
      key=np.zeros((slots, 2), np.uint32),
      temperature=np.ones(slots, np.float32),
      top_p=np.ones(slots, np.float32),
      min_p=np.zeros(slots, np.float32),
      top_k=np.zeros(slots, np.int32),
      limit=np.zeros(slots, np.int32),
      stop_ids=np.full((slots, STOP_IDS), -1, np.int32),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """Donated to insert and generate.

  Attributes:
    k, v: [L, S, K, C, A], keys (after rope) and values.
    length: i32[S], cache entries in use; the next token is written there.
    token: i32[S], last token sampled, not yet in the cache.
    active: bool[S].
    generated: i32[S], tokens sampled so far.
    stop_reason: i32[S], a StopReason.
    requests: Requests.
    tokens i32[S, R], logprobs f32[S, R], versions i32[S, R]: what was sampled.
  """

  k: Any
  v: Any
  length: Any
  token: Any
  active: Any
  generated: Any
  stop_reason: Any
  requests: Requests
  tokens: Any
  logprobs: Any
  versions: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
  """A prefilled batch of prompts: k, v [L, P, K, T, A], logits f32[P, V], lengths i32[P]."""

  k: Any
  v: Any
  logits: Any
  lengths: Any


def init_state(spec: EngineSpec) -> DecodeState:
  """An engine with every slot free."""
  m, S = spec.model, spec.slots
  cache = (m.num_layers, S, m.num_kv_heads, spec.cache_length, m.head_dim)
  ints = lambda *shape: jnp.zeros(shape, jnp.int32)
  return DecodeState(
    k=jnp.zeros(cache, spec.dtype),
    v=jnp.zeros(cache, spec.dtype),
    length=ints(S),
    token=ints(S),
    active=jnp.zeros(S, bool),
    generated=ints(S),
    stop_reason=ints(S),
    requests=jax.tree.map(jnp.asarray, Requests.empty(S)),
    tokens=ints(S, spec.max_response),
    logprobs=jnp.zeros((S, spec.max_response), jnp.float32),
    versions=ints(S, spec.max_response) - 1,
  )


def prefill(spec: EngineSpec, params, tokens, lengths) -> Prefix:
  """Runs prompts i32[P, T] (right-padded, true lengths i32[P]) through the model."""
  hidden, k, v = transformer.prefill(
    params, spec.model, tokens, lengths, dtype=spec.dtype, unroll=spec.unroll
  )
  return Prefix(k, v, transformer.logits(params, spec.model, hidden), lengths)


def _record(state: DecodeState, live, logits, version) -> DecodeState:
  """Samples one token in the `live` slots and books it: buffers, stop, limit."""
  r = state.requests
  token, logprob = sampling.sample(
    logits, r.key, state.length, r.temperature, r.top_k, r.top_p, r.min_p
  )
  S, R = state.tokens.shape
  at = (jnp.arange(S), jnp.where(live, state.generated, R))  # R is out of range: dropped
  generated = state.generated + live
  stopped = jnp.any(token[:, None] == r.stop_ids, axis=1)
  full = generated >= r.limit
  reason = jnp.where(stopped, StopReason.STOP, jnp.where(full, StopReason.LENGTH, 0))
  return dataclasses.replace(
    state,
    token=jnp.where(live, token, state.token),
    active=jnp.where(live, ~(stopped | full), state.active),
    generated=generated,
    stop_reason=jnp.where(live, reason, state.stop_reason),
    tokens=state.tokens.at[at].set(token, mode="drop"),
    logprobs=state.logprobs.at[at].set(logprob, mode="drop"),
    versions=state.versions.at[at].set(version, mode="drop"),
  )


def insert(spec: EngineSpec, state: DecodeState, prefix: Prefix, source, requests, version):
  """Starts sequences: copies prefix row source[s] into slot s and samples its first token.

  Every slot gathers its own row, so one program serves any number of slots, several slots share
  one prefill, and slots sharded over devices stay local.

  Args:
    prefix: P prefilled prompts.
    source: i32[S], row of prefix for each slot, -1 leaves the slot as it is.
    requests: Requests, used where source >= 0.
    version: i32[], version of the params that made the prefix.
  """
  take = source >= 0
  row = jnp.maximum(source, 0)
  T = min(prefix.k.shape[3], spec.cache_length)

  def copy(cache, new):
    old = cache[:, :, :, :T]
    new = jnp.where(take[None, :, None, None, None], new[:, row, :, :T].astype(cache.dtype), old)
    return lax.dynamic_update_slice(cache, new, (0, 0, 0, 0, 0))

  def choose(new, old):
    return jnp.where(take.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)

  state = dataclasses.replace(
    state,
    k=copy(state.k, prefix.k),
    v=copy(state.v, prefix.v),
    length=choose(prefix.lengths[row], state.length),
    generated=choose(0, state.generated),
    requests=jax.tree.map(choose, requests, state.requests),
  )
  return _record(state, take, prefix.logits[row], version)


def generate(spec: EngineSpec, params, state, version, max_steps, enough_free, *, live: int):
  """Decodes until `max_steps` steps are done, `enough_free` slots are free, or all are.

  Args:
    version: i32[], stamped on the tokens sampled.
    max_steps, enough_free: i32[], traced.
    live: static; attends to the first `live` cache entries only. The caller makes sure that no
      active sequence can outgrow it within max_steps.

  Returns:
    DecodeState
  """

  def cond(carry):
    step, state = carry
    free = spec.slots - jnp.sum(state.active)
    return (step < max_steps) & (free < jnp.minimum(enough_free, spec.slots))

  def body(carry):
    step, state = carry
    # Idle slots write at their own last entry: never out of range, never read.
    position = jnp.minimum(state.length, spec.cache_length - 1)
    hidden, k, v = transformer.decode(
      params, spec.model, state.token, position, state.k, state.v, live=live, dtype=spec.dtype
    )
    logits = transformer.logits(params, spec.model, hidden)
    state = dataclasses.replace(state, k=k, v=v, length=state.length + state.active)
    return step + 1, _record(state, state.active, logits, version)

  return lax.while_loop(cond, body, (jnp.zeros((), jnp.int32), state))[1]


def release(state: DecodeState, mask) -> DecodeState:
  """Frees the slots in `mask` bool[S] at once (aborted requests)."""
  return dataclasses.replace(
    state,
    active=state.active & ~mask,
    stop_reason=jnp.where(mask, StopReason.ABORTED, state.stop_reason),
  )
