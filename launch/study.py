"""Studies of learning: python launch/study.py NAME --workdir=runs/study [--seeds 0,1,2]

Names:
  algorithms  every algorithm of the table by its name, from one SFT checkpoint of the quickstart:
              held-out accuracy after 30 steps, and once with the advantages' sign turned;
              supervised ones: the held-out loss before and after
  schedules   GRPO by each schedule of configs/asynchrony.py, at equal samples: held-out accuracy,
              and how old the tokens were
  staleness   what rollouts of older policies do: a plain policy gradient, PPO's clip, truncated
              importance sampling and decoupled PPO at a staleness of 0, 2, 8 and 16 versions

A run that has finished is not run again: the same command goes on after an interruption. Writes
WORKDIR/NAME.json and prints a table; staleness also draws WORKDIR/staleness.png.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

sys.path.insert(0, str(Path(__file__).parent))
from main import load_config

from trinity_jax.algorithms import TABLE, make

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all runs.", required=True)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the runs.")
_ONLY = flags.DEFINE_list("only", [], "Names of the algorithms; empty: all.")
_FLIP = flags.DEFINE_bool("flip", True, "Also run each with the advantages' sign turned (seed 0).")

CONFIGS = Path(__file__).parents[1] / "configs"
TEACHER = "grpo"


def execute(config: Any, workdir: Path) -> dict[str, Any]:
  """Runs a config, unless it has run before; returns its summary."""
  summary = workdir / "summary.json"
  if summary.exists():
    return json.loads(summary.read_text())
  from trinity_jax.run import run

  config.monitor.progress, config.monitor.tensorboard = "none", False
  return run(config, workdir)


def sft_checkpoint(workdir: Path) -> tuple[str, float]:
  """(folder, held-out accuracy) of the quickstart's SFT stage, seed 0."""
  config: Any = load_config(str(CONFIGS / "quickstart.py"))
  config.stages = config.stages[:1]
  summary = execute(config, workdir / "sft")
  return summary["model"], summary["accuracy_final"]


# --- every algorithm ------------------------------------------------------------------------------


def algorithms(workdir: Path) -> list[dict[str, Any]]:
  """One row per algorithm."""
  model, before = sft_checkpoint(workdir)
  rows = []
  for name in _ONLY.value or TABLE:
    row: dict[str, Any] = {"algorithm": name, "before": before}
    if TABLE[name].supervised:
      losses = [held_out_loss(one_run(workdir, name, model, int(s))) for s in _SEEDS.value]
      row["loss"] = losses
      row["learned"] = sum(after <= 0.9 * start for start, after in losses) >= 2 / 3 * len(losses)
    else:
      row["after"] = [accuracy(one_run(workdir, name, model, int(s))) for s in _SEEDS.value]
      row["learned"] = sum(a >= before + 0.1 for a in row["after"]) >= 2 / 3 * len(row["after"])
      if _FLIP.value:
        row["flipped"] = accuracy(one_run(workdir, name, model, 0, flip=True))
        row["learned"] &= row["flipped"] < before
    print(json.dumps(row), flush=True)
    rows.append(row)
  return rows


def one_run(workdir: Path, name: str, model: str, seed: int, flip: bool = False) -> Path:
  """The folder of a finished run of configs/algorithms.py."""
  config: Any = load_config(f"{CONFIGS / 'algorithms.py'}:{name}")
  config.model.path, config.seed = model, seed
  config.eval.on_start = TABLE[name].supervised
  if make(name).needs_teacher:
    teacher = one_run(workdir, TEACHER, model, 0)
    config.algorithm.teacher = str(teacher / "hf")
  config.algorithm.flip_advantages = flip
  folder = workdir / "algorithms" / f"{name}-{seed}{'-flipped' if flip else ''}"
  execute(config, folder)
  return folder


def accuracy(folder: Path) -> float:
  return json.loads((folder / "summary.json").read_text())["accuracy_final"]


def held_out_loss(folder: Path) -> tuple[float, float]:
  """(first, last) eval/loss of a run."""
  rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  losses = [r["eval/loss"] for r in rows if "eval/loss" in r]
  return losses[0], losses[-1]


def algorithms_table(rows: Sequence[Mapping[str, Any]]) -> str:
  titles = ("algorithm", "before", "after, by seed", "sign turned", "learned")
  lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
  for r in rows:
    if "loss" in r:
      after = ", ".join(f"{a:.3f} -> {b:.3f}" for a, b in r["loss"])
      lines.append(f"| {r['algorithm']} | | held-out loss {after} | | {_yes(r)} |")
    else:
      after = ", ".join(f"{a:.3f}" for a in r["after"])
      flipped = f"{r['flipped']:.3f}" if "flipped" in r else ""
      lines.append(f"| {r['algorithm']} | {r['before']:.3f} | {after} | {flipped} | {_yes(r)} |")
  return "\n".join(lines)


def _yes(row: Mapping[str, Any]) -> str:
  return "yes" if row["learned"] else "no"


# --- schedules ------------------------------------------------------------------------------------


