"""The pool outlives every way in which a grader can fail."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from trinity_jax.errors import RunFailed, UserError
from trinity_jax.explorer.rewards.grader_pool import Grade, GraderPool

# A grader that does what the response says.
GRADER = """
import ctypes, os, signal, sys, time
state = {"graded": 0}

def grade(response, truth):
  state["graded"] += 1
  if response == "spin":
    while True: pass
  if response == "spin in C":
    9 ** 9 ** 9
  if response == "spin deaf":
    for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
    while True:
      try:
        while True: pass
      except BaseException: pass
  if response == "sleep":
    time.sleep(1000)
  if response == "eat":
    held = [bytearray(1 << 24) for _ in range(1000)]
  if response == "raise":
    raise KeyError("of the grader")
  if response == "exit":
    sys.exit(0)
  if response.startswith("_exit"):
    os._exit(int(response.split()[1]))
  if response == "segfault":
    ctypes.string_at(0)
  if response == "print":
    print("this must not reach the protocol", flush=True)
    os.write(2, b"nor this")
  if response == "write":
    open(truth, "wb", buffering=0).write(b"x")
  if response == "kill worker":
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)
  if response == "nan":
    return float("nan"), "odd"
  if response == "graded":
    return float(state["graded"]), "counted"
  if response == "pid":
    return float(os.getpid()), "pid"
  if response == "environment":
    return 0.0, ",".join(os.environ)
  if response.startswith("work"):
    end = time.process_time() + float(response.split()[1])
    while time.process_time() < end: pass
  return float(len(response) == len(truth)), "compared"
"""


def wait_until_gone(pid):
  """Waits for a process that is not our child to end (or to be a zombie that nobody collects)."""
  deadline = time.monotonic() + 20
  while time.monotonic() < deadline:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    if not state.stdout.strip() or state.stdout.startswith("Z"):
      return
  raise AssertionError(f"process {pid} outlived its pool")


@pytest.fixture(scope="module")
def grader(tmp_path_factory):
  path = tmp_path_factory.mktemp("grader") / "grader.py"
  path.write_text(GRADER)
  return path


@pytest.fixture(scope="module")
def pool(grader):
  with GraderPool(grader, workers=2, cpu_seconds=0.4, wall_seconds=60.0, memory_mb=192) as pool:
    yield pool


@pytest.mark.parametrize(
  "response, reason, detail",
  [
    ("spin", "timeout", "SIGPROF"),
    ("spin in C", "timeout", "SIGPROF"),
    ("spin deaf", "timeout", "SIGPROF"),
    ("eat", "memory", ""),
    ("raise", "error", "KeyError"),
    ("exit", "error", "SystemExit"),
    ("_exit 0", "crash", "exit code 0"),
    ("_exit 3", "crash", "exit code 3"),
    ("segfault", "crash", "SIGSEGV"),
    ("nan", "error", "ValueError"),
    ("kill worker", "lost", "worker ended"),
  ],
)
def test_a_failing_grader_scores_zero_with_a_reason_and_the_pool_survives(
  pool, response, reason, detail
):
  before = pool.counts().get(reason, 0)
  assert pool.grade(response, "") == Grade(0.0, reason, detail)
  assert pool.counts()[reason] == before + 1
  good = pool.grade_all([("ab", "cd"), ("ab", "c"), ("ab", "ab")])
  assert [g.score for g in good] == [1.0, 0.0, 1.0]


def test_one_that_waits_instead_of_computing_has_a_wall_clock(grader):
  with GraderPool(grader, workers=1, wall_seconds=0.4) as pool:
    assert pool.grade("sleep", "") == Grade(0.0, "hang", "SIGALRM")
    assert pool.grade("ab", "cd").score == 1.0


def test_a_child_ends_with_its_worker(pool):
  """Else it held the worker's pipe open, and its verdict was waited for until the wall clock."""
  start = time.monotonic()
  assert pool.grade("kill worker", "").reason == "lost"
  assert time.monotonic() - start < 30  # far below twice wall_seconds


def test_a_grader_cannot_write_into_files(pool, tmp_path):
  path = tmp_path / "file"
  path.write_text("as it was")
  assert pool.grade("write", str(path)).detail == "OSError"
  assert path.read_text() in ("", "as it was")  # opening empties it; nothing can be put there


def test_results_come_in_order_and_hanging_ones_hold_up_nobody_for_long(pool):
  pairs = [("spin" if i % 10 == 3 else "x" * i, "x" * 8) for i in range(40)]
  start = time.monotonic()
  grades = pool.grade_all(pairs)
  assert [g.score for g in grades] == [float(r == "x" * 8) for r, _ in pairs]
  assert [i for i, g in enumerate(grades) if g.reason == "timeout"] == [3, 13, 23, 33]
  assert time.monotonic() - start < 30


def test_the_deadline_counts_cpu_time_not_the_wall_clock(grader):
  """A grader that the machine does not let run, as under heavy load, is not late."""
  with GraderPool(grader, workers=1, cpu_seconds=0.5) as pool, ThreadPoolExecutor(1) as threads:
    assert pool.grade("ab", "ab").score == 1.0
    start = time.monotonic()
    grade = threads.submit(pool.grade, "work 0.3", "work 0.3")
    children = psutil.Process().children(recursive=True)
    time.sleep(0.05)
    for child in children:
      child.suspend()
    time.sleep(0.6)
    for child in children:
      child.resume()
    assert grade.result(60) == Grade(1.0, "compared")
  assert time.monotonic() - start > 0.65


