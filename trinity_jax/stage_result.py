"""What a finished stage left, kept beside it: a rerun skips the stage."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path


@dataclasses.dataclass
class StageResult:
  """What a finished stage left."""

  name: str
  model: str  # Hugging Face folder, "" when save_hf is never
  resumed: bool


def write_stage_result(path: Path, result: StageResult, seconds: float) -> None:
  """Marks a stage as finished; a rerun skips it."""
  part = path.with_suffix(".part")
  part.write_text(json.dumps({**dataclasses.asdict(result), "seconds": seconds}))
  part.replace(path)


def read_stage_result(path: Path) -> StageResult:
  values = json.loads(path.read_text())
  values.pop("seconds")
  return StageResult(**values)
