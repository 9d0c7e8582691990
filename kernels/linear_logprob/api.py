"""Log-prob of given next tokens under softmax(hidden @ weight), without keeping [T, V].

Axes: T rows (tokens), D model width, V vocabulary.

An implementation works on the arrays of one device (`Implementation`). Here they get a derivative,
are split over the mesh in context (see layout.py) and merged, and are chosen per platform. A [T, V]
that is small on each device (xla.SMALL) is kept between forward and backward instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from ..errors import CannotRun
from . import arithmetic, columns, pallas_tpu, reference, whole, xla
from .layout import Layout, layout_of
from .platform import only_on
from .token_loss import TokenLoss, token_loss_of


class Implementation(NamedTuple):
  """Functions of the arrays of one device, over the columns it has.

  forward(hidden[T, D], weight[D, V], targets[T], mask[T], temperature[T], *, softcap)
    -> (target_logit, lse, mean_logit), each [T] in float32 or wider: of soft-capped logits over
    temperature; the mean is under these columns' softmax; a target outside [0, V) gives 0, a
    masked row gives 0.
  backward(hidden, weight, targets, mask, temperature, lse, entropy, cotangents, *, softcap)
    -> (d_hidden[T, D], d_weight[D, V]); lse and entropy are those over all columns; cotangents of
    (logprob, entropy, lse), each [T] or None: nothing depends on that output.
  loss_gradients: xla.loss_gradients in fewer products than forward and backward, or None.
  unsupported(hidden, weight) -> why it cannot serve these, or None.
  platforms: where it runs; None: everywhere.
  """

  name: str
  forward: Callable[..., Any]
  backward: Callable[..., Any]
  loss_gradients: Callable[..., Any] | None = None
  unsupported: Callable[[Any, Any], str | None] | None = None
  platforms: tuple[str, ...] | None = None


def xla_tiles(tile: xla.Tile) -> Implementation:
  """The XLA implementation with logits of that many rows and columns at a time."""
  some = functools.partial
  return Implementation(
    "xla", some(xla.forward, tile=tile), some(xla.backward, tile=tile),
    some(xla.loss_gradients, tile=tile),
  )  # fmt: skip


def pallas(by_rows: bool | None = None) -> Implementation:
  """The TPU kernels, for a weight that lies in memory as [V, D] or not; None: by its shape."""
  some = functools.partial
  return Implementation(
    "pallas_tpu", some(pallas_tpu.forward, by_rows=by_rows),
    some(pallas_tpu.backward, by_rows=by_rows), unsupported=pallas_tpu.unsupported,
    platforms=("tpu",),
  )  # fmt: skip


# "reference" has no parts, its gradients are autodiff's; "xla" has tiles for each platform.
IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu")


class _Plan(NamedTuple):
  """What is fixed when the program is traced."""

  layout: Layout
  softcap: float | None
  fixed: Implementation | None  # None: by platform,
  pallas: bool  # which includes kernels
  keep: bool = False  # the logits, between forward and backward
  slice: int = 0  # columns of the weight to gather at a time; 0: all
  by_rows: bool | None = None  # see `pallas`


def linear_logprob(
  hidden: jax.Array,  # [T, D]
  weight: jax.Array,  # [D, V]
  targets: jax.Array,  # i32[T]
  mask: jax.Array,  # bool[T]
  temperature: jax.Array | float = 1.0,  # scalar or [T]
  *,
  softcap: float | None = None,
  implementation: str | Implementation | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (logprob, entropy, lse), each [T], float32 (float64 where the inputs are).

  logits = softcap(hidden @ weight) / temperature, accumulated in float32 or wider;
  softcap(l) = softcap * tanh(l / softcap), or l when None. Entropy is in nats.

  Rows where `mask` is False are not read (NaN, target -1 and temperature 0 are fine there), give 0
  and receive no gradient. Differentiable in hidden and weight; temperature counts as a constant.

  Raises:
    ValueError: shapes that do not fit, an implementation that does not exist or cannot run (which
      for the platform is known when the program is compiled), a softcap that is not positive.
  """
  _check(hidden, weight, mask, temperature, softcap, targets=targets)
  if implementation == "reference":
    return reference.linear_logprob(hidden, weight, targets, mask, temperature, softcap=softcap)
  plan, rows = _prepare(hidden, weight, targets, mask, temperature, softcap, implementation)
  logprob, entropy, lse = (x[: mask.shape[0]] for x in _linear_logprob(plan, *rows))
  return logprob, entropy, lse


