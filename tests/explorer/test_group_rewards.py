"""Rewards that compare the runs of a group; what groups leave behind when they end."""

from __future__ import annotations

import asyncio
import contextlib
import sys

import pytest
from rig import Rig, config_of, workflow

from trinity_jax.experience import ExperienceId, StopReason
from trinity_jax.explorer.grading import GroupGrade, grading
from trinity_jax.explorer.groups import TRAIN_STREAM, Groups, group_ids
from trinity_jax.explorer.rewards import Score, dapo, make_reward
from trinity_jax.explorer.workflow import SamplingParams

__all__ = ["workflow"]  # a fixture


def go(world, sampler, grade, runs=4, stream=TRAIN_STREAM, **more):
  """One group of runs; returns their experiences."""
  groups = Groups(
    config_of(world, **more), sampler, world.tokenizer, lambda _: contextlib.nullcontext()
  )
  runner = groups.runner("tested", grade, SamplingParams(1.0, world.max_response), stream)

  async def main():
    (ids,) = group_ids(1, [0], runs)
    groups.announce(stream, [ids])
    async with contextlib.aclosing(groups):
      return await groups.run(runner, world.task(0, truth="t"), ids)

  return asyncio.run(main())


class Judge:
  """Gives responses their places, the longest first; fails as often as told."""

  def __init__(self, failures=0, hang=False):
    self.failures, self.hang = failures, hang
    self.calls: list[list[str]] = []
    self.tokens: list[list[int]] = []

  async def __call__(self, responses, task, tokens):
    self.calls.append(list(responses))
    self.tokens.append(list(tokens))
    if self.hang:
      await asyncio.Event().wait()
    if len(self.calls) <= self.failures:
      raise ConnectionError("the judge is out")
    return [Score(float(i), {"place": float(i)}) for i in range(len(responses))]


@pytest.mark.parametrize("stream", [TRAIN_STREAM, 1])
def test_a_judge_sees_the_group_once_and_only_what_went_well(world, workflow, stream):
  async def some(task, model):
    if model.id.run == 1:
      raise ValueError("broken")
    await model.chat(task.messages)
    return 9.0 if model.id.run == 2 else None

  workflow(some)
  judge = Judge()
  with world.sampler() as sampler:
    found = go(world, sampler, GroupGrade(judge), stream=stream)
  assert len(judge.calls) == 1 and len(judge.calls[0]) == 2
  assert [e.reward for e in found] == [0.0, None, 9.0, 1.0]
  assert [e.stop_reason.failed for e in found] == [False, True, False, False]
  assert found[3].metrics["rewards/place"] == 1.0 and found[3].metrics["reward_latency"] > 0
  assert judge.tokens == [[found[i].num_actions for i in (0, 3)]]
  assert found[0].id == ExperienceId(1, 0, 0, 0) and found[0].metrics["run_seconds"] >= 0


def test_a_judge_that_fails_is_asked_again_and_then_fails_the_runs_that_waited(world, workflow):
  async def some(task, model):
    await model.chat(task.messages)
    return 9.0 if model.id.run == 2 else None

  workflow(some)
  with world.sampler() as sampler:
    again, never = Judge(failures=1), Judge(failures=9)
    good = go(world, sampler, GroupGrade(again), **{"explorer.max_retries": 1})
    bad = go(world, sampler, GroupGrade(never), **{"explorer.max_retries": 1})
  assert again.calls[0] == again.calls[1] and [e.reward for e in good] == [0.0, 1.0, 9.0, 2.0]
  assert [e.metrics["retries"] for e in good] == [1, 1, 0, 1]
  assert len(never.calls) == 2
  for e in bad:
    if e.id.run == 2:
      assert e.reward == 9.0
      continue
    assert e.stop_reason is StopReason.ERROR and e.info["type"] == "ConnectionError"
    assert e.info["attempts"] == 2 and e.metrics["run_seconds"] > 0 and not len(e.tokens)


def test_a_judge_that_hangs_has_a_deadline(world, workflow):
  with world.sampler() as sampler:
    found = go(
      world, sampler, GroupGrade(Judge(hang=True)), runs=2, **{"explorer.run_timeout": 0.3}
    )
  assert {e.stop_reason for e in found} == {StopReason.TIMEOUT}
  assert "explorer.run_timeout = 0.3" in found[0].info["error"]


async def length(responses, truth, task=None):
  assert truth == "t" and task.index == 0
  return [float(len(r)) for r in responses]


length.judges_group = True  # type: ignore[attr-defined]


def tokens(response, truth, task=None):
  return float(dapo._count(response, ""))


def test_a_reward_of_a_config_that_compares_runs(world, workflow, monkeypatch):
  """Its other functions know how many tokens each response has."""
  monkeypatch.setitem(sys.modules, "two_rewards", sys.modules[__name__])
  judged = grading(make_reward("two_rewards:length+two_rewards:tokens"))
  assert isinstance(judged, GroupGrade)
  with world.sampler() as sampler:
    found = go(world, sampler, judged)
  for e in found:
    assert e.metrics["rewards/tokens"] == e.num_actions
    assert e.metrics["rewards/length"] == len(e.messages[-1]["content"])


def test_a_single_reward_grades_each_run_by_itself(world, workflow):
  single = grading(make_reward("format"))
  assert not isinstance(single, GroupGrade)
  with world.sampler() as sampler:
    found = go(world, sampler, single)
  assert all("rewards/format" in e.metrics for e in found)


# --- the end ------------------------------------------------------------------------------------


def test_classes_keep_their_instances_from_step_to_step_until_the_explorer_ends(world, workflow):
  made, resets, closed = [], [], []

  class Kept:
    def __init__(self):
      made.append(self)

    def reset(self, task):
      resets.append(self)

    async def run(self, task, model):
      await model.chat(task.messages)
      return 1.0

    async def close(self):
      closed.append(self)
      if len(closed) == 1:
        await asyncio.Event().wait()  # ends with its deadline

  workflow(Kept)
  with world.sampler(version=None) as sampler, pytest.MonkeyPatch.context() as patch:
    patch.setattr("trinity_jax.explorer.adapt.CLOSING", 0.1)
    rig = Rig(world, sampler, config_of(world, tasks=2, runs=2))
    rig.go(1, 4)
    assert len(resets) == 16 and len(made) <= 8, "one a run at once, two steps at most"
    assert not closed
    asyncio.run(rig.explorer.aclose())
  assert sorted(map(id, closed)) == sorted(map(id, made))

