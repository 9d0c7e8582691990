"""Mixed training: which share of the loss belongs to the experts' sequences, step by step.

A schedule takes the number of the optimizer step (traced) and returns mu in [0, 1]; the step's loss
is (1 - mu) x the rollouts' mean + mu x the experts' mean, each under the algorithm's aggregation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trinity_jax.algorithms import aggregation
from trinity_jax.errors import UserError


def constant(step: jax.Array, *, mu: float = 0.1) -> jax.Array:
  """The same share at every step (MIX)."""
  _check(mu=mu)
  return jnp.full(jnp.shape(step), mu, jnp.result_type(float))


def chord(
  step: jax.Array,
  *,
  peak: float = 0.1,
  valley: float = 0.1,
  warmup: int = 0,
  decay: int = 0,
) -> jax.Array:
  """CHORD-mu (arXiv 2508.11408): linear from 0 to `peak` over `warmup` steps, then along a cosine
  to `valley` over `decay` steps, then `valley`."""
  _check(peak=peak, valley=valley)
  step = jnp.asarray(step, jnp.result_type(float))
  rising = peak * step / max(warmup, 1)
  turn = jnp.clip((step - warmup) / max(decay, 1), 0, 1)
  falling = valley + 0.5 * (peak - valley) * (1 + jnp.cos(jnp.pi * turn))
  if decay == 0:
    falling = jnp.full_like(step, valley)
  return jnp.where(step < warmup, rising, falling)


def _check(**shares: float) -> None:
  for name, value in shares.items():
    if isinstance(value, (int, float)) and not 0 <= value <= 1:
      raise UserError(f"blend: {name} = {value!r}: expected a share in [0, 1]")


def weights(
  mu: jax.Array,
  mask: jax.Array,
  sequence_index: jax.Array,
  num_sequences: int,
  mode: str,
  max_length: float | None,
  *,
  valid: jax.Array,
  experts: jax.Array,
) -> jax.Array:
  """`aggregation.weights` of rollouts and experts apart, joined by the share mu.

  Args:
    mu: scalar, the experts' share.
    experts: bool [N], True for sequences that an expert or a human wrote.
    mask, sequence_index, num_sequences, mode, max_length, valid: see aggregation.weights.
  """

  def of(kind):
    return aggregation.weights(
      mask, sequence_index, num_sequences, mode, max_length, valid=valid & kind
    )

  return (1 - mu) * of(~experts) + mu * of(experts)


BLENDS = {"constant": constant, "chord": chord}
