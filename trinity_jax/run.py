"""Runs the stages of a config and leaves summary.json and curves.png."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

from trinity_jax.config import Config, resolve, stage_configs
from trinity_jax.distributed import ALONE, World
from trinity_jax.errors import UserError
from trinity_jax.preemption import Preemption

CONFIG = "config.json"


def run(config: Any, workdir: str | Path, world: World = ALONE) -> dict[str, Any]:
  """Runs a config to its end, or continues it where an earlier process stopped.

  Args:
    config: ConfigDict or Config.
    workdir: the run's folder; finished stages in it are skipped, checkpoints are continued. All
      processes of a run see it.
    world: the processes that train together.

  Returns:
    The contents of WORKDIR/summary.json; {} where another process leads.

  Raises:
    UserError: a mistake in the config, the data or the folder.
    RunFailed: the run had to stop.
    Preempted: SIGTERM; what was done is saved.
  """
  config = config if isinstance(config, Config) else resolve(config)
  if config.mode == "explore":
    return explore(config, Path(workdir))
  start = time.monotonic()
  workdir, warnings = Path(workdir).absolute(), []
  if world.count > 1:
    from trinity_jax.build import make_meshes

    make_meshes(config)  # brings the devices up, for which all processes are needed
  if world.leader:
    prepare_workdir(workdir, config)
    warnings = preflight(config, workdir)
  world.meet("the run's folder", config.sync.timeout)  # the first one may read data for long

  from trinity_jax.monitor.compiles import CompileCounter
  from trinity_jax.monitor.progress import Progress
  from trinity_jax.monitor.timeline import Timeline

  timeline, preemption = Timeline(), Preemption()
  with (
    preemption.on_signals(),
    CompileCounter() as compiles,
    Progress(config.monitor.progress if world.leader else "none", title=config.name) as shown,
    preemption.telling(world.ask_all_to_end),
  ):
    world.on_end(preemption.request)
    for warning in warnings:
      shown.message(f"warning: {warning}")
    results = run_stages(config, workdir, compiles, timeline, shown, preemption, world)
    if not world.leader:
      return {}
    summary = summarise(config, workdir, results, time.monotonic() - start, compiles)
    if compiles.since_warmup:
      shown.message(f"compiled after the warm-up (a bug): {', '.join(compiles.late)}")
    timeline.write_trace(workdir / "trace.json")
    picture = draw_curves(config, workdir)
    shown.message(f"summary: {workdir / 'summary.json'}  curves: {picture}")
  return summary


def preflight(config: Config, workdir: Path) -> list[str]:
  """Checks all stages before the first one starts; makes the first model; returns warnings.

  Raises:
    UserError: what some stage would stumble over, perhaps hours later.
  """
  from trinity_jax.check import check_texts, plan
  from trinity_jax.models.tokenizer import Tokenizer

  plans = [plan(stage) for stage in stage_configs(config)]
  record_config(workdir, config)
  tokenizer = Tokenizer.load(first_model(stage_configs(config)[0], workdir))
  return [warning for stage in plans for warning in check_texts(stage, tokenizer)]


def explore(config: Config, workdir: Path) -> dict[str, Any]:
  """Explores for the trainer that works in the same folder; returns {}.

  Supervised stages need no explorer and are passed over, as finished ones are.
  """
  from trinity_jax.algorithms.algorithm import find_row
  from trinity_jax.exploring import explore_stage
  from trinity_jax.monitor.progress import Progress
  from trinity_jax.monitor.timeline import Timeline

  timeline, preemption = Timeline(), Preemption()
  title = f"{config.name}: {config.explorer.name}"
  with preemption.on_signals(), Progress(config.monitor.progress, title=title) as shown:
    for stage in stage_configs(config):
      directory = stage_directory(config, workdir.absolute(), stage)
      alone = find_row(stage.algorithm.name).supervised or stage.buffer.replay
      if not alone and not (directory / "stage.json").exists():
        explore_stage(stage, directory, timeline, shown, preemption)
    add_evaluations(config, workdir.absolute())
  return {}


def run_stages(
  config: Config, workdir: Path, compiles, timeline, progress, preemption, world: World = ALONE
) -> list:
  """Runs each stage that has not finished; each starts from the previous one's model."""
  from trinity_jax.loop import run_stage
  from trinity_jax.stage_result import read_stage_result

  results = []
  model = None
  for stage in stage_configs(config):
    directory = stage_directory(config, workdir, stage)
    marker = directory / "stage.json"
    if world.agree(marker.exists()):
      result = dataclasses.replace(read_stage_result(marker), resumed=True)
      progress.message(f"stage {stage.name} is done already ({marker}); skipped")
    else:
      model = Path(results[-1].model) if results else first_model(stage, workdir)
      directory.mkdir(parents=True, exist_ok=True)
      result = run_stage(stage, directory, model, compiles, timeline, progress, preemption, world)
      world.meet(f"stage {stage.name}")
    results.append(result)
  return results


def stage_directory(config: Config, workdir: Path, stage: Config) -> Path:
  return workdir / stage.name if config.stages else workdir


def first_model(config: Config, workdir: Path) -> Path:
  """config.model.path, or a new tiny random checkpoint made from config.model.tiny and the seed."""
  from trinity_jax.check import model_folder, tiny
  from trinity_jax.models.hf import write_tiny_checkpoint

  if config.model.path:
    return model_folder(config)
  path = workdir / "model"
  if not path.exists():
    tiny(config)  # names the key when a size cannot be
    part = path.with_name("model.part")  # a folder that is there is a complete one
    write_tiny_checkpoint(part, **{"seed": config.seed, **config.model.tiny})
    part.rename(path)
  return path


