"""Environments that speak text already, in the shapes of ALFWorld, ScienceWorld and WebShop."""

from __future__ import annotations

import asyncio
import sys

import pytest

from trinity_jax.errors import UserError
from trinity_jax.experience import Task
from trinity_jax.explorer.environments.process import Processes
from trinity_jax.explorer.environments.text import TextEnvironment
from trinity_jax.explorer.workflows import find_workflow

WORLDS = '''
class Kitchen:
  """Find the mug, take it; four values a step as ALFWorld has, five as gymnasium has."""

  def __init__(self, where="drawer", values=4):
    self.where, self.values, self.open, self.closed = where, values, False, False

  def info(self):
    return {"admissible_commands": ["look", "open " + self.where] + ["take mug"] * self.open}

  def reset(self):
    return "You are in a kitchen.", self.info()

  def step(self, command):
    text, reward, done = "Nothing happens.", 0, False
    if command == "open " + self.where:
      text, self.open = "You see a mug.", True
    elif command == "take mug" and self.open:
      text, reward, done = "You took it.", 1, True
    return (text, reward, done, *[False] * (self.values - 4), self.info())


class Shop:
  """WebShop's reset has nothing beside its text; no close."""

  def reset(self):
    return "search[...]", None

  def step(self, action):
    return action, 0.5, action == "click[buy]", None


class Bare:
  def reset(self):
    return "go"

  def step(self, action):
    return {"none": None, "batch": (["x"], [0.0], [False], {})}.get(action, (b"x", 0.0, False, {}))


kitchen, shop, bare = Kitchen, Shop, Bare
'''
TEXT = "trinity_jax.explorer.environments.text:TextEnvironment"


@pytest.fixture(autouse=True)
def worlds(tmp_path, monkeypatch):
  (tmp_path / "text_worlds.py").write_text(WORLDS)
  monkeypatch.syspath_prepend(tmp_path)
  yield
  sys.modules.pop("text_worlds", None)


class Scripted:
  sampler = None

  def __init__(self, *lines, processes=None):
    self.lines, self.messages, self.shown, self.total = list(lines), [], [], 0.0
    self.processes = processes

  def reward(self, value):
    self.total += value

  async def chat(self, messages):
    self.shown.append(messages[-1]["content"])
    self.messages = [*messages, {"role": "assistant", "content": self.lines[0]}]
    return self.lines.pop(0)


@pytest.mark.parametrize("values", [4, 5])
@pytest.mark.parametrize("own_process", [False, True])
def test_an_episode_in_free_text(values, own_process):
  args = {
    "make": "text_worlds:kitchen", "args": {"where": "fridge", "values": values},
    "commands": "admissible_commands", "goal": "Take the mug.",
  }  # fmt: skip
  row = {"environment": TEXT, "environment_args": args, "own_process": own_process}
  task = Task(0, ({"role": "user", "content": "x"},), raw=row)
  processes = Processes(1)
  model = Scripted("dance", " open fridge\n", "take mug", "never", processes=processes)
  try:
    score = asyncio.run(find_workflow("environment")(task, model))
  finally:
    processes.close()
  assert model.shown == [
    "Take the mug.\nYou are in a kitchen.\nPossible: look | open fridge",
    "Nothing happens.\nPossible: look | open fridge",
    "You see a mug.\nPossible: look | open fridge | take mug",
  ]
  assert model.total == 1 and score == (0.0, {"return": 1.0}) and model.lines == ["never"]


def test_a_shop_without_info_and_close():
  shop = TextEnvironment("text_worlds:shop")
  assert shop.reset() == "search[...]"
  assert shop.step("search[mug]").reward == 0.5 and shop.step("click[buy]").done
  shop.close()


def test_what_is_no_such_environment():
  with pytest.raises(UserError, match="no function 'kitchn'; did you mean 'kitchen'"):
    TextEnvironment("text_worlds:kitchn")
  bare = TextEnvironment("text_worlds:bare")
  assert bare.reset() == "go"
  with pytest.raises(ValueError, match="returned 'None'; expected 4 or 5 values"):
    bare.step("none")
  with pytest.raises(ValueError, match="observation is bytes, no text"):
    bare.step("bytes")
  with pytest.raises(ValueError, match="observation is list, no text"):
    bare.step("batch")
  kitchen = TextEnvironment("text_worlds:kitchen", commands="valid")
  with pytest.raises(ValueError, match="info has no 'valid'; it has admissible_commands"):
    kitchen.reset()
  with pytest.raises(ValueError, match="it has type NoneType"):
    TextEnvironment("text_worlds:shop", commands="valid").reset()
