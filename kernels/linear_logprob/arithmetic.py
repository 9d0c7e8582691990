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


def no_columns(zeros):
  """What `add_columns` starts from: (top logit, sum of e, sum of e logit, target logit), each [C].

  e = exp(logit - top).
  """
  return (zeros + jnp.finfo(zeros.dtype).min, zeros, zeros, zeros)


def add_columns(sums, logits, targets):
  """Takes in the columns of logits [C, B]; the target counts where it is one of them."""
  before, total, weighted, target = sums
  top = jnp.maximum(before, jnp.max(logits, axis=-1))
  e = jnp.exp(logits - top[:, None])
  scale = jnp.exp(before - top)
  total = total * scale + jnp.sum(e, axis=-1)
  weighted = weighted * scale + jnp.sum(e * logits, axis=-1)
  inside = (targets >= 0) & (targets < logits.shape[1])
  found = jnp.take_along_axis(logits, targets[:, None], axis=-1, mode="clip")[:, 0]
  return top, total, weighted, jnp.where(inside, found, target)


def finish(sums):
  """-> (target logit (0 where it was no column), lse, mean logit), each [C]."""
  top, total, weighted, target = sums
  return target, top + jnp.log(total), weighted / jnp.where(total == 0, 1, total)


def join(some, others):
  """(target logit, lse, mean logit) of disjoint columns -> of all of them; masked rows have 0."""
  lse = jnp.logaddexp(some[1], others[1])
  mean = sum(part[2] * jnp.exp(part[1] - lse) for part in (some, others))
  return some[0] + others[0], lse, mean


def reduce(logits, targets):
  """All columns at once -> (logprob, entropy, lse), each [C]."""
  top = jnp.max(logits, axis=-1)
  shifted = logits - top[:, None]
  e = jnp.exp(shifted)
  total = jnp.sum(e, axis=-1)
  mean = jnp.sum(e * shifted, axis=-1) / total
  log_total = jnp.log(total)
  target = jnp.take_along_axis(shifted, targets[:, None], axis=-1)[:, 0]
  return target - log_total, log_total - mean, top + log_total


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


def product(left, d):
  """x^T [D, C], [C, V] -> [D, V]."""
  return jnp.dot(left, d.astype(left.dtype), preferred_element_type=d.dtype)