def linear_logprob_loss(
  hidden: jax.Array,  # [T, D]
  weight: jax.Array,  # [D, V]
  targets: jax.Array,  # i32[T]
  mask: jax.Array,  # bool[T]
  temperature: jax.Array | float,  # scalar or [T]
  token_loss: Callable[..., jax.Array],
  arrays: Any,  # pytree of [T, ...] and scalars
  *,
  softcap: float | None = None,
  implementation: str | Implementation | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
  """sum_t token_loss(logprob, entropy, arrays)_t over rows under the mask; see linear_logprob.

  As the loss of a token depends on no other token's log-prob, its gradient is known as soon as its
  logits are: differentiated, this computes the gradients in the forward pass, without computing
  the logits twice. Undifferentiated it costs a forward pass only.

  Args:
    token_loss: (logprob[C], entropy[C], arrays) -> [C], for some C of the T rows, with those rows
      of `arrays` (scalars come as they are). It must not capture traced arrays.
    arrays: not read where masked.

  Returns:
    (loss, (logprob, entropy, lse)). Only the loss is differentiable, once, in hidden and weight;
    nothing flows back through the rest, nor into `arrays`.

  Raises:
    ValueError: as linear_logprob; token_loss does not give one loss per token.
  """
  _check(hidden, weight, mask, temperature, softcap, targets=targets)
  for path, x in jax.tree_util.tree_leaves_with_path(arrays):
    if jnp.ndim(x) and jnp.shape(x)[:1] != mask.shape:
      name = jax.tree_util.keystr(path)
      raise ValueError(
        f"arrays{name} has shape {jnp.shape(x)}, expected a scalar or [T, ...] with T = {len(mask)}"
      )
  arrays = jax.lax.stop_gradient(jax.tree.map(jnp.asarray, arrays))
  if implementation == "reference":
    logprob, entropy, lse = reference.linear_logprob(
      hidden, weight, targets, mask, temperature, softcap=softcap
    )
    losses = token_loss_of(token_loss, logprob.dtype, mask.shape[0], arrays)(
      logprob, entropy, arrays
    )
    loss = jnp.sum(jnp.where(mask, losses, 0))
    return loss, jax.lax.stop_gradient((logprob, entropy, lse))
  plan, rows = _prepare(hidden, weight, targets, mask, temperature, softcap, implementation)
  arrays = _padded(plan.layout, mask.shape[0], arrays)
  count = rows[3].shape[0] // plan.layout.row_shards
  tokens = token_loss_of(token_loss, arithmetic.wide(hidden, weight), count, arrays)
  loss, outs = _linear_logprob_loss(plan, tokens, *rows, arrays)
  logprob, entropy, lse = (jax.lax.stop_gradient(x[: mask.shape[0]]) for x in outs)
  return loss, (logprob, entropy, lse)


def expected_score(
  hidden: jax.Array,  # [T, D]
  weight: jax.Array,  # [D, V]
  mask: jax.Array,  # bool[T]
  temperature: jax.Array | float = 1.0,  # scalar or [T]
) -> jax.Array:
  """sum_v p_v^2 (H + log p_v) per row [T], p = softmax(hidden @ weight / temperature), H = entropy.

  0 where masked; no gradient; in chunks on every platform, and over the mesh as linear_logprob.
  """
  _check(hidden, weight, mask, temperature, None)
  hidden, weight = jax.lax.stop_gradient((hidden, weight))
  targets = jnp.zeros(mask.shape, jnp.int32)
  plan, rows = _prepare(hidden, weight, targets, mask, temperature, None, None)
  hidden, weight, _, padded, temperature = rows
  layout = plan.layout
  with_tile = lambda tile: functools.partial(xla.expected_score, layout=layout, tile=tile)
  run = lambda *args: jax.lax.platform_dependent(
    *args, cpu=with_tile(xla.CPU), default=with_tile(xla.ACCELERATOR)
  )
  specs = (layout.row, layout.weight(), layout.row, layout.row)
  run = layout.map(run, specs, layout.row)
  return run(hidden, weight, padded, temperature)[: mask.shape[0]]


# --- arguments ------------------------------------------------------------------------------------


def _check(hidden, weight, mask, temperature, softcap, **rows) -> None:
  if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[0]:
    raise ValueError(f"hidden {hidden.shape} and weight {weight.shape}: expected [T, D] and [D, V]")
  for name, x in {**rows, "mask": mask}.items():
    if x.shape != hidden.shape[:1]:
      raise ValueError(f"{name} has shape {x.shape}, expected [T] = {hidden.shape[:1]}")
  if jnp.shape(temperature) not in ((), hidden.shape[:1]):
    raise ValueError(f"temperature has shape {jnp.shape(temperature)}, expected a scalar or [T]")
  if softcap is not None and not softcap > 0:
    raise ValueError(f"softcap is {softcap!r}, expected a positive number or None")


def _prepare(hidden, weight, targets, mask, temperature, softcap, implementation):
  """-> (plan, arguments of _linear_logprob)."""
  hidden, weight, targets = (jnp.asarray(x) for x in (hidden, weight, targets))
  mask = jnp.asarray(mask, bool)
  temperature = jnp.broadcast_to(temperature, mask.shape).astype(arithmetic.wide(hidden, weight))
  # Of masked rows nothing is read: temperature 0 and target -1 are fine there.
  temperature = jax.lax.stop_gradient(jnp.where(mask, temperature, 1))
  targets = jnp.where(mask, targets, 0).astype(jnp.int32)
  if isinstance(implementation, str) and implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"linear_logprob: implementation {implementation!r} does not exist; "
      f"known: {', '.join(IMPLEMENTATIONS)}"
    )
  fixed = pallas() if implementation == "pallas_tpu" else implementation
  layout = layout_of(weight.shape[1])
  plan = _Plan(
    layout, softcap, fixed if isinstance(fixed, Implementation) else None, implementation is None
  )
  hidden, targets, mask, temperature = _padded(
    layout, mask.shape[0], (hidden, targets, mask, temperature)
  )
  temperature = jnp.where(mask, temperature, 1)
  if implementation in (None, "xla"):
    logits = mask.shape[0] // layout.row_shards * (weight.shape[1] // layout.vocabulary_shards)
    plan = plan._replace(keep=logits <= xla.SMALL)
  if not plan.keep:
    plan = plan._replace(slice=columns.slice_of(layout, weight))
  if plan.slice:  # what the whole shard lies like, its slices do
    by_rows = pallas_tpu.lies_by_rows(*layout.shard(weight.shape))
    plan = plan._replace(by_rows=by_rows)
    if implementation == "pallas_tpu":
      plan = plan._replace(fixed=pallas(by_rows))
  if plan.fixed is not None and plan.fixed.unsupported is not None:
    reason = plan.fixed.unsupported(hidden, weight)
    if reason:
      raise CannotRun(f"linear_logprob: implementation {plan.fixed.name!r} cannot run: {reason}")
  return plan, (hidden, weight, targets, mask, temperature)


