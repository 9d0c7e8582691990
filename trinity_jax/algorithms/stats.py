"""Metrics that survive any split of a step: each says how it reduces.

A loss function returns `dict[str, Stat]`. A `Stat` is already reduced over the tokens it was given
(a few scalars), so carrying it through a loop over micro-batches costs nothing:

  carry = merge(carry, stats_of_this_micro_batch)      # associative, `neutral` is the identity
  metrics = finish(carry)                              # dict[str, f32 scalar], once per step

Means therefore divide by the count of the whole optimizer step, never by that of a micro-batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Kind(NamedTuple):
  """How one sort of metric merges: `merge[i]` and `neutral[i]` belong to part i of a Stat."""

  merge: tuple[Callable[[Any, Any], Any], ...]
  neutral: tuple[float, ...]
  finish: Callable[..., jax.Array]


def _present(value, count):
  # A statistic over no element at all is reported as 0: every record must be finite JSON.
  return jnp.where(count > 0, value, 0)


def _ess(count, total, square):
  return _present(jnp.square(total) / jnp.where(square > 0, square * count, 1), square)


def _explained(count, error, error_square, target, target_square):
  n = jnp.maximum(count, 1)
  square = target_square / n
  variance = square - jnp.square(target / n)
  unexplained = error_square / n - jnp.square(error / n)
  # Below that share a difference of two sums is rounding.
  varies = variance > 1e-6 * square
  return jnp.where(varies, 1 - unexplained / jnp.where(varies, variance, 1), 0)


KINDS: dict[str, Kind] = {
  "sum": Kind((jnp.add,), (0.0,), lambda total: total),
  "mean": Kind((jnp.add, jnp.add), (0.0, 0.0), lambda s, n: _present(s / jnp.maximum(n, 1), n)),
  "max": Kind((jnp.maximum, jnp.add), (-jnp.inf, 0.0), _present),
  "min": Kind((jnp.minimum, jnp.add), (jnp.inf, 0.0), _present),
  "ess": Kind((jnp.add,) * 3, (0.0,) * 3, _ess),
  "explained_variance": Kind((jnp.add,) * 5, (0.0,) * 5, _explained),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stat:
  """One metric, partly reduced. `parts` are scalars; their meaning is `KINDS[kind]`'s."""

  parts: tuple[jax.Array, ...]
  kind: str = dataclasses.field(metadata={"static": True})


Stats = Mapping[str, Stat]


def _selected(x, mask, fill):
  x, mask = jnp.asarray(x), jnp.asarray(mask, bool)
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32)) if x.dtype != jnp.bool_ else x + 0.0
  # `where` before any arithmetic: what a masked position holds, NaN included, is never read.
  x = jax.lax.stop_gradient(jnp.where(mask, x, jnp.asarray(fill, x.dtype)))
  return x, jnp.sum(jnp.broadcast_to(mask, x.shape), dtype=x.dtype)


def total(x: jax.Array) -> Stat:
  """Stat of a quantity whose shares add up over the step (a weighted loss, a count)."""
  x, _ = _selected(x, True, 0)
  return Stat((jnp.sum(x),), "sum")


def mean(x: jax.Array, mask: jax.Array) -> Stat:
  """Stat of the mean of `x` (any shape, bool allowed) over the positions where `mask`."""
  x, count = _selected(x, mask, 0)
  return Stat((jnp.sum(x), count), "mean")


def maximum(x: jax.Array, mask: jax.Array) -> Stat:
  """Stat of the largest `x` where `mask`."""
  x, count = _selected(x, mask, -jnp.inf)
  return Stat((jnp.max(x, initial=-jnp.inf), count), "max")


def minimum(x: jax.Array, mask: jax.Array) -> Stat:
  """Stat of the smallest `x` where `mask`."""
  x, count = _selected(x, mask, jnp.inf)
  return Stat((jnp.min(x, initial=jnp.inf), count), "min")


def effective_sample_size(weights: jax.Array, mask: jax.Array) -> Stat:
  """Stat of (sum w)^2 / (n sum w^2) where `mask`: 1 for equal weights, 1 / n for a single one."""
  w, count = _selected(weights, mask, 0)
  return Stat((count, jnp.sum(w), jnp.sum(jnp.square(w))), "ess")


def explained_variance(predictions: jax.Array, targets: jax.Array, mask: jax.Array) -> Stat:
  """Stat of 1 - Var(targets - predictions) / Var(targets) where `mask`; 0 for equal targets."""
  targets, count = _selected(targets, mask, 0)
  error = targets - _selected(predictions, mask, 0)[0]
  sums = (error, jnp.square(error), targets, jnp.square(targets))
  return Stat((count, *(jnp.sum(x) for x in sums)), "explained_variance")


def neutral(stats: Stats) -> dict[str, Stat]:
  """Returns the identity of `merge` with the structure of `stats`.

  `stats` may hold shapes only (from `jax.eval_shape`), which is how a loop over micro-batches gets
  the carry it starts from.
  """
  return {
    name: Stat(
      tuple(jnp.full(p.shape, v, p.dtype) for p, v in zip(s.parts, KINDS[s.kind].neutral)), s.kind
    )
    for name, s in stats.items()
  }


def merge(a: Stats, b: Stats) -> dict[str, Stat]:
  """Combines the stats of two disjoint sets of tokens; names and kinds must agree."""
  if a.keys() != b.keys() or any(a[k].kind != b[k].kind for k in a):
    raise TypeError(f"cannot merge stats of different names or kinds: {sorted(a)} and {sorted(b)}")
  return {
    name: Stat(
      tuple(f(x, y) for f, x, y in zip(KINDS[s.kind].merge, s.parts, b[name].parts)), s.kind
    )
    for name, s in a.items()
  }


def finish(stats: Stats) -> dict[str, jax.Array]:
  """Returns one scalar per metric; 0 where no position was selected."""
  return {name: KINDS[s.kind].finish(*s.parts) for name, s in stats.items()}
