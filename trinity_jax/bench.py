"""Every checkpoint of a run on every held-out set: mean@k, best@k, worst@k.

WORKDIR[/STAGE]/checkpoints/* and WORKDIR[/STAGE]/hf are evaluated with eval.runs = k runs per task;
the results are in WORKDIR/bench.json and WORKDIR/bench.png. A run's tokens depend on the seed, the
step, the set, the task and the run, as in the evaluations of the run itself, and on nothing else.
A rerun evaluates what is new or was evaluated with other settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trinity_jax import build, run
from trinity_jax.checksums import checksums
from trinity_jax.config import Config, resolve, stage_configs
from trinity_jax.errors import UserError
from trinity_jax.experience import Experience
from trinity_jax.explorer.evaluation import HeldOut
from trinity_jax.explorer.groups import TRAIN_STREAM, Groups, group_ids
from trinity_jax.explorer.metrics import accuracy
from trinity_jax.explorer.workflow import SamplingParams
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import hf, sharding
from trinity_jax.models import params as params_lib
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.monitor.files import write_atomic
from trinity_jax.monitor.text import sanitize
from trinity_jax.sampler.rollout_engine import RolloutEngine
from trinity_jax.tasks.taskset import Taskset
from trinity_jax.trainer.checkpoint import restore_params, saved_steps

FILE = "bench.json"
PICTURE = "bench.png"
HF = "hf"


class Weights(NamedTuple):
  """One of a stage's sets of weights.

  Attributes:
    name: "hf" or the checkpoint's step.
    step: trainer steps that they have had; of "hf" those of the newest checkpoint.
    stamp: changes when the files are written anew.
  """

  name: str
  step: int
  path: Path
  stamp: int


def bench(
  config: Any, workdir: str | Path, *, report: Callable[[str], None] = print
) -> dict[str, Any]:
  """Evaluates what is not evaluated yet; returns the contents of WORKDIR/bench.json.

  Each entry of "results" is of one stage, checkpoint and set: accuracy as "mean@k" (over tasks and
  runs), "best@k" and "worst@k" (the best and the worst run of each task, mean over tasks), "stderr"
  of mean@k over tasks, "reward" (mean), "errored" (share of runs), "length" (mean tokens of a
  response), "tasks", "seconds", and the settings.

  Args:
    config: ConfigDict or Config, whose `eval` says what is evaluated and how.
    workdir: of the run; it may be going on.
    report: called with a line per result, and the table at the end.

  Raises:
    UserError: no held-out set or no checkpoint; k greedy runs, which are all equal.
    RunFailed: the sampler died.
  """
  config = config if isinstance(config, Config) else resolve(config)
  workdir = Path(workdir).absolute()
  stages = [s for s in stage_configs(config) if s.eval.tasksets]
  _check(config, stages)
  model_path = _model_path(config, workdir)
  found = [(s, weights_of(run.stage_directory(config, workdir, s))) for s in stages]
  if not any(weights for _, weights in found):
    raise UserError(
      f"--workdir={workdir} holds no checkpoint to evaluate; train there first (--mode=both)"
    )
  book = Book(workdir / FILE, [(s.name, [w.name for w in weights]) for s, weights in found])
  for stage, weights in found:
    with contextlib.closing(_Bench(stage, model_path, book, report)) as work:
      work.run(weights)
  report(table(book.results))
  try:
    from trinity_jax.monitor.bench_plot import bench_png

    picture = bench_png(book.results, workdir / PICTURE, title=config.name)
    report(f"results: {book.path}  curves: {picture}")
  except ModuleNotFoundError as e:
    if e.name is None or e.name.partition(".")[0] != "matplotlib":
      raise
    report(f"results: {book.path}  curves: not drawn, matplotlib is not installed")
  return book.contents()


def _check(config: Config, stages: Sequence[Config]) -> None:
  if not stages:
    raise UserError(
      "config.eval.tasksets is empty: --mode=bench evaluates on held-out sets; name at least one"
    )
  for stage in stages:
    e, where = stage.eval, f"stage {stage.name!r}: " if config.stages else ""
    if e.runs > 1 and e.temperature == 0:
      raise UserError(
        f"{where}config.eval.temperature = 0.0 with eval.runs = {e.runs}: greedy runs of a task "
        "are all equal; set a temperature above 0 or eval.runs=1"
      )


def _model_path(config: Config, workdir: Path) -> Path:
  """Where the tokenizer and the model's sizes are."""
  if not stage_configs(config)[0].model.path and not (workdir / "model").is_dir():
    raise UserError(f"--workdir={workdir} holds no run of this config: it has no model folder")
  return run.first_model(stage_configs(config)[0], workdir)


