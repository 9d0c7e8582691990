"""Log-prob of given next tokens under softmax(hidden @ weight), without keeping [T, V].

Axes: T rows (tokens), D model width, V vocabulary.

An implementation works on the arrays of one device and is chosen per platform (implementation.py).
Its parts are split over the mesh in context (layout.py), merged, and given a derivative
(operator.py) or a loss whose gradients the forward pass computes (fused_loss.py). A [T, V] that is
small on each device (xla.SMALL) is kept between forward and backward instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import CannotRun
from . import arithmetic, columns, fused_loss, operator, reference, xla
from .implementation import IMPLEMENTATIONS, Implementation, Plan, pallas
from .layout import Layout, layout_of
from .pallas_tpu_tiles import lies_by_rows
from .token_loss import token_loss_of


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
  logprob, entropy, lse = (x[: mask.shape[0]] for x in operator.linear_logprob(plan, *rows))
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
  loss, outs = fused_loss.linear_logprob_loss(plan, tokens, *rows, arrays)
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
  """-> (plan, arguments of operator.linear_logprob)."""
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
  plan = Plan(
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
    by_rows = lies_by_rows(*layout.shard(weight.shape))
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
