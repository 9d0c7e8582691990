"""Asynchrony: the explorer, buffer, synchronizer and schedule of a run on traces of latencies.

Environments wait as long as the trace says, the trainer as long as --trains says, and sampling is
instant: what is measured is who waits for whom. Beside it the discrete-event bound of rft_bound.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import latency_traces
import numpy as np
from absl import flags
from benchmark import Row
from rft_bound import Bound, bound

TRACES = flags.DEFINE_list("traces", [], "Names of latency_traces.json for `rft`; empty: all.")
TRAINS = flags.DEFINE_list("trains", ["0.25", "1"], "Train step of `rft`, in mean rollouts.")
SCHEDULES = flags.DEFINE_list(
  "schedules",
  ["on_policy", "one_step_off_exact", "one_step_off", "fully_async"],
  "Schedules of `rft`; speed-ups are over the first.",
)
STEPS = flags.DEFINE_integer("steps", 40, "Train steps of `rft`.", lower_bound=1, upper_bound=64)
STALENESS = flags.DEFINE_integer("staleness", 8, "max_staleness of fully_async.", lower_bound=0)
UNIT = flags.DEFINE_float("unit", 0.5, "Seconds of a mean rollout of `rft`.", lower_bound=0)
BUFFER = flags.DEFINE_string("buffer", "sqlite", "buffer.url of `rft`.")
PLOT = flags.DEFINE_string("plot", None, "Where `rft` draws the speed-ups.")

TURNS = 4  # of an episode; each is a wait and then a token
WAIT, JOIN = 600.0, 60.0


@dataclasses.dataclass(frozen=True)
class Style:
  """How a schedule is configured, and what of the bound it is held against."""

  sync: dict[str, Any]
  deterministic: bool
  staleness: int

  @property
  def config(self) -> dict[str, Any]:
    out = {f"sync.{k}": v for k, v in self.sync.items()}
    return out | {"explorer.deterministic": self.deterministic}


def styles() -> dict[str, Style]:
  """Those that --schedules can name.

  `exact` is explorer.deterministic: step t trains batch t, and weights change between rollouts
  only; the bound, which has no such rule, is lower. The others carry stragglers over.
  """
  s = STALENESS.value
  return {
    "on_policy": Style({}, True, 0),
    "one_step_off_exact": Style({"offset": 1}, True, 1),
    "one_step_off": Style({"offset": 1}, False, 1),
    "trainer_driven": Style({"style": "trainer_driven", "max_staleness": s}, False, s),
    "fully_async": Style({"style": "fully_async", "max_staleness": s}, False, s),
  }


@dataclasses.dataclass
class Cell:
  """One measured run; times in mean rollouts.

  Attributes:
    time: from the first rollout's start to the last train step's end.
    trainer_idle: share of it in which the trainer waited.
    masked: share of the sampled tokens of trained groups that were too old.
    lag: mean over the other tokens of the trainer steps between sampling and training.
    dropped: groups that were too old altogether.
    host: share of one core that the process took.
    bound: what the discrete-event bound says of it.
  """

  time: float
  trainer_idle: float
  masked: float
  lag: float
  dropped: int
  host: float
  bound: Bound


class Instant:
  """A rollout engine that answers at once: token 1 of the version it has."""

  version, error = -1, None
  stats: dict[str, float] = {}

  def start(self) -> None: ...

  def close(self) -> None: ...

  def release(self) -> None: ...

  def set_params(self, version: int, params: Any) -> None:
    self.version = version

  def member(self, order: Sequence[int]) -> Instant:
    return self

  def enter(self) -> None: ...

  def leave(self) -> None: ...

  async def logprobs(self, tokens: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    return np.zeros(len(tokens), np.float32)

  def describe(self) -> str:
    return "sampling is instant"

  def metrics(self) -> dict[str, float]:
    return {}

  async def generate(self, request: Any) -> Any:
    from trinity_jax.experience import StopReason
    from trinity_jax.sampler.request import Completion

    one = np.ones(1, np.int32)
    return Completion(one, -one.astype(np.float32), one * self.version, one < 0, StopReason.LENGTH)


async def episode(task: Any, model: Any) -> float:
  """Turns of waiting for the environment, then acting."""
  log: list[int] = [2]
  for _ in range(TURNS):
    await asyncio.sleep(task.raw["seconds"] / TURNS)
    log = [*log, *(await model.generate(log)).tolist(), 2]
  return 1.0


def config_of(style: Style, tasks: int) -> Any:
  from trinity_jax.config import base_config, resolve

  c = base_config()
  c.model.path = c.taskset.path = "unused"
  c.taskset.workflow = f"{__name__}:episode"
  c.taskset.selector = "sequential"
  c.explorer.batch_size, c.explorer.group_size = tasks, 1
  c.sampler.max_response_length = 1
  c.sync.timeout, c.buffer.url = WAIT, BUFFER.value
  c.update_from_flattened_dict(style.config)
  return resolve(c)


class Rig:
  """The parts of a run around a trainer that only waits."""

  def __init__(self, style: Style, trace: latency_traces.Trace, unit: float, directory: Path):
    import jax
    import jax.numpy as jnp

    from trinity_jax import build
    from trinity_jax.experience import Task
    from trinity_jax.explorer.explorer import Explorer
    from trinity_jax.launch_order import LaunchOrder
    from trinity_jax.models import sharding
    from trinity_jax.monitor.timeline import Timeline
    from trinity_jax.schedule import make_schedule
    from trinity_jax.synchronizer import Synchronizer
    from trinity_jax.tasks import Taskset

    self.config = c = config_of(style, len(trace[0]))
    self.schedule, self.timeline = make_schedule(c.sync), Timeline()
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    self.buffer = build.make_buffer(c, self.schedule, directory, 0)
    self.weights = {"w": jax.device_put(jnp.ones(8), replicated)}
    self.synchronizer = Synchronizer(
      {"w": replicated},
      jnp.float32,
      LaunchOrder(mesh),
      keep=build.kept_versions(self.schedule),
      timeout=WAIT,
      bell=self.buffer.bell,
    )
    seconds = [s * unit for batch in trace for s in batch]
    self.explorer = Explorer(
      c,
      engine=Instant(),
      tokenizer=SimpleNamespace(stop_ids=(0,), decode=lambda tokens, **_: str(tokens)),  # type: ignore[arg-type]
      schedule=self.schedule,
      versions=self.synchronizer,
      buffer=self.buffer,
      bell=self.buffer.bell,
      taskset=Taskset(
        [Task(i, (), raw={"seconds": s}) for i, s in enumerate(seconds)], selector="sequential"
      ),
      held_out=(),
      grade=lambda *_: None,  # type: ignore[arg-type,return-value]
      span=self.timeline.span,
      on_eval=lambda *_: None,
    )
    self._error: BaseException | None = None

  def _explore(self, batches: int) -> None:
    try:
      asyncio.run(self.explorer.explore(batches))
    except BaseException as error:  # the trainer, which waits at the buffer, raises it
      self._error = error
      self.buffer.close(error)

  @contextlib.contextmanager
  def exploring(self, batches: int):
    """Explores on a thread of its own until the trainer is done."""
    from trinity_jax.build import close_buffer
    from trinity_jax.errors import RunFailed

    thread = threading.Thread(target=self._explore, args=(batches,), name="explorer", daemon=True)
    thread.start()
    try:
      yield
    except BaseException as error:  # wakes the explorer's thread, then goes on up
      self.synchronizer.close(error)
      self.buffer.close(error)
      raise
    finally:
      self.buffer.finish()
      thread.join(JOIN)
      close_buffer(self.buffer)
    if self._error is not None:
      raise self._error
    if thread.is_alive():
      raise RunFailed(f"the explorer did not end within {JOIN:.0f} s: {self.explorer.describe()}")

  def publish(self, version: int) -> None:
    with self.timeline.span("publish"):
      self.synchronizer.publish(version, self.weights)

  def train(self, steps: int, seconds: float) -> tuple[list[Any], list[int]]:
    """Trains; returns the experiences of all steps and the step of each."""
    found, when = [], []
    for step in range(1, steps + 1):
      with self.timeline.span("wait_for_batch"):
        new = self.buffer.sample(
          self.config.explorer.batch_size, step, WAIT, self.explorer.describe
        )
      with self.timeline.span("train"):
        time.sleep(seconds)  # the train step: a device would be busy for so long
      if self.schedule.publishes(step, self.synchronizer.take_request()):
        self.publish(step)
      found += new
      when += [step] * len(new)
    return found, when


def measure(
  style: Style, trace: latency_traces.Trace, train: float, steps: int, unit: float
) -> Cell:
  """Runs one cell: train steps of `train` mean rollouts, of `unit` seconds each."""
  with tempfile.TemporaryDirectory() as scratch:
    rig = Rig(style, trace, unit, Path(scratch))
    rig.publish(0)  # compiles
    rig.timeline.step()
    start, host = time.perf_counter(), time.process_time()
    with rig.exploring(len(trace)):
      found, when = rig.train(steps, train * unit)
      wall, host = time.perf_counter() - start, time.process_time() - host
      spent = rig.timeline.total()["time/train"]
      dropped = rig.buffer.dropped
  failed = [e.info for e in found if e.stop_reason.failed]
  assert not failed, failed[0]
  kept = [(e.versions[e.action_mask], step) for e, step in zip(found, when)]
  lags = np.concatenate([step - 1 - versions for versions, step in kept])
  assert lags.max() <= style.staleness, "a token older than declared was trained on"
  masked = 1 - len(lags) / (TURNS * len(found))
  least = bound(trace, train, steps, style.staleness, in_order=style.deterministic)
  return Cell(wall / unit, 1 - spent / wall, masked, lags.mean(), dropped, host / wall, least)


HEAD = (
  "| trace, train step | schedule | time (bound) | speed-up (bound) | of it | trainer idle (bound) "
  "| masked (bound) | lag |\n|---|---|---|---|---|---|---|---|"
)


def line(prefix: str, schedule: str, cell: Cell, base: Cell) -> str:
  """A cell as a row of the table under HEAD."""
  b, percent = cell.bound, "{:.1%} ({:.1%})".format
  ours, ideal = base.time / cell.time, base.bound.seconds / b.seconds
  return (
    f"| {prefix.replace('/', ', ')} | {schedule.replace('_', '-')} | {cell.time:.2f} "
    f"({b.seconds:.2f}) | {ours:.2f} ({ideal:.2f}) | {ours / ideal:.3f} | "
    f"{percent(cell.trainer_idle, b.trainer_idle)} | {percent(cell.masked, b.masked(TURNS))} | "
    f"{cell.lag:.2f} |"
  )


def _chosen(flag: Any, known: Iterable[str]) -> list[str]:
  """The flag's names, or all of the known ones; ends the program at one that is not known."""
  known = list(known)
  for name in flag.value:
    if name not in known:
      sys.exit(f"error: --{flag.name} {name}: no such name; known: {', '.join(known)}")
  return flag.value or known