def weights_of(directory: Path) -> list[Weights]:
  """A stage's checkpoints, rising, and its Hugging Face folder."""
  folders = [(step, directory / "checkpoints" / str(step))
             for step in saved_steps(directory / "checkpoints")]  # fmt: skip
  newest = max((step for step, _ in folders), default=0)
  if (directory / HF / "config.json").is_file():
    folders.append((newest, directory / HF))
  out = []
  for step, path in folders:
    with contextlib.suppress(FileNotFoundError):  # the run goes on and has deleted it
      out.append(Weights(path.name, step, path, _stamp(path)))
  return out


def _stamp(folder: Path) -> int:
  return max(p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")])


class Book:
  """The results, in the order of stages, weights and sets; on disk after each.

  Args:
    order: (stage, names of its weights); results of others, which are deleted, stay before them.
  """

  def __init__(self, path: Path, order: Sequence[tuple[str, Sequence[str]]]):
    self.path = path
    self._order = {
      (s, w): (i, j) for i, (s, names) in enumerate(order) for j, w in enumerate(names)
    }
    self.results: list[dict[str, Any]] = []
    if path.exists():
      try:
        self.results = json.loads(path.read_text())["results"]
      except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: damaged ({e}); delete it to evaluate everything anew") from e

  def find(self, **values: Any) -> dict[str, Any] | None:
    """The result that has these values."""
    return next((r for r in self.results if values.items() <= r.items()), None)

  def add(self, result: dict[str, Any]) -> None:
    """Puts a result in the place of one of the same stage, checkpoint and set."""
    key = lambda r: (r["stage"], r["checkpoint"], r["set"])
    others = [r for r in self.results if key(r) != key(result)]
    place = lambda r: self._order.get((r["stage"], r["checkpoint"]), (-1, r["step"]))
    self.results = sorted([*others, result], key=place)
    write_atomic(self.path, json.dumps(self.contents(), indent=2).encode() + b"\n")

  def contents(self) -> dict[str, Any]:
    return {"results": self.results}


class _Bench:
  """One stage's sampler, made when there is something to do."""

  def __init__(self, config: Config, model_path: Path, book: Book, report: Callable[[str], None]):
    self.config, self.book, self._report = config, book, report
    self._model_path, self.model = model_path, hf.load_config(model_path)
    self._held_out: list[HeldOut] = [
      build.held_out_taskset(config, i) for i in range(len(config.eval.tasksets))
    ]
    names = [own.name for own, _, _ in self._held_out]
    if twice := sorted({n for n in names if names.count(n) > 1}):
      raise UserError(f"config.eval.tasksets: several are named {twice[0]!r}; give each its own")
    self._settings = [_settings(config, *held_out) for held_out in self._held_out]
    self._parts: tuple[RolloutEngine, Groups, Any] | None = None
    self._loop = asyncio.Runner()
    self._given = 0  # weights given to the engine, whose versions only rise

  def run(self, weights: Sequence[Weights]) -> None:
    for one in weights:
      todo = [i for i in range(len(self._held_out)) if not self._known(one, i)]
      if todo:
        self._evaluate(one, todo)

  def close(self) -> None:
    if self._parts is not None:
      engine, groups, _ = self._parts
      self._loop.run(groups.aclose())
      engine.close()
    self._loop.close()

  def _known(self, one: Weights, i: int) -> bool:
    return self._find(i, checkpoint=one.name, stamp=one.stamp) is not None

  def _find(self, i: int, **values: Any) -> dict[str, Any] | None:
    name = self._held_out[i][0].name
    return self.book.find(stage=self.config.name, set=name, settings=self._settings[i], **values)

  def _start(self) -> tuple[RolloutEngine, Groups, Any]:
    if self._parts is None:
      c, meshes = self.config, build.make_meshes(self.config)
      launch = LaunchOrder(meshes.train)
      engine = build.make_engine(c, self.model, meshes, launch, tokenizer_dir=self._model_path)
      engine.start()
      span = lambda _: contextlib.nullcontext()
      groups = Groups(c, engine, Tokenizer.load(self._model_path), span)
      self._parts = engine, groups, sharding.param_shardings(self.model, meshes.train)
    return self._parts

  def _evaluate(self, one: Weights, todo: Sequence[int]) -> None:
    engine, groups, layout = self._start()
    try:
      params = self._load(one, layout)
    except Exception:  # whatever reading raises where a file is gone; any other goes on up
      if one.path.exists():
        raise
      self._report(f"{self.config.name} {one.name}: deleted meanwhile, not evaluated")
      return
    digest = hashlib.sha256(json.dumps(checksums(params)).encode()).hexdigest()[:16]
    given = False
    for i in todo:
      own = self._held_out[i][0]
      found = self._find(i, step=one.step, weights=digest)  # hf is often the last checkpoint
      if found is None:
        if not given:
          self._given, given = self._given + 1, True
          engine.set_params(self._given, params)
        found = self._measure(groups, one, i)
      where = {"stage": self.config.name, "checkpoint": one.name, "step": one.step}
      self.book.add({
        **found, **where, "set": own.name, "weights": digest, "stamp": one.stamp,
        "settings": self._settings[i],
      })  # fmt: skip
      scores = "  ".join(f"{k} {v:.3f}" for k, v in found.items() if "@" in k)
      self._report(f"{self.config.name} {one.name} on {sanitize(own.name, 40)}: {scores}")

  def _load(self, one: Weights, layout: Any) -> Any:
    dtype = jnp.dtype(self.config.model.rollout_dtype or self.config.model.dtype)
    if one.name == HF:
      return hf.load(one.path, self.model, dtype=dtype, shardings=layout)[0]
    like = jax.tree.map(
      lambda spec, s: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=s),
      params_lib.abstract(self.model),
      layout,
    )
    return restore_params(one.path.parent, one.step, like)

  def _measure(self, groups: Groups, one: Weights, i: int) -> dict[str, Any]:
    c, (own, tasks, grade) = self.config, self._held_out[i]
    stream = TRAIN_STREAM + 1 + i
    params = SamplingParams(c.eval.temperature, c.sampler.max_response_length)
    runner = groups.runner(own.workflow, grade, params, stream)
    ids = group_ids(one.step, range(len(tasks)), c.eval.runs)

    async def go() -> list[list[Experience]]:
      groups.announce(stream, ids)
      return await asyncio.gather(
        *(groups.run(runner, task, group) for task, group in zip(tasks, ids))
      )

    start = time.monotonic()
    done = self._loop.run(go())
    return {**measures(done), "seconds": time.monotonic() - start}


