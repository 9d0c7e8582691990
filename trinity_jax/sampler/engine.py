"""The sampler's device part: pure `extend`, `copy`, `start`, `generate` over fixed slots.

A slot holds one sequence. `extend` runs a chunk of tokens through the model behind what the slot's
cache already holds: a whole prompt, a piece of a long one, the next turn of a dialogue, or a
partial response that is to be continued. `copy` gives a prefix to further slots, `start` samples
first tokens, `generate` decodes. Whatever a request can ask for (temperature, top-k, stop tokens,
limits, randomness) is a traced array of the state, so nothing recompiles. Tokens, log-probs and
versions are collected on the device and read when a sequence has ended.

Slots are sharded over data x context x fsdp, kv heads over tensor. Every use of the cache is local
to a shard: the rows of an `extend` are split like the slots, and slot numbers in its arguments
count within the shard. Axis letters: S slots, C cache length, R response limit, P rows of one
extend, T their length, L layers, H query heads, K kv heads, A head dim, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from trinity_jax import ops
from trinity_jax.experience import StopReason
from trinity_jax.models import transformer
from trinity_jax.models.presets import ModelConfig
from trinity_jax.models.sharding import RULES
from trinity_jax.sampler import cache as cache_lib
from trinity_jax.sampler import sampling

STOP_IDS = 8  # stop tokens a request may name
SLOTS: Any = RULES["slots"]  # mesh axes that slots are split over


class EngineSpec(NamedTuple):
  """Static shapes and dtypes of an engine.

  Attributes:
    live_lengths: cache lengths that decode is compiled for, ascending; the last is C.
    max_response: R.
    cache_dtype: float32, bfloat16 or int8 (scaled per entry and head); None: dtype.
  """

  model: ModelConfig
  slots: int  # S
  live_lengths: tuple[int, ...]
  max_response: int
  dtype: Any = jnp.float32
  cache_dtype: Any = None

  @property
  def cache_length(self) -> int:
    """C."""
    return self.live_lengths[-1]


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
  """Donated to whatever changes it.

  Attributes:
    cache: per layer, per segment: see cache.py.
    length: i32[S], cache entries in use; the next token is written there.
    token: i32[S], last token sampled, not yet in the cache.
    active: bool[S].
    generated: i32[S], tokens sampled so far.
    stop_reason: i32[S], a StopReason.
    requests: Requests.
    tokens i32[S, R], logprobs f32[S, R], versions i32[S, R]: what was sampled.
  """

  cache: Any
  length: Any
  token: Any
  active: Any
  generated: Any
  stop_reason: Any
  requests: Requests
  tokens: Any
  logprobs: Any
  versions: Any


def init_state(spec: EngineSpec) -> DecodeState:
  """An engine with every slot free."""
  m, S = spec.model, spec.slots
  ints = lambda *shape: jnp.zeros(shape, jnp.int32)
  return DecodeState(
    cache=cache_lib.init(
      m.num_layers, S, m.num_kv_heads, m.head_dim, spec.live_lengths,
      spec.dtype if spec.cache_dtype is None else spec.cache_dtype,
    ),
    length=ints(S),
    token=ints(S),
    active=jnp.zeros(S, bool),
    generated=ints(S),
    stop_reason=ints(S),
    requests=jax.tree.map(jnp.asarray, Requests.empty(S)),
    tokens=ints(S, spec.max_response),
    logprobs=jnp.zeros((S, spec.max_response), jnp.float32),
    versions=ints(S, spec.max_response) - 1,
  )  # fmt: skip


def layout(x: Any) -> PartitionSpec:
  """How an array of the state lies on the mesh: slots first, and in the cache kv heads second."""
  return PartitionSpec(SLOTS, *(("tensor",) if x.ndim >= 3 else ()))


def _local(f: Callable, inputs: tuple, outputs: Any) -> Callable:
  """f on each device's own part, inside `with jax.set_mesh(mesh)`; else f itself.

  inputs, outputs: pytrees of arrays or PartitionSpec; an array stands for its `layout`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return f
  is_spec = lambda x: isinstance(x, PartitionSpec)
  specs = lambda tree: jax.tree.map(lambda x: x if is_spec(x) else layout(x), tree, is_leaf=is_spec)
  return jax.shard_map(
    f, mesh=mesh, in_specs=specs(inputs), out_specs=specs(outputs), check_vma=False
  )


_ROWS = PartitionSpec(SLOTS)
_HEADS = PartitionSpec(SLOTS, "tensor", None)  # [S, H, A]
_CHUNK_HEADS = PartitionSpec(SLOTS, None, "tensor", None)  # [P, T, H, A]


