"""The weight some columns at a time, and of a weight split over fsdp: gathered so, never whole.

Axes: T rows (tokens), D model width, V vocabulary (the columns of this device), B of one slice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import arithmetic
from .layout import Layout

# Bytes of a gathered slice, in the weight's dtype. A weight that is smaller is gathered whole.
SLICE = 1 << 25
_LANES = 128


def over_columns(weight, size: int, body: Callable[..., Any], carry):
  """carry = body(start, weight[:, start : start + B], carry), B = `size` but for the rest."""
  count = weight.shape[1]

  def block(start, width, carry):
    # The barrier makes one array of it: products in an inner loop do not slice again.
    part = lax.optimization_barrier(lax.dynamic_slice_in_dim(weight, start, width, 1))
    return body(start, part, carry)

  if count // size:
    carry = lax.fori_loop(0, count // size, lambda j, c: block(j * size, size, c), carry)
  rest = count % size
  return block(count - rest, rest, carry) if rest else carry


def slice_of(layout: Layout, weight: jax.Array) -> int:
  """Columns to gather at a time of a weight [D, V] of the whole mesh; 0: all at once."""
  width, count = weight.shape
  column = width * weight.dtype.itemsize
  if not layout.scatters(width) or count // layout.vocabulary_shards * column <= SLICE:
    return 0
  return max(SLICE // column // _LANES, 1) * _LANES


def forward(run, layout: Layout, size: int, hidden, weight, targets, mask, temperature):
  """(target logit, lse, mean logit), each [T], by `run` on slices of weight [D / fsdp, V]."""

  def body(start, part, before):
    found = run(hidden, layout.gather(part), targets - start, mask, temperature)
    return arithmetic.join(before, found)

  zeros = jnp.zeros(mask.shape, arithmetic.wide(hidden, weight))
  return over_columns(weight, size, body, (zeros, zeros + jnp.finfo(zeros.dtype).min, zeros))


def backward(run, layout: Layout, size: int, hidden, weight, targets, *rest):
  """(d_hidden [T, D], d_weight [D / fsdp, V], which is summed over the rows' shards)."""

  def body(start, part, gradients):
    d_hidden, d_weight = gradients
    d_rows, d_part = run(hidden, layout.gather(part), targets - start, *rest)
    d_part = layout.sum_weight_gradient(d_part).astype(weight.dtype)
    return d_hidden + d_rows, lax.dynamic_update_slice_in_dim(d_weight, d_part, start, 1)

  zeros = jnp.zeros(hidden.shape, arithmetic.wide(hidden, weight))
  return over_columns(weight, size, body, (zeros, jnp.zeros_like(weight)))
