"""Checkpoints: Orbax, atomic, keep the newest N and the best.

A checkpoint of step t is WORKDIR/checkpoints/t/{state,meta}. `meta` is JSON: version, taskset
cursor, counters and the terms of exactness (machine, core count, mesh, library versions).
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import jax

from trinity_jax.errors import UserError
from trinity_jax.trainer.state import TrainState


def terms_of_exactness(mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """What must be equal for a resumed run to be bit-identical to one never stopped."""
  import importlib.metadata

  libraries = ("jax", "jaxlib", "optax", "numpy")
  return {
    "machine": platform.machine(),
    "device": jax.devices()[0].device_kind,
    "cores": os.cpu_count(),
    "mesh": dict(mesh.shape),
    "libraries": {name: importlib.metadata.version(name) for name in libraries},
  }


def changed_terms(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """Names the terms that differ, as 'name: then -> now'."""
  return [f"{k}: {saved.get(k)} -> {now[k]}" for k in now if saved.get(k) != now[k]]


class Checkpointer:
  """Saves and restores (TrainState, meta) under a directory."""

  def __init__(self, directory: Path, keep: int):
    import orbax.checkpoint as ocp

    self._ocp = ocp
    self._keep = keep
    self._directory = Path(directory).absolute()
    self._best_file = self._directory / "best.json"
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False),
    )

  def latest_step(self) -> int | None:
    """The newest complete checkpoint's step, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
    """Writes step `step`, then deletes what is neither among the newest `keep` nor the best."""
    args = self._ocp.args
    self._manager.save(
      step, args=args.Composite(state=args.StandardSave(state), meta=args.JsonSave(meta))
    )
    self._manager.wait_until_finished()
    best = self.best().get("step")
    steps = sorted(self._manager.all_steps())
    for old in steps[: -self._keep]:
      if old != best:
        self._manager.delete(old)

  def best(self) -> dict[str, Any]:
    """{"step", "score"} of the best checkpoint, or {}."""
    return json.loads(self._best_file.read_text()) if self._best_file.exists() else {}

  def offer_best(self, step: int, score: float) -> None:
    """Remembers `step` as the best when its checkpoint exists and its score is higher."""
    if step in self._manager.all_steps() and score > self.best().get("score", float("-inf")):
      part = self._best_file.with_suffix(".part")
      part.write_text(json.dumps({"step": step, "score": score}))
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
    saved = self._ocp.StandardCheckpointer().metadata(self._directory / str(step) / "state")
    tree = saved.item_metadata if hasattr(saved, "item_metadata") else saved
    tree = getattr(tree, "tree", tree)
    have = {_name(p): tuple(m.shape) for p, m in jax.tree_util.tree_leaves_with_path(tree)}
    want = {_name(p): tuple(a.shape) for p, a in jax.tree_util.tree_leaves_with_path(abstract)}
    wrong = [
      f"{k}: {have.get(k, 'missing')} in the checkpoint, {want.get(k, 'not wanted')} in the run"
      for k in sorted(have.keys() | want.keys())
      if have.get(k) != want.get(k)
    ]
    if wrong:
      raise UserError(
        f"checkpoint {self._directory / str(step)} does not fit this run's model or optimizer: "
        f"{'; '.join(wrong[:3])}{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}; "
        "use the config it was made with or another --workdir"
      )

  def close(self) -> None:
    self._manager.close()


def _name(path) -> str:
  """A leaf's path as dots, the same for dataclasses, tuples and the dicts Orbax reads back."""
  parts = []
  for entry in path:
    value = next(getattr(entry, a) for a in ("key", "name", "idx") if hasattr(entry, a))
    parts.append(str(value))
  return ".".join(parts)
