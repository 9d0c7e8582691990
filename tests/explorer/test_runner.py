"""Whatever a workflow or its grading does, the run ends as an experience and leaks nothing."""

from __future__ import annotations

import asyncio
import copy

import numpy as np
import pytest

from trinity_jax.errors import RunFailed
from trinity_jax.experience import StopReason
from trinity_jax.explorer.outcome import read_reward
from trinity_jax.explorer.rewards import Score
from trinity_jax.explorer.runner import Runner

GOOD = (StopReason.STOP, StopReason.LENGTH)


async def behave(task, model):
  """A workflow that does what its task's truth says."""
  match task.truth:
    case "silent":
      return 1.0
    case "hang":
      await asyncio.Event().wait()
    case "hang and mask it":
      try:
        await asyncio.Event().wait()
      except asyncio.CancelledError:
        raise ValueError("connection lost") from None
    case "raise":
      raise KeyError("no such tool")
    case "exit":
      raise SystemExit(2)
    case "own timeout":
      raise TimeoutError("the environment did not answer")
    case "stray cancel":
      raise asyncio.CancelledError
    case "long prompt":
      await model.chat([{"role": "user", "content": "x" * 99}])
  await model.chat(task.messages)
  match task.truth:
    case "hang later":
      await asyncio.Event().wait()
    case "long second prompt":
      await model.generate([*model.experience(Score(0.0, {}), {}).tokens, *[9] * 40])
    case "text":
      return "abc"
    case "nan":
      return float("nan")
    case "bad component":
      return {"accuracy": 1.0, "style": None}
    case "list":
      return [1.0, 2.0]
    case "components":
      return {"accuracy": 1.0, "length": -0.25}
    case "number":
      return np.float32(0.5)
  return None


async def grade(response, task):
  if task.truth == "bad grade":
    raise ZeroDivisionError("in the reward")
  if task.truth == "grade hangs":
    await asyncio.Event().wait()
  return Score(0.75, {"accuracy": 1.0, "format": 0.5})


FAILURES = {
  "silent": (StopReason.ERROR, "ValueError", "ended without a call to the model"),
  "raise": (StopReason.ERROR, "KeyError", "no such tool"),
  "exit": (StopReason.ERROR, "SystemExit", "2"),
  "own timeout": (StopReason.ERROR, "TimeoutError", "the environment did not answer"),
  "stray cancel": (StopReason.ERROR, "CancelledError", ""),
  "long prompt": (StopReason.PROMPT_TOO_LONG, None, "exceeds sampler.max_prompt_length = 24"),
  "long second prompt": (StopReason.PROMPT_TOO_LONG, None, "sampler.max_prompt_length = 24"),
  "text": (StopReason.ERROR, "ValueError", "returned reward = 'abc'; expected a finite number"),
  "nan": (StopReason.ERROR, "ValueError", "returned reward = nan"),
  "bad component": (StopReason.ERROR, "ValueError", "returned style = None"),
  "list": (StopReason.ERROR, "ValueError", "2 rewards, but its run has 1 token logs"),
  "bad grade": (StopReason.ERROR, "ZeroDivisionError", "in the reward"),
}
HANGS = ("hang", "hang and mask it", "hang later", "grade hangs")


@pytest.mark.parametrize("deterministic", [True, False])
def test_every_failure_is_a_value_and_harms_no_other_run(world, deterministic):
  names = [n for bad in FAILURES for n in (bad, "good")]
  tasks = [world.task(i, truth=n) for i, n in enumerate(names)]
  with world.sampler(deterministic=deterministic) as sampler:
    out = world.run(sampler, behave, tasks, grade=grade)
  assert [e.id.task for e in out] == list(range(len(names)))
  for name, e in zip(names, out):
    assert e.metrics["run_seconds"] >= 0
    if name == "good":
      assert e.stop_reason in GOOD and e.reward == 0.75 and e.num_actions
      assert e.info == {"task": e.id.task, "taskset": "train"}
    else:
      reason, kind, text = FAILURES[name]
      assert (e.stop_reason, e.info.get("type")) == (reason, kind)
      assert text in e.info["error"]
      assert e.stop_reason.failed and e.reward is None and len(e.tokens) == 0
  raised = out[names.index("raise")].info
  assert "in behave" in raised["traceback"] and raised["attempts"] == 1
  assert raised["task"] == names.index("raise")


@pytest.mark.parametrize("deterministic", [True, False])
def test_hanging_runs_time_out_and_those_they_hold_back_do_not(world, deterministic):
  """Deterministic admission waits for the hanging ones; that wait is not the others' time."""
  names = [n for bad in HANGS for n in (bad, "good")]
  tasks = [world.task(i, truth=n) for i, n in enumerate(names)]
  with world.sampler(deterministic=deterministic) as sampler:
    out = world.run(sampler, behave, tasks, grade=grade, timeout=0.4)
  for name, e in zip(names, out):
    if name == "good":
      assert e.stop_reason in GOOD and e.reward == 0.75
    else:
      assert e.stop_reason is StopReason.TIMEOUT and len(e.tokens) == 0
      assert "longer than explorer.run_timeout = 0.4 s" in e.info["error"]
      assert e.metrics["run_seconds"] >= 0.4


