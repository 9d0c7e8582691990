"""Held-out accuracy of a run's checkpoints as one PNG: a panel per set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trinity_jax.monitor.plots import _DPI, _STYLE, SIZE, Stage, _bands, _plain

if TYPE_CHECKING:
  from matplotlib.axes import Axes

_COLUMNS = 3
_BLUE = "#0969da"


def bench_png(results: Sequence[dict[str, Any]], out_path: str | Path, *, title: str = "") -> Path:
  """Draws mean@k over the checkpoints, between worst@k and best@k; returns `out_path`.

  Stages stand side by side, each from step 0 to its newest checkpoint.

  Args:
    results: of bench.bench.
    out_path: the PNG, 1200 x 500 pixels per row of three panels.
  """
  import matplotlib
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  sets = list(dict.fromkeys(r["set"] for r in results))
  names = list(dict.fromkeys(r["stage"] for r in results))
  last = lambda name: max(r["step"] for r in results if r["stage"] == name)
  shown = lambda name: name if len(names) > 1 else ""
  stages = {name: Stage(shown(name), [], i, 0, last(name)) for i, name in enumerate(names)}
  columns = min(len(sets), _COLUMNS)
  lines = -(-len(sets) // columns)
  with matplotlib.rc_context(_STYLE):
    figure = Figure(
      figsize=(SIZE[0] / _DPI, SIZE[1] * lines / _DPI), dpi=_DPI, layout="constrained"
    )
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(lines, columns)
    for i, name in enumerate(sets):
      axes = figure.add_subplot(grid[divmod(i, columns)])
      _draw(axes, stages, [r for r in results if r["set"] == name])
      axes.set_xlabel(f"{_plain(name)}: step")
    if title:
      figure.suptitle(_plain(title), fontsize=14, fontweight="bold")
    figure.savefig(out_path, dpi=_DPI, format="png", metadata={"Software": None})
  return Path(out_path)


def _draw(axes: Axes, stages: Mapping[str, Stage], results: Sequence[dict[str, Any]]) -> None:
  _bands(axes, list(stages.values()), label=True)
  labelled = False
  for name, stage in stages.items():
    # Of a checkpoint and a Hugging Face folder of one step, which are the same weights, one.
    points = {r["step"]: r for r in results if r["stage"] == name}
    if not points:
      continue
    k = points[max(points)]["settings"]["runs"]
    # Results with another k, of checkpoints that are deleted now, have no place in this curve.
    rows = [points[s] for s in sorted(points) if points[s]["settings"]["runs"] == k]
    xs = [stage.x(r["step"]) for r in rows]
    mean, best, worst = ([r[f"{what}@{k}"] for r in rows] for what in ("mean", "best", "worst"))
    label = lambda text, shown=labelled: "" if shown else text
    if k > 1:
      axes.fill_between(
        xs, worst, best, color=_BLUE, alpha=0.15, lw=0, label=label(f"worst@{k} to best@{k}")
      )
    axes.plot(
      xs, mean, color=_BLUE, lw=2, marker="o", ms=5, clip_on=False, zorder=4,
      label=label(f"mean@{k}"),
    )  # fmt: skip
    axes.annotate(
      f"{mean[-1]:.2f}", (xs[-1], mean[-1]), xytext=(-4, 8), ha="right", zorder=5,
      textcoords="offset points", color=_BLUE, fontweight="bold",
    )  # fmt: skip
    labelled = True
  axes.set_ylim(0, 1.1)
  axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
  axes.set_ylabel("accuracy")
  axes.legend(loc="upper left")
