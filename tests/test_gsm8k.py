"""configs/gsm8k_smoke.py over the real file: real prompts, real grading, a gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trinity_jax.monitor.metrics import undocumented
from trinity_jax.monitor.writers import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("TRINITY_GSM8K", ROOT.parent / "shared/data/gsm8k"))

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not (DATA / "train.jsonl").is_file(),
    reason=f"{DATA}/train.jsonl does not exist; set TRINITY_GSM8K to the folder of openai/gsm8k",
  ),
]

# The launcher's run, with a note of what each step was trained on.
DRIVER = """
import json, sys
from trinity_jax.run import run
from trinity_jax.trainer.trainer import Trainer
import runpy

out, workdir, path = sys.argv[1:]
step = Trainer.step

def noted(self, experiences):
  with open(out, "a") as file:
    for e in experiences:
      file.write(json.dumps({
        "step": e.id.batch, "task": e.info.get("task"), "messages": e.messages,
        "reward": e.reward, "metrics": e.metrics, "stop": e.stop_reason.name,
        "prompt": int((~e.action_mask).sum()),
      }) + "\\n")
  return step(self, experiences)

Trainer.step = noted
c = runpy.run_path("configs/gsm8k_smoke.py")["get_config"]()
c.taskset.path = path
run(c, workdir)
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory):
  """(summary, rows of metrics.jsonl, what was trained on)."""
  folder = tmp_path_factory.mktemp("gsm8k")
  (folder / "driver.py").write_text(DRIVER)
  env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
  done = subprocess.run(
    [sys.executable, folder / "driver.py", folder / "notes", folder / "run", DATA / "train.jsonl"],
    cwd=ROOT, env=env | {"JAX_PLATFORMS": "cpu"}, timeout=2400, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  notes = [json.loads(line) for line in (folder / "notes").read_text().splitlines()]
  rows = [r for r in read_jsonl(folder / "run/metrics.jsonl") if "loss" in r]
  return json.loads((folder / "run/summary.json").read_text()), rows, notes


def test_every_prompt_is_a_real_row(result):
  _, rows, notes = result
  real = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()]
  assert len(real) == 7473
  assert [r["step"] for r in rows] == list(range(1, 21))
  assert len(notes) == 20 * 64
  tasks = set()
  for note in notes:
    assert note["stop"] in ("STOP", "LENGTH")  # nothing failed, nothing was cut to fit
    question = real[note["task"]]["question"]
    assert [m["role"] for m in note["messages"]] == ["user", "assistant"]
    assert note["messages"][0]["content"] == question
    assert note["prompt"] >= len(question.encode())  # a byte is a token here: all of it was read
    tasks.add(note["task"])
  assert len(tasks) == 20 * 8


def test_every_reward_is_graded(result):
  _, rows, notes = result
  for note in notes:
    parts = {k: v for k, v in note["metrics"].items() if k.startswith("rewards/")}
    assert {"rewards/math", "rewards/format"} <= parts.keys(), parts
    assert parts["rewards/math"] in (0, 1)
  for r in rows:
    graded = sum(v for k, v in r.items() if k.startswith("grader/"))
    assert graded == 64, {k: v for k, v in r.items() if k.startswith("grader/")}


def test_there_is_something_to_learn(result):
  """At least half of the steps have a policy gradient; flat groups are counted in every one."""
  _, rows, notes = result
  with_gradient = [
    r for r in rows
    if r["grad_norm"] > 0 and r["group/effective_batch_size"] > 0 and r["advantages/max"] > 0
  ]  # fmt: skip
  print(len(with_gradient), [round(r["frac_reward_zero_std"], 2) for r in rows])
  assert len(with_gradient) >= 10
  for r in rows:
    groups = {}
    for note in notes:
      if note["step"] == r["step"]:
        groups.setdefault(note["task"], set()).add(note["reward"])
    flat = sum(len(g) == 1 for g in groups.values())
    assert len(groups) == 8 and r["frac_reward_zero_std"] == pytest.approx(flat / 8)
    assert r["groups_zero_std"] == flat


def test_exactness(result):
  summary, rows, _ = result
  for r in rows:
    assert r["logprob_diff/p999"] <= 1e-5 and r["logprob_diff/max"] <= 5e-5, r["step"]
    assert r["compile/after_warmup"] == 0
    split = sum(v for k, v in r.items() if k.startswith("time_split/"))
    assert split == pytest.approx(100, abs=0.1)
  assert summary["compiles_after_warmup"] == 0
  assert undocumented({k for r in rows for k in r}) == []
