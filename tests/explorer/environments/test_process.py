"""Environments that raise, hang, kill their process, are slow or talk nonsense harm nobody else."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import math
import os
import time
from pathlib import Path

import pytest

from trinity_jax.errors import UserError
from trinity_jax.experience import Task
from trinity_jax.explorer.environments import flaky
from trinity_jax.explorer.environments.environment import Step, checked
from trinity_jax.explorer.environments.flaky import AsyncFlaky, Fate, Flaky, Rates
from trinity_jax.explorer.environments.process import (
  EnvironmentDied,
  EnvironmentHung,
  EnvironmentRaised,
  Processes,
)
from trinity_jax.explorer.workflow import find_workflow
from trinity_jax.explorer.workflows.environment import processes as shared_processes
from trinity_jax.explorer.workflows.multi_turn import play

FLAKY = "trinity_jax.explorer.environments.flaky:Flaky"
ENDS = {
  "raises": EnvironmentRaised, "hangs": TimeoutError, "dies": EnvironmentDied,
  "garbage": ValueError,
}  # fmt: skip


class Yes:
  """A model handle that always says yes."""

  def __init__(self):
    self.messages = []

  async def chat(self, messages, tools=None):
    self.messages = [*messages, {"role": "assistant", "content": "yes"}]
    return "yes"


def seed_of(fate: str, turns=4) -> int:
  return next(s for s in range(10_000) if Fate(s, Rates(), turns).name == fate)


def workers() -> int:
  """Environments' processes of ours that live."""
  count, own = 0, str(os.getpid()).encode()
  for path in Path("/proc").glob("[0-9]*/cmdline"):
    with contextlib.suppress(OSError):
      words = path.read_bytes().split(b"\0")
      count += words[3:4] == [own] and words[2].endswith(b"process_worker.py")
  return count


def args(seed, **more):
  return {"seed": seed, "own_process": True, **more}


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
        await episode(processes.environment(FLAKY, args(seed_of(name))), 5)
    # A process that raised or talked nonsense goes on; one that hung or died was replaced.
    assert processes.started == 3
    assert (await episode(processes.environment(FLAKY, args(seed_of(""))))).turns == 4
    await processes.close()

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
    assert not processes._here()[1]
    await processes.close()

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
    await processes.close()

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
    await processes.close()
    return text

  text = asyncio.run(main())
  assert "PATH" in text and "hunter2" not in text


async def chaos(count, at_once, make, seconds):
  """Runs episodes; returns how many ended how, and the seconds that all took."""
  ends, start = collections.Counter(), time.monotonic()
  places = asyncio.Semaphore(at_once)

  async def one(seed):
    async with places:
      try:
        ended = await episode(make(seed), seconds)
        ends["ok"] += ended.total == 1.0
      except Exception as e:
        ends[type(e).__name__] += 1

  async with asyncio.TaskGroup() as group:
    for seed in range(count):
      group.create_task(one(seed))
  return ends, time.monotonic() - start


def expected(count, turns=4):
  fates = collections.Counter(Fate(s, Rates(), turns).name for s in range(count))
  ends = collections.Counter({"ok": fates[""] + fates["slow"]})
  return ends + collections.Counter({ENDS[name].__name__: fates[name] for name in ENDS})


def check_chaos(count, at_once):
  async def main():
    processes = Processes(at_once)
    make = lambda seed: processes.environment(FLAKY, args(seed, seconds=0.001))
    ends, _ = await chaos(count, at_once, make, 4)
    fates = collections.Counter(Fate(s, Rates(), 4).name for s in range(count))
    assert processes.started <= at_once + fates["dies"] + fates["hangs"]
    await processes.close()
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

  ends, _ = asyncio.run(chaos(500, 500, make, 5))
  rates = Rates(dies=0.0)
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


def test_as_a_workflow():
  def run(**row):
    task = Task(2, ({"role": "user", "content": "x"},), raw=row)
    return asyncio.run(find_workflow("environment")(task, Yes()))

  calm = {"seed": 1, "rates": dataclasses.asdict(flaky.CALM)}
  async_flaky = FLAKY.replace("Flaky", "AsyncFlaky")
  assert run(environment=async_flaky, environment_args=calm) == {"return": 1.0}
  assert run(environment=FLAKY, environment_args=calm) == {"return": 1.0}  # in a thread
  assert run(environment=FLAKY, environment_args=calm, own_process=True) == {"return": 1.0}
  assert shared_processes().started == 1
  with pytest.raises(UserError, match="train row 2: environment = 'x'"):
    run(environment="x")
