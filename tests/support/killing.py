"""Whole runs in processes of their own, which tests kill and start again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import launching

from trinity_jax.buffer.record import Store
from trinity_jax.buffer.store import open_store
from trinity_jax.monitor.writers import read_jsonl

ROOT = Path(__file__).resolve().parents[2]

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
# What goes wrong at a named point: FAULT=raise:sampler:5 raises in the fifth call there.
FAULTS = """
import os, time
from trinity_jax.buffer import replay
from trinity_jax.sampler import driver

kind, _, rest = os.environ.get("FAULT", "").partition(":")
place, _, count = rest.partition(":")
left = int(count or 1)

def broken(function):
  def call(*args, **kwargs):
    global left
    left -= 1
    if left == 0 and kind == "raise":
      raise RuntimeError(f"injected into {place}")
    if left == 0 and kind == "enospc":
      raise OSError(28, "No space left on device")
    if left == 0 and kind == "hang":
      time.sleep(1e6)
    return function(*args, **kwargs)
  return call

if kind and place == "sampler":
  driver.Driver.step = broken(driver.Driver.step)
if kind and place == "writer":
  make = replay.Writer.__init__
  replay.Writer.__init__ = lambda self, write, bell: make(self, broken(write), bell)
if kind and place == "trainer":
  from trinity_jax.trainer import trainer
  trainer.Trainer.step = broken(trainer.Trainer.step)
if kind and place == "reward":
  import tests_reward
  tests_reward.ones = broken(tests_reward.ones)
if kind and place == "checkpoint":
  from trinity_jax.trainer import checkpoint
  checkpoint.Checkpointer.save = broken(checkpoint.Checkpointer.save)
"""
ASYNCHRONOUS = ONE_STAGE + """
_one_stage = get_config

def get_config():
  c = _one_stage()
  stage = dict(c.stages[0])
  stage |= {"explorer.deterministic": False, "sync.style": "trainer_driven", "sync.offset": 1,
            "buffer.lease": 4.0, "trainer.total_steps": 30, "trainer.save_interval": 4}
  c.stages = (stage,)
  return c
"""
POSTGRES = """
_with_sqlite = get_config

def get_config():
  c = _with_sqlite()
  c.buffer.url, c.buffer.namespace = {url!r}, {namespace!r}
  return c
"""
REWARD = '''
def ones(response, truth, task=None):
  return float(sum(ord(c) % 2 for c in response))
'''


class Run:
  """The same command, as often as it takes.

  Args:
    folder: for its workdir and its config.
    config: text of a config file.
    database: URL of a PostgreSQL server that holds its buffer, "" for a file of its own.
  """

  def __init__(self, folder: Path, config: str, database: str = ""):
    folder.mkdir(parents=True)
    self.database, self._namespace = database, f"run{time.monotonic_ns()}"
    if database:
      config += POSTGRES.format(url=database, namespace=self._namespace)
    self.workdir, self._log = folder / "run", folder / "log"
    (folder / "short.py").write_text(FAULTS + config)
    (folder / "tests_reward.py").write_text(REWARD)
    self._env = launching.environment(PYTHONPATH=str(folder))
    self._command = [sys.executable, "launch/main.py", f"--config={folder / 'short.py'}",
                     f"--workdir={self.workdir}"]  # fmt: skip

  def start(self, *flags: str, fault: str = "") -> subprocess.Popen:
    """The command with more flags; `fault`: see FAULTS."""
    with self._log.open("ab") as log:
      return subprocess.Popen(
        [*self._command, *flags], cwd=ROOT, env=self._env | {"FAULT": fault}, stdout=log,
        stderr=subprocess.STDOUT,
      )  # fmt: skip

  def text(self) -> str:
    return self._log.read_text()

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

  def open_store(self, stage: str) -> Store:
    """Its buffer's store, as another process would open it."""
    return open_store(
      self.database or "sqlite", self.workdir / stage, namespace=f"{self._namespace}_{stage}"
    )

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
