"""Log-prob, entropy and lse of rows over the mesh, and their derivative."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from . import columns, whole
from .implementation import Plan, dispatch, fit
from .layout import Layout


def _values(plan: Plan, *rows):
  return forward(plan, *rows)[0]


def forward(plan: Plan, *rows):
  """-> ((logprob, entropy, lse), the logits that are kept or None)."""
  layout = plan.layout

  def local(hidden, weight, targets, mask, temperature):
    args = (hidden, weight, layout.columns(targets, weight.shape[1]), mask, temperature)
    if plan.keep:
      return whole.forward(*args, softcap=plan.softcap, layout=layout)
    return merged(plan, *args), None

  kept = PartitionSpec(layout.rows, layout.vocabulary)
  return layout.map(local, specs_of(plan), ((layout.row,) * 3, kept))(*rows)


def specs_of(plan: Plan):
  """Of (hidden, weight, targets, mask, temperature)."""
  row = plan.layout.row
  return (row, plan.layout.weight(split=plan.slice > 0), row, row, row)


def merged(plan: Plan, *args):
  """Inside map: (logprob, entropy, lse) over all columns, 0 where masked."""
  one = lambda implementation, *args: implementation.forward(*args, softcap=plan.softcap)
  run = functools.partial(dispatch, plan, one)
  parts: Any = columns.forward(run, plan.layout, plan.slice, *args) if plan.slice else run(*args)
  return tuple(jnp.where(args[3], x, 0) for x in plan.layout.merge(*parts))


def gradients_of(plan: Plan, *args):
  """Inside map: (d_hidden, d_weight), summed over the shards that share them."""
  layout = plan.layout
  one = lambda implementation, hidden, weight, *rest: fit(
    hidden, weight, implementation.backward(hidden, weight, *rest, softcap=plan.softcap)
  )
  run = functools.partial(dispatch, plan, one)
  if plan.slice:
    d_hidden, d_weight = columns.backward(run, layout, plan.slice, *args)
    return layout.sum_vocabulary(d_hidden.astype(args[0].dtype)), d_weight
  return summed(layout, *run(*args))


def summed(layout: Layout, d_hidden: Any, d_weight: Any):
  return layout.sum_vocabulary(d_hidden), layout.sum_weight_gradient(d_weight)


def _first(plan, *primals):
  rows = [x.value for x in primals]
  outs, logits = forward(plan, *rows)
  return outs, (rows, outs[1:], logits)


def _backward(plan: Plan, saved, cotangents):
  rows, (entropy, lse), logits = saved
  layout = plan.layout

  def local(rows, entropy, lse, cotangents, logits):
    hidden, weight, targets, mask, temperature = rows
    cotangents = jax.tree.map(lambda c: jnp.where(mask, c, 0), cotangents)
    targets = layout.columns(targets, weight.shape[1])
    args = (hidden, weight, targets, mask, temperature, lse, entropy, cotangents)
    if plan.keep:
      found = whole.backward(*args, logits, softcap=plan.softcap)
      return summed(layout, *fit(hidden, weight, found))
    return gradients_of(plan, *args)

  kept = PartitionSpec(layout.rows, layout.vocabulary)
  specs = (specs_of(plan), layout.row, layout.row, layout.row, kept)
  given = tuple(None if isinstance(c, SymbolicZero) else c for c in cotangents)
  outs = (layout.row, layout.weight_gradient(rows[0].shape[1]))
  gradients = layout.map(local, specs, outs)(tuple(rows), entropy, lse, given, logits)
  return (*gradients, None, None, None)


linear_logprob: Any = jax.custom_vjp(_values, nondiff_argnums=(0,))
linear_logprob.defvjp(_first, _backward, symbolic_zeros=True)
