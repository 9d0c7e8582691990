"""A run's folder as the viewer sees it: its stages, their curves, their tokenizer."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trinity_jax.buffer.record import FILE as BUFFER
from trinity_jax.config import resolve, stage_configs
from trinity_jax.errors import RunFailed, UserError
from trinity_jax.monitor.writers import FILE as METRICS
from trinity_jax.monitor.writers import read_stage
from trinity_jax.server.viewer.index import EMPTY, Index
from trinity_jax.server.viewer.stores import SqliteStore, Store

NAMESPACE = "buffer.namespace"  # of a stage whose buffer is in PostgreSQL
_LONGEST_CHARACTER = 6  # tokens that are tried together
POINTS = 600  # of a curve that are sent at most
# Files whose changes the page shows; of a buffer elsewhere it hears when metrics are written.
WATCHED = (METRICS, BUFFER, f"{BUFFER}-wal", NAMESPACE, "stage.json")


class Folder:
  """Reads a run.

  Args:
    workdir: what the launcher was given as --workdir, or one stage's folder.
    tokenizer: HF folder whose tokenizer.json turns ids into text; "" looks for the run's own.

  Raises:
    UserError: no such folder, or no such tokenizer.
  """

  def __init__(self, workdir: str | Path, tokenizer: str | Path = ""):
    self.path = Path(workdir).resolve()
    if not self.path.is_dir():
      raise UserError(f"--workdir={workdir}: is no folder; name the folder a run writes to")
    self._tokenizer = Path(tokenizer) if tokenizer else None
    if self._tokenizer and not (self._tokenizer / "tokenizer.json").is_file():
      raise UserError(f"--tokenizer={tokenizer}: has no tokenizer.json; name an HF model folder")
    self._lock = threading.Lock()
    self._indices: dict[str, Index] = {}
    self._loaded: dict[Path, Any] = {}

  def stages(self) -> list[str]:
    """Names of the stages so far, in the order they began; "." for a folder that is one."""
    if _is_stage(self.path):
      return ["."]
    found = [p for p in self.path.iterdir() if p.is_dir() and _is_stage(p)]
    return [p.name for p in sorted(found, key=_began)]

  def stage(self, name: str) -> Path:
    """Its folder. Only names that `stages` gives are looked up, so no path leads elsewhere."""
    known = self.stages()
    if name not in known:
      raise UserError(
        f"stage {name[:80]!r} does not exist; there are: {', '.join(known) or 'none'}"
      )
    return self.path / name

  def index(self, name: str) -> Index | None:
    """Of a stage's rollouts; None where nothing that can be read has any.

    Raises:
      UserError: the run's config.json does not say where they are.
    """
    store = self._store(name)
    with self._lock:
      return None if store is None else self._indices.setdefault(name, Index(store))

  def _store(self, name: str) -> Store | None:
    folder = self.stage(name)
    if (folder / BUFFER).is_file():
      return SqliteStore(folder / BUFFER)
    buffer, stage = self._configured_buffer(name)
    kind, _, rest = buffer.get("url", "").partition("://")
    if kind == "sqlite" and rest:
      return SqliteStore(Path(rest.removeprefix("/")))
    if kind.partition("+")[0] != "postgresql":
      return None
    prefix, own = buffer["namespace"], folder / NAMESPACE
    if not prefix and not own.is_file():
      return None
    from trinity_jax.server.viewer.store_postgres import PostgresStore

    return PostgresStore(buffer["url"], f"{prefix}_{stage}" if prefix else own.read_text())

  def describe(self, name: str) -> dict[str, Any]:
    """What the page says of a stage: counts, and why rollouts are missing."""
    finished, problem, index = (self.stage(name) / "stage.json").is_file(), "", None
    counts = EMPTY
    try:
      index = self.index(name)
      counts = EMPTY if index is None else index.refresh()
    except (UserError, RunFailed) as e:  # its curves can be seen all the same
      problem = f"Rollouts cannot be read: {e}"
    note = problem or _note(counts, index is not None)
    return {
      "name": name, "finished": finished, "has_buffer": index is not None, "note": note, **counts
    }  # fmt: skip

  def curves(self, name: str, names: Sequence[str]) -> dict[str, Any]:
    """All metric names, and [[step, value], ...] of those asked for (at most POINTS each).

    A longer curve is thinned by taking the extremes of each span, so that a spike stays visible.
    """
    file = self.stage(name) / METRICS
    rows = read_stage(file) if file.is_file() else []
    known = sorted({k for row in rows for k, v in row.items() if _number(v)} - {"step", "time"})
    series = {}
    for metric in names:
      points = [[r["step"], r[metric]] for r in rows if _number(r.get(metric))]
      series[metric] = _thin(points, POINTS)
    return {"names": known, "series": series, "rows": len(rows)}

  def pieces(self, name: str, ids: Sequence[int]) -> tuple[list[str] | None, str]:
    """The text of each token, and where the tokenizer was found; (None, "") without one.

    Tokens that only together are characters: the first has the text, the others "".
    """
    for folder in self._tokenizers(name):
      return _pieces(self._load(folder), ids), str(folder)
    return None, ""

  def _tokenizers(self, name: str) -> list[Path]:
    if self._tokenizer:
      return [self._tokenizer]
    places = [self.stage(name) / "hf", self.path / "model", self.path.parent / "model"]
    for config in self._configs():
      path = _configured_model(config)
      places += [Path(path)] if path else []
    return [p for p in places if (p / "tokenizer.json").is_file()]

  def _configs(self) -> list[Path]:
    both = (self.path / "config.json", self.path.parent / "config.json")
    return [p for p in both if p.is_file()]

  def _configured_buffer(self, name: str) -> tuple[dict[str, Any], str]:
    """(keys of config.buffer, name in the config) of a stage; ({}, "") without a config."""
    folder = self.stage(name).name
    for config in self._configs():
      try:
        stages = stage_configs(resolve(json.loads(config.read_bytes())))
      except (OSError, ValueError, TypeError, AttributeError) as e:  # UserErrors are ValueErrors
        raise UserError(f"{config}: is no config of a run that this version knows: {e}") from e
      found = [s for s in stages if s.name == folder] or stages[:1]
      return dataclasses.asdict(found[0].buffer), found[0].name
    return {}, ""

  def _load(self, folder: Path) -> Any:
    from tokenizers import Tokenizer

    with self._lock:
      if folder not in self._loaded:
        try:
          self._loaded[folder] = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as e:  # the library raises plain Exceptions
          raise UserError(f"{folder}/tokenizer.json: unreadable tokenizer: {e}") from e
      return self._loaded[folder]


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
  decode = lambda part: tokenizer.decode([int(i) for i in part], skip_special_tokens=False)
  out: list[str] = []
  while len(out) < len(ids):
    at = len(out)
    first = text = decode(ids[at : at + 1])
    size = 1
    while "\ufffd" in text and size < _LONGEST_CHARACTER and at + size < len(ids):
      size += 1
      text = decode(ids[at : at + size])
    # Bytes that are no text, however many are taken, stand for themselves.
    out += [first] if "\ufffd" in text else [text, *[""] * (size - 1)]
  return out


def _is_stage(folder: Path) -> bool:
  return any((folder / name).is_file() for name in (METRICS, BUFFER, NAMESPACE))


def _began(folder: Path) -> tuple[float, str]:
  """Time of the first row of metrics, and the name among those that have none yet."""
  try:
    with open(folder / METRICS, "rb") as file:
      return float(json.loads(file.readline())["time"]), folder.name
  except (OSError, ValueError, KeyError, TypeError):
    return math.inf, folder.name


def _note(counts: Mapping[str, int], has_buffer: bool) -> str:
  if not has_buffer:
    return (
      "No rollouts are kept: this stage samples nothing, has not begun to, or keeps its buffer in "
      "memory."
    )
  if counts["deleted"]:
    return (
      f"{counts['deleted']} of {counts['groups']} groups were trained on or dropped and their "
      "rollouts deleted; run with --config.buffer.keep=True to keep them."
    )
  return ""


def _number(value: Any) -> bool:
  return isinstance(value, (int, float)) and math.isfinite(value)


def _thin(points: list[list[float]], most: int) -> list[list[float]]:
  if len(points) <= most:
    return points
  span = math.ceil(2 * len(points) / most)
  out = []
  for i in range(0, len(points), span):
    part = points[i : i + span]
    ends = {id(p): p for p in (min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1]))}
    out += sorted(ends.values())
  return out


def _configured_model(config: Path) -> str:
  try:
    path = json.loads(config.read_bytes())["model"]["path"]
  except (OSError, ValueError, KeyError, TypeError):
    return ""
  return path if isinstance(path, str) else ""
