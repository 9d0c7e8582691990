"""launch/plan_table.py: PLAN.md is what PLAN.json says, and nothing else."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from trinity_jax.config import resolve

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture(scope="module")
def table():
  spec = importlib.util.spec_from_file_location("plan_table", LAUNCH / "plan_table.py")
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_page_is_that_of_its_figures(table):
  cases = json.loads((LAUNCH / "PLAN.json").read_text())
  assert set(cases) == set(table.WHOLE)
  assert (LAUNCH / "PLAN.md").read_text() == table.table(cases)
  assert not any("-" in figures["row"][12:15] for figures in cases.values())  # nothing is uncounted


def test_growth(table):
  row = ["a case"] * len(table.COLUMNS)
  train = dict(
    compute=2.0, memory=1.0, waiting=0.1, hidden=0.0, total=2.1, sent={"all-gather": 3e9}
  )
  more = {**train, "waiting": 0.31, "total": 2.31, "sent": {"all-gather": 3e9, "all-reduce": 4e7}}
  text = table.table({
    "qwen3-8b-v5p-16": {"row": row, "train": train}, "qwen3-8b-v5p-64": {"row": row, "train": more}
  })  # fmt: skip
  assert "| v5p:2x2x4 | fsdp 16 | 2.10 | 0.0 | 2.00 | 1.00 | 0.10 | 0.00 | all-gather 3.0 |" in text
  assert (
    "| v5p:4x4x4 | data 4 x fsdp 16 | 2.31 | 10.0 | 2.00 | 1.00 | 0.31 | 0.00 | all-gather 3.0 |"
  ) in text


def test_cases_are_configs(table):
  for case in table.WHOLE.values():
    config = resolve(table.config_of(case, 16))
    assert config.model.path == case.model and config.sampler.slots == case.slots
