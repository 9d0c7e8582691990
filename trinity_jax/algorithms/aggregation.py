"""How per-token losses become one number: weights whose denominators are the whole step's.

`weights` is called once per optimizer step, on all of its tokens, before any split. Afterwards
every loss is `sum(weights * per_token)`, and sums may be split at will: micro-batches, devices,
packing and padding change nothing.

With m the action mask, x the per-token loss, N the sequences of the step (an empty response is
one of them) and n_i the action tokens of sequence i:

  token-mean               sum(x m) / sum(m)
  seq-mean-token-sum       1/N sum_i sum_t x m
  seq-mean-token-mean      1/N sum_i (sum_t x m / n_i)
  seq-mean-token-sum-norm  sum(x m) / max_length         (constant length, arXiv 2503.20783)
  token-sum                sum(x m)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trinity_jax.algorithms.numerics import sequence_sum
from trinity_jax.errors import UserError, suggestion

MODES = (
  "token-mean",
  "seq-mean-token-sum",
  "seq-mean-token-mean",
  "seq-mean-token-sum-norm",
  "token-sum",
)


def check_mode(mode: str) -> str:
  """Returns `mode`, or raises UserError when it is not one of MODES."""
  if mode not in MODES:
    raise UserError(f"aggregation {mode!r} does not exist{suggestion(mode, MODES)}")
  return mode


def weights(
  mask: jax.Array,
  sequence_index: jax.Array,
  num_sequences: int,
  mode: str = "token-mean",
  max_length: float | None = None,
  *,
  valid: jax.Array | None = None,
  dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
  """Returns the weight of every token, 0 where `mask` is False.

  Args:
    mask: bool, any shape X ([M, B, T] in the trainer): all action tokens of the step.
    sequence_index: int32 X, index into [0, N); ignored where `mask` is False.
    num_sequences: N, static: the length of the step's per-sequence arrays.
    mode: one of MODES.
    max_length: the constant length of seq-mean-token-sum-norm (ignored by the others).
    valid: bool [N], False for slots of the per-sequence arrays that hold no sequence; their
      tokens get weight 0. None means that all N are real.
    dtype: of the result; None means jax's default float.

  Raises:
    UserError: unknown mode, or no positive `max_length` where the mode needs it.
  """
  check_mode(mode)
  dtype = dtype or jnp.result_type(float)
  mask = jnp.asarray(mask, bool)
  if valid is None:
    sequences = jnp.asarray(num_sequences, dtype)
  else:
    valid = jnp.asarray(valid, bool)
    sequences = jnp.sum(valid, dtype=dtype)
    mask = mask & valid[jnp.where(mask, sequence_index, 0)]
  weight = mask.astype(dtype)
  if mode == "token-mean":
    return weight / jnp.maximum(jnp.sum(weight), 1)
  if mode == "seq-mean-token-sum":
    return weight / jnp.maximum(sequences, 1)
  if mode == "seq-mean-token-mean":
    lengths = sequence_sum(weight, mask, sequence_index, num_sequences)
    length = lengths[jnp.where(mask, sequence_index, 0)]
    return weight / (jnp.maximum(length, 1) * jnp.maximum(sequences, 1))
  if mode == "seq-mean-token-sum-norm":
    concrete = isinstance(max_length, (int, float))  # a traced one cannot be looked at
    if max_length is None or (concrete and not max_length > 0):
      raise UserError(
        f"aggregation {mode!r} divides by a fixed length: max_length is {max_length!r}, "
        "expected a positive number (the longest response the sampler may write)"
      )
    return weight / jnp.asarray(max_length, dtype)
  return weight  # token-sum
