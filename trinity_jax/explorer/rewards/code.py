"""Does the program in a response pass its tests? Run in the sandbox (environments/sandbox.py).

The forms a truth may have:

- {"inputs": [text], "outputs": [text]}: programs that read stdin and print (as in APPS and
  CodeContests); compared by lines, blanks at their ends aside.
- {"fn_name": "f", "inputs": [[arguments]], "outputs": [value]}: a function, or a method of a class
  Solution; results are compared as JSON values, numbers to a relative 1e-6.
- Python text with asserts (as in MBPP), run after the response's code. Where they stand in a
  function (HumanEval's `check`) the text must call it, too.

In the first two forms the expected values stay outside the sandbox. Asserts run in the same process
as the answer, so that an answer that attacks its own interpreter can pass them: prefer the others.
"""

from __future__ import annotations

import ast
import functools
import json
import math
import re
import secrets
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from trinity_jax.errors import UserError
from trinity_jax.explorer.environments.sandbox import Limits, Outcome, Sandbox

if TYPE_CHECKING:
  from trinity_jax.experience import Task

# (tag of a block, tag of one that begins within a line, its text). Blocks of other languages are
# found, too, or what ends them would begin one.
_FENCE = re.compile(
  r"(?:^[ \t]*```([^\n`]*)|```(python3?|py)[ \t]*|(?<!\S)```[ \t]*)\n(.*?)```",
  re.DOTALL | re.IGNORECASE | re.MULTILINE,
)
_PYTHON = ("", "python", "python3", "py")
_TOLERANCE = 1e-6

# The programs below are texts that run inside the sandbox only: its exec of the answer is what the
# sandbox is for, and whatever the answer raises is a case that failed.

# Runs answer.py, then calls its function for each case; results go where its prints do not.
_CALLER = """
import json, os, sys
out = os.dup(1)
os.dup2(2, 1)
request = json.loads(sys.stdin.read())
space = {"__name__": "answer"}
with open("answer.py") as file:
  exec(compile(file.read(), "answer.py", "exec"), space)
name = request["name"]
function = space[name] if name in space else getattr(space["Solution"](), name)
results = []
for arguments in request["cases"]:
  try:
    results.append([True, json.loads(json.dumps(function(*arguments)))])
  except Exception:  # an answer that raises has failed this case
    results.append([False, None])
data = json.dumps(results).encode()
while data:
  data = data[os.write(out, data):]
os._exit(0)
"""

# Runs answer.py and its tests in one space, and says that it came to the end.
_ASSERTER = """
import sys
mark = sys.stdin.readline()
space = {"__name__": "answer"}
for name in ("answer.py", "tests.py"):
  with open(name) as file:
    exec(compile(file.read(), name, "exec"), space)
sys.__stdout__.write("\\n" + mark)
"""


class _Run(NamedTuple):
  """One use of the sandbox: what it runs, and which tests pass given how it ended."""

  code: str
  stdin: str
  files: dict[str, str]
  passed: Callable[[Outcome], list[bool]]
  output_kb: int = 0  # what the expected output needs


def code_reward(
  response: str,
  truth: str,
  task: Task | None = None,
  *,
  partial: bool = False,
  cpu_seconds: float = 5.0,
  wall_seconds: float = 30.0,
  memory_mb: int = 512,
  isolation: str = "namespaces",
  workers: int = 2,
) -> float:
  """Returns 1.0 when the program of the response passes all tests, else 0.0.

  The program is the last fenced block of the response (tagged as Python or not at all), or all of
  it where there is none. It may write twice what the tests expect, and 64 KiB at least.

  Args:
    response: what the model wrote.
    truth: the tests; see the module's text.
    task: not used.
    partial: return the share of the tests that pass instead.
    cpu_seconds, wall_seconds, memory_mb: limits of each run of the program.
    isolation: of the sandbox; see there.
    workers: programs at a time.

  Raises:
    UserError: the truth holds no tests, or the sandbox's isolation is not allowed here.
  """
  box = _sandbox(cpu_seconds, wall_seconds, memory_mb, isolation, workers)
  passed: list[bool] = []
  for run in _runs(response, truth):
    outcome = box.run_blocking(
      run.code, stdin=run.stdin, files=run.files, output_kb=run.output_kb
    )
    passed += run.passed(outcome)
    if not partial and not all(passed):
      return 0.0
  return sum(passed) / len(passed)


async def code_reward_async(
  response: str,
  truth: str,
  task: Task | None = None,
  *,
  partial: bool = False,
  cpu_seconds: float = 5.0,
  wall_seconds: float = 30.0,
  memory_mb: int = 512,
  isolation: str = "namespaces",
  workers: int = 2,
) -> float:
  """`code_reward` for coroutines: the event loop goes on meanwhile, and cancelling kills."""
  box = _sandbox(cpu_seconds, wall_seconds, memory_mb, isolation, workers)
  passed: list[bool] = []
  for run in _runs(response, truth):
    outcome = await box.run(run.code, stdin=run.stdin, files=run.files, output_kb=run.output_kb)
    passed += run.passed(outcome)
    if not partial and not all(passed):
      return 0.0
  return sum(passed) / len(passed)


