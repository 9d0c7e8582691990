"""What the README says is what the code says."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import shlex
import tomllib
from pathlib import Path

from trinity_jax.algorithms.listing import render_pieces, render_table
from trinity_jax.config_keys import check_key
from trinity_jax.config_schema import MODES, Config

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_table_of_algorithms_is_the_rendered_one():
  assert render_pieces() in TEXT, "paste algorithms.listing.render_pieces() into README.md"
  assert render_table() in TEXT, "paste algorithms.listing.render_table() into README.md"


def test_links_files_and_targets_exist():
  for link in re.findall(r"\]\(([^)#:]+)\)", TEXT):
    assert (ROOT / link).exists(), link
  for config in re.findall(r"--config=(\S+\.py)", TEXT):
    assert (ROOT / config).exists(), config
  makefile = (ROOT / "Makefile").read_text()
  for target in re.findall(r"make ([a-z]+)", TEXT):
    assert re.search(rf"^{target}:", makefile, re.M), target
  for folder in re.findall(r"^\| `([\w/]+)` \|", TEXT, re.M):
    assert (ROOT / folder).is_dir(), folder


def commands() -> list[list[str]]:
  """[script, flag, ...] of each command, in code blocks and in tables."""
  shell = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.S)).replace("\\\n", " ")
  lines = shell.splitlines() + re.findall(r"`([^`\n]+)`", TEXT)
  found = [re.search(r"python (launch/\S+\.py.*)", line) for line in lines]
  return [shlex.split(m[1].rstrip(" &")) for m in found if m]


def test_commands_name_scripts_modes_and_flags_that_exist():
  known = commands()
  assert len(known) > 10
  for script, *words in known:
    usage = ast.get_docstring(ast.parse((ROOT / script).read_text())) or ""
    for word in words:
      if word == "--":  # what follows is the run's
        usage = ast.get_docstring(ast.parse((ROOT / "launch/main.py").read_text())) or ""
        continue
      if word.startswith("--config."):
        check_key(word[len("--config.") :].split("=")[0])
      elif word.startswith("--"):
        assert word.split("=")[0] in usage, (script, word)
  for mode in re.findall(r"--mode=(\w+)", TEXT):
    assert mode in (*MODES, "keys"), mode
  assert not re.findall(r"^launch/", TEXT, re.M), "scripts are not executable: python launch/..."


def test_what_stands_in_code_marks_exists():
  groups = [f.name for f in dataclasses.fields(Config) if f.name not in ("name", "mode", "stages")]
  marked = re.findall(r"`([^`\n]+)`", TEXT)
  key = re.compile(rf"(?:config\.)?((?:{'|'.join(groups)})\.[\w.]+)(=.*)?")
  keys = [m[1] for mark in marked if (m := key.fullmatch(mark))]
  assert len(keys) > 40
  for name in keys:
    check_key(name)
  path = re.compile(r"(tests|configs|launch|colab|trinity_jax)/[\w/.]+")
  paths = [m for m in marked if path.fullmatch(m)]
  assert len(paths) > 15
  for name in paths:
    assert (ROOT / name).exists(), name
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  for extra in re.findall(r"trinity_jax\[(\w+)\]", TEXT):
    assert extra in project["optional-dependencies"], extra


def test_examples_import_what_exists():
  for code in re.findall(r"```python\n(.*?)```", TEXT, re.S):
    for node in ast.walk(ast.parse(code)):
      if isinstance(node, ast.ImportFrom):
        module = importlib.import_module(node.module or "")
        for name in node.names:
          if not hasattr(module, name.name):
            importlib.import_module(f"{node.module}.{name.name}")


def test_the_samplers_example_runs(tmp_path, capsys):
  from trinity_jax.models.hf import write_tiny_checkpoint

  model = write_tiny_checkpoint(
    tmp_path / "model", hidden=32, layers=1, heads=2, kv_heads=2, head_dim=16, intermediate=32
  )
  code = next(c for c in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "MODEL_FOLDER" in c)
  code = code.replace("MODEL_FOLDER", str(model))
  # One device of the eight, and short buckets: the example is of the calls.
  code = code.replace("build.make_meshes(config)", "build.make_meshes(config, jax.devices()[:1])")
  code = code.replace("512, 256", "16, 64")
  exec(compile(code, "README.md", "exec"), {})  # our own text
  printed = capsys.readouterr().out
  assert "Completion(tokens=array(" in printed and printed.count("[") >= 2


def test_keys_for_those_who_come_from_trinity_exist():
  rows = (ROOT / "configs/FROM_TRINITY.md").read_text().splitlines()
  cells = [row.split("|")[2] for row in rows if row.startswith("| `")]
  assert len(cells) > 40
  for key in re.findall(r"`([\w.]+)`", " ".join(cells)):
    check_key(key)
