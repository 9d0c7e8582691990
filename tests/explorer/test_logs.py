"""Runs of several token logs: what workflows return for them, and what becomes of each."""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
import pytest
from rig import Rig, config_of, workflow

from trinity_jax.errors import RunFailed
from trinity_jax.experience import ExperienceId, StopReason
from trinity_jax.explorer import metrics as explorer_lib
from trinity_jax.explorer.outcome import read_outcome
from trinity_jax.explorer.rewards import Score
from trinity_jax.explorer.runner import Runner
from trinity_jax.trainer.extras import step_rewards, token_rewards

__all__ = ["workflow"]  # a fixture


def said(text):
  return [{"role": "user", "content": text}]


async def steps(model, count, reward=None):
  """As many dialogues, one after the other; each is a token log."""
  for i in range(count):
    await model.chat(said(chr(97 + i)))
    if reward is not None:
      model.reward(reward * (i + 1))


async def run(world, sampler, function, most=8, retries=0):
  """One run; returns its experiences."""

  async def grade(response, task):
    return Score(0.75, {"accuracy": 0.75})

  runner = Runner(
    function, grade, lambda id: world.model(sampler, id), lambda _: sampler.leave(),
    lambda _: contextlib.nullcontext(), timeout=60, retries=retries, most_logs=most,
  )  # fmt: skip
  sampler.enter()
  return (await runner.run(world.task(), ExperienceId(1, 2, 3, 0))).experiences()


def test_what_a_workflow_may_return_for_several_logs(world):
  async def for_all(task, model):
    await steps(model, 3)
    return {"right": 1.0, "style": 0.5}

  async def graded(task, model):
    await steps(model, 3)

  async def one_each(task, model):
    await steps(model, 3)
    return [0.25, {"a": 1.0, "b": 1.0}, -1.0]

  async def with_turns(task, model):
    await steps(model, 3, reward=0.5)
    return 10.0

  async def own(task, model):
    await steps(model, 3)
    found = model.experiences([1.0, 2.0, 3.0])
    for i, e in enumerate(found):
      e.info["env_state"] = f"state {i}"
    return found[1:]

  async def go(sampler):
    return [await run(world, sampler, f) for f in (for_all, graded, one_each, with_turns, own)]

  with world.sampler() as sampler:
    everyone, asked, each, turns, mine = asyncio.run(go(sampler))
  for found in (everyone, asked, each, turns):
    assert [e.id for e in found] == [(1, 2, 3, 0), (1, 2, 3, 1), (1, 2, 3, 2)]
    assert [e.messages[0]["content"] for e in found] == ["a", "b", "c"]
    assert all(e.info["task"] == 0 and e.info["taskset"] == "train" for e in found)
    assert found[-1].metrics["logs"] == 3 and found[-1].metrics["logs_dropped"] == 0
    assert ["run_seconds" in e.metrics for e in found] == [False, False, True]
  assert [e.reward for e in everyone] == [1.5] * 3
  assert [e.metrics["rewards/right"] for e in everyone] == [1.0] * 3
  assert [e.reward for e in asked] == [0.75] * 3
  assert [e.reward for e in each] == [0.25, 2.0, -1.0]
  assert step_rewards(each, 3).tolist() == [0.25, 2.0, -1.0]
  # 10 for the run and 0.5 + 1 + 1.5 for its turns: all logs have the run's return.
  assert [e.reward for e in turns] == [13.0] * 3
  assert step_rewards(turns, 3).tolist() == [0.5, 1.0, 11.5]
  for e, of_turn in zip(turns, (0.5, 1.0, 1.5)):
    rewards = token_rewards(e)
    assert rewards.sum() == e.reward and np.count_nonzero(rewards) == 1
    assert e.info["step_reward"] == of_turn + 10.0 * (of_turn == 1.5)
  assert [(e.id.step, e.reward, e.info["env_state"]) for e in mine] == [
    (1, 2.0, "state 1"), (2, 3.0, "state 2"),
  ]  # fmt: skip


def test_logs_beyond_the_limit_are_dropped_and_counted_the_latest_stay(world):
  async def returns_to_the_first(task, model):
    await model.chat(said("a"))
    first = model.messages
    await steps(model, 2)  # "a" again and "b"
    await model.chat([*first, {"role": "user", "content": "c"}])
    model.reward(1.0)
    return 2.0

  async def go(sampler):
    return [await run(world, sampler, returns_to_the_first, most) for most in (1, 2, 3)]

  with world.sampler() as sampler:
    one, two, all_ = asyncio.run(go(sampler))
  texts = lambda found: [[m["content"] for m in e.messages if m["role"] == "user"] for e in found]
  assert texts(one) == [["a", "c"]] and one[0].id.step == 0
  assert texts(two) == [["a", "c"], ["b"]] and [e.id.step for e in two] == [0, 1]
  assert len(all_) == 3 and [e.reward for e in all_] == [3.0] * 3
  assert [f[-1].metrics["logs_dropped"] for f in (one, two, all_)] == [2, 1, 0]
  assert one[0].reward == 3.0, "the run's return does not depend on what is kept"


