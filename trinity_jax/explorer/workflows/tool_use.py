"""A dialogue in which the agent may call tools before it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trinity_jax.errors import UserError
from trinity_jax.experience import Task
from trinity_jax.explorer.environments import tools as tools_lib
from trinity_jax.explorer.workflow import Model

MAX_TURNS = 8


async def tool_use(task: Task, model: Model) -> None:
  """Answers tool calls until a reply has none; that reply is graded by the taskset's reward.

  The row may hold "tools" (names of built-in ones; default calculator and python), "max_turns"
  (replies, default 8), "sandbox" and "corpus" (see `tools.make`). After the last turn the last
  reply is graded, whatever it is. A call that cannot be read is told so, and the dialogue goes on.

  Raises:
    UserError: the row asks for a tool that there is not.
  """
  row = task.raw
  names, turns = row.get("tools", ["calculator", "python"]), row.get("max_turns", MAX_TURNS)
  if not isinstance(names, Sequence) or isinstance(names, str) or not names:
    raise UserError(f"{task.taskset} row {task.index}: tools = {names!r}: expected a list of names")
  if not isinstance(turns, int) or turns < 1:
    raise UserError(f"{task.taskset} row {task.index}: max_turns = {turns!r}: expected 1 or more")
  toolbox = tools_lib.Toolbox([tools_lib.make(name, row) for name in names])
  messages: list[dict[str, Any]] = [dict(m) for m in task.messages]
  for turn in range(1, turns + 1):
    misread = len(model.tool_errors)
    await model.chat(messages, toolbox.schemas)
    if turn == turns:
      return
    answers = await _answers(toolbox, model.message)
    if len(model.tool_errors) > misread:
      answers = [{"role": "user", "content": f"no tool call: {model.tool_errors[-1]}"}]
    if not answers:
      return
    messages = [*model.messages, *answers]


async def _answers(toolbox: tools_lib.Toolbox, message: dict[str, Any]) -> list[dict[str, Any]]:
  """The tools' messages, in the order of the calls."""
  out = []
  for call in message.get("tool_calls") or ():
    function = call["function"]
    content = await toolbox.call(function["name"], function["arguments"])
    out.append(
      {"role": "tool", "tool_call_id": call["id"], "name": function["name"], "content": content}
    )
  return out