def _padded(layout: Layout, count: int, arrays):
  """Rows of zeros, as many as the split over the mesh needs."""
  more = -count % layout.row_shards
  if not more:
    return arrays
  pad = lambda x: jnp.pad(x, ((0, more), *((0, 0),) * (x.ndim - 1))) if x.ndim else x
  return jax.tree.map(pad, arrays)


# --- which implementation -------------------------------------------------------------------------


def _run(plan: _Plan, method: Callable[..., Any], *args):
  """method(implementation, *args) for the one that is fixed, or for that of the platform."""
  fixed = plan.fixed
  if fixed is not None:
    if fixed.platforms is not None:
      where = ", ".join(fixed.platforms)
      text = f"linear_logprob: implementation {fixed.name!r} runs on {where}"
      args = (only_on(fixed.platforms, text, args[0]), *args[1:])
    return method(fixed, *args)
  by = lambda implementation: functools.partial(method, implementation)
  branches = {"cpu": by(xla_tiles(xla.CPU)), "default": by(xla_tiles(xla.ACCELERATOR))}
  if plan.pallas and not pallas_tpu.unsupported(*args[:2]):
    branches["tpu"] = by(pallas(plan.by_rows))
  return jax.lax.platform_dependent(*args, **branches)


def _fit(hidden, weight, gradients):
  """One dtype, whichever implementation it was."""
  return gradients[0].astype(hidden.dtype), gradients[1].astype(weight.dtype)


