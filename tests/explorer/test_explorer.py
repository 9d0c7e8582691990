"""The explorer over a real sampler: pace, whole groups, evaluation, failures, determinism."""

from __future__ import annotations

import asyncio
import gc
import threading

import numpy as np
import pytest
from rig import WAIT, Rig, config_of, held_out, speaks, versions, workflow

from trinity_jax.errors import RunFailed, root_cause
from trinity_jax.experience import Experience, ExperienceId, StopReason
from trinity_jax.explorer import metrics as explorer_lib
from trinity_jax.tasks import Taskset

__all__ = ["workflow"]  # a fixture


@pytest.mark.parametrize(
  ("interval", "offset", "want"),
  [(1, 0, [0, 1, 2, 3, 4]), (1, 1, [0, 0, 1, 2, 3]), (2, 1, [0, 0, 0, 2, 2])],
)
def test_steps_sample_from_the_version_of_their_timeline(world, workflow, interval, offset, want):
  with world.sampler(version=None) as sampler:
    rig = Rig(world, sampler, config_of(world, interval=interval, offset=offset))
    steps = rig.go(1, 5)
  assert [versions(s) for s in steps] == [{v} for v in want]
  for number, experiences in enumerate(steps, 1):
    assert [tuple(e.id) for e in experiences] == [
      (number, task, run, 0) for task in range(3) for run in range(2)
    ]
    for a, b in zip(experiences[::2], experiences[1::2]):  # one group: one task
      assert a.info["task"] == b.info["task"] and a.messages[0] == b.messages[0]
  order = Taskset([world.task(i) for i in range(7)], seed=1)
  assert [e.info["task"] for s in steps for e in s[::2]] == [
    t.index for t in order.next_batch(15)
  ]


def test_steps_of_one_version_run_side_by_side(world, workflow):
  """Their batches are announced together: one is not drained before the next starts."""
  open_steps, most = set(), [0]

  async def watched(task, model):
    open_steps.add(model.id.batch)
    most[0] = max(most[0], len(open_steps))
    await model.chat(task.messages)
    open_steps.discard(model.id.batch)

  workflow(watched)
  with world.sampler(version=None) as sampler:
    Rig(world, sampler, config_of(world, tasks=1, interval=3)).go(1, 6)
  assert most[0] == 3


def test_evaluations_that_stored_groups_would_skip(world, workflow):
  """After a kill the trainer goes from version to version on what was stored before."""
  workflow(speaks)
  with world.sampler(version=None) as sampler:
    before = Rig(world, sampler, config_of(world))
    stored = before.go(1, 4)
  groups = [[e for e in s if e.id.task == t] for s in stored for t in range(3)]
  with world.sampler(version=None) as sampler:
    held = held_out(world)
    config = config_of(world, every=2, **{"buffer.capacity": 100})
    rig = Rig(world, sampler, config, held_out=[held], keep=9)
    for group in groups:
      asyncio.run(rig.buffer.put(group))
    rig.publish(0)
    with rig.exploring(rig.explorer.explore(6)):
      rig.train(1, 6)  # steps 1 to 4 wait for nobody
      rig.buffer.finish()
    assert not rig.errors
    asyncio.run(rig.explorer.evaluate_last(6))
  assert [version for version, *_ in rig.evals] == [0, 2, 4, 6]


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_task_that_always_fails_is_not_run_for_ever(world, workflow, deterministic):
  """After two groups that failed whole; a task of which one run ends well is not touched."""
  calls = []

  async def breaks(task, model):
    if task.index == 2 or (task.index == 4 and model.id.run == 0):
      calls.append(task.index)
      raise ValueError("this row is broken")
    await model.chat(task.messages)

  workflow(breaks)
  settings = {"explorer.quarantine": 2, "explorer.deterministic": deterministic}
  with world.sampler(version=None, deterministic=deterministic) as sampler:
    rig = Rig(world, sampler, config_of(world, tasks=7, offset=1, **settings))
    steps = rig.go(1, 6)
  found = [e for step in steps for e in step if e.info["task"] == 2]
  reasons = [e.stop_reason for e in sorted(found, key=lambda e: e.id)]
  ran = reasons.count(StopReason.ERROR)
  assert ran == calls.count(2) in (4, 6), "a step that ran beside the second failure may come yet"
  if deterministic:  # else a seventh step may begin, and its groups take the place of late ones
    assert len(reasons) == 12 and calls.count(4) == 6
  assert len(reasons) >= 10 and calls.count(4) >= 6
  assert reasons == [StopReason.ERROR] * ran + [StopReason.QUARANTINED] * (len(reasons) - ran)
  assert "explorer.quarantine" in max(found, key=lambda e: e.id).info["error"]


