"""All rows at once, logits kept between forward and backward: for [T, V] that is small anyway."""

from __future__ import annotations

import jax.numpy as jnp

from . import arithmetic


def forward(hidden, weight, targets, mask, temperature, *, softcap, layout):
  """-> (logprob, entropy, lse), 0 where masked; logits [T, V]."""
  hidden = _clean(mask, hidden)
  logits = arithmetic.logits_of(hidden, weight, temperature, softcap)
  if layout.vocabulary is None:
    outs = arithmetic.reduce(logits, targets)
  else:
    outs = layout.merge(*_parts(logits, targets))
  return tuple(jnp.where(mask, x, 0) for x in outs), logits


def backward(
  hidden, weight, targets, mask, temperature, lse, entropy, cotangents, logits, *, softcap
):
  """-> (d_hidden, d_weight)."""
  d = arithmetic.logits_gradient(logits, targets, temperature, entropy, lse, cotangents, softcap)
  return arithmetic.hidden_gradient(d, weight), arithmetic.product(_clean(mask, hidden).T, d)


def _parts(logits, targets):
  """-> (target logit, lse, mean logit) over the columns of one shard."""
  sums = arithmetic.no_columns(jnp.zeros(targets.shape, logits.dtype))
  return arithmetic.finish(arithmetic.add_columns(sums, logits, targets))


def _clean(mask, x):
  return jnp.where(mask[:, None], x, jnp.zeros_like(x))
