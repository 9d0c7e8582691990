"""What is installed is what is on the disk."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAMES = PROJECT["tool"]["setuptools"]["packages"]


def folders() -> dict[str, Path]:
  """Package name -> folder, for every __init__.py of the package and of kernels/."""
  found = {}
  for top, name in (("trinity_jax", "trinity_jax"), ("kernels", "trinity_jax.kernels")):
    for init in sorted((ROOT / top).rglob("__init__.py")):
      parts = init.parent.relative_to(ROOT / top).parts
      found[".".join([name, *parts])] = init.parent
  return found


def test_the_list_of_packages_is_that_of_the_folders():
  assert sorted(NAMES) == sorted(folders()) and NAMES == sorted(NAMES)


def test_every_folder_with_code_is_a_package():
  """A folder without __init__.py would be missing from the wheel without a word."""
  code = {p.parent for top in ("trinity_jax", "kernels") for p in (ROOT / top).rglob("*.py")}
  assert code == set(folders().values())


def test_kernels_is_mapped_and_imports_nothing_of_ours():
  assert PROJECT["tool"]["setuptools"]["package-dir"] == {"trinity_jax.kernels": "kernels"}
  for path in sorted((ROOT / "kernels").rglob("*.py")):
    assert not re.search(r"^\s*(from|import) (trinity_jax|kernels)\b", path.read_text(), re.M), path


def test_only_ops_imports_kernels():
  pattern = r"(from|import) trinity_jax\.kernels|from trinity_jax import kernels"
  importers = {
    str(p.relative_to(ROOT))
    for p in sorted((ROOT / "trinity_jax").rglob("*.py"))
    if re.search(pattern, p.read_text())
  }
  assert importers == {"trinity_jax/ops.py"}


def test_scripts_and_tests_are_not_packages():
  for folder in ("configs", "launch", "tests"):
    assert not sorted((ROOT / folder).rglob("__init__.py"))


def imported(path):
  """Top-level packages that a module imports anywhere."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      names.add(node.module)
  return {name.partition(".")[0] for name in names}


def test_imported_packages_are_declared():
  """What the package imports is a dependency, or an extra's."""
  known = {
    "absl": "absl-py", "google": "", "jax": "jax", "jaxlib": "jax", "math_verify": "math-verify",
    "ml_collections": "ml-collections", "orbax": "orbax-checkpoint", "yaml": "pyyaml",
  }  # fmt: skip
  listed = [*PROJECT["project"]["dependencies"]]
  for extra in PROJECT["project"]["optional-dependencies"].values():
    listed += extra
  declared = {re.match(r"[\w-]+", d)[0].lower() for d in listed}  # type: ignore[index]
  declared |= {"mlflow"} if "mlflow-skinny" in declared else set()
  for path in sorted([*(ROOT / "trinity_jax").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]):
    for name in sorted(imported(path)):
      beside = path.is_relative_to(ROOT / "launch") and path.with_name(f"{name}.py").exists()
      if name in sys.stdlib_module_names or name == "trinity_jax" or beside:
        continue
      assert known.get(name, name).lower() in declared, f"{path}: {name} is not in pyproject.toml"


def test_makefile_and_markers_agree():
  makefile = (ROOT / "Makefile").read_text()
  targets = set(re.findall(r"^([\w-]+):", makefile, re.M))
  wanted = "quickstart test slow nightly check aot-check gpu-check perf"
  assert set(wanted.split()) <= targets
  markers = {m.split(":")[0] for m in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
  assert markers == {"slow", "nightly", "aot"}
  for extra in re.findall(r"'\.\[(\w+)\]'", makefile):
    assert extra in PROJECT["project"]["optional-dependencies"]
  for script in re.findall(r"\b((?:launch|configs)/\w+\.py)", makefile):
    assert (ROOT / script).exists(), script


def test_wheel_is_complete_and_works_elsewhere(tmp_path):
  """Builds a wheel, and uses it from another folder without the source tree."""
  source = tmp_path / "source"  # a build in place would leave a build/ that hides what is missing
  for folder in ("trinity_jax", "kernels"):
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
  for file in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / file, source)
  subprocess.run(
    [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
     "--wheel-dir", tmp_path, source], check=True,
  )  # fmt: skip
  (wheel,) = tmp_path.glob("*.whl")
  names = set(zipfile.ZipFile(wheel).namelist())
  for package, folder in folders().items():
    for file in folder.glob("*.py"):
      assert f"{package.replace('.', '/')}/{file.name}" in names
  top = {n.split("/")[0] for n in names}
  assert {t for t in top if not t.endswith(".dist-info")} == {"trinity_jax"}
  target = tmp_path / "site"
  zipfile.ZipFile(wheel).extractall(target)
  # -P and no editable finder: the extracted wheel is the only trinity_jax there is.
  code = (
    "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
    "import trinity_jax.ops as ops, trinity_jax.kernels as k\n"
    "assert 'kernels' not in sys.modules; print(ops.__file__, k.__file__)"
  )
  done = subprocess.run(
    [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True,
    env={**os.environ, "PYTHONPATH": str(target)},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert all(p.startswith(str(target)) for p in done.stdout.split())


def test_sizes_of_files_and_functions():
  """A report, not a rule: pytest -rP shows it."""
  import ast

  for path in sorted(
    p for top in ("trinity_jax", "kernels", "launch") for p in (ROOT / top).rglob("*.py")
  ):
    text = path.read_text()
    if (lines := text.count("\n")) >= 450:
      print(f"{path.relative_to(ROOT)}: {lines} lines")
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        size = (node.end_lineno or 0) - node.lineno + 1
        if size > 80:
          print(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {size} lines")