def test_a_synchronous_run_is_bit_identical_whatever_the_timing(world, workflow):
  rng = np.random.default_rng()

  async def dawdles(task, model):
    await asyncio.sleep(rng.exponential(0.001))
    await model.chat(task.messages)
    await asyncio.sleep(rng.exponential(0.001))

  workflow(dawdles)
  runs = []
  for _ in range(2):
    with world.sampler(version=None) as sampler:
      steps = Rig(world, sampler, config_of(world, interval=2, offset=1)).go(1, 4)
    runs.append([e for s in steps for e in s])
  for a, b in zip(*runs):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.logprobs, b.logprobs)
    assert (a.id, a.reward, a.stop_reason) == (b.id, b.reward, b.stop_reason)


def test_a_resumed_run_goes_on_where_it_was(world, workflow):
  with world.sampler(version=None) as sampler:
    whole = Rig(world, sampler, config_of(world)).go(1, 4)
  with world.sampler(version=None) as sampler:
    rig = Rig(world, sampler, config_of(world), start=2)
    rest = rig.go(3, 4)
  for a, b in zip([e for s in whole[2:] for e in s], [e for s in rest for e in s], strict=True):
    assert a.id == b.id and a.tokens.tolist() == b.tokens.tolist()
    np.testing.assert_array_equal(a.logprobs, b.logprobs)


def test_failing_runs_leave_their_group_complete(world, workflow):
  async def breaks(task, model):
    if model.id.run == 1 or model.id.task == 2:
      raise ValueError(f"run {model.id}")
    await model.chat(task.messages)

  workflow(breaks)
  with world.sampler(version=None) as sampler:
    steps = Rig(world, sampler, config_of(world)).go(1, 2)
  for experiences in steps:
    failed = [e.stop_reason is StopReason.ERROR for e in experiences]
    assert failed == [False, True, False, True, True, True]
    assert all("ValueError: run" in e.info["error"] for e, f in zip(experiences, failed) if f)
  m = explorer_lib.rollout_metrics(steps[0], 2)
  assert m["rollout/count"] == 6 and m["rollout/errored"] == 4 / 6
  assert m["rollout/empty"] == pytest.approx(4 / 6)
  assert m["error/ValueError/count"] == 4 and m["stop/error"] == 4 / 6
  assert sum(v for k, v in m.items() if k.startswith("stop/")) == pytest.approx(1)


def test_a_small_buffer_holds_the_explorer_back_without_a_deadlock(world, workflow):
  with world.sampler(version=None) as sampler:
    config = config_of(world, interval=3, offset=2, **{"buffer.capacity": 6})
    steps = Rig(world, sampler, config).go(1, 9)
  assert [s[0].id.batch for s in steps] == list(range(1, 10))


# --- evaluation ---------------------------------------------------------------------------------


def test_evaluation_happens_once_at_each_due_version(world, workflow):
  with world.sampler(version=None) as sampler:
    rig = Rig(
      world, sampler, config_of(world, every=2), [held_out(world), held_out(world, "more", 2)],
      evaluated={2},
    )  # fmt: skip

    async def go():
      await rig.explorer.explore(5)
      await rig.explorer.evaluate_versions([5, 5])

    rig.publish(0)
    with rig.exploring(go()):
      rig.train(1, 5)
      rig.buffer.finish()
    assert not rig.errors
  assert [v for v, _, _ in rig.evals] == [0, 4, 5]
  metrics = rig.evals[0][1]
  assert metrics["eval/sums/accuracy"] == metrics["eval/accuracy"] == pytest.approx(2 / 5)
  assert metrics["eval/sums/avg@1"] == pytest.approx(1 / 5)
  assert metrics["eval/more/accuracy"] == 0.5 and metrics["eval/count"] == 7
  for version, _, shown in rig.evals:
    assert versions(shown) == {version} and len(shown) == 4
    assert shown[0].temperature == 1.0  # greedy


def test_evaluation_without_a_start_and_its_own_randomness(world, workflow):
  with world.sampler(version=None) as sampler:
    config = config_of(
      world, every=1, **{"eval.on_start": False, "eval.runs": 3, "eval.temperature": 1.0}
    )
    rig = Rig(world, sampler, config, [held_out(world, n=2)])
    steps = rig.go(1, 3)
  assert [v for v, _, _ in rig.evals] == [1, 2]
  assert rig.evals[0][1]["eval/sums/pass@3"] == 0.5
  assert "eval/sums/avg@3" in rig.evals[0][1]
  assert len(steps) == 3


def test_a_version_that_is_gone_is_never_evaluated_under_newer_weights(world, workflow):
  """The newest takes its place, once; and those that are then behind are left out."""
  with world.sampler(version=None) as sampler:
    rig = Rig(world, sampler, config_of(world), [held_out(world)], keep=2)
    for version in (0, 2, 4, 6):
      rig.publish(version)
    with rig.exploring(rig.explorer.evaluate_versions([0, 4, 6])):
      pass
    assert not rig.errors
  assert [v for v, _, _ in rig.evals] == [6]
  assert versions(rig.evals[0][2]) == {6}