def _settings(config: Config, own: Any, tasks: Any, grade: Any) -> dict[str, Any]:
  """What a result depends on beside the weights, as it reads back from JSON."""
  c = config
  values = {
    "seed": c.seed,
    "runs": c.eval.runs,
    "temperature": c.eval.temperature,
    "max_prompt_length": c.sampler.max_prompt_length,
    "max_response_length": c.sampler.max_response_length,
    "dtype": c.model.rollout_dtype or c.model.dtype,
    "tasks": Taskset(tasks).state()["digest"],
    "workflow": own.workflow,
    "reward": own.reward,
    "reward_args": dict(own.reward_args),
  }
  return json.loads(json.dumps(values))


def measures(groups: Sequence[Sequence[Experience]]) -> dict[str, float]:
  """Of one set: groups of k runs, one group per task."""
  scores = np.array([[accuracy(e) for e in group] for group in groups])
  N, k = scores.shape
  runs = [e for group in groups for e in group]
  of_tasks = scores.mean(axis=1)
  return {
    f"mean@{k}": float(of_tasks.mean()),
    f"best@{k}": float(scores.max(axis=1).mean()),
    f"worst@{k}": float(scores.min(axis=1).mean()),
    "stderr": float(of_tasks.std(ddof=1) / N**0.5) if N > 1 else 0.0,
    "reward": float(np.mean([e.reward or 0.0 for e in runs])),
    "errored": float(np.mean([e.stop_reason.failed for e in runs])),
    "length": float(np.mean([e.num_actions for e in runs])),
    "tasks": N,
  }


def table(results: Sequence[dict[str, Any]]) -> str:
  """The results as text; * marks the best mean of each set."""
  head = ("stage", "checkpoint", "set", "mean@k", "best@k", "worst@k", "k", "tasks", "errored")
  top = {r["set"]: max(_mean(o) for o in results if o["set"] == r["set"]) for r in results}
  rows = [head, *(_row(r, _mean(r) == top[r["set"]]) for r in results)]
  widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
  lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
  return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _row(r: dict[str, Any], top: bool) -> tuple[str, ...]:
  k = r["settings"]["runs"]
  scores = [f"{r[f'{name}@{k}']:.3f}" for name in ("mean", "best", "worst")]
  scores[0] += f" ± {r['stderr']:.3f}{' *' if top else ''}"
  names = [sanitize(r[key], 40) for key in ("stage", "checkpoint", "set")]
  return (*names, *scores, str(k), str(r["tasks"]), f"{r['errored']:.1%}")


def _mean(r: dict[str, Any]) -> float:
  return r[f"mean@{r['settings']['runs']}"]
