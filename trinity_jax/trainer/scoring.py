"""Evaluating a decoder on a packed batch: log-probs, entropies and values of its tokens.

Axis letters: M micro-batches, B rows, T row length, N sequences, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from trinity_jax import ops
from trinity_jax.experience import Batch
from trinity_jax.models import transformer
from trinity_jax.models.presets import ModelConfig
from trinity_jax.models.sharding import fold, unfold


class Policy(NamedTuple):
  """How to evaluate the decoder in a train step: architecture, dtype, remat, unroll."""

  config: ModelConfig
  dtype: Any = jnp.float32
  remat: str = "none"
  unroll: int | None = None


def preceding(params, policy: Policy, tokens, positions, segment_ids) -> jax.Array:
  """Hidden states [B, T, D] from which each token is predicted: that at t - 1 for the token at t.

  Args:
    tokens, positions, segment_ids: i32[B, T].
  """
  hidden = transformer.forward(
    params,
    policy.config,
    tokens,
    positions,
    segment_ids,
    dtype=policy.dtype,
    remat=policy.remat,
    unroll=policy.unroll,
  )
  return jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))


def token_logprobs(params, policy: Policy, tokens, positions, segment_ids, mask, temperature):
  """Log-prob and entropy of every masked token given what precedes it in its segment.

  Args:
    tokens, positions, segment_ids: i32[B, T].
    mask: bool[B, T], tokens wanted (never the first of a segment).
    temperature: f32[B, T], the distribution is softmax(logits / temperature).

  Returns:
    (logprob f32[B, T], entropy f32[B, T]), 0 where not masked.
  """
  before = preceding(params, policy, tokens, positions, segment_ids)
  logprob, entropy, _ = ops.linear_logprob(
    fold(before),
    transformer.output_weight(params, policy.config),
    fold(tokens),
    fold(mask),
    fold(temperature),
  )
  return unfold(logprob, tokens.shape), unfold(entropy, tokens.shape)


def token_loss(params, policy: Policy, tokens, positions, segment_ids, temperature, algorithm, x):
  """(loss, logprob, entropy) where the loss of each token is a function of its own numbers.

  Args:
    algorithm: with `token_level`.
    x: the arrays it reads: per token (the shape of x["mask"]), scalars, and [N], which no such loss
      can read.

  Only the loss, f32[], is differentiable; logprob and entropy are f32[B, T].
  """
  before = preceding(params, policy, tokens, positions, segment_ids)
  shape = tokens.shape
  flat = {
    k: fold(v) if jnp.shape(v) == shape else v
    for k, v in x.items()
    if v is not None and jnp.shape(v) in ((), shape)
  }
  weights = flat.pop("weights")

  def of_rows(logprob, entropy, rows):
    weights, arrays = rows
    return weights * algorithm.token_loss(logprob=logprob, entropy=entropy, **arrays)[0]

  loss, (logprob, entropy, _) = ops.linear_logprob_loss(
    fold(before),
    transformer.output_weight(params, policy.config),
    fold(tokens),
    flat["mask"],
    fold(temperature),
    of_rows,
    (weights, flat),
  )
  return loss, unfold(logprob, shape), unfold(entropy, shape)


def micro_batch(batch: Batch, m) -> dict[str, jax.Array]:
  """The token arrays [B, T] of micro-batch m, and the temperature of each token."""
  pick = lambda x: lax.dynamic_index_in_dim(x, m, 0, keepdims=False)
  out = {k: pick(getattr(batch, k)) for k in Batch.TOKEN_FIELDS}
  out |= {k: pick(v) for k, v in batch.extras.items() if v.ndim == 3}
  out["temperature"] = batch.temperature[out["sequence_index"]]
  return out


def over_micro_batches(
  batch: Batch, names: Sequence[str], f: Callable[[dict[str, jax.Array]], Sequence[jax.Array]]
) -> dict[str, jax.Array]:
  """f(token arrays of a micro-batch) -> one f32[B, T] per name, for all live micro-batches.

  Returns:
    name -> f32[M, B, T], 0 in micro-batches that are not live.
  """

  def body(m, out):
    found = f(micro_batch(batch, m))
    return [
      lax.dynamic_update_index_in_dim(o, x.astype(o.dtype), m, 0) for o, x in zip(out, found)
    ]

  zeros = [jnp.zeros(batch.tokens.shape, jnp.float32) for _ in names]
  return dict(zip(names, lax.fori_loop(0, batch.num_micro, body, zeros)))


def score(
  params, policy: Policy, batch: Batch, outputs: Sequence[str] = ("logprob",)
) -> dict[str, jax.Array]:
  """What `params` think of the batch's action tokens.

  Args:
    outputs: any of logprob, entropy (nats) and expected_score (ops.expected_score).

  Returns:
    output -> f32[M, B, T], 0 where not an action token.
  """

  def of(x):
    before = preceding(params, policy, x["tokens"], x["positions"], x["segment_ids"])
    hidden, shape = fold(before), x["tokens"].shape
    weight = transformer.output_weight(params, policy.config)
    tokens, mask, temperature = (fold(x[k]) for k in ("tokens", "action_mask", "temperature"))
    logprob, entropy, _ = ops.linear_logprob(hidden, weight, tokens, mask, temperature)
    found = {"logprob": logprob, "entropy": entropy}
    if "expected_score" in outputs:
      found["expected_score"] = ops.expected_score(hidden, weight, mask, temperature)
    return [unfold(found[k], shape) for k in outputs]

  return over_micro_batches(batch, outputs, of)
