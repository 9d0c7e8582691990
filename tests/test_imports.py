"""What is imported when: a light package, and a loop that runs on the core packages alone."""

from __future__ import annotations

import json
from pathlib import Path

import launching
import pytest

HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "transformers", "tokenizers", "rich",
         "matplotlib", "tensorboardX", "math_verify", "safetensors", "torch")  # fmt: skip

# Everything that pyproject.toml installs beyond the bare loop's packages, and what other parts of
# the design will bring.
BLOCKED = ("rich", "tensorboardX", "matplotlib", "math_verify", "sympy", "sqlalchemy", "watchdog",
           "psycopg", "datasets", "pyarrow", "pandas", "torch", "gymnasium", "starlette",
           "uvicorn", "wandb", "mlflow", "pytest", "hypothesis", "PIL")  # fmt: skip

# Makes packages as if they were not installed: no finder finds them.
BLOCK = f"""
import sys

class Hide:
  def __init__(self, finder):
    self.finder = finder

  def find_spec(self, name, path=None, target=None):
    if any(name == b or name.startswith(b + ".") for b in {BLOCKED!r}):
      return None
    return self.finder.find_spec(name, path, target)

  def __getattr__(self, name):
    return getattr(self.finder, name)

sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
"""


def test_import_is_light():
  done = launching.spawn(
    code="import sys, time; start = time.monotonic(); import trinity_jax, trinity_jax.config,"
    "trinity_jax.errors; print(time.monotonic() - start);"
    f"print([m for m in {HEAVY} if m in sys.modules])"
  )
  assert done.returncode == 0, done.stderr
  _, heavy = done.stdout.splitlines()
  assert heavy == "[]"


def test_every_module_imports_without_the_optional_packages():
  """And `kernels` is no global name: that one belongs to another distribution."""
  done = launching.spawn(
    code=BLOCK + "import pkgutil, importlib, trinity_jax\n"
    "names = [m.name for m in pkgutil.walk_packages(trinity_jax.__path__, 'trinity_jax.')]\n"
    "names = [n for n in names if not n.endswith(('math_grader', 'grader_worker'))]\n"
    # What an SQL buffer needs, which is opened by name.
    "names = [n for n in names if not n.endswith(('buffer.database', 'buffer.schema', '_sql',"
    " 'storage_postgres'))]\n"
    "[importlib.import_module(n) for n in names]\n"
    "import trinity_jax.kernels.linear_logprob, trinity_jax.kernels.attention\n"
    "assert len(names) > 40, names\n"
    "print([n for n in ('kernels', 'configs', 'launch', 'tests') if n in sys.modules])"
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == "[]"


def test_bare_loop(tmp_path, capsys):
  """Two GRPO steps with rich, TensorBoard, matplotlib, math_verify ... all missing."""
  recipe = launching.write_recipe(tmp_path / "recipe.py", "")
  args = [f"--config={recipe}", f"--workdir={tmp_path}/run", "--config.monitor.progress=auto",
          "--config.buffer.url=memory",
          "--config.model.tiny={'hidden': 32, 'layers': 1, 'intermediate': 32}"]  # fmt: skip
  run = f"\nimport runpy\nrunpy.run_path({str(launching.ROOT / 'launch' / 'main.py')!r}, "
  done = launching.spawn(*args, code=BLOCK + run + "run_name='__main__')")
  assert done.returncode == 0, done.stderr
  # What is missing is said, not hidden; but not PyTorch, which nothing of ours would use.
  assert "PyTorch" not in done.stderr
  assert "progress is plain: rich is not installed" in done.stderr
  assert "curves: not drawn, matplotlib is not installed" in done.stdout
  assert "step 2/2 | reward" in done.stdout
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [r["step"] for r in rows] == [1, 2] and all("loss" in r for r in rows)
  assert not (tmp_path / "run" / "tensorboard").exists()
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  assert summary["resumed"] is False and Path(summary["model"], "model.safetensors").exists()

  # The same command again has nothing left to do; another config is refused by name.
  main = launching.launcher().main
  before = (tmp_path / "run" / "metrics.jsonl").read_text()
  assert main(["main.py", *args]) == 0
  assert json.loads((tmp_path / "run" / "summary.json").read_text())["resumed"] is True
  assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
  capsys.readouterr()
  assert main(["main.py", *args, "--config.seed=5"]) == 1
  assert "another config (differs in: seed)" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("key", "package"), [("tensorboard=True", "tensorboardX"), ("progress=live", "rich")]
)
def test_asking_for_what_is_not_installed_is_an_error(tmp_path, monkeypatch, capsys, key, package):
  """Nothing that was asked for by name is left out."""
  import sys

  for name in [m for m in sys.modules if m.split(".")[0] == package]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, package, None)
  recipe = launching.write_recipe(tmp_path / "recipe.py", "")
  code = launching.launcher().main([
    "main.py", f"--config={recipe}", f"--workdir={tmp_path}/run", f"--config.monitor.{key}",
    "--config.model.tiny={'hidden': 32, 'layers': 1, 'intermediate': 32}",
  ])  # fmt: skip
  assert code == 1
  assert f"{package} is not installed; pip install {package} or set" in capsys.readouterr().err
