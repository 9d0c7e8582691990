"""Reference: the whole [T, V] in memory, gradients by autodiff, float64-able. For tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def linear_logprob(hidden, weight, targets, mask, temperature, *, softcap):
  """See api.py. Accumulates in float32, or wider where the inputs are wider."""
  mask = jnp.asarray(mask, bool)
  wide = jnp.promote_types(jnp.promote_types(hidden.dtype, weight.dtype), jnp.float32)
  hidden = jnp.where(mask[:, None], hidden, jnp.zeros_like(hidden))
  logits = jnp.dot(hidden, weight, preferred_element_type=wide)
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  # Of masked rows nothing is read: temperature 0 and target -1 are fine there.
  temperature = jnp.broadcast_to(jax.lax.stop_gradient(temperature), mask.shape).astype(wide)
  logits = logits / jnp.where(mask, temperature, 1)[:, None]
  lse = jax.nn.logsumexp(logits, axis=-1)
  target = jnp.where(mask, targets, 0)[:, None]
  logprob = jnp.take_along_axis(logits, target, axis=-1)[:, 0] - lse
  log_p = logits - lse[:, None]
  entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
  logprob, entropy, lse = (jnp.where(mask, x, 0) for x in (logprob, entropy, lse))
  return logprob, entropy, lse
