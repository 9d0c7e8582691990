"""What the README says is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from trinity_jax.algorithms.listing import render_pieces, render_table
from trinity_jax.config_keys import check_key

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
