"""An agent that knows nothing but the official openai package, and the workflow that trains it.

`ask` is how people write agents: a client, tools, a stream, a loop. It would run against any
server; the workflow gives it a client of its run, so that every call becomes a turn of the run.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from trinity_jax.experience import Task
from trinity_jax.tasks.tool_sums import TOOLS, value

if TYPE_CHECKING:
  from openai import AsyncOpenAI

  from trinity_jax.explorer.workflow import Model

MAX_TURNS = 3


async def calculator_agent(task: Task, model: Model) -> dict[str, float]:
  """1 where the agent's answer to the task's prompt is the task's truth.

  Raises:
    UserError: the package openai is missing.
  """
  async with model.openai(max_retries=0) as client:
    answer = await ask(client, task.messages[-1]["content"])
  return {"accuracy": float(answer.strip() == task.truth)}


async def ask(client: AsyncOpenAI, question: str) -> str:
  """Answers a question with the help of a calculator; every reply is streamed."""
  tools: Any = TOOLS
  messages: list[Any] = [{"role": "user", "content": question}]
  text = ""
  for _ in range(MAX_TURNS):
    text, calls = "", []
    stream = await client.chat.completions.create(
      model="policy", messages=messages, tools=tools, stream=True
    )  # fmt: skip
    async for chunk in stream:
      delta = chunk.choices[0].delta
      text += delta.content or ""
      calls += [c.model_dump(exclude={"index"}) for c in delta.tool_calls or ()]
    if not calls:
      break
    messages.append({"role": "assistant", "content": text, "tool_calls": calls})
    for call in calls:
      found = calculate(call["function"]["arguments"])
      messages.append({"role": "tool", "tool_call_id": call["id"], "content": found})
  return text


def calculate(arguments: str) -> str:
  """The tool: {"x": "8-3"} -> "5"."""
  found = value(str(json.loads(arguments).get("x", "")))
  return "error" if found is None else str(found)
