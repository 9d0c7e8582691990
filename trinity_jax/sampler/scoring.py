"""Log-probs of given tokens under the sampler's weights, between two dispatches of decoding.

A row is one request, from its first token on, and its length alone chooses the program: what is
scored beside it changes no bit. Slots and cache are not touched. Axes: P rows, T row length, D
width, H query heads, A head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future

import jax.numpy as jnp
import numpy as np

from trinity_jax import ops
from trinity_jax.errors import UserError
from trinity_jax.models import transformer
from trinity_jax.sampler.cache import bucket_for
from trinity_jax.sampler.engine import EngineSpec

_SMALLEST, _MOST_ROWS = 256, 8


def lengths(spec: EngineSpec) -> tuple[int, ...]:
  """Row lengths T that programs are compiled for, ascending: the cache's, and quarters of it."""
  out = [spec.cache_length]
  while out[0] // 4 >= _SMALLEST:
    out.insert(0, out[0] // 4)
  return tuple(out)


def rows(spec: EngineSpec, T: int, shards: int) -> int:
  """Rows P of the program of length T: together about as long as one of the cache's length."""
  return shards * min(_MOST_ROWS, spec.cache_length // T)


def score(spec: EngineSpec, params, tokens, counts, temperature):
  """Log-probs f32[P, T] of tokens i32[P, T] given those before; 0 for the first and for padding.

  Args:
    params: of transformer.unstack.
    counts: i32[P], true lengths.
    temperature: f32[P], above 0: the distribution is softmax(logits / temperature).
  """
  P, T = tokens.shape
  positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (P, T))
  segments = (positions < counts[:, None]).astype(jnp.int32)

  def attend(_, q, k, v):
    return ops.attention(
      q, k, v, positions=positions, segment_ids=segments, window=spec.model.sliding_window
    )

  hidden = transformer.with_cache(params, spec.model, tokens, positions, attend, dtype=spec.dtype)
  before = jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
  logprobs, _, _ = ops.linear_logprob(
    before.reshape(P * T, -1),
    transformer.output_weight(params, spec.model),
    tokens.reshape(-1),
    ((segments > 0) & (positions > 0)).reshape(-1),
    jnp.repeat(temperature, T),
  )
  return logprobs.reshape(P, T)


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
  """tokens i32[n] to be scored at a temperature; the future gives f32[n]."""

  tokens: np.ndarray
  temperature: float
  future: Future


def ask(tokens: Sequence[int] | np.ndarray, temperature: float, spec: EngineSpec) -> Asked:
  """Raises UserError for what the programs were not compiled for."""
  if not 1 <= len(tokens) <= spec.cache_length:
    raise UserError(
      f"logprobs of {len(tokens)} tokens: sampler.max_prompt_length + max_response_length allow 1 "
      f"to {spec.cache_length}"
    )
  if not (temperature > 0 and np.isfinite(temperature)):
    raise UserError(f"logprobs at temperature {temperature!r}: expected a number above 0")
  ids = np.asarray(tokens, np.int64)
  wrong = ids[(ids < 0) | (ids >= spec.model.vocab_size)]
  if len(wrong):
    raise UserError(
      f"logprobs of token {wrong[0]}: the vocabulary has ids 0 to {spec.model.vocab_size - 1}"
    )
  return Asked(ids.astype(np.int32), float(temperature), Future())


def take(waiting: list[Asked], spec: EngineSpec, shards: int) -> list[Asked]:
  """Removes from `waiting` what one dispatch scores: the oldest and others of its row length."""
  waiting[:] = [a for a in waiting if not a.future.cancelled()]
  if not waiting:
    return []
  choices = lengths(spec)
  T = bucket_for(len(waiting[0].tokens), choices)
  fit = [a for a in waiting if bucket_for(len(a.tokens), choices) == T]
  taken = fit[: rows(spec, T, shards)]
  waiting[:] = [a for a in waiting if a not in taken]
  return [a for a in taken if a.future.set_running_or_notify_cancel()]


def rows_of(taken: Sequence[Asked], spec: EngineSpec, shards: int):
  """The arguments (tokens, counts, temperature) of `score` for what `take` has taken."""
  T = bucket_for(max(len(a.tokens) for a in taken), lengths(spec))
  P = rows(spec, T, shards)
  tokens, counts = np.zeros((P, T), np.int32), np.zeros(P, np.int32)
  temperature = np.ones(P, np.float32)
  for p, a in enumerate(taken):
    tokens[p, : len(a.tokens)], counts[p], temperature[p] = a.tokens, len(a.tokens), a.temperature
  return tokens, counts, temperature
