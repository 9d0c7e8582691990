"""The operator and the loss of its tokens: gradients are computed in the forward pass."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from . import whole
from .implementation import Implementation, Plan, dispatch, fit
from .operator import forward, gradients_of, merged, specs_of, summed
from .token_loss import TokenLoss


def _loss(plan: Plan, token_loss: TokenLoss, *args):
  *rows, arrays = args
  outs, _ = forward(plan, *rows)
  layout = plan.layout

  def local(mask, logprob, entropy, arrays):
    losses = token_loss(logprob, entropy, arrays)
    return layout.sum_rows(jnp.sum(jnp.where(mask, losses, 0)))

  specs = (layout.row, layout.row, layout.row, layout.rows_of(arrays))
  total = layout.map(local, specs, PartitionSpec())
  return total(rows[3], *outs[:2], arrays), outs


def _loss_first(plan: Plan, token_loss: TokenLoss, *args):
  *rows, arrays = args
  layout = plan.layout

  def local(rows, arrays):
    hidden, weight, targets, mask, temperature = rows
    targets = layout.columns(targets, weight.shape[1])
    args = (hidden, weight, targets, mask, temperature, arrays)
    if plan.keep:
      found = _loss_whole(plan, token_loss, *args)
    elif plan.slice:
      found = _loss_in_two(plan, token_loss, *args)
    else:
      found = dispatch(plan, functools.partial(_loss_by, plan, token_loss), *args)
    losses, outs, gradients = found
    return (layout.sum_rows(jnp.sum(losses)), outs), gradients

  specs = (specs_of(plan), layout.rows_of(arrays))
  gradients = (layout.row, layout.weight_gradient(rows[0].shape[1]))
  run = layout.map(local, specs, ((PartitionSpec(), layout.row), gradients))
  return run(tuple(rows), arrays)


def _loss_whole(plan: Plan, token_loss: TokenLoss, *args):
  hidden, weight, targets, mask, temperature, arrays = args
  rows = (hidden, weight, targets, mask, temperature)
  outs, logits = whole.forward(*rows, softcap=plan.softcap, layout=plan.layout)
  logprob, entropy, lse = outs
  losses, g, h = token_loss.gradients(mask, logprob, entropy, arrays)
  found = whole.backward(*rows, lse, entropy, (g, h, None), logits, softcap=plan.softcap)
  return losses, outs, summed(plan.layout, *fit(hidden, weight, found))


def _loss_by(plan: Plan, token_loss: TokenLoss, implementation: Implementation, *args):
  """(losses, outputs, gradients), by the implementation's own way or not."""
  if implementation.loss_gradients is None:
    return _loss_in_two(plan._replace(fixed=implementation), token_loss, *args)
  losses, outs, *found = implementation.loss_gradients(
    *args, token_loss=token_loss, layout=plan.layout, softcap=plan.softcap
  )
  return losses, outs, summed(plan.layout, *fit(args[0], args[1], found))


def _loss_in_two(plan: Plan, token_loss: TokenLoss, *args):
  """As _loss_by, forward and then backward: four products."""
  *rows, arrays = args
  logprob, entropy, lse = outs = merged(plan, *rows)
  losses, g, h = token_loss.gradients(rows[3], logprob, entropy, arrays)
  return losses, outs, gradients_of(plan, *rows, lse, entropy, (g, h, None))


def _loss_backward(plan: Plan, token_loss: TokenLoss, gradients, cotangents):
  d_hidden, d_weight = (g * cotangents[0].astype(g.dtype) for g in gradients)
  return d_hidden, d_weight, None, None, None, None


linear_logprob_loss: Any = jax.custom_vjp(_loss, nondiff_argnums=(0, 1))
linear_logprob_loss.defvjp(_loss_first, _loss_backward)
