"""Environments that raise, hang, kill their process, are slow or talk nonsense harm nobody else."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import math
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trinity_jax.errors import UserError
from trinity_jax.experience import Task
from trinity_jax.explorer.environments import flaky, process
from trinity_jax.explorer.environments.environment import Step, checked
from trinity_jax.explorer.environments.flaky import AsyncFlaky, Fate, Flaky, Rates
from trinity_jax.explorer.environments.process import (
  EnvironmentDied,
  EnvironmentHung,
  EnvironmentRaised,
  Processes,
)
from trinity_jax.explorer.workflows import find_workflow
from trinity_jax.explorer.workflows.multi_turn import play

FLAKY = "trinity_jax.explorer.environments.flaky:Flaky"
RATES = Rates()
ENDS = {
  "raises": EnvironmentRaised, "hangs": TimeoutError, "dies": EnvironmentDied,
  "garbage": ValueError,
}  # fmt: skip


class Yes:
  """A model handle that always says yes."""

  def __init__(self):
    self.messages, self.total, self.sampler = [], 0.0, None

  def reward(self, value):
    self.total += value

  async def chat(self, messages, tools=None):
    self.messages = [*messages, {"role": "assistant", "content": "yes"}]
    return "yes"


def seed_of(fate: str, turns=4) -> int:
  return next(s for s in range(10_000) if Fate(s, Rates(), turns).name == fate)


def workers(owner=0) -> list[int]:
  """Environments' processes of `owner` (0: of ours) that live."""
  found, owner = [], owner or os.getpid()
  for path in Path("/proc").glob("[0-9]*/cmdline"):
    with contextlib.suppress(OSError):
      words = path.read_bytes().split(b"\0")
      if words[3:4] == [b"%d" % owner] and words[2].endswith(b"process_worker.py"):
        found.append(int(path.parent.name))
  return sorted(found)


def args(seed, **more):
  return {"seed": seed, "own_process": True, **more}


def limit(fate: str) -> float:
  """Seconds for an episode: those that hang are given up soon, others never without need."""
  return 0.5 if fate == "hangs" else 30.0


async def episode(made, seconds=30.0):
  async with asyncio.timeout(seconds):
    return await play(Yes(), made, 10)


def test_fates_have_their_rates():
  count = collections.Counter(Fate(s, Rates(), 4).name for s in range(4000))
  for name, rate in dataclasses.asdict(Rates()).items():
    assert abs(count[name] / 4000 - rate) < 4 * math.sqrt(rate * (1 - rate) / 4000), name
  assert {Fate(s, Rates(), 4).turn for s in range(100)} == {0, 1, 2, 3}
  assert Fate(5, Rates(), 4).__dict__ == Fate(5, Rates(), 4).__dict__
  with pytest.raises(UserError, match="sum of at most 1"):
    Rates(raises=0.9, hangs=0.2)
  with pytest.raises(UserError, match="own_process=True"):
    Flaky(seed_of("dies"))


def test_each_fate_in_a_process():
  async def main():
    processes = Processes(2, deadline=60)
    made = processes.environment(FLAKY, args(seed_of("")))
    assert (await episode(made)).total == 1.0
    assert processes.started == 1
    for name, error in ENDS.items():
      with pytest.raises(error):
        await episode(processes.environment(FLAKY, args(seed_of(name))), limit(name))
    # A process that raised or talked nonsense goes on; one that hung or died was replaced.
    assert processes.started == 3
    assert (await episode(processes.environment(FLAKY, args(seed_of(""))))).turns == 4
    processes.close()

  before = workers()
  asyncio.run(main())
  assert workers() == before


def test_a_hang_has_a_deadline_and_a_name():
  async def main():
    processes = Processes(1, deadline=0.5)
    with pytest.raises((EnvironmentHung, asyncio.TimeoutError), match="no answer within 0.5 s"):
      made = processes.environment(FLAKY, args(seed_of("hangs")))
      processes.deadline = 30.0  # to start
      await made.reset()
      processes.deadline = 0.5
      while True:
        await made.step("x")
    await made.close()
    assert not processes._idle
    processes.close()

  before = workers()
  asyncio.run(main())
  assert workers() == before