def prepare_workdir(workdir: Path, config: Config) -> Path:
  """Makes the folder and sees that it is free for this config.

  Raises:
    UserError: the folder cannot be written, or holds another run.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / ".writable"
    probe.write_text("")
    probe.unlink()
  except OSError as e:
    raise UserError(f"--workdir={workdir} cannot be written: {e.strerror}; choose another") from e
  record = workdir / CONFIG
  if record.exists():
    before, now = json.loads(record.read_text()), _as_json(config)
    changed = sorted(k for k in now if before.get(k) != now[k] and k not in ("monitor", "mode"))
    if changed and _begun(workdir, before):
      raise UserError(
        f"--workdir={workdir} holds a run with another config (differs in: {', '.join(changed)}); "
        "continue it with its own config or choose another folder"
      )
    if changed:  # an attempt that ended before its first checkpoint: its model may not fit
      shutil.rmtree(workdir / "model", ignore_errors=True)
  return workdir.absolute()


def _begun(workdir: Path, before: dict[str, Any]) -> bool:
  """Whether a run of config `before` has left what another one would take for its own."""
  from trinity_jax.buffer.record import FILE

  if any(True for name in ("stage.json", "checkpoints/[0-9]*") for _ in workdir.glob(f"**/{name}")):
    return True
  # A server's tables are not looked into: who has begun to log may have filled them.
  elsewhere = "://" in str(before.get("buffer"))
  if any(elsewhere or file.stat().st_size for file in workdir.glob("**/metrics.jsonl")):
    return True
  return any(_holds_groups(file) for file in workdir.glob(f"**/{FILE}"))


def _holds_groups(file: Path) -> bool:
  with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as store:
    try:
      return store.execute("SELECT 1 FROM groups LIMIT 1").fetchone() is not None
    except sqlite3.DatabaseError as e:
      return "no such table" not in str(e)


def record_config(workdir: Path, config: Config) -> None:
  """Writes WORKDIR/config.json."""
  record = workdir / CONFIG
  part = record.with_suffix(f".{os.getpid()}")
  part.write_text(json.dumps(_as_json(config), indent=2))
  part.replace(record)


def _as_json(config: Config) -> dict[str, Any]:
  """The config as it reads back from JSON: tuples are lists."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def summarise(config: Config, workdir: Path, results: list, seconds: float, compiles):
  """Writes summary.json from the stages' metrics."""
  from trinity_jax.monitor.summary import peak_rss_mb, worst, write_summary

  rows = [row for stage in stage_configs(config) for row in _rows(config, workdir, stage)]
  values = {
    **accuracies(config, workdir),
    "wall_seconds": seconds,
    "logprob_diff_p999": worst(rows, "logprob_diff/p999"),
    "logprob_diff_max": worst(rows, "logprob_diff/max"),
    "compiles_after_warmup": compiles.since_warmup,
    "peak_rss_mb": peak_rss_mb(),
    "resumed": any(r.resumed for r in results),
    "seed": config.seed,
    "model": results[-1].model,
    "stages": [r.name for r in results],
  }
  write_summary(workdir, values)
  return values


def _rows(config: Config, workdir: Path, stage: Config) -> list[dict[str, Any]]:
  from trinity_jax.monitor.writers import FILE, read_stage

  return read_stage(stage_directory(config, workdir, stage) / FILE)


def accuracies(config: Config, workdir: Path) -> dict[str, float | None]:
  """Held-out accuracy of the last version of the last stage, and of the last one of SFT."""
  from trinity_jax.algorithms.algorithm import find_row
  from trinity_jax.monitor.summary import last

  after_sft = final = None
  for stage in stage_configs(config):
    done = [
      r for r in _rows(config, workdir, stage) if r["step"] == stage.trainer.total_steps
    ]
    final = last(done, "eval/accuracy")
    if find_row(stage.algorithm.name).data == "demonstrations":
      after_sft = final
  return {"accuracy_after_sft": after_sft, "accuracy_final": final}


def add_evaluations(config: Config, workdir: Path) -> None:
  """Adds what an explorer's process found to the summary and the curves of a trainer that is done.

  The last version is evaluated after the trainer has ended; a summary that is not there yet will
  find the evaluation.
  """
  from trinity_jax.monitor import summary

  if (workdir / summary.FILE).exists():
    found = summary.read_summary(workdir) | accuracies(config, workdir)
    summary.write_summary(workdir, found)
    draw_curves(config, workdir)


def draw_curves(config: Config, workdir: Path) -> str:
  """Draws WORKDIR/curves.png over all stages; returns its path, or why there is none."""
  from trinity_jax.monitor.plots import curves_png
  from trinity_jax.monitor.writers import FILE

  stages = stage_configs(config)
  paths = [stage_directory(config, workdir, s) / FILE for s in stages]
  names = [s.name for s in stages]
  try:
    return str(curves_png(paths, workdir / "curves.png", title=config.name, stages=names))
  except ModuleNotFoundError as e:
    if e.name is None or e.name.partition(".")[0] != "matplotlib":
      raise
    return "not drawn, matplotlib is not installed"
