"""Boxed, accuracy and DAPO's overlong penalty; rewards of whole groups."""

from __future__ import annotations

import asyncio
import sys
import threading

import pytest

from trinity_jax.errors import UserError
from trinity_jax.explorer.rewards import make_reward, overlong_penalty, response_tokens
from trinity_jax.models.tokenizer import write_byte_tokenizer


def both_ways(spec, args, *texts):
  reward = make_reward(spec, args)
  direct, awaited = reward(*texts), asyncio.run(reward.grade(*texts))
  assert direct == awaited
  return direct


@pytest.mark.parametrize(
  "response, accuracy, form",
  [("so \\boxed{72}", 1.0, 0.1), ("\\boxed{71}", 0.0, 0.1), ("#### 72", 0.0, -0.1),
   ("\\boxed{71} #### 72", 0.0, 0.1), ("72", 0.0, -0.1), ("", 0.0, -0.1)],
)  # fmt: skip
def test_boxed(response, accuracy, form):
  score = both_ways("boxed", {}, response, "#### 72")
  assert score.components == {"accuracy": accuracy, "format": form}


def test_accuracy_is_the_math_reward_by_another_name():
  assert both_ways("accuracy", {}, "#### 72", "72") == (1.0, {"accuracy": 1.0})


def test_overlong_penalty_is_the_papers():
  """Equation 13 with L_max = 100, L_cache = 20."""
  lengths = (0, 80, 85, 90, 100, 101, 10**9)
  assert [overlong_penalty(n, 100, 20) for n in lengths] == [0, 0, -0.25, -0.5, -1, -1, -1]
  assert overlong_penalty(10, 10, 10) == -1 and overlong_penalty(0, 10, 10) == 0
  for cache in (0, 101, -1):
    with pytest.raises(UserError, match="0 < cache_length <= max_length"):
      overlong_penalty(5, 100, cache)


def test_dapo_takes_the_number_of_tokens_from_the_caller():
  args = {"max_length": 100, "cache_length": 20, "penalty": 0.5}
  with response_tokens(90):
    assert both_ways("dapo", args, "72", "72") == (0.75, {"accuracy": 1.0, "overlong": -0.25})
    with response_tokens(10):
      assert both_ways("dapo", args, "7", "72") == (-1.0, {"accuracy": -1.0, "overlong": 0.0})
  with pytest.raises(UserError, match="set reward_args.tokenizer"):
    make_reward("dapo", args)("72", "72")


def test_dapo_counts_them_else(tmp_path):
  write_byte_tokenizer(tmp_path, vocab_size=320, max_length=4096)
  args = {"max_length": 4, "cache_length": 2, "tokenizer": str(tmp_path)}
  assert both_ways("dapo", args, "072", "72").components == {"accuracy": 1.0, "overlong": -0.5}
  args["tokenizer"] = str(tmp_path / "missing")
  with pytest.raises(UserError, match="has no tokenizer.json"):
    make_reward("dapo", args)("72", "72")


# --- rewards of groups ----------------------------------------------------------------------------


def batch(responses, truth, task=None):
  assert threading.current_thread() is not threading.main_thread()
  return [{"rank": float(sorted(responses).index(r))} for r in responses]


batch.judges_group = True


async def short(responses, truth, task=None):
  return [0.0]


short.judges_group = True


async def fails(response, truth, task=None):
  if response == "bad":
    raise ZeroDivisionError(response)
  await asyncio.Event().wait()  # until it is cancelled


@pytest.fixture(autouse=True)
def importable(monkeypatch):
  monkeypatch.setitem(sys.modules, "group_rewards", sys.modules[__name__])


def of_group(spec, responses, args=None):
  return asyncio.run(make_reward(spec, args).grade_group(responses, "72"))


def test_a_batch_function_of_a_user_sees_the_group():
  found = of_group("group_rewards:batch+math", ["b", "72", "a"])
  assert [s.components for s in found] == [
    {"rank": 2.0, "math": 0.0}, {"rank": 0.0, "math": 1.0}, {"rank": 1.0, "math": 0.0}
  ]  # fmt: skip


def test_every_reward_grades_groups():
  assert [s.total for s in of_group("format", ["#### 1", "", "1"])] == [0.1, 0.0, 0.05]
  assert not make_reward("format").needs_group and make_reward("group_rewards:batch").needs_group


def test_a_value_for_each_response():
  with pytest.raises(UserError, match="'short' returned 1 values for 2 responses"):
    of_group("group_rewards:short", ["a", "b"])


def test_one_that_fails_ends_the_others():
  with pytest.raises(ZeroDivisionError, match="bad"):
    of_group("group_rewards:fails", ["a", "bad", "b"])