def test_a_run_that_gives_up_on_the_sampler_itself(world):
  """A deadline of the workflow's own inside a call: the slot is freed, the run may go on."""

  async def impatient(task, model):
    if task.index == 0:
      return await model.chat(task.messages) and 0.0
    with pytest.raises(TimeoutError):
      async with asyncio.timeout(0):
        await model.chat(task.messages)
    await model.chat(task.messages)
    return 1.0

  with world.sampler() as sampler:
    out = world.run(sampler, impatient, [world.task(i) for i in range(3)])
    assert [e.reward for e in out] == [0.0, 1.0, 1.0]
    assert all(e.metrics["num_turns"] == 1 for e in out)


def test_retries_use_a_fresh_model_and_are_counted(world):
  seen: dict[int, list] = {}

  async def flaky(task, model):
    seen.setdefault(task.index, []).append(model)
    await model.chat(task.messages)
    if len(seen[task.index]) <= task.index:
      raise OSError("connection reset")

  with world.sampler() as sampler:
    out = world.run(sampler, flaky, [world.task(i) for i in range(4)], retries=2)
  assert [len(seen[i]) for i in range(4)] == [1, 2, 3, 3]
  assert len({id(m) for models in seen.values() for m in models}) == 9
  assert [e.metrics.get("retries") for e in out] == [0, 1, 2, None]
  assert [e.metrics.get("num_turns") for e in out[:3]] == [1, 1, 1]
  assert out[3].stop_reason is StopReason.ERROR and out[3].info["attempts"] == 3


def test_only_errors_that_may_go_away_are_tried_again(world):
  calls = []

  async def breaks(task, model):
    calls.append(task.index)
    raise (ConnectionResetError, KeyError, UnicodeError)[task.index]("broken")

  with world.sampler() as sampler:
    tasks = [world.task(i) for i in range(3)]
    out = world.run(sampler, breaks, tasks, retries=2, retry_on=("OSError", "UnicodeError"))
  assert [calls.count(i) for i in range(3)] == [3, 1, 3]  # a reset connection is an OSError
  assert [e.info["attempts"] for e in out] == [3, 1, 3]


def test_a_grader_that_fails_once_is_asked_again_about_the_same_response(world):
  asked, graded = [], []

  async def once(task, model):
    asked.append(task.index)
    await model.chat(task.messages)

  async def flaky_grade(response, task):
    graded.append(response)
    if len(graded) == 1:
      raise OSError("worker lost")
    return Score(1.0, {"accuracy": 1.0})

  with world.sampler() as sampler:
    (e,) = world.run(sampler, once, [world.task()], grade=flaky_grade, retries=1)
  assert asked == [0], "sampling again would give the same tokens, outside the admission plan"
  assert graded[0] == graded[1] and e.reward == 1.0 and e.metrics["retries"] == 1


def test_grading_knows_how_many_tokens_were_written(world):
  from trinity_jax.explorer.rewards import dapo

  counts = {}

  async def count(response, task):
    counts[task.index] = dapo._count(response, "")
    return Score(0.0, {})

  async def speak(task, model):
    await model.chat(task.messages)

  with world.sampler() as sampler:
    out = world.run(sampler, speak, [world.task(i, text="x" * i) for i in range(3)], grade=count)
  assert counts == {i: e.metrics["response_length"] for i, e in enumerate(out)}


def test_reward_components_and_metrics(world):
  tasks = [world.task(0, truth="components"), world.task(1, truth="number"), world.task(2)]
  with world.sampler() as sampler:
    parts, number, graded = world.run(sampler, behave, tasks, grade=grade)
  assert parts.reward == 0.75
  assert parts.metrics["rewards/accuracy"] == 1.0 and parts.metrics["rewards/length"] == -0.25
  assert number.reward == 0.5 and number.metrics["rewards/reward"] == 0.5
  assert number.metrics["reward_latency"] == 0.0
  assert graded.reward == 0.75 and graded.metrics["rewards/format"] == 0.5
  assert graded.metrics["reward_latency"] > 0


def test_a_dead_sampler_ends_the_run_with_its_cause(world):
  cause = MemoryError("out of memory")

  def breaks(*_):
    raise cause

  whole, world.programs = world.programs, copy.copy(world.programs)
  world.programs.extend = breaks
  try:
    with world.sampler(check=False) as sampler:
      with pytest.raises(RunFailed, match="out of memory") as e:
        world.run(sampler, behave, [world.task(i) for i in range(6)], retries=3)
      assert e.value.__cause__ is cause
  finally:
    world.programs = whole


def test_cancelling_a_run_cancels_it(world):
  """At the end of the program nothing is turned into a value or retried."""
  started = asyncio.Event()

  async def stubborn(task, model):
    started.set()
    try:
      await asyncio.Event().wait()
    except asyncio.CancelledError:
      raise OSError("masked") from None

  with world.sampler() as sampler:

    async def main():
      runner = Runner(
        stubborn, grade, lambda id: world.model(sampler, id), lambda _: sampler.leave(),
        lambda _: None, timeout=60, retries=5,
      )  # fmt: skip
      sampler.enter()
      run = asyncio.create_task(runner.run(world.task(), world.model(sampler).id))
      await started.wait()
      run.cancel()
      with pytest.raises(asyncio.CancelledError):
        await run

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize(
  ("value", "want"),
  [
    (None, None),
    (1, Score(1.0, {"reward": 1.0})),
    (True, Score(1.0, {"reward": 1.0})),
    ({"a": 0.5, "b": 0.25}, Score(0.75, {"a": 0.5, "b": 0.25})),
  ],
)
def test_read_reward(value, want):
  assert read_reward(value) == want
