"""Strict JSON and atomic files, shared by the writers and the summary.

JSON has no NaN and no infinity. A non-finite number is written as `null`, and the object gets a
key `nonfinite` that says which it was: `{"loss": null, "nonfinite": {"loss": "nan"}}`. Columns
stay numeric for every reader, and nothing is lost: `decode_row` gives the floats back.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NONFINITE = "nonfinite"
_SPELLING = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def as_number(name: str, value: Any) -> int | float:
  """Returns a Python number for a Python, numpy or (host-ready) jax scalar.

  Raises:
    TypeError: `value` is not a real scalar; the message names the metric.
  """
  if hasattr(value, "item") and getattr(value, "size", 1) == 1:
    value = value.item()
  if isinstance(value, bool):
    return int(value)
  if isinstance(value, (int, float)):
    return value
  raise TypeError(f"metric {name!r} is {type(value).__name__}, expected one real number")


def encode_row(row: Mapping[str, Any]) -> str:
  """Returns one line of strict JSON; non-finite floats become null plus a `nonfinite` entry.

  Raises:
    ValueError: the row has a key `nonfinite` of its own.
    TypeError: a value is not JSON.
  """
  if NONFINITE in row:
    raise ValueError(f"key {NONFINITE!r} is reserved: it says which nulls were NaN or infinite")
  odd = {k: str(float(v)) for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
  if odd:
    row = {**{k: None if k in odd else v for k, v in row.items()}, NONFINITE: odd}
  return json.dumps(row, allow_nan=False, ensure_ascii=False)


def decode_row(line: str | bytes) -> dict[str, Any]:
  """Inverse of `encode_row`.

  Raises:
    ValueError: not JSON, not an object, or an unknown spelling in `nonfinite`.
  """
  row = json.loads(line)
  if not isinstance(row, dict):
    raise ValueError(f"expected a JSON object, found {type(row).__name__}")
  for name, spelling in row.pop(NONFINITE, {}).items():
    if spelling not in _SPELLING:
      raise ValueError(f"unknown number {spelling!r} in {NONFINITE!r}")
    row[name] = _SPELLING[spelling]
  return row


def write_atomic(path: str | Path, data: bytes) -> None:
  """Replaces `path` by `data` in one step: a reader or a crash sees the old file or the new one."""
  path = Path(path)
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
  try:
    with os.fdopen(handle, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    # mkstemp makes 0600; give the file what an ordinary open() would have given.
    os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
    os.replace(temporary, path)
  except BaseException:  # leaves no half file, then goes on up
    Path(temporary).unlink(missing_ok=True)
    raise
  directory = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(directory)
  finally:
    os.close(directory)


def _umask() -> int:
  """Reads the umask without changing it where the system tells (Linux)."""
  try:
    for line in Path("/proc/self/status").read_text().splitlines():
      if line.startswith("Umask:"):
        return int(line.split()[1], 8)
  except OSError:
    return 0o022  # not Linux: the usual default
  return 0o022