def schedules(workdir: Path) -> list[dict[str, Any]]:
  """One row per schedule: held-out accuracy and mean staleness of each seed."""
  model, before = sft_checkpoint(workdir)
  rows = []
  for name in runpy.run_path(str(CONFIGS / "asynchrony.py"))["SCHEDULES"]:
    row: dict[str, Any] = {"schedule": name, "before": before, "after": [], "staleness": []}
    for seed in _SEEDS.value:
      config: Any = load_config(f"{CONFIGS / 'asynchrony.py'}:{name}")
      config.model.path, config.seed = model, int(seed)
      folder = workdir / "schedules" / f"{name}-{seed}"
      row["after"].append(execute(config, folder)["accuracy_final"])
      lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
      lags = [r["staleness/mean"] for r in lines if "staleness/mean" in r]
      row["staleness"].append(sum(lags) / len(lags))
    print(json.dumps(row), flush=True)
    rows.append(row)
  return rows


def schedules_table(rows: Sequence[Mapping[str, Any]]) -> str:
  lines = ["| schedule | before | after, by seed | mean staleness |", "|---|---|---|---|"]
  for r in rows:
    after = ", ".join(f"{a:.3f}" for a in r["after"])
    lag = sum(r["staleness"]) / len(r["staleness"])
    lines.append(f"| {r['schedule'].replace('_', '-')} | {r['before']:.3f} | {after} | {lag:.2f} |")
  return "\n".join(lines)


# --- rollouts of older policies -------------------------------------------------------------------


def staleness(workdir: Path) -> list[dict[str, Any]]:
  """One row per loss and staleness: held-out accuracy of each seed, and the curve of rewards."""
  model, before = sft_checkpoint(workdir)
  rows = []
  constants = runpy.run_path(str(CONFIGS / "off_policy.py"))
  for loss in constants["LOSSES"]:
    for lag in constants["STALENESS"]:
      after, curves = [], []
      for seed in _SEEDS.value:
        config: Any = load_config(f"{CONFIGS / 'off_policy.py'}:{loss},{lag}")
        config.model.path, config.seed = model, int(seed)
        folder = workdir / "staleness" / f"{loss}-{lag}-{seed}"
        after.append(execute(config, folder)["accuracy_final"])
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        curves.append([r["reward/mean"] for r in lines if "reward/mean" in r])
      rows.append({"loss": loss, "staleness": lag, "before": before, "after": after,
                   "rewards": curves})  # fmt: skip
      print(json.dumps({k: v for k, v in rows[-1].items() if k != "rewards"}), flush=True)
  draw(rows, workdir / "staleness.png")
  return rows


def staleness_table(rows: Sequence[Mapping[str, Any]]) -> str:
  lags = sorted({r["staleness"] for r in rows})
  lines = ["| loss | " + " | ".join(f"staleness {n}" for n in lags) + " |",
           "|---" * (1 + len(lags)) + "|"]  # fmt: skip
  for loss in dict.fromkeys(r["loss"] for r in rows):
    cells = []
    for lag in lags:
      found = sorted(next(r["after"] for r in rows if (r["loss"], r["staleness"]) == (loss, lag)))
      cells.append(f"{found[len(found) // 2]:.3f} ({found[0]:.3f} to {found[-1]:.3f})")
    lines.append(f"| {loss} | {' | '.join(cells)} |")
  return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
  """Held-out accuracy over staleness: median of the seeds, and their range."""
  import matplotlib

  matplotlib.use("agg")
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
  names = list(dict.fromkeys(r["loss"] for r in rows))
  for i, loss in enumerate(names):
    own = [r for r in rows if r["loss"] == loss]
    x = [r["staleness"] + 0.12 * (i - (len(names) - 1) / 2) for r in own]
    middle = [sorted(r["after"])[len(r["after"]) // 2] for r in own]
    below = [m - min(r["after"]) for m, r in zip(middle, own)]
    above = [max(r["after"]) - m for m, r in zip(middle, own)]
    axes.errorbar(x, middle, yerr=(below, above), marker="o", capsize=3, label=loss)
  axes.axhline(rows[0]["before"], color="gray", linestyle=":", label="before")
  axes.set(xlabel="staleness of the rollouts (versions)", ylabel="held-out accuracy", ylim=(0, 1))
  axes.set_xticks(sorted({r["staleness"] for r in rows}))
  figure.legend(loc="outside right center", fontsize=8)
  figure.savefig(path, dpi=150)
  plt.close(figure)


STUDIES = {
  "algorithms": (algorithms, algorithms_table),
  "schedules": (schedules, schedules_table),
  "staleness": (staleness, staleness_table),
}


def main(argv: list[str]) -> None:
  if len(argv) != 2 or argv[1] not in STUDIES:
    sys.exit(f"error: name one of: {', '.join(STUDIES)}\n{__doc__}")
  workdir = Path(_WORKDIR.value).absolute()
  workdir.mkdir(parents=True, exist_ok=True)
  logging.set_verbosity(logging.WARNING)
  # Runs differ in their train step alone; the sampler's programs are compiled once.
  jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  run, table = STUDIES[argv[1]]
  rows = run(workdir)
  (workdir / f"{argv[1]}.json").write_text(json.dumps(rows, indent=2) + "\n")
  print(table(rows))


if __name__ == "__main__":
  app.run(main)
