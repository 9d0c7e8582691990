"""Episodes: every turn in one log, observations never trained on."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from trinity_jax.errors import UserError
from trinity_jax.experience import Task
from trinity_jax.explorer.environments.environment import Step
from trinity_jax.explorer.workflows import find_workflow, multi_turn
from trinity_jax.explorer.workflows.multi_turn import play
from trinity_jax.tasks import frozen_lake


class Scripted:
  """A model handle that says what it was told to."""

  def __init__(self, *lines):
    self.lines, self.messages, self.asked, self.rewards = list(lines), [], [], []

  def reward(self, value):
    self.rewards.append((len(self.asked), value))

  async def chat(self, messages, tools=None):
    self.asked.append([m["content"] for m in messages])
    text = self.lines.pop(0)
    self.messages = [*messages, {"role": "assistant", "content": text}]
    return text


def task(**row) -> Task:
  return Task(7, ({"role": "user", "content": "x"},), raw=row)


def run(row, *lines):
  model = Scripted(*lines)
  return asyncio.run(find_workflow("gym")(task(**row), model)), model


ROW = frozen_lake.generate("eval", held_out=1)[0]


def test_the_right_way_is_rewarded():
  reward, model = run(ROW, *ROW["answer"])
  assert reward == (0.0, {"accuracy": 1.0})
  assert model.rewards == [(len(ROW["answer"]), 1.0)]
  assert model.asked[0] == [ROW["prompt"]]
  assert len(model.asked[-1]) == 2 * len(ROW["answer"]) - 1  # the whole dialogue, every turn


def test_turns_and_nonsense_end_an_episode():
  reward, model = run(ROW | {"max_turns": 3}, "L", "L", "L", "L")
  assert reward == (0.0, {"accuracy": 0.0}) and len(model.lines) == 1
  reward, model = run(ROW, "sideways", "R")
  assert reward == (0.0, {"accuracy": 0.0}) and len(model.lines) == 1


def test_rows_that_are_wrong():
  for row, message in (
    ({}, "environment = None"),
    (ROW | {"max_turns": 0}, "max_turns = 0"),
    (ROW | {"environment_args": "x"}, "expects gymnasium's id and an object"),
  ):
    with pytest.raises(UserError, match=f"train row 7.*{message}"):
      run(row)


class Recording:
  """An environment with its own clock: what happens to it, in order."""

  def __init__(self, fail_at=99):
    self.calls, self.fail_at = [], fail_at

  async def reset(self):
    self.calls.append("reset")
    return "go"

  def step(self, action):
    self.calls.append(action)
    if len(self.calls) > self.fail_at:
      raise OSError("broken")
    return Step("on", 0.5, done=len(self.calls) > 3)

  def close(self):
    self.calls.append("close")


def test_environments_are_closed_whatever_happens():
  env, model = Recording(), Scripted("a", "b", "c", "d")
  episode = asyncio.run(play(model, env, 10, system="be kind"))
  assert env.calls == ["reset", "a", "b", "c", "close"]
  assert (episode.total, episode.turns, episode.done, episode.invalid) == (1.5, 3, True, False)
  assert model.asked[0] == ["be kind", "go"]
  assert model.rewards == [(1, 0.5), (2, 0.5), (3, 0.5)]  # each to the turn that earned it
  env = Recording(fail_at=1)
  with pytest.raises(OSError, match="broken"):
    asyncio.run(play(Scripted("a"), env, 10))
  assert env.calls == ["reset", "a", "close"]


def test_an_environment_that_hangs_cannot_hold_a_cancelled_run(monkeypatch):
  """Neither its step nor its close, in threads that never end, keeps the run from ending."""
  hung = threading.Event()

  class Hung(Recording):
    def step(self, action):
      hung.wait()

    def close(self):
      self.calls.append("close")
      hung.wait()

  async def main(env):
    async with asyncio.timeout(0.2):
      await play(Scripted("a"), env, 10)

  monkeypatch.setattr(multi_turn, "CLOSING", 0.2)
  env, start = Hung(), time.monotonic()
  with pytest.raises((TimeoutError, RuntimeError)):
    asyncio.run(main(env))
  hung.set()
  assert env.calls == ["reset", "close"] and time.monotonic() - start < 5


def test_observations_are_never_in_the_loss(world):
  """With a real sampler: the mask is True for what was sampled and for nothing else."""

  class Hold:
    quick = True

    def reset(self):
      return "a"

    def step(self, action):
      return Step("b")

    def close(self):
      pass

  async def workflow(task, model):
    await play(model, Hold(), 2)
    return 0.0

  with world.sampler() as sampler:
    experiences = world.run(sampler, workflow, [world.task(i) for i in range(3)])
  for e in experiences:
    e = e[0] if isinstance(e, list) else e
    assert e.metrics["num_turns"] == 2
    shown = e.tokens[~e.action_mask].tolist()
    user, end = (world.tokenizer.encode(x)[0] for x in ("<|user|>", "<|end|>"))
    assert shown.count(user) == 2 and world.tokenizer.encode("b")[0] in shown
    edges = np.flatnonzero(np.diff(e.action_mask.astype(int)))
    assert len(edges) == 3  # shown, written, shown, written
    assert (e.versions[~e.action_mask] == -1).all() and (e.logprobs[~e.action_mask] == 0).all()
    assert end in e.tokens