def extend(spec: EngineSpec, params, state: DecodeState, tokens, starts, counts, slots):
  """Runs a chunk of tokens behind what a slot's cache holds.

  Args:
    params: of transformer.unstack.
    tokens: i32[P, T], right-padded.
    starts: i32[P], cache entries before the chunk. counts: i32[P], true lengths.
    slots: i32[P], within the shard; -1 for a row of padding.

  Returns:
    (state with the new entries, f32[P, V] logits after each chunk's last token)
  """
  T = tokens.shape[1]
  positions = starts[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
  needed = jnp.max(jnp.where(slots >= 0, starts + counts, 0))
  last = jnp.maximum(counts - 1, 0)
  layers = list(state.cache)

  def attend(i, q, k, v):
    asking = positions if q.shape[1] == T else transformer.take_tokens(positions, last)

    def local(layer, slots, starts, positions, needed, q, k, v):
      layer = cache_lib.write_chunks(layer, slots, starts, k, v)
      return layer, ops.extend_attention(
        q, layer, slots, positions, needed, window=spec.model.sliding_window
      )

    inputs = (layers[i], _ROWS, _ROWS, _ROWS, PartitionSpec(), *(_CHUNK_HEADS,) * 3)
    run = _local(local, inputs, (layers[i], _CHUNK_HEADS))
    layers[i], mixed = run(layers[i], slots, starts, asking, needed, q, k, v)
    return mixed

  hidden = transformer.with_cache(
    params, spec.model, tokens, positions, attend, last=last, dtype=spec.dtype
  )
  logits = transformer.logits(params, spec.model, hidden[:, 0])
  return dataclasses.replace(state, cache=tuple(layers)), logits


def copy(state: DecodeState, source, target, count, *, live: int) -> DecodeState:
  """Slot target[i] gets the first `live` cache entries of slot source[i].

  Args:
    source, target: i32[S], slots within the shard; S / shards pairs for each shard.
    count: i32[shards], pairs that count.
    live: static, one of the live lengths.
  """

  def local(cache, source, target, count):
    return tuple(cache_lib.copy_rows(layer, live, source, target, count[0]) for layer in cache)

  run = _local(local, (state.cache, _ROWS, _ROWS, _ROWS), state.cache)
  return dataclasses.replace(state, cache=run(state.cache, source, target, count))


def start(state: DecodeState, logits, rows, lengths, requests: Requests, version) -> DecodeState:
  """Starts sequences: samples the first token of every slot that has a row of logits.

  Args:
    logits: f32[P, V] of extend.
    rows: i32[S], row of logits within the shard for each slot; -1 leaves the slot as it is.
    lengths: i32[S], cache entries in use; requests: Requests; both used where rows >= 0.
    version: i32[], version of the params that made the logits.
  """
  take = rows >= 0
  wide = PartitionSpec(SLOTS, "tensor")
  gather = _local(lambda x, rows: x[jnp.maximum(rows, 0)], (wide, _ROWS), wide)

  def choose(new, old):
    return jnp.where(take.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)

  state = dataclasses.replace(
    state,
    length=choose(lengths, state.length),
    generated=choose(0, state.generated),
    requests=jax.tree.map(choose, requests, state.requests),
  )
  return _record(state, take, gather(logits, rows), version)


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


def generate(spec: EngineSpec, params, state, version, max_steps, enough_free, *, live: int):
  """Decodes until `max_steps` steps are done, `enough_free` slots are idle, or all are.

  Args:
    version: i32[], stamped on the tokens sampled.
    max_steps, enough_free: i32[], traced.
    live: static, one of the live lengths; attends to the first `live` cache entries only. The
      caller makes sure that no active sequence can outgrow it within max_steps.

  Returns:
    (DecodeState, i32[] steps done)
  """

  def cond(carry):
    step, state = carry
    free = spec.slots - jnp.sum(state.active)
    return (step < max_steps) & (free < jnp.minimum(enough_free, spec.slots))

  def body(carry):
    step, state = carry
    hidden, cache = _decode(spec, params, state, live)
    logits = transformer.logits(params, spec.model, hidden)
    state = dataclasses.replace(state, cache=cache, length=state.length + state.active)
    return step + 1, _record(state, state.active, logits, version)

  steps, state = lax.while_loop(cond, body, (jnp.zeros((), jnp.int32), state))
  return state, steps


def _decode(spec: EngineSpec, params, state: DecodeState, live: int):
  """One token per slot: (hidden [S, D], cache with the entries of active slots)."""
  # The cache of an idle slot is left alone: it may hold a prefix for the next turn.
  positions = jnp.where(state.active, state.length, spec.cache_length)
  layers = list(state.cache)

  def attend(i, q, k, v):
    def local(layer, positions, q, k, v):
      near = cache_lib.write_entries(cache_lib.up_to(layer, live), positions, k, v)
      mixed = ops.decode_attention(q, near, positions, window=spec.model.sliding_window)
      return (*near, *layer[len(near) :]), mixed

    run = _local(local, (layers[i], _ROWS, _HEADS, _HEADS, _HEADS), (layers[i], _HEADS))
    layers[i], mixed = run(layers[i], positions, q, k, v)
    return mixed

  hidden = transformer.with_cache(
    params, spec.model, state.token, positions, attend, dtype=spec.dtype
  )
  return hidden, tuple(layers)


def release(state: DecodeState, mask) -> DecodeState:
  """Frees the slots in `mask` bool[S] at once (aborted requests)."""
  return dataclasses.replace(
    state,
    active=state.active & ~mask,
    stop_reason=jnp.where(mask, StopReason.ABORTED, state.stop_reason),
  )
