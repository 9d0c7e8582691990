"""The explorer where nobody waits for the slowest: carry-over, swaps, evaluation on a snapshot."""

from __future__ import annotations

import asyncio
import threading

import pytest
from rig import WAIT, Rig, config_of, held_out, versions, workflow

from trinity_jax.experience import StopReason

__all__ = ["workflow"]
FREE = {"explorer.deterministic": False}


def free(world, style, **more):
  return config_of(world, **{**FREE, "sync.style": style, **more})


@pytest.mark.parametrize("style", ["fixed", "trainer_driven", "fully_async"])
def test_a_straggler_holds_nobody_up(world, workflow, style):
  """Its group is trained when it comes, by then with what its lag allows."""
  go_on = threading.Event()

  async def one_hangs(task, model):
    if model.id.group == (1, 1):
      await asyncio.to_thread(go_on.wait, WAIT)
    await model.chat(task.messages)

  workflow(one_hangs)
  with world.sampler(version=None, deterministic=False) as sampler:
    rig = Rig(world, sampler, free(world, style, **{"sync.offset": 2}))
    rig.publish(0)
    with rig.exploring(rig.explorer.explore(6)):
      first = rig.train(1, 3)
      go_on.set()
      rest = rig.train(4, 6)
      rig.buffer.finish()
    assert not rig.errors
  groups = [{e.id.group for e in step} for step in first + rest]
  assert all(len(g) == 3 for g in groups) and len(set().union(*groups)) == 18
  assert not any((1, 1) in g for g in groups[:3]) and any((1, 1) in g for g in groups[3:])
  for step, experiences in enumerate(first + rest, 1):
    lag = [step - 1 - v for v in versions(experiences)]
    assert max(lag) <= rig.schedule.max_lag


def test_fully_async_swaps_weights_in_the_middle_of_a_run(world, workflow):
  """A second turn that begins after a publication is sampled by the new version."""
  published, spoke = threading.Event(), threading.Semaphore(0)

  async def two_turns(task, model):
    first = [65, 66 + task.index, 67]
    spoken = await model.generate(first)
    if model.id.batch == 1:
      spoke.release()
      await asyncio.to_thread(published.wait, WAIT)
    await model.generate([*first, *spoken, 68])
    return 1.0

  workflow(two_turns)
  more = {"sync.max_staleness": 3}
  with world.sampler(version=None, deterministic=False) as sampler:
    rig = Rig(world, sampler, free(world, "fully_async", **more))
    rig.publish(0)
    with rig.exploring(rig.explorer.explore(2)):
      assert all(spoke.acquire(timeout=WAIT) for _ in range(6))
      for version in (1, 2):
        rig.publish(version)
      assert rig.until(lambda: sampler.version == 2 or rig.explorer._version == 2)
      published.set()
      steps = rig.train(1, 2, publish=False)  # the second batch may be ready first
      rig.buffer.finish()
    assert not rig.errors
  both = [e for step in steps for e in step if e.id.batch == 1 and e.num_actions]
  assert both, steps[0][0].info
  assert all({int(v) for v in e.versions[e.action_mask]} == {0, 2} for e in both)


def test_the_end_of_training_ends_what_is_under_way(world, workflow):
  """Runs that nobody needs are cancelled, whatever they wait for, and free their slots."""

  async def some_never_end(task, model):
    await model.chat(task.messages)
    if model.id.batch > 1:
      await asyncio.Event().wait()

  workflow(some_never_end)
  with world.sampler(version=None, deterministic=False) as sampler:
    rig = Rig(world, sampler, free(world, "trainer_driven", **{"sync.offset": 1}))
    rig.publish(0)
    with rig.exploring(rig.explorer.explore(4)):
      rig.train(1, 1)
      rig.buffer.finish()
    assert not rig.errors


def test_over_rollout_trains_without_its_slowest(world, workflow):
  """Five tasks a step for a batch of three: two that hang are missed by nobody."""
  go_on = threading.Event()

  async def two_hang(task, model):
    if model.id.task in (0, 3) and model.id.batch == 1:
      await asyncio.to_thread(go_on.wait, WAIT)
    await model.chat(task.messages)

  workflow(two_hang)
  with world.sampler(version=None, deterministic=False) as sampler:
    rig = Rig(world, sampler, free(world, "fixed", **{"explorer.over_rollout": 0.67}))
    rig.publish(0)
    with rig.exploring(rig.explorer.explore(2)):
      steps = rig.train(1, 2)
      rig.buffer.finish()
      go_on.set()
    assert not rig.errors
  assert {e.id.group for e in steps[0]} == {(1, 1), (1, 2), (1, 4)}
  assert all(versions(s) == {n} for n, s in enumerate(steps))


