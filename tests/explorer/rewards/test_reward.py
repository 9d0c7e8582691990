"""Small rewards, and from a config's spec to a score."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest
from growth import assert_linear

from trinity_jax.errors import UserError
from trinity_jax.explorer.rewards import (
  arithmetic_reward,
  combine,
  format_reward,
  grading_counts,
  make_reward,
  resolve,
)


@pytest.mark.parametrize(
  "response, score",
  [
    ("85", 1.0),
    (" 85\n", 1.0),
    ("75", 0.0),
    ("085", 0.0),
    ("+85", 0.0),
    ("85.", 0.0),
    ("85 ", 1.0),
    ("8 5", 0.0),
    ("the answer is 85", 0.0),
    ("85<|end|>", 0.0),
    ("\u0668\u0665", 0.0),
    ("", 0.0),
    ("85" * 10**6, 0.0),
  ],
)
def test_arithmetic_wants_the_integer_and_nothing_else(response, score):
  assert arithmetic_reward(response, "85") == score


def test_arithmetic_truth_must_be_an_integer():
  assert arithmetic_reward("-5", "-5") == 1.0
  with pytest.raises(UserError, match="'#### 85' is not an integer"):
    arithmetic_reward("85", "#### 85")


@pytest.mark.parametrize(
  "response, score",
  [
    ("so 3*4=12\n#### 12", 0.1),
    ("#### -1,200.5", 0.1),
    ("$\\boxed{\\frac{1}{2}}$", 0.1),
    ("it is 12", 0.05),
    ("it is 12.", 0.05),
    ("#### twelve or so 12", 0.1),
    ("#### ", 0.0),
    ("\\boxed{x} 3 y", 0.02),
    ("12 it is", 0.02),
    ("a1b", 0.02),
    ("twelve", 0.0),
    ("", 0.0),
  ],
)
def test_format_levels(response, score):
  assert format_reward(response) == pytest.approx(score)
  assert format_reward(response, scale=1.0) == pytest.approx(10 * score)


def test_format_tells_random_bytes_apart():
  """What an untrained byte-level model writes gets different rewards in most groups of eight."""
  rng = random.Random(0)
  groups = [
    {format_reward(bytes(rng.randrange(256) for _ in range(48)).decode(errors="replace"))
     for _ in range(8)}
    for _ in range(100)
  ]  # fmt: skip
  assert sum(len(g) > 1 for g in groups) > 60


def test_format_is_linear_in_the_text():
  for part in ("\\boxed{", "#### 1\n", "1", "1,", "{", "<answer>"):
    assert_linear(lambda n, part=part: format_reward(part * n), 10_000)


def test_resolve_finds_ours_and_yours():
  assert resolve("arithmetic") is arithmetic_reward
  assert resolve("trinity_jax.explorer.rewards.format:format_reward") is format_reward
  with pytest.raises(UserError, match="'artihmetic' does not exist.*did you mean 'arithmetic'"):
    resolve("artihmetic")
  with pytest.raises(UserError, match="no module 'no_such_thing'"):
    resolve("no_such_thing:reward")
  with pytest.raises(UserError, match="no function 'missing'"):
    resolve("trinity_jax.explorer.rewards.format:missing")


def test_combine_sums_with_weights():
  components = {"accuracy": 1.0, "format": -0.5}
  assert combine(components, {}) == 0.5
  assert combine(components, {"format": 0.1}) == pytest.approx(0.95)
  with pytest.raises(UserError, match="weight 'fromat'.*did you mean 'format'"):
    combine(components, {"fromat": 1.0})


# --- functions that make_reward finds by name -----------------------------------------------------


def dapo(response, truth, task=None, *, penalty=-0.5):
  return {"accuracy": 1.0 if response == truth else -1.0, "format": penalty}


async def judge(response, truth, task=None):
  await asyncio.sleep(0)
  return 0.25


def thread_name(response, truth, task=None):
  return {"main": float(threading.current_thread() is threading.main_thread())}


def broken(response, truth, task=None):
  return {"nan": float("nan"), "none": None, "text": "1.0x"}[response]


def needs_more(response, truth, task, depth):
  return depth


@pytest.fixture(autouse=True)
def importable(monkeypatch):
  import sys

  monkeypatch.setitem(sys.modules, "my_rewards", sys.modules[__name__])


def both_ways(reward, *args):
  direct, awaited = reward(*args), asyncio.run(reward.grade(*args))
  assert direct == awaited
  return direct


def test_one_reward_with_arguments():
  score = both_ways(make_reward("format", {"scale": 1.0}), "#### 3", "3")
  assert score == (1.0, {"format": 1.0})


def test_several_rewards_with_weights():
  score = both_ways(make_reward("math+format"), "#### 3", "3")
  assert score.total == pytest.approx(1.1)
  assert score.components == {"math": 1.0, "format": 0.1}
  args = {"math": 2, "format": {"scale": 1.0, "weight": 0.5}}
  assert both_ways(make_reward("math+format", args), "#### 4", "3").total == 0.5
  assert both_ways(make_reward("math+format", args), "#### 3", "3").total == 2.5


def test_the_number_of_graders_reaches_those_that_grade_in_workers():
  reward = make_reward("math+format", {"format": 2.0}, workers=1)
  assert both_ways(reward, "#### 3", "3").total == pytest.approx(1.2)
  assert grading_counts(workers=1) == {"correct": 2}


def test_components_of_one_function_are_weighted():
  reward = make_reward("my_rewards:dapo", {"penalty": -2.0, "weights": {"format": 0.1}})
  assert both_ways(reward, "a", "a") == (0.8, {"accuracy": 1.0, "format": -2.0})


def test_coroutines_are_awaited_and_plain_functions_leave_the_loop():
  assert asyncio.run(make_reward("my_rewards:judge").grade("", "")).components == {"judge": 0.25}
  with pytest.raises(UserError, match="coroutine function"):
    make_reward("my_rewards:judge")("", "")
  assert asyncio.run(make_reward("my_rewards:thread_name").grade("", "")).total == 0.0


@pytest.mark.parametrize("response", ["nan", "none", "text"])
def test_a_reward_that_is_no_number_is_named(response):
  with pytest.raises(UserError, match="'broken' returned broken = .*expected a finite number"):
    make_reward("my_rewards:broken")(response, "")


@pytest.mark.parametrize(
  "spec, args, message",
  [
    ("maht", {}, "did you mean 'math'"),
    ("math+", {}, "reward '' does not exist"),
    ("format", {"scael": 1.0}, "scael.*check reward_args"),
    ("math+format", {"fromat": 1.0}, "no such part.*did you mean 'format'"),
    ("math+format", {"format": "much"}, "weight = 'much'; expected a finite number"),
    ("math+format", {"weights": 3}, "weights = 3"),
    ("math+math", {}, "names a function twice"),
    ("my_rewards:needs_more", {}, "missing a required argument: 'depth'"),
  ],
)
def test_bad_specs_say_what_is_wrong(spec, args, message):
  with pytest.raises(UserError, match=message):
    make_reward(spec, args)


def test_two_functions_with_the_same_component_clash():
  reward = make_reward("format+my_rewards:dapo")
  with pytest.raises(UserError, match="two functions return a component 'format'"):
    reward("", "")