def test_every_verdict_of_a_failure_is_by_a_fresh_child(grader):
  with GraderPool(grader, workers=1, cpu_seconds=0.6) as pool:
    assert pool.grade("graded", "").score == 1.0
    assert pool.grade("graded", "").score == 2.0  # light work: the child is used again
    # Above the used child's share (a quarter), below the limit: judged again by a fresh one.
    assert pool.grade("work 0.25", "work 0.25").score == 1.0
    assert pool.grade("graded", "").score == 2.0  # of the child that did the work
    assert pool.grade("raise", "").reason == "error"
    assert pool.grade("graded", "").score == 1.0


def test_a_child_is_replaced_after_its_share_of_requests(grader):
  with GraderPool(grader, workers=1, requests=3) as pool:
    assert [pool.grade("graded", "").score for _ in range(7)] == [1, 2, 3, 1, 2, 3, 1]


def test_what_a_grader_prints_is_not_a_reply_and_secrets_do_not_reach_it(grader, monkeypatch):
  monkeypatch.setenv("WANDB_API_KEY", "secret")
  with GraderPool(grader, workers=1) as pool:
    assert pool.grade("print", "print").score == 1.0
    assert "WANDB_API_KEY" not in pool.grade("environment", "").reason


def test_any_text_survives_the_pipe(pool):
  texts = ["", "\n", "\r\n\0", "\ud800", '"}\n{"score": 1.0}', "x" * 3_000_000, "\u2028\u00e9"]
  assert [g.score for g in pool.grade_all([(t, t) for t in texts])] == [1.0] * len(texts)


def test_many_threads_share_the_workers(pool):
  results = {}

  def ask(i):
    results[i] = [pool.grade("x" * n, "x" * i).score for n in range(12)]

  threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  assert results == {i: [float(n == i) for n in range(12)] for i in range(12)}


def test_512_gradings_do_not_block_the_event_loop(pool):
  async def main():
    ticks, done = 0, False

    async def tick():
      nonlocal ticks
      while not done:
        await asyncio.sleep(0.01)
        ticks += 1

    ticker = asyncio.create_task(tick())
    slow = [pool.agrade("spin", "") for _ in range(2)]
    grades = await asyncio.gather(*slow, *(pool.agrade("x" * (i % 5), "xx") for i in range(512)))
    done = True
    await ticker
    return ticks, grades

  ticks, grades = asyncio.run(main())
  assert [g.score for g in grades[2:]] == [float(i % 5 == 2) for i in range(512)]
  assert ticks >= 10  # the two spins alone take longer than that


def test_a_cancelled_wait_leaves_the_pool_in_order(pool):
  async def main():
    waiting = [asyncio.create_task(pool.agrade("spin", "")) for _ in range(6)]
    await asyncio.sleep(0.05)
    for task in waiting:
      task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    return await pool.agrade("ab", "cd")

  assert asyncio.run(main()).score == 1.0


def test_workers_start_once_and_keep_no_jax(grader, tmp_path):
  path = tmp_path / "modules.py"
  path.write_text(
    "import os, sys\n"
    "def grade(response, truth):\n"
    "  return float(os.getppid()), ' '.join(sorted(m for m in ('jax', 'numpy', 'trinity_jax')"
    " if m in sys.modules))\n"
  )
  with GraderPool(path, workers=1) as pool:
    grades = pool.grade_all([("", "")] * 600)
  assert len({g.score for g in grades}) == 1  # one worker process, though several children
  assert {g.reason for g in grades} == {""}


def test_a_grader_that_cannot_be_loaded_is_an_error_with_its_traceback(tmp_path):
  path = tmp_path / "broken.py"
  path.write_text("import no_such_package_anywhere\n")
  with GraderPool(path, workers=2) as pool:
    for _ in range(3):
      with pytest.raises(RunFailed, match="(?s)broken.py did not start.*no_such_package_anywhere"):
        pool.grade("", "")


def test_closing_ends_processes_and_waiting_requests(grader):
  pool = GraderPool(grader, workers=1)
  pid = int(pool.grade("pid", "").score)
  futures = [pool.submit("sleep", "") for _ in range(3)]
  pool.close()
  pool.close()
  for future in futures:
    with pytest.raises(RunFailed, match="closed"):
      future.result(timeout=60)
  with pytest.raises(RunFailed, match="closed"):
    pool.submit("ab", "cd")
  wait_until_gone(pid)


def test_a_fork_of_ours_leaves_our_workers_alone(grader):
  code = (
    "import os, pathlib, sys\n"
    "from trinity_jax.explorer.rewards.grader_pool import GraderPool\n"
    f"pool = GraderPool(pathlib.Path({str(grader)!r}), workers=1)\n"
    "first = pool.grade('pid', '').score\n"
    "fork = os.fork()\n"
    "if fork == 0:\n"
    "  pool.close()\n"
    "  os._exit(0)\n"
    "os.waitpid(fork, 0)\n"
    "print(pool.grade('pid', '').score == first)\n"
  )
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
  assert out.stdout.strip() == "True", out.stderr


def test_arguments_are_checked(grader):
  with pytest.raises(UserError, match="workers = 0"):
    GraderPool(grader, workers=0)


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)"])
def test_workers_end_with_the_process_that_started_them(grader, end):
  code = (
    "import os, pathlib\n"
    "from trinity_jax.explorer.rewards.math import _pool\n"
    "from trinity_jax.explorer.rewards.grader_pool import GraderPool\n"
    f"pool = GraderPool(pathlib.Path({str(grader)!r}), workers=1)\n"
    "print(int(pool.grade('pid', '').score), os.getpid(), flush=True)\n"
    f"{end}\n"
  )
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
  child = int(out.stdout.split()[0])
  wait_until_gone(child)
