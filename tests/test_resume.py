"""kill -9 at any moment, the same command again: as if it had never happened."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trinity_jax.monitor.writers import read_jsonl

ROOT = Path(__file__).resolve().parents[1]

# The quickstart, small: a model of 25 k parameters, a dozen steps. Dotted keys come last and win.
SHORT = f"""
import runpy

def get_config():
  c = runpy.run_path({str(ROOT / "configs/quickstart.py")!r})["get_config"]()
  c.model.tiny = dict(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=64)
  c.monitor.tensorboard = False
  c.sampler.slots = 32
  c.sampler.prefill_batches = (8,)
  held_out = dict(c.eval.tasksets[0])
  held_out["generate_args"] = dict(split="eval", held_out=20)
  c.eval.tasksets = (held_out,)
  sft, grpo = (dict(s) for s in c.stages)
  sft |= {{"trainer.total_steps": 24, "trainer.batch_size": 32, "trainer.rows_per_micro": 32,
          "trainer.save_interval": 5, "eval.interval": 8}}
  grpo |= {{"trainer.total_steps": 12, "explorer.batch_size": 8, "explorer.group_size": 4,
           "trainer.rows_per_micro": 16, "trainer.save_interval": 3, "eval.interval": 4}}
  c.stages = (sft, grpo)
  return c
"""
# The second stage alone, from a random model that is rewarded for whatever comes by chance.
ONE_STAGE = SHORT + """
_short = get_config

def get_config():
  c = _short()
  stage = dict(c.stages[1])
  stage["taskset.reward"] = "tests_reward:ones"
  stage["eval.interval"] = 0
  c.eval.tasksets = ()
  c.stages = (stage,)
  return c
"""
REWARD = '''
def ones(response, truth, task=None):
  return float(sum(ord(c) % 2 for c in response))
'''


class Run:
  """The same command, as often as it takes."""

  def __init__(self, folder: Path, config: str):
    folder.mkdir(parents=True)
    self.workdir, self._log = folder / "run", folder / "log"
    (folder / "short.py").write_text(config)
    (folder / "tests_reward.py").write_text(REWARD)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    self._env = env | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(folder)}
    self._command = [sys.executable, "launch/main.py", f"--config={folder / 'short.py'}",
                     f"--workdir={self.workdir}"]  # fmt: skip

  def start(self) -> subprocess.Popen:
    self.log = self._log.open("ab")
    return subprocess.Popen(
      self._command, cwd=ROOT, env=self._env, stdout=self.log, stderr=subprocess.STDOUT
    )

  def finish(self, timeout: float = 900) -> dict:
    code = self.start().wait(timeout)
    assert code == 0, self._log.read_text()[-3000:]
    return json.loads((self.workdir / "summary.json").read_text())

  def kill_when(self, moment: Callable[[], bool], timeout: float = 900) -> None:
    """SIGKILL as soon as `moment()`; the run must not have ended by itself before."""
    process, end = self.start(), time.monotonic() + timeout
    while not moment():
      assert process.poll() is None, f"ended too early: {self._log.read_text()[-3000:]}"
      assert time.monotonic() < end, f"the moment never came: {self._log.read_text()[-3000:]}"
      time.sleep(0.002)  # another process's files: nothing to wait on
    process.kill()
    process.wait()

  def steps(self, stage: str) -> list[int]:
    file = self.workdir / stage / "metrics.jsonl"
    return [r["step"] for r in read_jsonl(file) if "loss" in r] if file.exists() else []

  def after_step(self, stage: str, step: int) -> Callable[[], bool]:
    return lambda: max(self.steps(stage), default=0) >= step

  def while_saving(self, stage: str, step: int) -> Callable[[], bool]:
    """True while a checkpoint of `step` or later is being written."""
    def moment():
      folder = self.workdir / stage / "checkpoints"
      names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
      return any("tmp" in n and int(n.split(".")[0]) >= step for n in names)

    return moment


# What must be the same to the last digit; times and memory are not.
NUMBERS = ("loss", "grad_norm", "update_norm", "lr", "policy_version", "reward/mean",
           "logprob_diff/max", "response_length/mean", "entropy")  # fmt: skip


def assert_as_if_never_killed(run: Run, whole: Run, stages: tuple[str, ...]) -> None:
  for stage in stages:
    ours, theirs = ([r for r in read_jsonl(x.workdir / stage / "metrics.jsonl") if "loss" in r]
                    for x in (run, whole))  # fmt: skip
    steps = [r["step"] for r in ours]
    assert steps == list(range(1, len(theirs) + 1)), (stage, steps)
    for a, b in zip(ours, theirs, strict=True):
      differs = {k: (a[k], b[k]) for k in NUMBERS if k in b and a[k] != b[k]}
      assert not differs, (stage, a["step"], differs)
    file = Path(stage, "hf", "model.safetensors")
    assert (run.workdir / file).read_bytes() == (whole.workdir / file).read_bytes(), stage


def test_one_kill(tmp_path):
  """In the middle of GRPO between two checkpoints."""
  whole, run = Run(tmp_path / "whole", ONE_STAGE), Run(tmp_path / "killed", ONE_STAGE)
  run.kill_when(run.after_step("grpo", 5))
  assert 5 <= run.steps("grpo")[-1] < 12 and not (run.workdir / "summary.json").exists()
  assert run.finish()["resumed"] is True
  assert whole.finish()["resumed"] is False
  rows = read_jsonl(whole.workdir / "grpo/metrics.jsonl")
  assert all(r["grad_norm"] > 0 for r in rows), "nothing was learned, so nothing was compared"
  assert_as_if_never_killed(run, whole, ("grpo",))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The run that nobody kills, and how long it took."""
  run = Run(tmp_path_factory.mktemp("whole") / "x", SHORT)
  start = time.monotonic()
  summary = run.finish()
  run.seconds = time.monotonic() - start
  assert summary["resumed"] is False and summary["compiles_after_warmup"] == 0
  return run


