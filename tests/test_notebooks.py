"""The notebooks run from top to bottom, as plain Python in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "colab").glob("*.ipynb"))


def code_of(path: Path) -> str:
  cells = json.loads(path.read_text())["cells"]
  return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def test_notebooks_are_clean():
  """No outputs in the repository, nothing that only IPython understands."""
  assert NOTEBOOKS
  for path in NOTEBOOKS:
    for cell in json.loads(path.read_text())["cells"]:
      assert not cell.get("outputs") and cell.get("execution_count") is None, path
    compile(code_of(path), str(path), "exec")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path):
  env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
  done = subprocess.run(
    [sys.executable, "-c", code_of(path)], cwd=tmp_path, env=env | {"JAX_PLATFORMS": "cpu"},
    capture_output=True, text=True, timeout=900,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
