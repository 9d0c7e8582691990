"""What can end a process or a thread, at random moments: nothing is lost, nothing doubled."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import time

import pytest
from killing import ASYNCHRONOUS, ONE_STAGE, Run, assert_as_if_never_killed

from trinity_jax.monitor.writers import read_jsonl
from trinity_jax.preemption import EXIT_CODE

GRPO = "grpo"


def uses(run: Run) -> list[tuple[int, int, int]]:
  """(explorer step, task, trainer step) of every group that was trained on."""
  with sqlite3.connect(run.workdir / GRPO / "buffer.sqlite") as db:
    return db.execute("select batch, task, at from uses where not dropped").fetchall()


def assert_each_trained_once(run: Run, steps: int, tasks: int) -> None:
  assert run.steps(GRPO) == list(range(1, steps + 1))
  found = uses(run)
  groups = [(batch, task) for batch, task, _ in found]
  assert len(groups) == len(set(groups)) == steps * tasks
  for step in range(1, steps + 1):
    assert sum(at == step for _, _, at in found) == tasks


# --- one process, deterministic: bit-identical ----------------------------------------------------

# (what happens, exit codes it may have); a run that was faster ends well, with 0.
ONE_PROCESS = [
  ("kill", {-signal.SIGKILL}),
  ("terminate", {EXIT_CODE, -signal.SIGTERM}),  # the latter before anything was imported
  ("raise:sampler", {3}),
  ("hang:sampler", {3}),
  ("raise:writer", {3}),
  ("hang:writer", {3}),
  ("raise:trainer", {1}),
  ("enospc:checkpoint", {1, 3}),
]


STEPS = 40
STALLING = ONE_STAGE + """
_calm = get_config

def get_config():
  c = _calm()
  c.monitor.stall = 15.0
  c.stages = ({**c.stages[0], "trainer.total_steps": STEPS},)
  return c
""".replace("STEPS", str(STEPS))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  run = Run(tmp_path_factory.mktemp("whole") / "x", STALLING)
  run.finish()
  return run


def strike(run: Run, fault: str, codes: set[int], rng: random.Random) -> bool:
  """Starts the run and lets the fault happen to it; False: it had ended well before."""
  if ":" in fault:
    calls = 1 if "checkpoint" in fault else rng.randint(1, 5)
    code = run.start(fault=f"{fault}:{calls}").wait(300)
  else:
    process, step = run.start(), rng.randint(0, 4) + max(run.steps(GRPO), default=0)
    while process.poll() is None and max(run.steps(GRPO), default=0) < step:
      time.sleep(0.005)  # another process's file
    time.sleep(rng.uniform(0, 0.2))
    process.send_signal(signal.SIGKILL if fault == "kill" else signal.SIGTERM)
    code = process.wait(120)
  assert code in codes | {0}, f"{fault} ended with {code}: {run.text()[-3000:]}"
  return code != 0


def one_process(folder, whole: Run, seed: int, faults: int) -> None:
  run, rng = Run(folder, STALLING), random.Random(seed)
  order = rng.sample(ONE_PROCESS, len(ONE_PROCESS)) * (faults // len(ONE_PROCESS) + 1)
  struck = [strike(run, fault, codes, rng) for fault, codes in order[:faults]]
  assert all(struck), struck
  run.finish()
  assert_as_if_never_killed(run, whole, (GRPO,))
  assert_each_trained_once(run, STEPS, 8)


@pytest.mark.slow
def test_one_process(tmp_path, whole):
  one_process(tmp_path / "run", whole, 0, 6)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_one_process_for_long(tmp_path, whole, seed):
  one_process(tmp_path / "run", whole, seed, 8)


@pytest.mark.slow
def test_sigterm_saves_and_says_so(tmp_path):
  """Before the first checkpoint was due: what is done is saved, and the run goes on from there."""
  run = Run(tmp_path / "run", ONE_STAGE)
  process = run.start()
  while max(run.steps(GRPO), default=0) < 2:
    assert process.poll() is None, run.text()[-3000:]
    time.sleep(0.005)
  process.terminate()
  assert process.wait(60) == EXIT_CODE, run.text()[-3000:]
  done = run.steps(GRPO)[-1]
  assert f"asked to end; step {done} is saved" in run.text()
  assert (run.workdir / GRPO / "checkpoints" / str(done)).is_dir()


# --- a trainer and two explorers ------------------------------------------------------------------


def start(run: Run, name: str) -> subprocess.Popen:
  flags = ["--mode=train"] if name == "trainer" else [
    "--mode=explore", f"--config.explorer.name={name}"
  ]  # fmt: skip
  return run.start(*flags)


def several_processes(folder, seed: int, faults: int, config: str = ASYNCHRONOUS) -> Run:
  """Kills and restarts one of three processes at a time until `faults` have happened."""
  run, rng = Run(folder, config), random.Random(seed)
  names = ("trainer", "a", "b")
  processes = {name: start(run, name) for name in names}
  try:
    for _ in range(faults):
      goal = max(run.steps(GRPO), default=0) + rng.randint(1, 4)
      end = time.monotonic() + 240
      while max(run.steps(GRPO), default=0) < goal and processes["trainer"].poll() is None:
        assert time.monotonic() < end, run.text()[-4000:]
        time.sleep(0.01)
      if processes["trainer"].poll() is not None:
        break
      name, how = rng.choice(names), rng.choice([signal.SIGKILL, signal.SIGTERM])
      processes[name].send_signal(how)
      code = processes[name].wait(60)
      assert code in (-signal.SIGKILL, -signal.SIGTERM, EXIT_CODE, 0), run.text()[-4000:]
      processes[name] = start(run, name)
    for name in names:
      assert processes[name].wait(300) == 0, (name, run.text()[-4000:])
  finally:
    for process in processes.values():
      process.kill()
  return run


@pytest.mark.slow
def test_a_trainer_and_two_explorers(tmp_path):
  run = several_processes(tmp_path / "run", 0, 6)
  assert_each_trained_once(run, 30, 8)
  rows = read_jsonl(run.workdir / GRPO / "metrics.jsonl")
  assert max(r.get("staleness/max", 0) for r in rows) <= 2


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_a_trainer_and_two_explorers_for_long(tmp_path, seed):
  run = several_processes(tmp_path / "run", seed, 7)
  assert_each_trained_once(run, 30, 8)