# --- the operator ---------------------------------------------------------------------------------


def _values(plan: _Plan, *rows):
  return _forward(plan, *rows)[0]


def _forward(plan: _Plan, *rows):
  """-> ((logprob, entropy, lse), the logits that are kept or None)."""
  layout = plan.layout

  def local(hidden, weight, targets, mask, temperature):
    args = (hidden, weight, layout.columns(targets, weight.shape[1]), mask, temperature)
    if plan.keep:
      return whole.forward(*args, softcap=plan.softcap, layout=layout)
    return _merged(plan, *args), None

  kept = PartitionSpec(layout.rows, layout.vocabulary)
  return layout.map(local, _specs(plan), ((layout.row,) * 3, kept))(*rows)


def _specs(plan: _Plan):
  """Of (hidden, weight, targets, mask, temperature)."""
  row = plan.layout.row
  return (row, plan.layout.weight(split=plan.slice > 0), row, row, row)


def _merged(plan: _Plan, *args):
  """Inside map: (logprob, entropy, lse) over all columns, 0 where masked."""
  forward = lambda implementation, *args: implementation.forward(*args, softcap=plan.softcap)
  run = functools.partial(_run, plan, forward)
  parts: Any = columns.forward(run, plan.layout, plan.slice, *args) if plan.slice else run(*args)
  return tuple(jnp.where(args[3], x, 0) for x in plan.layout.merge(*parts))


def _gradients(plan: _Plan, *args):
  """Inside map: (d_hidden, d_weight), summed over the shards that share them."""
  layout = plan.layout
  backward = lambda implementation, hidden, weight, *rest: _fit(
    hidden, weight, implementation.backward(hidden, weight, *rest, softcap=plan.softcap)
  )
  run = functools.partial(_run, plan, backward)
  if plan.slice:
    d_hidden, d_weight = columns.backward(run, layout, plan.slice, *args)
    return layout.sum_vocabulary(d_hidden.astype(args[0].dtype)), d_weight
  return _summed(layout, *run(*args))


def _summed(layout: Layout, d_hidden: Any, d_weight: Any):
  return layout.sum_vocabulary(d_hidden), layout.sum_weight_gradient(d_weight)


def _first(plan, *primals):
  rows = [x.value for x in primals]
  outs, logits = _forward(plan, *rows)
  return outs, (rows, outs[1:], logits)


