"""What a run shows while it runs: a live view on a terminal, one plain line per step elsewhere.

The view must never end a run: an error while drawing turns the live view into plain lines, an
error while printing (closed pipe) turns the output off; both are logged once. Texts of models and
tasks pass through `text.sanitize` and are never parsed as markup.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from trinity_jax.errors import UserError
from trinity_jax.monitor import text as t
from trinity_jax.monitor.timeline import CATEGORIES

if TYPE_CHECKING:
  from rich.console import Console, RenderableType
  from rich.text import Text

  from trinity_jax.experience import Experience

log = logging.getLogger(__name__)

# (label, names in order of preference): the first one that a row has is shown.
HEADLINE = (
  ("reward", ("reward/mean",)),
  ("held-out", ("eval/accuracy",)),
  ("loss", ("loss", "sft_loss")),
  ("entropy", ("entropy",)),
  ("kl", ("ppo_kl", "kl")),
  ("grad", ("grad_norm",)),
  ("tok/s", ("throughput/tokens_per_s",)),
  ("gen tok/s", ("throughput/gen_tokens_per_s",)),
  ("stale", ("staleness/mean",)),
)
_CURVES = (("reward", "reward/mean", "green"), ("held-out", "eval/accuracy", "cyan"),
           ("loss", "loss", "yellow"))
_COLORS: dict[str, str] = dict(zip(CATEGORIES, (
  "blue", "cyan", "green", "magenta", "white", "bright_blue", "yellow", "bright_yellow", "red",
  "bright_red", "bright_black")))


class Sample(NamedTuple):
  """One rollout to show; `truth` may be empty, `reward` None when it was not graded."""

  prompt: str
  response: str
  reward: float | None = None
  truth: str = ""


def samples(experiences: Sequence[Experience], n: int) -> list[Sample]:
  """The first runs of the first groups, as texts for people."""
  first = [e for e in experiences if e.id.run == 0 and len(e.messages) > 1][:n]
  return [
    Sample(str(e.messages[-2]["content"]), str(e.messages[-1]["content"]), e.reward) for e in first
  ]


class Progress:
  """Shows a run.

  Args:
    mode: "live", "plain", "none", or "auto": live when the console is a terminal that can draw.
      "live" where the encoding cannot carry the drawing becomes plain, with a warning.
    title: shown above the live view.
    console: a rich Console; default one on stdout.
    clock: seconds, monotonic.
  """

  def __init__(self, mode: str = "auto", *, title: str = "", console: Console | None = None,
               clock: Callable[[], float] = time.monotonic):
    if mode not in ("auto", "live", "plain", "none"):
      raise ValueError(f"progress mode is {mode!r}, expected auto, live, plain or none")
    self._clock, self._title, self._lock = clock, t.sanitize(title, 80), threading.Lock()
    self._begin = clock()
    self._times: deque[tuple[int, float]] = deque(maxlen=20)
    self._curves: dict[str, deque[float]] = {name: deque(maxlen=2000) for _, name, _ in _CURVES}
    self._row: Mapping[str, Any] = {}
    self._shown: dict[str, Any] = {}  # latest value of every metric: eval is not in every row
    self._before: dict[str, str] = {}  # prompt -> last response
    self._samples: list[tuple[Sample, str | None]] = []
    self._step, self._total, self._live = 0, 0, None
    self._mode = mode
    self._console: Any = console
    if mode == "none":
      return
    out: Any = _console(mode) if console is None else console
    self._console = out
    # Rich ends the process when the reader of its output has gone; a run must outlive its view.
    out.on_broken_pipe = _broken_pipe
    draws = out.encoding.lower().startswith("utf")
    if mode == "auto":
      able = out.is_terminal and not out.is_dumb_terminal and out.width >= 20
      self._mode = "live" if able and draws else "plain"
    elif mode == "live" and not draws:
      log.warning("progress is plain: the output's encoding %s has no bars", out.encoding)
      self._mode = "plain"
    if self._mode == "live":
      self._attempt(self._start_live)

  @property
  def mode(self) -> str:
    """"live", "plain" or "none": what it is doing now."""
    return self._mode

  def update(self, step: int, total: int | None = None, metrics: Mapping[str, float] | None = None,
             samples: Sequence[Sample] = ()) -> None:
    """Shows the state after `step` of `total` (None or 0: unknown).

    Args:
      metrics: the row that the writers get; names of the catalogue.
      samples: rollouts to show; a prompt seen before is shown with what it answered then.
    """
    with self._lock:
      if self._mode == "none":
        return
      self._attempt(lambda: self._absorb(step, total or 0, metrics or {}, samples))
      self._draw()

  def message(self, text: str) -> None:
    """Prints a text above the live view, or as lines; control characters are made visible."""
    with self._lock:
      if self._mode != "none":
        self._attempt(lambda: self._print(
          "\n".join(t.sanitize(line, 2000) for line in str(text).splitlines())))

  def close(self) -> None:
    """Leaves the last view on the screen; a second call does nothing."""
    with self._lock:
      if self._live is not None:
        self._attempt(self._stop_live)
      self._mode = "none"

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()

  # --- state ---

  def _absorb(self, step: int, total: int, metrics: Mapping[str, Any],
              samples: Sequence[Sample]) -> None:
    if self._times and step < self._times[-1][0]:
      self._times.clear()  # another stage
    if not self._times or step > self._times[-1][0]:  # once a step: an evaluation shows its own row
      self._times.append((step, self._clock()))
    self._step, self._total, self._row = step, total, dict(metrics)
    self._shown.update(metrics)
    for name, curve in self._curves.items():
      if name in metrics:
        curve.append(float(metrics[name]))
    if samples:
      self._samples = [(s, self._before.get(s.prompt)) for s in samples]
      for s in samples:
        self._before.pop(s.prompt, None)  # newest last
        self._before[s.prompt] = s.response
      while len(self._before) > 256:
        del self._before[next(iter(self._before))]

  def _eta(self) -> str:
    """Time left, from the pace of the newest steps."""
    if len(self._times) < 2 or self._total <= 0:
      return "?"
    (first, begin), (newest, end) = self._times[0], self._times[-1]
    return t.duration((end - begin) / (newest - first) * max(self._total - newest, 0))

  def _headline(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for label, names in HEADLINE:
      name = next((n for n in names if n in row), None)
      if name is not None:
        found.append((label, t.number(float(row[name]))))
    return found

  # --- output ---

  def _attempt(self, draw: Callable[[], None]) -> None:
    """Runs a drawing call; an error degrades the view by one level and is logged."""
    try:
      draw()
    except Exception as error:  # a view must not end a run; it says so instead
      worse = "plain" if self._mode == "live" else "none"
      self._mode = worse
      self._abandon_live()  # first: it holds the streams that the log may write to
      log.warning("progress view failed (%s: %s); going on with %s output",
                  type(error).__name__, t.sanitize(error), "plain" if worse == "plain" else "no")

  def _abandon_live(self) -> None:
    """Takes the terminal back from a live view that may be broken."""
    live, self._live = self._live, None
    if live is None:
      return
    failure = None
    try:
      live.stop()
    except Exception as error:  # a view must not end a run: reported below
      failure = error
    finally:
      sys.stdout, sys.stderr = self._streams  # stop() may have failed before it did this
    if failure is not None:
      log.warning("the live view did not stop (%s)", type(failure).__name__)

  def _start_live(self) -> None:
    from rich.live import Live

    self._streams = sys.stdout, sys.stderr
    # No refresh thread: the view changes when there is something new.
    self._live = Live(self._view(), console=self._console, auto_refresh=False,
                      vertical_overflow="crop")
    self._live.start(refresh=False)

  def _stop_live(self) -> None:
    if self._live is not None:
      self._live.stop()
      self._live = None

  def _draw(self) -> None:
    if self._mode == "live":
      self._attempt(lambda: self._live.update(self._view(), refresh=True))  # type: ignore[union-attr]
    if self._mode == "plain":  # also when the live view has just failed
      self._attempt(lambda: self._print(self._line()))

  def _print(self, text: str) -> None:
    console = self._console
    assert console is not None
    text = t.encodable(text, console.encoding)
    if self._mode == "live":
      from rich.text import Text

      console.print(Text(text))
    else:
      # Not console.print: it wraps at the assumed width of what is no terminal.
      console.file.write(text + "\n")
      console.file.flush()

  def _line(self) -> str:
    """One plain line of a step: what this row says, nothing older."""
    parts = [f"step {self._step}" + (f"/{self._total}" if self._total else "")]
    parts += [f"{label} {value}" for label, value in self._headline(self._row)]
    if split := _split(self._row):
      parts.append("time " + " ".join(f"{c} {p:.0f}%" for c, p in split[:4]))
    parts.append(f"eta {self._eta()}")
    if self._samples:
      sample, before = self._samples[0]
      shown = f'"{_end(sample.prompt, 40)}" -> "{t.sanitize(sample.response, 60)}"'
      if sample.reward is not None:
        shown += f" ({t.number(sample.reward)})"
      if before is not None and before != sample.response:
        shown += f', was "{t.sanitize(before, 30)}"'
      parts.append(shown)
    return " | ".join(parts)

  def _view(self) -> RenderableType:
    """The live view; every text in it is a Text, so nothing is parsed as markup."""
    from rich.console import Group

    console = self._console
    assert console is not None
    width = max(console.width, 10)
    lines: list[Text] = [self._head(width)]
    for label, name, color in _CURVES:
      if values := list(self._curves[name]):
        line = _text(f"{label:>9} ")
        line.append(t.sparkline(values, max(width - 22, 4)), style=color)
        line.append(f" {t.number(values[-1])}", style="bold")
        lines.append(line)
    lines += _pack([_text(f"{label} ", "dim").append(value, style="not dim bold")
                    for label, value in self._headline(self._shown)], width)
    lines += _bar(self._shown, width)
    lines += [_sample_line(sample, before, width) for sample, before in self._samples]
    return Group(*lines)

  def _head(self, width: int) -> Text:
    line = _text(f"{self._title}  " if self._title else "", "bold")
    line.append(f"step {self._step}" + (f"/{self._total}" if self._total else ""))
    if self._total > 0:
      room = max(min(30, width - 50), 5)
      full = math.floor(min(max(self._step / self._total, 0.0), 1.0) * room)
      line.append("  " + "━" * full, style="green")
      line.append("━" * (room - full), style="bright_black")
    line.append(f"  {t.duration(self._clock() - self._begin)} elapsed, {self._eta()} left")
    return line


class _Lines:
  """What plain lines need of a console."""

  is_terminal = is_dumb_terminal = False
  width = 80

  def __init__(self) -> None:
    self.file = sys.stdout
    self.encoding: str = getattr(sys.stdout, "encoding", None) or "utf-8"
    self.on_broken_pipe: Callable[[], None] = _broken_pipe


def _console(mode: str) -> Console | _Lines:
  """A rich Console on stdout; for plain lines rich is not needed.

  Raises:
    UserError: a live view is asked for and rich is not installed.
  """
  if mode == "plain":
    return _Lines()
  try:
    from rich.console import Console
  except ImportError as error:
    if mode == "live":
      raise UserError("monitor.progress is 'live' but rich is not installed; "
                      "pip install rich or set monitor.progress='plain'") from error
    log.warning("progress is plain: rich is not installed")
    return _Lines()
  return Console(file=sys.stdout)


def _broken_pipe() -> None:
  raise BrokenPipeError("nobody reads the output any more")


# --- pieces --------------------------------------------------------------------------------------


def _text(text: str, style: str = "") -> Text:
  """A line that is cut, not wrapped, where the terminal ends."""
  from rich.text import Text

  return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _pack(items: Sequence[Text], width: int) -> list[Text]:
  """Puts items on as few lines as they need, never breaking inside one."""
  lines: list[Text] = []
  for item in items:
    if not lines or len(lines[-1]) + 2 + len(item) > width:
      lines.append(_text(" "))
    lines[-1].append(" ").append_text(item)
  return lines


def _split(row: Mapping[str, Any]) -> list[tuple[str, float]]:
  """(category, percent) of the wall time, largest first, without what rounds to nothing."""
  named = ((c, float(row.get(f"time_split/{c}", 0.0))) for c in CATEGORIES)
  return sorted(((c, p) for c, p in named if p >= 0.5), key=lambda item: -item[1])


def _bar(row: Mapping[str, Any], width: int) -> list[Text]:
  """The time split as one bar and its legend."""
  split = _split(row)
  if not split:
    return []
  bar, room, done, used = _text("     time "), max(width - 12, 4), 0.0, 0
  legend = []
  for category, percent in split:
    done += percent
    cells = round(done / 100 * room) - used  # of the running sum: the bar never overflows
    used += cells
    bar.append("█" * cells, style=_COLORS[category])
    legend.append(_text("").append("■ ", style=_COLORS[category])
                  .append(f"{category} {percent:.0f}%"))
  return [bar, *_pack(legend, width)]


def _end(text: str, limit: int) -> str:
  """The end of a prompt: what distinguishes it from the others."""
  safe = t.sanitize(text[-4 * limit:], 100 * limit)
  return safe if len(safe) <= limit and len(text) <= 4 * limit else "…" + safe[1 - limit:]


def _sample_line(sample: Sample, before: str | None, width: int) -> Text:
  line = _text("   sample ", "dim")
  line.append(_end(sample.prompt, max(width // 3, 10)), style="not dim")
  line.append(" → ", style="not dim")
  style = "not dim"
  if sample.reward is not None:
    style = "not dim green" if sample.reward > 0 else "not dim red"
  line.append(t.sanitize(sample.response, max(width // 2, 20)), style=style)
  if sample.reward is not None:
    line.append(f"  reward {t.number(sample.reward)}", style="not dim")
  if sample.truth:
    line.append(f"  truth {t.sanitize(sample.truth, 40)}")
  if before is not None and before != sample.response:
    line.append(f"  was {t.sanitize(before, 40)}", style="italic")
  return line
