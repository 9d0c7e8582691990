"""Workflows that are classes or plain functions."""

from __future__ import annotations

import asyncio
import threading

import pytest

from trinity_jax.errors import UserError
from trinity_jax.explorer.adapt import ClassWorkflow, as_workflow
from trinity_jax.explorer.workflow import RunEnded
from trinity_jax.explorer.workflows.single_turn import single_turn


def test_coroutine_functions_stay_as_they_are():
  class Caller:
    async def __call__(self, task, model): ...

  caller = Caller()
  assert as_workflow(single_turn, "w") is single_turn and as_workflow(caller, "w") is caller
  with pytest.raises(UserError, match="'w' is a class without a method run"):
    as_workflow(dict, "w")


def test_a_plain_function_runs_in_a_thread_and_asks_without_await(world):
  def plain(task, model):
    assert threading.current_thread() is not threading.main_thread()
    text = model.chat(task.messages)
    model.reward(0.25)
    model.chat([*model.messages, {"role": "user", "content": "b"}])
    assert len(model.logprobs([1, 2, 3])) == 3
    return float(model.turns) if text == model.messages[1]["content"] else None

  with world.sampler() as sampler:
    out = world.run(sampler, as_workflow(plain, "plain"), [world.task(i) for i in range(3)])
  assert [e.reward for e in out] == [2.25] * 3
  assert all(e.metrics["num_turns"] == 2 for e in out)


def test_a_thread_that_outlives_its_run_gets_no_more_answers(world):
  go, said = threading.Event(), []

  def slow(task, model):
    model.chat(task.messages)
    go.wait(30)
    try:
      model.chat(model.messages)
    except RunEnded as e:
      said.append(str(e))
    finally:
      said.append("end")
      over.set()

  over = threading.Event()
  with world.sampler() as sampler:
    (e,) = world.run(sampler, as_workflow(slow, "slow"), [world.task()], timeout=0.5)
    go.set()
    assert over.wait(30)
  assert e.stop_reason.name == "TIMEOUT"
  assert len(said) == 2 and "has ended" in said[0]


def test_classes_serve_one_run_at_a_time_and_are_kept_if_they_can_reset(world):
  made, resets, closed = [], [], []

  class Once:
    def __init__(self):
      made.append(self)

    async def run(self, task, model):
      await model.chat(task.messages)
      return 1.0

    def close(self):
      closed.append(self)

  class Kept(Once):
    def reset(self, task):
      resets.append(task.index)

    async def run(self, task, model):
      assert resets[-1] == task.index
      if task.index == 2:
        raise RuntimeError("broken")
      return await super().run(task, model)

  async def one_by_one(workflow, sampler):
    sampler.enter()
    try:
      for i in range(4):
        try:
          await workflow(world.task(i), world.model(sampler))
        except RuntimeError:
          assert i == 2
    finally:
      sampler.leave()

  with world.sampler() as sampler:
    asyncio.run(one_by_one(as_workflow(Once, "w"), sampler))
    assert len(made) == 4 and closed == made
    made.clear()
    closed.clear()
    kept = as_workflow(Kept, "w")
    assert isinstance(kept, ClassWorkflow)
    asyncio.run(one_by_one(kept, sampler))
    assert resets == [0, 1, 2, 3] and len(made) == 2
    assert closed == made[:1]  # the one that failed is not trusted again
    asyncio.run(kept.close())
    assert closed == made


def test_a_sync_class_runs_in_threads(world):
  class Plain:
    def run(self, task, model):
      model.chat(task.messages)
      return {"a": 0.5, "b": 0.25}

  with world.sampler() as sampler:
    out = world.run(sampler, as_workflow(Plain, "w"), [world.task(i) for i in range(4)])
  assert [e.reward for e in out] == [0.75] * 4