def _backward(plan: _Plan, saved, cotangents):
  rows, (entropy, lse), logits = saved
  layout = plan.layout

  def local(rows, entropy, lse, cotangents, logits):
    hidden, weight, targets, mask, temperature = rows
    cotangents = jax.tree.map(lambda c: jnp.where(mask, c, 0), cotangents)
    targets = layout.columns(targets, weight.shape[1])
    args = (hidden, weight, targets, mask, temperature, lse, entropy, cotangents)
    if plan.keep:
      found = whole.backward(*args, logits, softcap=plan.softcap)
      return _summed(layout, *_fit(hidden, weight, found))
    return _gradients(plan, *args)

  kept = PartitionSpec(layout.rows, layout.vocabulary)
  specs = (_specs(plan), layout.row, layout.row, layout.row, kept)
  given = tuple(None if isinstance(c, SymbolicZero) else c for c in cotangents)
  outs = (layout.row, layout.weight_gradient(rows[0].shape[1]))
  gradients = layout.map(local, specs, outs)(tuple(rows), entropy, lse, given, logits)
  return (*gradients, None, None, None)


_linear_logprob: Any = jax.custom_vjp(_values, nondiff_argnums=(0,))
_linear_logprob.defvjp(_first, _backward, symbolic_zeros=True)


# --- the operator and a loss ----------------------------------------------------------------------


def _loss(plan: _Plan, token_loss: TokenLoss, *args):
  *rows, arrays = args
  outs, _ = _forward(plan, *rows)
  layout = plan.layout

  def local(mask, logprob, entropy, arrays):
    losses = token_loss(logprob, entropy, arrays)
    return layout.sum_rows(jnp.sum(jnp.where(mask, losses, 0)))

  specs = (layout.row, layout.row, layout.row, layout.rows_of(arrays))
  total = layout.map(local, specs, PartitionSpec())
  return total(rows[3], *outs[:2], arrays), outs


def _loss_first(plan: _Plan, token_loss: TokenLoss, *args):
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
      found = _run(plan, functools.partial(_loss_by, plan, token_loss), *args)
    losses, outs, gradients = found
    return (layout.sum_rows(jnp.sum(losses)), outs), gradients

  specs = (_specs(plan), layout.rows_of(arrays))
  gradients = (layout.row, layout.weight_gradient(rows[0].shape[1]))
  run = layout.map(local, specs, ((PartitionSpec(), layout.row), gradients))
  return run(tuple(rows), arrays)


def _loss_whole(plan: _Plan, token_loss: TokenLoss, *args):
  hidden, weight, targets, mask, temperature, arrays = args
  rows = (hidden, weight, targets, mask, temperature)
  outs, logits = whole.forward(*rows, softcap=plan.softcap, layout=plan.layout)
  logprob, entropy, lse = outs
  losses, g, h = token_loss.gradients(mask, logprob, entropy, arrays)
  found = whole.backward(*rows, lse, entropy, (g, h, None), logits, softcap=plan.softcap)
  return losses, outs, _summed(plan.layout, *_fit(hidden, weight, found))


def _loss_by(plan: _Plan, token_loss: TokenLoss, implementation: Implementation, *args):
  """(losses, outputs, gradients), by the implementation's own way or not."""
  if implementation.loss_gradients is None:
    return _loss_in_two(plan._replace(fixed=implementation), token_loss, *args)
  losses, outs, *found = implementation.loss_gradients(
    *args, token_loss=token_loss, layout=plan.layout, softcap=plan.softcap
  )
  return losses, outs, _summed(plan.layout, *_fit(args[0], args[1], found))


def _loss_in_two(plan: _Plan, token_loss: TokenLoss, *args):
  """As _loss_by, forward and then backward: four products."""
  *rows, arrays = args
  logprob, entropy, lse = outs = _merged(plan, *rows)
  losses, g, h = token_loss.gradients(rows[3], logprob, entropy, arrays)
  return losses, outs, _gradients(plan, *rows, lse, entropy, (g, h, None))


def _loss_backward(plan: _Plan, token_loss: TokenLoss, gradients, cotangents):
  d_hidden, d_weight = (g * cotangents[0].astype(g.dtype) for g in gradients)
  return d_hidden, d_weight, None, None, None, None


_linear_logprob_loss: Any = jax.custom_vjp(_loss, nondiff_argnums=(0, 1))
_linear_logprob_loss.defvjp(_loss_first, _loss_backward)