@pytest.mark.slow
def test_killed_in_every_phase(tmp_path, whole):
  run = Run(tmp_path / "killed", SHORT)
  run.kill_when(lambda: run.workdir.exists())
  run.kill_when(run.after_step("sft", 3))  # before the first checkpoint
  run.kill_when(run.while_saving("sft", 5))
  run.kill_when(run.after_step("sft", 12))
  run.kill_when(run.after_step("grpo", 2))
  run.kill_when(run.while_saving("grpo", 6))
  run.kill_when(run.after_step("grpo", 11))
  summary = run.finish()
  assert summary["resumed"] is True and summary["compiles_after_warmup"] == 0
  assert_as_if_never_killed(run, whole, ("sft", "grpo"))
  rows = read_jsonl(run.workdir / "grpo/metrics.jsonl")
  evaluated = [r["step"] for r in rows if "eval/accuracy" in r]
  assert evaluated == sorted(set(evaluated)) and set(evaluated) == {0, 4, 8, 12}
  assert summary["accuracy_final"] == json.loads(
    (whole.workdir / "summary.json").read_text()
  )["accuracy_final"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments(tmp_path, whole, seed):
  """Seeded delays over the length of a run; a run that was faster than its delay has ended well."""
  run, rng = Run(tmp_path / "killed", SHORT), random.Random(seed)
  for _ in range(4):
    process = run.start()
    try:
      process.wait(rng.uniform(0.1, 1.0) * whole.seconds)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
  run.finish()
  assert_as_if_never_killed(run, whole, ("sft", "grpo"))


@pytest.mark.slow
def test_a_run_that_blows_up_stops_with_its_batch_saved(tmp_path):
  """Learning rate 1e30: three non-finite steps in a row, exit code 3, the batch readable."""
  from trinity_jax.experience import Experience

  interval = '"trainer.save_interval": 5,'
  config = SHORT.replace(interval, interval + ' "optimizer.learning_rate": 1e30,')
  assert config != SHORT
  run = Run(tmp_path / "x", config)
  assert run.start().wait(900) == 3
  log = run._log.read_text()
  assert "were not finite for 3 steps in a row (trainer.max_nonfinite)" in log
  files = list((run.workdir / "sft/bad_batch").iterdir())
  assert len(files) == 32
  for file in files:
    e = Experience.from_bytes(file.read_bytes())
    assert e.num_actions > 0 and e.messages[-1]["role"] == "assistant"