def bench_rft() -> list[Row]:
  traces, known = latency_traces.read(), styles()
  rows: list[Row] = []
  schedules = _chosen(SCHEDULES, known)
  print(HEAD)
  for name in _chosen(TRACES, traces):
    for train in map(float, TRAINS.value):
      prefix, base = f"{name}/{train:g}", None
      for s in schedules:
        cell = measure(known[s], traces[name], train, STEPS.value, UNIT.value)
        base = base or cell
        rows += rows_of(prefix, s, cell, base)
        print(line(prefix, s, cell, base), flush=True)
  print()
  if PLOT.value:
    plot(rows, Path(PLOT.value))
  return rows


def rows_of(prefix: str, schedule: str, cell: Cell, base: Cell) -> list[Row]:
  """The figures of a cell; speed-ups are over `base`, the first schedule of the same cell."""
  name = lambda what: f"{prefix}/{schedule}/{what}"
  ours, ideal = base.time / cell.time, base.bound.seconds / cell.bound.seconds
  return [
    Row(name("time"), cell.time, "mean rollouts", f"{prefix}/{SCHEDULES.value[0]}/time", ours),
    Row(name("bound"), cell.bound.seconds, "mean rollouts"),
    Row(name("speed_up"), ours, "x", name("bound_speed_up"), ours / ideal),
    Row(name("bound_speed_up"), ideal, "x"),
    Row(name("trainer_idle"), 100 * cell.trainer_idle, "%"),
    Row(name("bound_trainer_idle"), 100 * cell.bound.trainer_idle, "%"),
    Row(name("masked"), 100 * cell.masked, "% of tokens"),
    Row(name("bound_masked"), 100 * cell.bound.masked(TURNS), "% of tokens"),
    Row(name("lag"), cell.lag, "steps"),
    Row(name("dropped"), cell.dropped, "groups"),
    Row(name("host"), 100 * cell.host, "% of a core"),
  ]


