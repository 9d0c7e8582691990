"""Which implementation works on the arrays of one device: a fixed one, or that of the platform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from . import pallas_tpu, xla
from .layout import Layout
from .platform import only_on


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


class Plan(NamedTuple):
  """What is fixed when the program is traced."""

  layout: Layout
  softcap: float | None
  fixed: Implementation | None  # None: by platform,
  pallas: bool  # which includes kernels
  keep: bool = False  # the logits, between forward and backward
  slice: int = 0  # columns of the weight to gather at a time; 0: all
  by_rows: bool | None = None  # see `pallas`


def dispatch(plan: Plan, method: Callable[..., Any], *args):
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


def fit(hidden, weight, gradients):
  """One dtype, whichever implementation it was."""
  return gradients[0].astype(hidden.dtype), gradients[1].astype(weight.dtype)
