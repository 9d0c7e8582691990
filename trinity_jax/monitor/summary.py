"""WORKDIR/summary.json: the results of a run for machines, and this process' memory."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trinity_jax.monitor import files

# A key whose quantity does not exist in a run (no SFT stage, no evaluation) is present and None.
REQUIRED = (
  "accuracy_after_sft",  # greedy accuracy on the held-out set after the SFT stage
  "accuracy_final",  # the same at the end
  "wall_seconds",  # of this process, start to summary
  "logprob_diff_p999",  # worst step's 99.9th percentile, nats
  "logprob_diff_max",  # worst token, nats
  "compiles_after_warmup",
  "peak_rss_mb",  # 1e6 bytes
  "resumed",  # bool: continued from a checkpoint
  "seed",
)
FILE = "summary.json"


def write_summary(workdir: str | Path, values: Mapping[str, Any]) -> Path:
  """Writes `workdir/summary.json` atomically and returns its path.

  Extra keys are welcome. Non-finite floats at the top level become null, see `files`.

  Raises:
    ValueError: a required key is missing, or a non-finite number is nested inside a value.
    TypeError: a value that JSON cannot hold.
  """
  missing = [key for key in REQUIRED if key not in values]
  if missing:
    raise ValueError(f"summary lacks {', '.join(missing)}; give None for what this run has not")
  plain = {k: v.item() if hasattr(v, "item") else v for k, v in values.items()}
  row = json.loads(files.encode_row(plain))
  path = Path(workdir) / FILE
  files.write_atomic(path, (json.dumps(row, indent=2, ensure_ascii=False) + "\n").encode())
  return path


def read_summary(workdir: str | Path) -> dict[str, Any]:
  """Inverse of `write_summary`."""
  return files.decode_row((Path(workdir) / FILE).read_bytes())


def worst(rows: list[dict[str, Any]], name: str) -> float | None:
  """Returns the largest value of a metric over rows of metrics.jsonl; NaN wins, absent is None."""
  found = [row[name] for row in rows if row.get(name) is not None]
  if any(math.isnan(v) for v in found):
    return math.nan
  return max(found, default=None)


def last(rows: list[dict[str, Any]], name: str) -> float | None:
  """Returns the last value of a metric over rows of metrics.jsonl, or None."""
  return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)


def peak_rss_mb() -> float:
  """Returns this process' peak resident memory in MB (1e6 bytes); its children are not included.

  On Linux from VmHWM: getrusage's ru_maxrss would also remember the parent's size before exec.
  """
  value = _proc_status("VmHWM")
  if value is not None:
    return value
  import resource

  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def rss_mb() -> float | None:
  """Returns this process' resident memory in MB (1e6 bytes), or None where the system hides it."""
  return _proc_status("VmRSS")


def _proc_status(field: str) -> float | None:
  try:
    text = Path("/proc/self/status").read_text()
  except OSError:
    return None  # not Linux
  for line in text.splitlines():
    if line.startswith(field + ":"):
      return int(line.split()[1]) * 1024 / 1e6
  return None
