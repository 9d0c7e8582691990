"""Tools that an agent calls by name: a calculator, Python in the sandbox, a search of documents.

Whatever an agent does with a tool is answered with text: a wrong name, arguments that are no JSON,
a snippet that ran out of time. What the user of the library did wrong is raised.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from trinity_jax.errors import UserError, suggestion
from trinity_jax.explorer.environments import calculator as calculator_lib
from trinity_jax.explorer.environments import retrieval
from trinity_jax.explorer.environments.sandbox import Limits, Outcome, Sandbox

_SHOWN = 2000  # characters of a tool's answer


@dataclasses.dataclass(frozen=True)
class Tool:
  """A function for agents.

  Attributes:
    name, description: as the chat template shows them.
    parameters: name -> description of each argument; all are text and required.
    call: async (**arguments) -> the answer; a ValueError's text is an answer too.
  """

  name: str
  description: str
  parameters: Mapping[str, str]
  call: Callable[..., Awaitable[str]]

  @property
  def schema(self) -> dict[str, Any]:
    """The tool as OpenAI's API describes it."""
    properties = {k: {"type": "string", "description": v} for k, v in self.parameters.items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {
      "name": self.name, "description": self.description, "parameters": parameters,
    }  # fmt: skip
    return {"type": "function", "function": function}


class Toolbox:
  """Some tools, and how their calls are answered.

  Attributes:
    calls, errors: calls so far, and those that were no call of a tool.
  """

  def __init__(self, tools: Sequence[Tool]):
    self.tools = {tool.name: tool for tool in tools}
    self.calls = self.errors = 0

  @property
  def schemas(self) -> list[dict[str, Any]]:
    return [tool.schema for tool in self.tools.values()]

  async def call(self, name: str, arguments: str) -> str:
    """Answers a call.

    Args:
      name: of the tool, as the agent wrote it.
      arguments: a JSON object's text, as the agent wrote it.

    Raises:
      UserError: the tool cannot work here (a sandbox that the kernel does not allow, say).
    """
    self.calls += 1
    tool = self.tools.get(name)
    try:
      if tool is None:
        raise ValueError(f"no tool {name[:40]!r}; there are {', '.join(self.tools)}")
      given = _read(arguments, tool)
    except (ValueError, RecursionError) as e:
      self.errors += 1
      return f"error: {e}"
    try:
      answer = await tool.call(**given)
    except UserError:
      raise
    except ValueError as e:
      answer = f"error: {e}"
    return answer if len(answer) <= _SHOWN else f"{answer[:_SHOWN]}... ({len(answer)} characters)"


def _read(arguments: str, tool: Tool) -> dict[str, str]:
  given = json.loads(arguments or "{}")
  wanted = ", ".join(tool.parameters)
  if not isinstance(given, dict) or set(given) != set(tool.parameters):
    raise ValueError(f"{tool.name} takes an object with {wanted}")
  return {k: v if isinstance(v, str) else json.dumps(v) for k, v in given.items()}


def calculator() -> Tool:
  """Exact arithmetic; see calculator.calculate."""

  async def call(expression: str) -> str:
    return calculator_lib.calculate(expression)

  return Tool(
    "calculator",
    "Computes an arithmetic expression exactly.",
    {"expression": "for example (3 + 4) * 2^5 / 7"},
    call,
  )


def python(box: Sandbox) -> Tool:
  """Python in a sandbox; nothing is kept between calls."""

  async def call(code: str) -> str:
    return _shown(await box.run(code))

  return Tool(
    "python",
    "Runs a Python program and returns what it prints. Nothing is kept between calls.",
    {"code": "the program"},
    call,
  )


def search(index: retrieval.Index, count: int = 3) -> Tool:
  """The best documents of a corpus."""

  async def call(query: str) -> str:
    hits = index.search(query, count)
    return "\n\n".join(f"[{i}] {index.show(hit)}" for i, hit in enumerate(hits, 1)) or "nothing"

  return Tool("search", "Searches documents.", {"query": "a few words"}, call)


def _shown(outcome: Outcome) -> str:
  if outcome.reason == "ok":
    return outcome.stdout or "(no output)"
  said = outcome.stderr.strip().rpartition("\n")[2] if outcome.reason == "error" else ""
  return f"{outcome.stdout}error: {said or outcome.reason}"


@functools.lru_cache(maxsize=8)
def shared_sandbox(limits: Limits, isolation: str, at_once: int) -> Sandbox:
  """One sandbox for all runs of a process, so that its limit of snippets at once holds for all."""
  return Sandbox(limits, isolation=isolation, at_once=at_once)


def make(name: str, row: Mapping[str, Any]) -> Tool:
  """The built-in tool of that name, as a task's row configures it.

  Args:
    name: calculator, python or search.
    row: may hold "sandbox" (fields of Limits, "isolation", "at_once") and "corpus" (a JSONL file or
      'module:function'; see retrieval.load).

  Raises:
    UserError: no such tool, or its configuration is wrong.
  """
  if name == "calculator":
    return calculator()
  if name == "python":
    options = dict(row.get("sandbox") or {})
    isolation, at_once = options.pop("isolation", "namespaces"), options.pop("at_once", 4)
    try:
      limits = Limits(**options)
    except TypeError as e:
      raise UserError(f"sandbox = {row.get('sandbox')!r}: {e}") from e
    return python(shared_sandbox(limits, isolation, at_once))
  if name == "search":
    if not isinstance(row.get("corpus"), str):
      raise UserError(f"corpus = {row.get('corpus')!r}: the search tool needs a JSONL file's path")
    return search(retrieval.load(row["corpus"]))
  known = ("calculator", "python", "search")
  raise UserError(f"tool {name!r} does not exist{suggestion(name, known)}")
