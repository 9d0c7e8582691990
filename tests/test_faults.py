"""What can end a process or a thread, at random moments: nothing is lost, nothing doubled."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import time

import postgres
import pytest
import sqlalchemy as sa
from killing import ASYNCHRONOUS, ONE_STAGE, Run, assert_as_if_never_killed

from trinity_jax.buffer.recorded import Recorded
from trinity_jax.buffer.schema import USES
from trinity_jax.experience import Experience, StopReason
from trinity_jax.monitor.writers import read_jsonl
from trinity_jax.preemption import EXIT_CODE

GRPO = "grpo"
STORES = ("sqlite", "postgresql")


@pytest.fixture(scope="module")
def server():
  if reason := postgres.missing():
    pytest.skip(reason)
  with postgres.server() as running:
    yield running


@pytest.fixture(params=STORES)
def database(request) -> str:
  """URL of the server, "" for SQLite."""
  return request.getfixturevalue("server").url if request.param == "postgresql" else ""


def uses(run: Run) -> list[tuple[int, int, int]]:
  """(explorer step, task, trainer step) of every group that was trained on."""
  store = run.open_store(GRPO)
  try:
    columns = USES.c.batch, USES.c.task, USES.c.at
    select = sa.select(*columns).where(~USES.c.dropped)
    return store.database.read(lambda connection: connection.execute(select).all())
  finally:
    store.close()


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
  ("raise:writer", {1}),
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


def one_process(folder, whole: Run, seed: int, faults: int, database: str) -> None:
  run, rng = Run(folder, STALLING, database), random.Random(seed)
  order = rng.sample(ONE_PROCESS, len(ONE_PROCESS)) * (faults // len(ONE_PROCESS) + 1)
  struck = [strike(run, fault, codes, rng) for fault, codes in order[:faults]]
  assert all(struck), struck
  run.finish()
  assert_as_if_never_killed(run, whole, (GRPO,))
  assert_each_trained_once(run, STEPS, 8)


@pytest.mark.slow
def test_one_process(tmp_path, whole, database):
  one_process(tmp_path / "run", whole, bool(database), 6, database)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_one_process_for_long(tmp_path, whole, seed, database):
  one_process(tmp_path / "run", whole, seed, 8, database)


# --- what a run survives --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_database_that_goes_away(tmp_path, whole, server):
  """Connections cut, and the server crashed and started again, under a run that goes on."""
  run, rng = Run(tmp_path / "run", STALLING, server.url), random.Random(5)
  process = run.start()
  for crash in (False, True, False, True):
    step = max(run.steps(GRPO), default=0) + rng.randint(2, 5)
    while max(run.steps(GRPO), default=0) < step:
      assert process.poll() is None, run.text()[-3000:]
      time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.2))
    if crash:
      server.stop("immediate")
      server.start()
    else:
      assert server.cut_connections()
  assert process.wait(300) == 0, run.text()[-3000:]
  assert_as_if_never_killed(run, whole, (GRPO,))
  assert_each_trained_once(run, STEPS, 8)


KEPT = """
_forgetful = get_config

def get_config():
  c = _forgetful()
  c.buffer.keep = True
  return c
"""


def recorded(run: Run) -> list[Experience]:
  """Every experience of a run that kept them."""
  with contextlib.closing(Recorded(str(run.workdir / GRPO))) as found:
    return [e for group in found.groups(0, STEPS * 8) for e in group]


@pytest.mark.slow
def test_a_reward_that_raises_is_asked_again(tmp_path, whole):
  run = Run(tmp_path / "run", STALLING + KEPT)
  assert run.start(fault="raise:reward:100").wait(300) == 0, run.text()[-3000:]
  assert_as_if_never_killed(run, whole, (GRPO,))
  assert sum(e.metrics["retries"] for e in recorded(run)) == 1


HURRIED = STALLING + KEPT + """
_patient = get_config

def get_config():
  c = _patient()
  stage = dict(c.stages[0])
  stage["explorer.run_timeout"] = 4.0
  c.stages = (stage,)
  return c
"""


@pytest.mark.slow
def test_a_reward_that_hangs_costs_one_run(tmp_path):
  """Its thread never ends: the run does without it, and the process ends all the same."""
  run = Run(tmp_path / "run", HURRIED)
  assert run.start(fault="hang:reward:100").wait(300) == 0, run.text()[-3000:]
  assert_each_trained_once(run, STEPS, 8)
  late = [e.id for e in recorded(run) if e.stop_reason is StopReason.TIMEOUT]
  assert len(late) == 1


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


def several_processes(folder, seed: int, faults: int, database: str) -> Run:
  """Kills and restarts one of three processes at a time until `faults` have happened."""
  run, rng = Run(folder, ASYNCHRONOUS, database), random.Random(seed)
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
def test_a_trainer_and_two_explorers(tmp_path, database):
  run = several_processes(tmp_path / "run", bool(database), 6, database)
  assert_each_trained_once(run, 30, 8)
  rows = read_jsonl(run.workdir / GRPO / "metrics.jsonl")
  assert max(r.get("staleness/max", 0) for r in rows) <= 2


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [2, 3, 4, 5])
def test_a_trainer_and_two_explorers_for_long(tmp_path, seed, database):
  run = several_processes(tmp_path / "run", seed, 7, database)
  assert_each_trained_once(run, 30, 8)
