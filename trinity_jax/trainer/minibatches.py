"""Several updates per batch: how it is split, and how their metrics become one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trinity_jax.experience import Experience


def minibatches(experiences: Sequence[Experience], count: int) -> list[list[Experience]]:
  """`count` parts of equal numbers of groups, each group whole; experts are dealt out likewise.

  Group g goes to part g mod count, in the order given.
  """
  groups: dict[tuple, list[Experience]] = {}
  for e in experiences:
    groups.setdefault((e.source, *e.id.group), []).append(e)
  by_source: dict[int, list[list[Experience]]] = {}
  for (source, *_), members in groups.items():
    by_source.setdefault(source, []).append(members)
  return [
    [e for every in by_source.values() for group in every[i::count] for e in group]
    for i in range(count)
  ]


def joined(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """Metrics of a step from those of its updates: largest of maxima and of counters of bad steps,
  smallest of minima, sums of sizes, means of the rest."""
  if len(rows) == 1:
    return dict(rows[0])
  out = {}
  for name in rows[0]:
    values = [r[name] for r in rows if name in r]
    if name.endswith("/max") or name in ("nonfinite_steps", "loss/nan_count"):
      out[name] = max(values)
    elif name.endswith("/min"):
      out[name] = min(values)
    elif name in ("group/effective_batch_size", "packing/rows", "packing/micro_batches"):
      out[name] = sum(values)
    else:
      out[name] = sum(values) / len(values)
  return out
