"""Tools between a question and its answer, with scripted replies and with a real sampler."""

from __future__ import annotations

import asyncio
import json

import pytest

from trinity_jax.errors import UserError
from trinity_jax.experience import Task
from trinity_jax.explorer.workflows import find_workflow


class Scripted:
  """A model handle whose replies are given: text, calls, or a call that cannot be read."""

  def __init__(self, *replies):
    self.replies, self.messages, self.tool_errors, self.asked = list(replies), [], [], []
    self.message = {}

  async def chat(self, messages, tools=None):
    self.asked.append([dict(m) for m in messages])
    self.tools = tools
    reply = self.replies.pop(0)
    self.message = {"role": "assistant", "content": reply if isinstance(reply, str) else ""}
    if reply == "broken":
      self.tool_errors.append("JSONDecodeError: x")
    if isinstance(reply, list):
      self.message["tool_calls"] = [
        {"id": f"call{i}", "type": "function", "function": {"name": n, "arguments": json.dumps(a)}}
        for i, (n, a) in enumerate(reply)
      ]
    self.messages = [*messages, self.message]
    return self.message["content"]


def run(*replies, **row):
  model = Scripted(*replies)
  task = Task(3, ({"role": "user", "content": "6*7?"},), raw={"tools": ["calculator"], **row})
  assert asyncio.run(find_workflow("tool_use")(task, model)) is None
  return model


def call(expression):
  return ("calculator", {"expression": expression})


def test_answers_come_back_in_order():
  model = run([call("6*7"), call("1/0")], "it is 42")
  assert [t["function"]["name"] for t in model.tools] == ["calculator"]
  assert model.asked[1][2:] == [
    {"role": "tool", "tool_call_id": "call0", "name": "calculator", "content": "42"},
    {"role": "tool", "tool_call_id": "call1", "name": "calculator",
     "content": "error: division by zero"},
  ]  # fmt: skip


def test_the_last_turn_is_the_last():
  model = run([call("1")], [call("2")], "never asked", max_turns=2)
  assert model.replies == ["never asked"]
  assert run("at once", "no more").replies == ["no more"]


def test_a_call_that_cannot_be_read_is_told_so():
  model = run("broken", "42")
  assert model.asked[1][-1] == {"role": "user", "content": "no tool call: JSONDecodeError: x"}


@pytest.mark.parametrize("row", [{"tools": "calculator"}, {"tools": []}, {"max_turns": 0}])
def test_rows_that_are_wrong(row):
  with pytest.raises(UserError, match="train row 3: "):
    run("x", **row)


def test_with_a_real_model(world):
  """A random model calls nothing, so its first reply is graded as in any dialogue."""
  import dataclasses

  # The schema and the question, in bytes, are longer than the tiny sampler's prompts.
  tasks = [dataclasses.replace(world.task(0), raw={"tools": ["calculator"]})]
  with world.sampler() as sampler:
    (got,) = world.run(sampler, find_workflow("tool_use"), tasks)
  e = got[0] if isinstance(got, list) else got
  assert e.stop_reason.name == "PROMPT_TOO_LONG" and "max_prompt_length" in e.info["error"]
