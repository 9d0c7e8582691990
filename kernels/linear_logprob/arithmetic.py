"""Arithmetic on the logits of some rows, shared by all that holds them as an array.

Axes: C rows, D model width, V vocabulary (the columns at hand).

With p = exp(l - lse), entropy H and cotangents g (of logprob), h (of entropy), z (of lse):

  dl = g (1[v = target] - p) + z p - h p (log p + H)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def wide(*arrays: jax.Array):
  """float32, or wider where an array is wider."""
  return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def logits_of(x, weight, temperature, softcap):
  """[C, D], [D, V] -> [C, V] in float32 or wider."""
  logits = jnp.dot(x, weight, preferred_element_type=wide(x, weight))
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  return logits / temperature[:, None]


def reduce(logits, targets):
  """-> (target logit (0 where the target is no column), lse, mean logit), each [C]."""
  top, shifted_target, log_total, mean = _reduce(logits, targets)
  inside = (targets >= 0) & (targets < logits.shape[1])
  return jnp.where(inside, shifted_target + top, 0), log_total + top, mean + top


def reduce_all(logits, targets):
  """As `reduce` where these are all columns -> (logprob, entropy, lse), each [C]."""
  top, shifted_target, log_total, mean = _reduce(logits, targets)
  return shifted_target - log_total, log_total - mean, top + log_total


def _reduce(logits, targets):
  top = jnp.max(logits, axis=-1)
  shifted = logits - top[:, None]
  e = jnp.exp(shifted)
  total = jnp.sum(e, axis=-1)
  mean = jnp.sum(e * shifted, axis=-1) / total
  target = jnp.take_along_axis(shifted, targets[:, None], axis=-1, mode="clip")[:, 0]
  return top, target, jnp.log(total), mean


def logits_gradient(logits, targets, temperature, entropy, lse, cotangents, softcap):
  """d/d(hidden @ weight), [C, V]. A cotangent may be None: nothing depends on that output."""
  g, h, z = cotangents
  scale = jnp.zeros_like(lse)
  if z is not None:
    scale += z
  if g is not None:
    scale -= g
  log_p = logits - lse[:, None]
  d = scale[:, None]
  if h is not None:  # usually a mere metric: then nothing is added
    d = d - h[:, None] * (log_p + entropy[:, None])
  d = jnp.exp(log_p) * d
  if g is not None:
    columns = jax.lax.broadcasted_iota(jnp.int32, d.shape, 1)
    d = d + jnp.where(columns == targets[:, None], g[:, None], 0)
  if softcap is not None:  # d tanh = 1 - tanh^2, and tanh is the capped logit over the cap
    d = d * (1 - jnp.square(logits * (temperature / softcap)[:, None]))
  return d / temperature[:, None]


def hidden_gradient(d, weight):
  """[C, V], [D, V] -> [C, D]."""
  return jax.lax.dot_general(
    d.astype(weight.dtype), weight, (((1,), (1,)), ((), ())), preferred_element_type=d.dtype
  )


def weight_gradient(x, d):
  """[C, D], [C, V] -> [D, V]."""
  return jax.lax.dot_general(
    x, d.astype(x.dtype), (((0,), (0,)), ((), ())), preferred_element_type=d.dtype
  )