def test_no_environment_or_no_answer_is_said():
  async def main():
    processes = Processes(1)
    for factory, text in (("no_such_module_x:f", "No module named"), (FLAKY, "unexpected keyword")):
      with pytest.raises(EnvironmentRaised, match=text):
        await episode(processes.environment(factory, {"seed": 0, "colour": 1}))
    with pytest.raises(UserError, match="expected 'module:function'"):
      processes.environment("flaky")
    processes.close()

  asyncio.run(main())
  with pytest.raises(UserError, match="at_once = 0"):
    Processes(0)


def test_our_variables_stay_ours(monkeypatch, tmp_path):
  (tmp_path / "peek.py").write_text(
    "import os\nclass Peek:\n  def reset(self): return repr(dict(os.environ))\n"
    "  def close(self): pass\n"
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.setenv("OUR_SECRET", "hunter2")

  async def main():
    processes = Processes(1)
    made = processes.environment("peek:Peek")
    text = await made.reset()
    await made.close()
    processes.close()
    return text

  text = asyncio.run(main())
  assert "PATH" in text and "hunter2" not in text


async def chaos(count, at_once, make, rates=RATES):
  """Runs episodes; returns how many ended how."""
  ends = collections.Counter()
  places = asyncio.Semaphore(at_once)

  async def one(seed):
    async with places:
      try:
        ended = await episode(make(seed), limit(Fate(seed, rates, 4).name))
        ends["ok"] += ended.total == 1.0
      except Exception as e:
        ends[type(e).__name__] += 1

  async with asyncio.TaskGroup() as group:
    for seed in range(count):
      group.create_task(one(seed))
  return ends


def expected(count, turns=4):
  fates = collections.Counter(Fate(s, Rates(), turns).name for s in range(count))
  ends = collections.Counter({"ok": fates[""] + fates["slow"]})
  return ends + collections.Counter({ENDS[name].__name__: fates[name] for name in ENDS})


def check_chaos(count, at_once):
  async def main():
    processes = Processes(at_once)
    make = lambda seed: processes.environment(FLAKY, args(seed, seconds=0.001))
    ends = await chaos(count, at_once, make)
    fates = collections.Counter(Fate(s, Rates(), 4).name for s in range(count))
    assert processes.started <= at_once + fates["dies"] + fates["hangs"]
    processes.close()
    return ends

  before, files = workers(), len(os.listdir("/proc/self/fd"))
  assert asyncio.run(main()) == expected(count)
  assert workers() == before
  assert len(os.listdir("/proc/self/fd")) <= files + 2


def test_chaos_is_accounted_for():
  check_chaos(100, 4)


@pytest.mark.slow
def test_two_thousand_episodes_leak_nothing():
  check_chaos(2000, 16)


def test_chaos_on_the_event_loop():
  """As coroutines, 500 at once cost neither threads nor processes."""

  def make(seed):
    return AsyncFlaky(seed, seconds=0.01, rates={"dies": 0.0})

  rates = Rates(dies=0.0)
  ends = asyncio.run(chaos(500, 500, make, rates))
  fates = collections.Counter(Fate(s, rates, 4).name for s in range(500))
  assert ends["ok"] == fates[""] + fates["slow"]
  assert ends["ConnectionError"] == fates["raises"] and ends["TimeoutError"] == fates["hangs"]
  assert ends["ValueError"] == fates["garbage"]


def test_what_a_step_may_return():
  assert checked(Step("x", 1)).reward == 1
  for step, text in ((None, "no Step|expected a Step"), (Step(3), "no text"),
                     (Step("x", float("inf")), "finite"), (Step("x", "1"), "finite")):  # fmt: skip
    with pytest.raises(ValueError, match=text):
      checked(step)


def module(tmp_path, monkeypatch, name, text) -> str:
  (tmp_path / f"{name}.py").write_text(text)
  monkeypatch.syspath_prepend(str(tmp_path))
  return name


QUIET = "class Quiet:\n  def reset(self): return 'x'\n  def close(self): pass\n"


def test_a_module_that_hangs_is_named_and_harms_no_other(tmp_path, monkeypatch):
  name = module(tmp_path, monkeypatch, "hangs", "import threading\nthreading.Event().wait()\n")

  async def main():
    processes = Processes(2)
    good = processes.environment(FLAKY, args(seed_of("")))
    await good.reset()
    monkeypatch.setattr(process, "_STARTING", 0.5)
    with pytest.raises(EnvironmentHung, match="hangs was not imported within 0.5 s"):
      await processes.environment(f"{name}:Quiet").reset()
    assert (await good.step("x")).observation == "turn 1"
    await good.close()
    processes.close()

  before = workers()
  asyncio.run(main())
  assert workers() == before


def test_a_template_that_dies_is_replaced():
  async def main():
    processes = Processes(2)
    made = processes.environment(FLAKY, args(seed_of("")))
    await made.reset()
    (template,) = processes._templates.values()
    template._process.kill()
    with pytest.raises(EnvironmentDied):  # with the template, by the kernel
      async with asyncio.timeout(30):
        while True:
          await made.step("x")
    await made.close()
    assert (await episode(processes.environment(FLAKY, args(seed_of(""))))).total == 1.0
    assert template not in processes._templates.values()
    processes.close()

  asyncio.run(main())


def test_a_module_that_starts_threads_is_refused(tmp_path, monkeypatch):
  text = "import threading\nthreading.Thread(target=threading.Event().wait, name='mine',"
  name = module(tmp_path, monkeypatch, "threaded", f"{text} daemon=True).start()\n{QUIET}")

  async def main():
    processes = Processes(1)
    with pytest.raises(EnvironmentRaised, match=r"threaded starts threads .* \(mine\)"):
      await processes.environment(f"{name}:Quiet").reset()
    processes.close()

  asyncio.run(main())


def test_places_are_for_all_modules(tmp_path, monkeypatch):
  """An idle process of one module makes room for another's."""
  name = module(tmp_path, monkeypatch, "quiet", QUIET)

  async def main():
    processes = Processes(1)
    for factory, given in ((FLAKY, args(1)), (f"{name}:Quiet", {}), (FLAKY, args(1))):
      made = processes.environment(factory, given)
      await made.reset()
      await made.close()
      assert len(workers()) - len(before) <= 4  # two templates; who was killed may still be there
    assert processes.started == 3
    processes.close()

  before = workers()
  asyncio.run(main())
  assert workers() == before


def test_memory_has_a_limit(tmp_path, monkeypatch):
  if not Path("/proc/self/statm").exists():
    pytest.skip("needs Linux")
  text = "class Greedy:\n  def reset(self): return str(len(bytearray(1 << 28)))\n"
  name = module(tmp_path, monkeypatch, "greedy", f"{text}  def close(self): pass\n")

  async def main(memory_mb):
    processes = Processes(1, memory_mb=memory_mb)
    made = processes.environment(f"{name}:Greedy")
    try:
      return await made.reset()
    finally:
      await made.close()
      processes.close()

  assert asyncio.run(main(512)) == str(1 << 28)
  with pytest.raises(EnvironmentRaised, match="MemoryError"):
    asyncio.run(main(64))


def test_what_an_environment_starts_ends_with_it(tmp_path, monkeypatch):
  text = (
    "import subprocess\nclass Parent:\n"
    "  def reset(self): return str(subprocess.Popen(['sleep', '1000']).pid)\n"
    "  def step(self, action):\n    while True: pass\n  def close(self): pass\n"
  )
  name = module(tmp_path, monkeypatch, "parent", text)

  async def main():
    processes = Processes(1)
    made = processes.environment(f"{name}:Parent")
    child = int(await made.reset())
    with pytest.raises(TimeoutError):
      async with asyncio.timeout(0.2):
        await made.step("x")
    await made.close()
    processes.close()
    return child

  child = asyncio.run(main())
  status = Path(f"/proc/{child}/status")
  assert not status.exists() or "State:\tZ" in status.read_text()


def test_they_end_with_whoever_is_killed():
  code = (
    "import asyncio, sys\n"
    "from trinity_jax.explorer.environments.process import Processes\n"
    "async def main():\n"
    "  made = processes.environment(sys.argv[1], {'seed': 0, 'own_process': True})\n"
    "  await made.reset()\n"
    "  print('there', flush=True)\n"
    "  sys.stdin.read()\n"
    "processes = Processes(1)\n"
    "asyncio.run(main())\n"
  )
  with subprocess.Popen(
    [sys.executable, "-c", code, FLAKY], stdin=subprocess.PIPE, stdout=subprocess.PIPE
  ) as owner:
    assert owner.stdout and owner.stdout.readline() == b"there\n"
    alive = [os.pidfd_open(pid) for pid in workers(owner.pid)]
    owner.kill()
  poll = select.poll()
  for fd in alive:
    poll.register(fd, select.POLLIN)
  ended, deadline = 0, time.monotonic() + 30
  while ended < len(alive) and time.monotonic() < deadline:
    for fd, _ in poll.poll(1000 * (deadline - time.monotonic())):
      poll.unregister(fd)
      os.close(fd)
      ended += 1
  assert ended == len(alive) == 2  # the template and its process


def test_as_a_workflow():
  def run(**row):
    task, model = Task(2, ({"role": "user", "content": "x"},), raw=row), Yes()
    model.processes = processes
    score = asyncio.run(find_workflow("environment")(task, model))
    assert score.total == 0.0 and model.total == score.components["return"]
    return score.components

  processes = None

  calm = {"seed": 1, "rates": dataclasses.asdict(flaky.CALM)}
  async_flaky = FLAKY.replace("Flaky", "AsyncFlaky")
  assert run(environment=async_flaky, environment_args=calm) == {"return": 1.0}
  assert run(environment=FLAKY, environment_args=calm) == {"return": 1.0}  # in a thread
  own = dict(environment=FLAKY, environment_args=calm, own_process=True)
  with pytest.raises(UserError, match="train row 2: own_process: no processes are kept here"):
    run(**own)
  processes = Processes(1)
  assert run(**own) == run(**own) == {"return": 1.0}  # one process, two event loops
  assert processes.started == 1
  processes.close()
  with pytest.raises(UserError, match="train row 2: environment = 'x'"):
    run(environment="x")


def test_runs_beyond_the_processes_do_not_hold_the_others_up(world):
  """Admission waited for all six, four of whom waited for the two that waited for admission."""
  own = {
    "environment": FLAKY, "own_process": True,
    "environment_args": args(0, turns=1, rates=dataclasses.asdict(flaky.CALM)),
  }  # fmt: skip
  processes, workflow = Processes(2), find_workflow("environment")

  async def plays(task, model):
    model.processes = processes
    return await workflow(task, model)

  tasks = [dataclasses.replace(world.task(i), raw=own) for i in range(6)]
  with world.sampler() as sampler:
    ran = world.run(sampler, plays, tasks)
  processes.close()
  assert [e.reward for e in ran] == [1.0] * 6 and processes.started == 2


class Counted:
  """A sampler's count of busy runs, and its least."""

  def __init__(self, busy):
    self.busy = self.least = busy

  def enter(self):
    self.busy += 1

  def leave(self):
    self.busy -= 1
    self.least = min(self.least, self.busy)


def test_places_are_handed_on_in_order_and_nobody_is_counted_twice():
  calm = args(0, turns=1, rates=dataclasses.asdict(flaky.CALM))

  async def main():
    processes, member, order = Processes(1), Counted(5), []

    async def run(i):
      env = processes.environment(FLAKY, calm, member)
      try:
        await env.reset()
        order.append(i)
        await asyncio.sleep(0)
      finally:
        await env.close()
        if i == 0:
          runs[2].cancel()  # which has been given its turn, and has not yet been told
        member.leave()

    runs = [asyncio.create_task(run(i)) for i in range(5)]
    while len(processes._waiting) < 4:
      await asyncio.sleep(0)
    assert member.busy == 1  # who has the process
    runs[1].cancel()  # while it waits
    await asyncio.wait(runs)
    assert [run.cancelled() for run in runs] == [False, True, True, False, False]
    assert order == [0, 3, 4] and member.busy == 0 and processes._busy == 0
    assert not processes._waiting and processes.started == 1
    processes.close()
    return member.least

  assert asyncio.run(main()) == 0