def program(response: str) -> str:
  """The last fenced block of a response that may be Python, or all of it."""
  response = response.replace("\r\n", "\n")
  blocks = [
    text
    for tag, tag_within, text in _FENCE.findall(response)
    if (tag or tag_within).strip().lower() in _PYTHON
  ]
  return blocks[-1] if blocks else response


@functools.lru_cache(maxsize=8)
def _sandbox(cpu: float, wall: float, memory: int, isolation: str, workers: int) -> Sandbox:
  limits = Limits(cpu_seconds=cpu, wall_seconds=wall, memory_mb=memory)
  return Sandbox(limits, isolation=isolation, at_once=workers)


def _runs(response: str, truth: str) -> Iterator[_Run]:
  answer, tests = program(response), _tests(truth)
  if isinstance(tests, str):
    mark = secrets.token_hex(16)
    yield _Run(
      _ASSERTER, mark + "\n", {"answer.py": answer, "tests.py": tests},
      lambda outcome: [outcome.reason == "ok" and outcome.stdout.rstrip().endswith(mark)],
    )  # fmt: skip
  elif name := tests.get("fn_name"):
    request = json.dumps({"name": name, "cases": tests["inputs"]})
    yield _Run(
      _CALLER, request, {"answer.py": answer},
      lambda outcome: _results(outcome, tests["outputs"]), _kib(json.dumps(tests["outputs"])),
    )  # fmt: skip
  else:
    for given, wanted in zip(tests["inputs"], tests["outputs"]):
      yield _Run(
        answer, given, {},
        lambda outcome, wanted=wanted: [
          outcome.reason == "ok" and _lines(outcome.stdout) == _lines(wanted)
        ],
        _kib(wanted),
      )  # fmt: skip


def _kib(wanted: str) -> int:
  """Room for twice the expected output: what else is printed counts, too."""
  return 2 * len(wanted.encode()) // 1024 + 1


def _results(outcome: Outcome, wanted: list[Any]) -> list[bool]:
  try:
    found = json.loads(outcome.stdout) if outcome.reason == "ok" else []
  except (ValueError, RecursionError):
    found = []
  if not isinstance(found, list) or len(found) != len(wanted):
    return [False] * len(wanted)
  return [
    isinstance(f, list) and len(f) == 2 and f[0] is True and _equal(f[1], w)
    for f, w in zip(found, wanted)
  ]


def _equal(found: Any, wanted: Any) -> bool:
  """Equal JSON values; true and false are no numbers."""
  if isinstance(wanted, list):
    same = isinstance(found, list) and len(found) == len(wanted)
    return same and all(map(_equal, found, wanted))
  if isinstance(wanted, dict):
    same = isinstance(found, dict) and found.keys() == wanted.keys()
    return same and all(_equal(found[k], w) for k, w in wanted.items())
  if isinstance(found, bool) or isinstance(wanted, bool):
    return found is wanted
  if isinstance(wanted, float) or isinstance(found, float):
    numbers = isinstance(found, (int, float)) and isinstance(wanted, (int, float))
    return numbers and math.isclose(found, wanted, rel_tol=_TOLERANCE, abs_tol=1e-9)
  return found == wanted


def _lines(text: str) -> list[str]:
  return [line.rstrip() for line in text.strip().splitlines()]


def _tests(truth: str) -> dict[str, Any] | str:
  """Reads a truth: an object with inputs and outputs, or text with asserts."""
  try:
    tests = json.loads(truth)
  except ValueError:
    tests = truth
  if isinstance(tests, str) and "assert" in tests:
    _check_acts(tests)
    return tests
  if isinstance(tests, dict):
    inputs, outputs, name = (tests.get(k) for k in ("inputs", "outputs", "fn_name"))
    if isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs) > 0:
      kind = list if name else str
      texts = name or all(isinstance(x, str) for x in outputs)
      if texts and all(isinstance(x, kind) for x in inputs):
        return tests
  raise UserError(
    f"code reward: truth {truth[:80]!r} holds no tests; expected JSON with equally many "
    '"inputs" and "outputs" (texts, or with "fn_name" lists of arguments and values), or Python '
    "text with asserts (taskset.truth_key names the field it is read from)"
  )


def _check_acts(tests: str) -> None:
  """Refuses tests that only define: every program would pass them.

  Raises:
    UserError: they assert and call nothing where they stand, or are not Python.
  """
  try:
    lines = ast.parse(tests).body
  except (SyntaxError, ValueError) as e:  # the latter: null bytes
    raise UserError(f"code reward: the tests {tests[:80]!r} are not Python: {e}") from e
  defining = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
  nodes = (n for line in lines if not isinstance(line, defining) for n in ast.walk(line))
  if not any(isinstance(n, (ast.Assert, ast.Call)) for n in nodes):
    raise UserError(
      f"code reward: the tests {tests[:80]!r} define and call nothing, so that every program would "
      "pass; append the call, as in 'check(name_of_the_function)'"
    )