@pytest.mark.parametrize(
  ("returned", "message"),
  [
    ([1.0], r"1 rewards, but its run has 2 token logs; return one for each"),
    ([], r"0 rewards"),
    ([1.0, None], "a list that holds None"),
    ([1.0, float("nan")], "returned reward = nan"),
    ("none", "with reward None"),
    ("twice", "1/2/3/0, 1/2/3/0; expected some of model.experiences"),
    ("foreign", "returned experiences 7/2/3/0"),
    ("mixed", "holds something else too"),
  ],
)
def test_returns_that_make_no_sense_are_the_runs_error(world, returned, message):
  async def wrong(task, model):
    await steps(model, 2)
    found = model.experiences(1.0)
    if returned == "none":
      found[0].reward = None
    elif returned == "twice":
      found[1].id = found[0].id
    elif returned == "foreign":
      found = found[:1]
      found[0].id = found[0].id._replace(batch=7)
    elif returned == "mixed":
      return [*found, 1.0]
    else:
      return returned
    return found

  with world.sampler() as sampler:
    (e,) = asyncio.run(run(world, sampler, wrong))
  assert e.stop_reason is StopReason.ERROR and message in e.info["error"]
  assert e.id == (1, 2, 3, 0) and e.reward is None


def test_read_outcome_of_plain_rewards():
  id = ExperienceId(1, 0, 0, 0)
  assert read_outcome(None, id, 3) is None
  assert read_outcome(Score(1.0, {"a": 1.0}), id, 3) == Score(1.0, {"a": 1.0})
  assert read_outcome((1, 2), id, 2) == [Score(1.0, {"reward": 1.0}), Score(2.0, {"reward": 2.0})]


def test_groups_of_several_logs_travel_whole(world, workflow):
  """Through explorer, buffer and metrics; runs count, not logs; what is held out has one a run."""

  async def some(task, model):
    await steps(model, 1 + model.id.run)
    return float(model.id.run)

  workflow(some)
  config = config_of(world, tasks=2, runs=3, **{"explorer.max_logs": 2})
  with world.sampler(version=None) as sampler:
    (first, second) = Rig(world, sampler, config).go(1, 2)
  logs = ((0, 0), (1, 0), (1, 1), (2, 0), (2, 1))
  ids = [(task, run, step) for task in range(2) for run, step in logs]
  for batch, found in enumerate((first, second), 1):
    assert [e.id for e in found] == [(batch, *id) for id in ids]
  m = explorer_lib.rollout_metrics(first, 3)
  assert m["rollout/count"] == 6 and m["rollout/logs"] == 2.0 and m["rollout/logs_dropped"] == 2
  assert m["reward/mean"] == 1.0 and m["rewards/reward/mean"] == 1.0
  assert m["group/count"] == 2 and m["frac_reward_zero_std"] == 0
  assert m["num_turns/mean"] == 1.0 and m["rollout/empty"] == 0
  assert sum(v for k, v in m.items() if k.startswith("stop/")) == pytest.approx(1)


# --- groups of which too little is left ---------------------------------------------------------


@pytest.mark.parametrize("deterministic", [True, False])
def test_short_groups_are_dropped_and_others_take_their_place(world, workflow, deterministic):
  async def breaks(task, model):
    if (model.id.batch, model.id.task) in ((1, 1), (2, 0)) and model.id.run > 0:
      raise ValueError("no luck")
    await model.chat(task.messages)

  workflow(breaks)
  more = {"explorer.min_runs": 2, "explorer.deterministic": deterministic}
  if not deterministic:
    more["sync.style"] = "trainer_driven"
  with world.sampler(version=None, deterministic=deterministic) as sampler:
    rig = Rig(world, sampler, config_of(world, tasks=3, runs=3, **more))
    found = rig.go(1, 4)
  groups = [{e.id.group for e in step} for step in found]
  assert all(len(g) == 3 for g in groups) and len(set().union(*groups)) == 12
  assert not {(1, 1), (2, 0)} & set().union(*groups)
  assert all(not e.stop_reason.failed for step in found for e in step)
  assert rig.explorer.short_groups == 2 and rig.buffer.dropped >= 2
  for step, experiences in enumerate(found, 1):
    oldest = min(int(e.versions[e.action_mask].min()) for e in experiences)
    assert step - 1 - oldest <= rig.schedule.max_lag


def test_only_short_groups_end_the_run(world, workflow):
  async def breaks(task, model):
    raise ValueError("no luck at all")

  workflow(breaks)
  more = {"explorer.min_runs": 1, "explorer.max_failed_steps": 2, "explorer.quarantine": 0}
  with world.sampler(version=None) as sampler:
    rig = Rig(world, sampler, config_of(world, **more))
    rig.publish(0)
    with rig.exploring(rig.explorer.explore(3)), pytest.raises(RunFailed):
      rig.buffer.sample(3, 1, 60)
  (error,) = rig.errors
  assert "6 groups in a row had fewer than 1 good runs (explorer.min_runs)" in str(error)
  assert "no luck at all" in str(error)