def test_eval_metrics_by_hand():
  def run(accuracy, reward):
    metrics = {} if accuracy is None else {"rewards/accuracy": accuracy, "rewards/format": 9.0}
    none = np.zeros(0)
    return Experience(
      none, none, none, none, ExperienceId(1, 0, 0, 0), reward, metrics=metrics
    )

  groups = [[run(1.0, 2.0), run(0.0, 1.0)], [run(0.0, 0.5), run(None, None)]]
  assert explorer_lib.eval_metrics("x", groups, main=True) == {
    "eval/x/accuracy": 0.25, "eval/x/avg@2": 0.875, "eval/x/pass@2": 0.5, "eval/accuracy": 0.25,
  }  # fmt: skip
  assert "eval/accuracy" not in explorer_lib.eval_metrics("x", groups, main=False)
  # Points for the form of an answer solve nothing; -1 where it is wrong is no share.
  part = explorer_lib.eval_metrics("x", [[run(0.1, 0.1)] * 4, [run(1.0, 1.0)] * 4], main=False)
  assert part["eval/x/pass@4"] == 0.5 and part["eval/x/accuracy"] == pytest.approx(0.55)
  signs = explorer_lib.eval_metrics("x", [[run(1.0, 1.0), run(-1.0, -1.0)]] * 2, main=False)
  assert signs["eval/x/accuracy"] == 0.5 and signs["eval/x/avg@2"] == 0.0


def test_group_metrics_by_hand():
  def run(task, reward, number, step=0):
    one = np.ones(2)
    return Experience(one, np.array([0, 1]), one, one, ExperienceId(1, task, number, step), reward)

  rewards = [(0, 1.0), (0, 1.0), (1, 0.0), (1, 0.0), (2, 1.0), (2, 0.0), (3, 0.5), (3, 0.5)]
  runs = [run(*r, number=i % 2) for i, r in enumerate(rewards)]
  got = explorer_lib.group_metrics(runs, 2)
  assert got == {
    "group/count": 4, "frac_reward_zero_std": 0.75, "group/solve_all": 0.25,
    "group/solve_none": 0.25,
  }  # fmt: skip
  # A run's last log stands for it.
  logs = [run(0, 5.0, 0, 0), run(0, 1.0, 0, 1), *runs[1:]]
  assert explorer_lib.group_metrics(logs, 2) == got
  assert explorer_lib.group_metrics(runs, 1) == {}


# --- the explorer's own end ---------------------------------------------------------------------


def test_a_dead_sampler_ends_the_explorer_and_the_trainers_wait(world, workflow, caplog):
  with world.sampler(version=None, check=False) as sampler:
    rig = Rig(world, sampler, config_of(world, **{"explorer.max_retries": 2}))

    async def kills(task, model):
      sampler._driver._state = object()  # the next dispatch fails in the sampler's thread
      await model.chat(task.messages)

    workflow(kills)
    rig.publish(0)
    with rig.exploring(rig.explorer.explore(2)), pytest.raises(RunFailed, match="closed") as e:
      rig.train(1, 2)
  (error,) = rig.errors
  assert e.value.__cause__ is error
  assert isinstance(root_cause(error), RunFailed) and sampler.error is not None
  assert root_cause(error).__cause__ is sampler.error
  rig.explorer._in_flight.clear()
  gc.collect()
  assert not caplog.records  # one error, told once


def test_an_explorer_that_waits_for_weights_is_woken_when_the_trainer_fails(world, workflow):
  with world.sampler(version=None) as sampler:
    rig = Rig(world, sampler, config_of(world))
    rig.publish(0)
    with pytest.raises(ZeroDivisionError), rig.exploring(rig.explorer.explore(3)):
      rig.buffer.sample(3, 1, WAIT)
      raise ZeroDivisionError("the trainer's bug")
  (error,) = rig.errors
  assert isinstance(error, RunFailed) and isinstance(error.__cause__, ZeroDivisionError)


def test_describe_names_open_runs(world, workflow):
  asked, go_on = threading.Event(), threading.Event()

  async def hangs(task, model):
    if model.id.run == 1:
      asked.set()
      await asyncio.to_thread(go_on.wait, WAIT)
    await model.chat(task.messages)

  workflow(hangs)
  with world.sampler(version=None) as sampler:
    rig = Rig(world, sampler, config_of(world, tasks=1))
    rig.publish(0)
    with rig.exploring(rig.explorer.explore(1)):
      assert asked.wait(WAIT)
      with pytest.raises(RunFailed, match=r"group \(1, 0\).*runs open.*1/0/1/0.*sampler at"):
        rig.buffer.sample(1, 1, 0.2, rig.explorer.describe)
      go_on.set()
      assert len(rig.buffer.sample(1, 1, WAIT)) == 2
      rig.buffer.finish()
    assert not rig.errors
  assert rig.explorer.describe().startswith("0 runs open")
