"""gymnasium's environments as text."""

from __future__ import annotations

import gymnasium
import pytest

from trinity_jax.errors import UserError
from trinity_jax.explorer.environments.gym import TEXTS, GymEnvironment, Text
from trinity_jax.tasks import frozen_lake

LAKE = ["SFHF", "FHFF", "FFFH", "HFFG"]


def lake() -> GymEnvironment:
  return GymEnvironment("FrozenLake-v1", {"desc": LAKE, "is_slippery": False})


def test_frozen_lake_by_text():
  env = lake()
  assert env.quick
  assert env.reset() == "SFHFFHFFFFFHHFFGa#FF#"
  steps = [env.step(a) for a in "DDRRDR"]
  env.close()
  assert [s.observation for s in steps[:2]] == ["e#FHS", "i#HFF"]
  assert [s.reward for s in steps] == [0, 0, 0, 0, 0, 1]
  assert [s.done for s in steps] == [False] * 5 + [True]
  assert not any(s.invalid for s in steps)


def test_the_taskset_and_the_environment_say_the_same():
  """Demonstrations are made without gymnasium; their texts are what the agent will see."""
  for row in frozen_lake.generate("eval", held_out=20):
    env = GymEnvironment(row["environment"], row["environment_args"])
    assert env.reset() == row["prompt"]
    *way, last = [env.step(a) for a in row["answer"]]
    assert last.done and last.reward == 1 and not any(s.done for s in way)
    cell = 0
    for action, step in zip(row["answer"], way):
      moved = frozen_lake._neighbours(row["environment_args"]["desc"], cell)
      cell = moved[frozen_lake.ACTIONS.index(action)]
      assert step.observation == frozen_lake.describe(row["environment_args"]["desc"], cell)


def test_holes_walls_and_words_that_are_no_action():
  env = lake()
  env.reset()
  assert env.step(" L\n").observation == "a#FF#"  # a wall: stays
  env.step("R")
  fallen = env.step("D")
  assert fallen.done and fallen.reward == 0 and not fallen.invalid
  for word in ("up", "", "R R", "\ufffd"):
    env = lake()
    env.reset()
    step = env.step(word)
    assert step.done and step.invalid and step.reward == 0


def test_nonsense_is_never_the_best_thing_to_say():
  """An agent once learned to end every blackjack game with nonsense, worth 0, and never lost."""
  taxi = max(name for name in gymnasium.registry if name.startswith("Taxi-"))
  for name, worst in (("Blackjack-v1", -1.0), (taxi, -200.0), ("FrozenLake-v1", 0.0)):
    env = GymEnvironment(name)
    env.reset()
    assert env.step("SS").reward == worst
  env = GymEnvironment("Blackjack-v1", text="trinity_jax.tasks.blackjack:text")
  env.reset()
  assert env.step("SS").reward == -1.0


def test_blackjack_and_taxi():
  env = GymEnvironment("Blackjack-v1", seed=3)
  first = env.reset()
  assert first.startswith("Blackjack. Write hit or stick. You have ") and env.reset() == first
  end = env.step("stick")
  assert end.done and end.reward in (-1.0, 0.0, 1.0, 1.5)
  taxi = max(name for name in gymnasium.registry if name.startswith("Taxi-"))
  env = GymEnvironment(taxi, seed=3)
  first = env.reset()
  assert "red: row 0 column 0" in first and "Target: " in first
  assert env.step("south").reward == -1 and env.step("pickup").reward in (-1, -10)
  assert set(TEXTS[taxi].actions) == {"south", "north", "east", "west", "pickup", "dropoff"}
  # The names are gymnasium's numbers: south first.
  env = GymEnvironment(taxi, seed=3)
  env.reset()
  row, *_ = env._env.unwrapped.decode(env._env.unwrapped.s)
  env.step("north")
  assert env._env.unwrapped.decode(env._env.unwrapped.s)[0] == max(row - 1, 0)


def cart(env, observation, first):
  return "left or right?"


CART = Text({"left": 0, "right": 1}, cart, quick=False)


def cart_text():
  return CART


def test_a_text_of_the_users_own(monkeypatch):
  import sys
  import types

  module = types.ModuleType("my_texts")
  module.cart = cart_text
  monkeypatch.setitem(sys.modules, "my_texts", module)
  env = GymEnvironment("CartPole-v1", text="my_texts:cart")
  assert env.reset() == "left or right?" and env.step("left").reward == 1 and not env.quick


def test_what_there_is_not():
  with pytest.raises(UserError, match="'FrozenLake-v2' has no text; did you mean 'FrozenLake-v1'"):
    GymEnvironment("FrozenLake-v2")
  with pytest.raises(UserError, match="environment_args"):
    GymEnvironment("FrozenLake-v1", {"colour": 3})