def test_a_run_that_takes_far_longer_than_others_is_given_up(world, workflow):
  async def one_never_ends(task, model):
    await model.chat(task.messages)
    if tuple(model.id[:3]) == (3, 1, 0):
      await asyncio.Event().wait()

  workflow(one_never_ends)
  with world.sampler(version=None, deterministic=False) as sampler:
    rig = Rig(world, sampler, free(world, "fixed", **{"explorer.timeout_ratio": 3.0}))
    steps = rig.go(1, 3)
  reasons = [[e.stop_reason for e in s] for s in steps]
  assert not any(StopReason.TIMEOUT in r for r in reasons[:2])
  assert reasons[2].count(StopReason.TIMEOUT) == 1  # after a second, not after half an hour


def test_evaluation_keeps_its_weights_while_training_goes_on(world, workflow):
  started, go_on = threading.Event(), threading.Event()

  async def evaluations_wait(task, model):
    if model._stream:
      started.set()
      await asyncio.to_thread(go_on.wait, WAIT)
    await model.chat(task.messages)

  workflow(evaluations_wait)
  with world.sampler(version=None, deterministic=False) as sampler:
    config = free(
      world, "fully_async", **{"eval.interval": 2, "eval.on_start": False, "sync.max_staleness": 4}
    )
    rig = Rig(world, sampler, config, [held_out(world)])
    rig.publish(0)
    with rig.exploring(rig.explorer.explore(6)):
      rig.train(1, 2)
      assert started.wait(WAIT)
      rig.train(3, 4)  # beside the evaluation, which began with version 2
      go_on.set()
      rig.train(5, 6)
      rig.buffer.finish()
    assert not rig.errors
  assert rig.evals[0][0] == 2 and versions(rig.evals[0][2]) == {2}


def test_an_evaluation_that_is_over_keeps_no_weights(world, workflow):
  """Nor does one that goes on, where a step needs newer ones."""
  with world.sampler(version=None, deterministic=False) as sampler:
    rig = Rig(world, sampler, free(world, "trainer_driven", every=100), [held_out(world)])
    rig.publish(0)
    with rig.exploring(rig.explorer.explore(6)):
      steps = rig.train(1, 6)
      rig.buffer.finish()
    assert not rig.errors
  assert [v for v, _, _ in rig.evals] == [0]
  assert rig.buffer.stats()["masked_tokens"] == rig.buffer.dropped == 0
  for number, experiences in enumerate(steps, 1):
    assert all(e.num_actions and number - 1 - min(versions([e])) <= 1 for e in experiences)


def test_explorer_driven_publishes_when_asked(world, workflow):
  with world.sampler(version=None, deterministic=False) as sampler:
    config = free(world, "explorer_driven", **{"sync.interval": 2, "sync.offset": 1})
    rig = Rig(world, sampler, config)
    steps = rig.go(1, 6)
  for number, experiences in enumerate(steps, 1):
    assert all(0 <= number - 1 - v <= rig.schedule.max_lag for v in versions(experiences))
  assert len(rig.published) < 7  # not after every step


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_a_dead_explorer_had_begun_is_taken_over(world, workflow, deterministic):
  """Also by one that waits for weights, which will not come without the dead one's groups."""
  with world.sampler(version=None, deterministic=deterministic) as sampler:
    more = {"explorer.deterministic": deterministic, "buffer.lease": 0.4}
    rig = Rig(world, sampler, config_of(world, **more))
    assert rig.buffer.claim("dead", 0.4).batch == 1
    rig.publish(0)
    with rig.exploring(rig.explorer.explore(3)):
      steps = rig.train(1, 3)
      rig.buffer.finish()
    assert not rig.errors
  assert [s[0].id.batch for s in steps] == [1, 2, 3]
  assert all(versions(s) == {n} for n, s in enumerate(steps))
