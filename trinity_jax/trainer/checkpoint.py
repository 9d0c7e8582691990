"""Checkpoints: Orbax, atomic, keep the newest N and the best.

A checkpoint of step t is WORKDIR/checkpoints/t/{state,meta}. `meta` is JSON: version, taskset
cursor, counters and the terms of exactness (machine, core count, mesh, library versions).
"""

from __future__ import annotations

import json
import os
import platform
import threading
from pathlib import Path
from typing import Any

import jax

from trinity_jax.distributed import ALONE, World
from trinity_jax.errors import RunFailed, UserError
from trinity_jax.trainer.state import TrainState


def terms_of_exactness(mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """What must be equal for a resumed run to be bit-identical to one never stopped."""
  import importlib.metadata

  libraries = ("jax", "jaxlib", "optax", "numpy")
  return {
    "machine": platform.machine(),
    "processor": _processor(),
    "device": jax.devices()[0].device_kind,
    "cores": _cores(),
    "mesh": dict(mesh.shape),
    "processes": jax.process_count(),
    "libraries": {name: importlib.metadata.version(name) for name in libraries},
  }


def _processor() -> str:
  """The CPU's model where the system tells (Linux): XLA compiles for its instruction set."""
  info = Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
  return next(names, platform.processor())


def _cores() -> int:
  """Cores this process may run on, which is what XLA's thread pools are made for."""
  allowed = getattr(os, "sched_getaffinity", None)
  return len(allowed(0)) if allowed else os.cpu_count() or 1


def changed_terms(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """Names the terms that differ, as 'name: then -> now'."""
  return [f"{k}: {saved.get(k)} -> {now[k]}" for k in now if saved.get(k) != now[k]]


class Checkpointer:
  """Saves and restores (TrainState, meta) under a directory that all processes of `world` see."""

  def __init__(self, directory: Path, keep: int, world: World = ALONE):
    import orbax.checkpoint as ocp

    self._ocp, self._world = ocp, world
    self._keep = keep
    self._directory = Path(directory).absolute()
    self._best_file = self._directory / "best.json"
    # Evaluation runs beside the trainer: a score may come before its checkpoint does, and must
    # not wait for one that is being written.
    self._lock = threading.Lock()
    self._scores: dict[int, float] = {}
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False),
    )
    self._saved: set[int] = set(self._manager.all_steps())

  def latest_step(self) -> int | None:
    """The newest complete checkpoint's step, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
    """Writes step `step`, then deletes what is neither among the newest `keep` nor the best."""
    args = self._ocp.args
    saved = self._manager.save(
      step, args=args.Composite(state=args.StandardSave(state), meta=args.JsonSave(meta))
    )
    if not saved:
      raise RunFailed(
        f"{self._directory} did not take a checkpoint of step {step}: its newest is of step "
        f"{self._manager.latest_step()}"
      )
    self._manager.wait_until_finished()
    with self._lock:
      self._saved.add(step)
      self._choose_best()
      best = self._world.agree(self.best().get("step"))
      old = {s for s in sorted(self._saved)[: -self._keep] if s != best}
      self._saved -= old
    for s in sorted(old):
      self._manager.delete(s)

  def best(self) -> dict[str, Any]:
    """{"step", "score"} of the best checkpoint, or {}."""
    return json.loads(self._best_file.read_text()) if self._best_file.exists() else {}

  def offer_best(self, step: int, score: float) -> None:
    """Makes `step` the best if its score is the highest and its checkpoint is, or will be, there.

    Thread-safe.
    """
    with self._lock:
      self._scores[step] = score
      self._choose_best()

  def _choose_best(self) -> None:
    if not self._world.leader:
      return
    step = max(self._saved & self._scores.keys(), key=lambda s: (self._scores[s], -s), default=None)
    if step is None or self._scores[step] <= self.best().get("score", float("-inf")):
      return
    part = self._best_file.with_suffix(".part")
    part.write_text(json.dumps({"step": step, "score": self._scores[step]}))
    part.replace(self._best_file)

  def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Restores step `step` into the shapes, dtypes and shardings of `like`.

    Raises:
      UserError: the checkpoint is of another model or optimizer (names the first leaves that
        differ).
    """
    args = self._ocp.args
    abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, like)
    self._check_shapes(step, abstract)
    out = self._manager.restore(
      step, args=args.Composite(state=args.StandardRestore(abstract), meta=args.JsonRestore())
    )
    return out["state"], out["meta"]

  def _check_shapes(self, step: int, abstract: TrainState) -> None:
    """Orbax pads or cuts arrays of another shape without a word; we refuse them by name."""
    with self._ocp.StandardCheckpointer() as checkpointer:
      saved = checkpointer.metadata(self._directory / str(step) / "state")
    tree = saved.item_metadata if hasattr(saved, "item_metadata") else saved
    tree = getattr(tree, "tree", tree)
    if wrong := _differences(tree, abstract):
      raise UserError(
        f"checkpoint {self._directory / str(step)} does not fit this run's model or optimizer: "
        f"{wrong}; use the config it was made with or another --workdir"
      )

  def close(self) -> None:
    self._manager.close()


def saved_steps(directory: Path) -> list[int]:
  """Steps of the complete checkpoints in a folder, rising; changes nothing there."""
  if not Path(directory).is_dir():
    return []
  return sorted(int(p.name) for p in Path(directory).iterdir() if p.name.isdigit())


def restore_params(directory: Path, step: int, like: Any) -> Any:
  """The parameters of checkpoint `step` alone; nothing else of it is read.

  Args:
    like: pytree of ShapeDtypeStruct with the shardings and the dtype wanted.

  Raises:
    UserError: the checkpoint is damaged, or of another model (names the first leaves that differ).
  """
  import orbax.checkpoint as ocp

  path = Path(directory).absolute() / str(step) / "state"
  tree = ocp.PyTreeCheckpointHandler()
  handler = ocp.Checkpointer(tree)
  try:
    try:
      # The handler's own metadata() wants a file that only managers' folders have.
      saved: Any = tree.metadata(path)  # type: ignore[arg-type]
    except (FileNotFoundError, ValueError) as e:  # tensorstore's NOT_FOUND is a ValueError
      raise UserError(
        f"checkpoint {path.parent} is damaged or was deleted: it says nothing of its parameters; "
        "delete it, or take another"
      ) from e
    if wrong := _differences(getattr(saved, "tree", saved)["params"], like):
      raise UserError(f"checkpoint {path.parent} does not fit the model: {wrong}")
    how = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype), like)
    args = ocp.args.PyTreeRestore(
      item={"params": like}, restore_args={"params": how}, partial_restore=True
    )
    return handler.restore(path, args=args)["params"]
  finally:
    handler.close()


def _differences(saved: Any, wanted: Any) -> str:
  """The first leaves whose shapes differ or that only one side has; "" when there are none."""
  have = {_name(p): tuple(m.shape) for p, m in jax.tree_util.tree_leaves_with_path(saved)}
  want = {_name(p): tuple(a.shape) for p, a in jax.tree_util.tree_leaves_with_path(wanted)}
  wrong = [
    f"{k}: {have.get(k, 'missing')} in the checkpoint, {want.get(k, 'not wanted')} in the run"
    for k in sorted(have.keys() | want.keys())
    if have.get(k) != want.get(k)
  ]
  return "; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def _name(path) -> str:
  """A leaf's path as dots, the same for dataclasses, tuples and the dicts Orbax reads back."""
  parts = []
  for entry in path:
    value = next(getattr(entry, a) for a in ("key", "name", "idx") if hasattr(entry, a))
    parts.append(str(value))
  return ".".join(parts)
