"""Curves of a run as one PNG for a README: reward and held-out accuracy, loss, throughput."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trinity_jax.errors import UserError
from trinity_jax.monitor.writers import read_stage

if TYPE_CHECKING:
  from matplotlib.axes import Axes

SIZE = (1200, 500)  # pixels
_DPI = 100
_INK, _FAINT = "#24292f", "#8c959f"
_SHADES = ("#eef2f7", "#eaf5ec", "#fbf3e6", "#f4eefb")  # one per stage
_STYLE: dict[Any, Any] = {
  "font.size": 11, "axes.titlesize": 12, "axes.labelsize": 11, "axes.edgecolor": _FAINT,
  "axes.labelcolor": _INK, "text.color": _INK, "xtick.color": _INK, "ytick.color": _INK,
  "axes.spines.top": False, "axes.grid": True, "grid.color": "#d0d7de", "grid.linewidth": 0.6,
  "axes.axisbelow": True, "figure.facecolor": "white", "savefig.facecolor": "white",
  "font.family": "DejaVu Sans", "legend.frameon": True, "legend.framealpha": 0.9,
  "legend.edgecolor": "none", "legend.fontsize": 10, "axes.titleweight": "bold",
}


class Stage(NamedTuple):
  """Rows of one stage, of steps `first` to `last`; it is drawn from x = `index` to `index + 1`."""

  name: str
  rows: list[dict[str, Any]]
  index: int
  first: int
  last: int

  def x(self, step: float) -> float:
    return self.index + (step - self.first) / max(self.last - self.first, 1)


def curves_png(paths: str | Path | Sequence[str | Path], out_path: str | Path, *, title: str = "",
               stages: Sequence[str] | Mapping[str, tuple[int, int]] | None = None) -> Path:
  """Draws the curves of a run and returns `out_path`.

  Stages stand side by side and get the same width, however many steps they have: 40 steps of GRPO
  would be a sliver behind 300 of SFT. Ticks are the steps of the rows.

  Args:
    paths: metrics.jsonl of the run, or one file per stage; what explorers' processes wrote beside
      it is drawn too.
    out_path: the PNG, 1200 x 500 pixels.
    title: above the figure.
    stages: names, one per file; or, for a single file, names by the rows' `stage` metric, or
      `{name: (first step, last step)}`.

  Raises:
    UserError: a file that cannot be read, no rows, or names that do not fit the files.
  """
  found = _stages([paths] if isinstance(paths, (str, Path)) else list(paths), stages)
  # The object interface with its own canvas: pyplot keeps global state and picks a backend.
  import matplotlib
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(SIZE[0] / _DPI, SIZE[1] / _DPI), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.55, 1))
    main = figure.add_subplot(grid[:, 0])
    loss = figure.add_subplot(grid[0, 1], sharex=main)
    speed = figure.add_subplot(grid[1, 1], sharex=main)
    for axes in (main, loss, speed):
      _bands(axes, found, label=axes is main)
    _draw_rewards(main, found)
    _draw_loss(loss, found)
    _draw_speed(speed, found)
    speed.set_xlabel("step")
    loss.tick_params(labelbottom=False)
    if title:
      figure.suptitle(_plain(title), fontsize=14, fontweight="bold")
    # Several processes of a run may draw at once.
    part = Path(f"{out_path}.{os.getpid()}")
    figure.savefig(part, dpi=_DPI, format="png", metadata={"Software": None})
    part.replace(out_path)
  return Path(out_path)


def _plain(text: str) -> str:
  """No mathtext: a dollar sign is a dollar sign."""
  return text.replace("$", r"\$")


# --- rows ----------------------------------------------------------------------------------------


def _stages(paths: list[str | Path], names: Any) -> list[Stage]:
  files = [read_stage(path) for path in paths]
  if len(files) > 1:
    labels = list(names) if names is not None else [f"stage {i + 1}" for i in range(len(files))]
    if len(labels) != len(files):
      raise UserError(f"{len(labels)} stage names for {len(files)} metrics files; give one each")
    groups = list(zip(labels, files))
  elif isinstance(names, Mapping):
    groups = [(name, [r for r in files[0] if first <= r["step"] <= last])
              for name, (first, last) in names.items()]
  else:
    by_index: dict[int, list[dict[str, Any]]] = {}
    for row in files[0]:
      # Rows without the metric belong to the stage before them.
      by_index.setdefault(int(row.get("stage", max(by_index, default=0))), []).append(row)
    labels = list(names or ())
    groups = [(labels[i] if i < len(labels) else f"stage {i + 1}", by_index[i])
              for i in sorted(by_index)]
    if len(groups) == 1 and not labels:
      groups = [("", groups[0][1])]
  out: list[Stage] = []
  for name, rows in groups:
    if rows:
      steps = [r["step"] for r in rows]
      out.append(Stage(name, rows, len(out), min(steps), max(steps)))
  if not out:
    raise UserError(f"no metrics to draw in {', '.join(str(p) for p in paths)}")
  return out


def _series(stages: Sequence[Stage], name: str) -> list[tuple[list[float], list[float]]]:
  """(x, y) of a metric per stage that has it; finite values; of two rows at one step the later."""
  out = []
  for stage in stages:
    points: dict[float, float] = {}
    for row in stage.rows:
      value = row.get(name)
      if isinstance(value, (int, float)) and math.isfinite(value):
        points[stage.x(row["step"])] = float(value)
    if points:
      xs = sorted(points)
      out.append((xs, [points[x] for x in xs]))
  return out


def _smooth(values: list[float], span: int) -> list[float]:
  """Centred moving average over `span` values, shorter at the ends."""
  half = span // 2
  return [sum(v) / len(v) for v in
          (values[max(i - half, 0):i + half + 1] for i in range(len(values)))]


# --- panels --------------------------------------------------------------------------------------


def _bands(axes: Axes, stages: Sequence[Stage], label: bool) -> None:
  """Shades the stages, names them along the top, and puts the steps on the x axis."""
  from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

  axes.set_xlim(0, len(stages))
  ticks: dict[float, int] = {}
  for stage in stages:
    nice = MaxNLocator(max(10 // len(stages), 2), integer=True, steps=[1, 2, 2.5, 5, 10])
    for step in nice.tick_values(stage.first, stage.last):
      # Not at a common border: two labels would collide there.
      if stage.first <= step <= stage.last and (step < stage.last or stage is stages[-1]):
        ticks[stage.x(step)] = int(step)
  axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
  axes.xaxis.set_major_formatter(FuncFormatter(
    lambda x, _: str(ticks[min(ticks, key=lambda t: abs(t - x))])))
  if len(stages) == 1 and not stages[0].name:
    return
  for stage in stages:
    i = stage.index
    axes.axvspan(i, i + 1, color=_SHADES[i % len(_SHADES)], lw=0, zorder=0)
    if i:
      axes.axvline(i, color=_FAINT, lw=1, ls=(0, (4, 3)), zorder=1)
    if label:
      room = 68 // len(stages)  # characters: a long name would run into its neighbour's
      name = stage.name if len(stage.name) <= room else stage.name[:room - 1] + "…"
      axes.text(i + 0.5, 1.015, _plain(name), ha="center", va="bottom",
                transform=axes.get_xaxis_transform(), color=_INK, fontweight="bold")


def _line(axes: Axes, series: list[tuple[list[float], list[float]]], color: str, label: str,
          markers: bool = False) -> bool:
  """Draws a curve per stage, smoothed over the raw values when it has many points.

  Returns False when there is nothing. Stages are not joined, a loss means another thing in each;
  but a curve with markers is: held-out accuracy means the same throughout.
  """
  if markers and series:
    series = [([x for xs, _ in series for x in xs], [y for _, ys in series for y in ys])]
  for i, (xs, ys) in enumerate(series):
    name = None if i else label
    if markers:
      axes.plot(xs, ys, color=color, lw=2, marker="o", ms=5, label=name, zorder=4,
                clip_on=False)
    elif len(xs) < 60:
      axes.plot(xs, ys, color=color, lw=1.8, marker="o" if len(xs) == 1 else "", label=name,
                zorder=3)
    else:
      axes.plot(xs, ys, color=color, lw=0.8, alpha=0.3, zorder=2)
      axes.plot(xs, _smooth(ys, max(len(ys) // 30, 3)), color=color, lw=1.9, label=name, zorder=3)
  return bool(series)


def _legend_above(axes: Axes, handles: list, labels: list) -> None:
  """A legend in one row over the panel, where it hides nothing."""
  axes.legend(handles, labels, loc="lower right", bbox_to_anchor=(1.0, 0.97), ncols=len(labels),
              columnspacing=1.2, handlelength=1.4, frameon=False)


def _held_out(stages: Sequence[Stage]) -> str:
  """The metric that is the held-out accuracy: eval/accuracy, else the first eval/*/accuracy."""
  names = sorted({n for s in stages for r in s.rows for n in r
                  if n.startswith("eval/") and n.endswith("/accuracy")})
  return "eval/accuracy" if any("eval/accuracy" in r for s in stages for r in s.rows) else (
    names[0] if names else "eval/accuracy")


def _draw_rewards(axes: Axes, stages: Sequence[Stage]) -> None:
  rewards = _series(stages, "reward/mean")
  accuracy = _series(stages, _held_out(stages))
  drawn = _line(axes, rewards, "#2da44e", "mean reward (training)")
  drawn |= _line(axes, accuracy, "#0969da", "held-out accuracy (greedy)", markers=True)
  for xs, ys in accuracy:  # the end of each stage is what a reader looks for
    axes.annotate(f"{ys[-1]:.2f}", (xs[-1], ys[-1]), xytext=(-4, 8), ha="right", zorder=5,
                  textcoords="offset points", color="#0969da", fontweight="bold", fontsize=12)
  axes.set_xlabel("step")
  axes.set_ylabel("reward, accuracy")
  values = [y for _, ys in rewards + accuracy for y in ys]
  if values and min(values) >= 0 and max(values) <= 1:
    axes.set_ylim(0, 1.1)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
  if drawn:
    axes.legend(loc="upper left" if accuracy and accuracy[0][1][-1] < 0.75 else "lower right")
  else:
    _nothing(axes, "no reward was logged")


def _draw_loss(axes: Axes, stages: Sequence[Stage]) -> None:
  axes.set_ylabel("loss (nats)")
  first = "loss" if any("loss" in r for s in stages for r in s.rows) else "sft_loss"
  drawn = _line(axes, _series(stages, first), "#bc4c00", "loss")
  entropy = _series(stages, "entropy")
  handles, labels = axes.get_legend_handles_labels()
  if entropy:
    right = axes.twinx()
    right.grid(False)
    right.spines["right"].set_visible(True)
    right.set_ylabel("entropy (nats)")
    _line(right, entropy, "#8250df", "entropy")
    more = right.get_legend_handles_labels()
    handles, labels = handles + more[0], labels + more[1]
  if drawn or entropy:
    _legend_above(axes, handles, labels)
  else:
    _nothing(axes, "no loss was logged")


def _draw_speed(axes: Axes, stages: Sequence[Stage]) -> None:
  from matplotlib.ticker import EngFormatter

  axes.set_ylabel("tokens/s")
  axes.yaxis.set_major_formatter(EngFormatter(sep=""))
  drawn = _line(axes, _series(stages, "throughput/gen_tokens_per_s"), "#1b7c83", "sampling")
  drawn |= _line(axes, _series(stages, "throughput/train_tokens_per_s"), "#bf8700", "training")
  drawn |= _line(axes, _series(stages, "throughput/tokens_per_s"), "#57606a", "end to end")
  if drawn:
    axes.set_ylim(bottom=0)
    _legend_above(axes, *axes.get_legend_handles_labels())
  else:
    _nothing(axes, "no throughput was logged")


def _nothing(axes: Axes, text: str) -> None:
  axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_FAINT)