def plot(rows: Sequence[Row], path: Path) -> None:
  """Bars of the measured speed-ups, the bound's as a line above each."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  values = {r.name: r.value for r in rows}
  cells = list(dict.fromkeys(r.name.rsplit("/", 2)[0] for r in rows))
  schedules = list(dict.fromkeys(r.name.split("/")[-2] for r in rows))
  figure, axes = pyplot.subplots(
    figsize=(max(7.0, 1.5 + 1.1 * len(cells)), 3.8), layout="constrained"
  )
  width = 0.8 / len(schedules)
  for j, s in enumerate(schedules):
    at = [i + (j - (len(schedules) - 1) / 2) * width for i in range(len(cells))]
    bars = [values[f"{c}/{s}/speed_up"] for c in cells]
    ideal = [values[f"{c}/{s}/bound_speed_up"] for c in cells]
    drawn = axes.bar(at, bars, width * 0.92, label=s.replace("_", " "))
    axes.bar_label(drawn, fmt="%.2g", fontsize=7, label_type="center", color="white", rotation=90)
    axes.hlines(
      ideal,
      [x - width / 2 for x in at],
      [x + width / 2 for x in at],
      colors="black",
      linewidth=1,
      label="" if j else "bound",
    )
  labels = [c.replace("-", ", batch ").replace("/", "\ntrain step ") for c in cells]
  axes.set_xticks(range(len(cells)), labels, fontsize=7)
  axes.set_yscale("log", subs=[])
  top = max(v for n, v in values.items() if n.endswith("/bound_speed_up"))
  ticks = [t for t in (1, 2, 5, 10, 20, 50) if t <= 1.2 * top]
  axes.set_yticks(ticks, [f"{t}x" for t in ticks])
  axes.set_ylim(0.7, 1.2 * top)
  axes.set_ylabel("speed-up over on-policy")
  axes.spines[["top", "right"]].set_visible(False)
  figure.legend(fontsize=7, frameon=False, ncols=6, loc="outside upper center")
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)
  pyplot.close(figure)
