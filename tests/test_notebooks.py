"""The notebooks as they are kept; `make notebooks` executes them."""

from __future__ import annotations

import json
import re
from pathlib import Path

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "colab").glob("*.ipynb"))


def code_of(path: Path) -> str:
  cells = json.loads(path.read_text())["cells"]
  return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def test_notebooks_show_a_run():
  """Every cell has run, in order, without an error; nothing tells where, nothing is IPython's."""
  names = {"quickstart", "custom_reward", "your_agent", "inside_the_step"}
  assert names <= {p.stem for p in NOTEBOOKS}
  for path in NOTEBOOKS:
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1)), path
    outputs = [o for c in cells for o in c["outputs"]]
    assert outputs and all(o["output_type"] != "error" for o in outputs), path
    assert all(o.get("name") != "stderr" for o in outputs), path
    shown = json.dumps([{**o, "data": None} for o in outputs])
    assert not re.search(r"/(home|root|tmp|work|Users)/", shown), path
    compile(code_of(path), str(path), "exec")
