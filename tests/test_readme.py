"""What the README says is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from trinity_jax.algorithms.algorithm import render_table

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_table_of_algorithms_is_the_rendered_one():
  assert render_table() in TEXT, "paste algorithms.algorithm.render_table() into README.md"


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
