"""Wires the parts for a mode: runs the stages of a config and leaves summary.json and curves.png."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from trinity_jax.config import Config, resolve, stage_configs
from trinity_jax.errors import UserError


def run(config: Any, workdir: str | Path) -> dict[str, Any]:
  """Runs a config to its end, or continues it where an earlier process stopped.

  Args:
    config: ConfigDict or Config.
    workdir: the run's folder; finished stages in it are skipped, checkpoints are continued.

  Returns:
    The contents of WORKDIR/summary.json.

  Raises:
    UserError: a mistake in the config, the data or the folder.
    RunFailed: the run had to stop.
  """
  config = config if isinstance(config, Config) else resolve(config)
  workdir = prepare_workdir(Path(workdir), config)
  start = time.monotonic()

  from trinity_jax.monitor.compiles import CompileCounter
  from trinity_jax.monitor.progress import Progress
  from trinity_jax.monitor.timeline import Timeline

  timeline = Timeline()
  with CompileCounter() as compiles, Progress(config.monitor.progress, title=config.name) as shown:
    results = run_stages(config, workdir, compiles, timeline, shown)
    summary = summarise(config, workdir, results, time.monotonic() - start, compiles)
    if compiles.since_warmup:
      shown.message(f"compiled after the warm-up (a bug): {', '.join(compiles.late)}")
    timeline.write_trace(workdir / "trace.json")
    picture = draw_curves(config, workdir)
    shown.message(f"summary: {workdir / 'summary.json'}  curves: {picture}")
  return summary


def run_stages(config: Config, workdir: Path, compiles, timeline, progress) -> list:
  """Runs each stage that has not finished; each starts from the previous one's model."""
  from trinity_jax.stage import read_stage_result, run_stage

  results = []
  model = None
  for stage in stage_configs(config):
    directory = stage_directory(config, workdir, stage)
    marker = directory / "stage.json"
    if marker.exists():
      result = dataclasses.replace(read_stage_result(marker), resumed=True)
      progress.message(f"stage {stage.name} is done already ({marker}); skipped")
    else:
      if results and not results[-1].model:
        raise UserError(
          f"stage {stage.name!r} needs the model of {results[-1].name!r}, which was not saved; set "
          "trainer.save_hf='last' there"
        )
      model = Path(results[-1].model) if results else first_model(stage, workdir)
      directory.mkdir(parents=True, exist_ok=True)
      result = run_stage(stage, directory, model, compiles, timeline, progress)
    results.append(result)
  return results


def stage_directory(config: Config, workdir: Path, stage: Config) -> Path:
  return workdir / stage.name if config.stages else workdir


def first_model(config: Config, workdir: Path) -> Path:
  """config.model.path, or a new tiny random checkpoint made from config.model.tiny and the seed."""
  if config.model.path:
    path = Path(config.model.path)
    if not path.is_dir():
      raise UserError(
        f"config.model.path = {config.model.path!r}: no such folder; give a Hugging Face model "
        "folder (config.json, *.safetensors, tokenizer files)"
      )
    return path
  from trinity_jax.models.hf import write_tiny_checkpoint

  path = workdir / "model"
  if not path.exists():
    part = path.with_name("model.part")  # a folder that is there is a complete one
    try:
      write_tiny_checkpoint(part, **{"seed": config.seed, **config.model.tiny})
      part.rename(path)
    except TypeError as e:
      raise UserError(f"config.model.tiny = {config.model.tiny!r}: {e}") from e
  return path


def prepare_workdir(workdir: Path, config: Config) -> Path:
  """Makes the folder, and records the config in it.

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
  record = workdir / "config.json"
  now = json.loads(json.dumps(dataclasses.asdict(config)))
  if record.exists():
    before = json.loads(record.read_text())
    changed = sorted(k for k in now if before.get(k) != now[k] and k != "monitor")
    if changed:
      raise UserError(
        f"--workdir={workdir} holds a run with another config (differs in: {', '.join(changed)}); "
        "continue it with its own config or choose another folder"
      )
  part = record.with_suffix(f".{os.getpid()}")
  part.write_text(json.dumps(now, indent=2))
  part.replace(record)
  return workdir.absolute()


def summarise(config: Config, workdir: Path, results: list, seconds: float, compiles):
  """Writes summary.json from the stages' metrics."""
  from trinity_jax.algorithms.algorithm import find_row
  from trinity_jax.monitor.summary import peak_rss_mb, worst, write_summary
  from trinity_jax.monitor.writers import FILE, read_jsonl

  rows, after_sft = [], None
  for stage, result in zip(stage_configs(config), results):
    rows += read_jsonl(stage_directory(config, workdir, stage) / FILE)
    if find_row(stage.algorithm.name).supervised:
      after_sft = result.accuracy
  values = {
    "accuracy_after_sft": after_sft,
    "accuracy_final": results[-1].accuracy,
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


def draw_curves(config: Config, workdir: Path) -> Path:
  """Draws WORKDIR/curves.png over all stages."""
  from trinity_jax.monitor.plots import curves_png
  from trinity_jax.monitor.writers import FILE

  stages = stage_configs(config)
  paths = [stage_directory(config, workdir, s) / FILE for s in stages]
  return curves_png(
    paths, workdir / "curves.png", title=config.name, stages=[s.name for s in stages]
  )
