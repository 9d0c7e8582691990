"""Programs graded by their tests, in the sandbox."""

from __future__ import annotations

import asyncio
import json

import pytest
from growth import assert_linear

from trinity_jax.errors import UserError
from trinity_jax.explorer.environments import sandbox
from trinity_jax.explorer.rewards import code_reward, make_reward
from trinity_jax.explorer.rewards.code import program

if why := sandbox.available():
  pytest.skip(why, allow_module_level=True)

STDIN = json.dumps({"inputs": ["1 2\n", "5 6\n"], "outputs": ["3\n", "11"]})
CALLS = json.dumps({"fn_name": "add", "inputs": [[1, 2], [0.1, 0.2]], "outputs": [3, 0.3]})
ASSERTS = "assert add(1, 2) == 3\nassert add(2, 2) == 4\n"
RIGHT = "Here:\n```python\ndef add(a, b):\n  print('noise')\n  return a + b\n```\nDone."


def test_programs_that_read_and_print():
  good = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
  assert code_reward(good, STDIN) == 1.0
  assert code_reward("print(3)", STDIN) == 0.0
  assert code_reward("print(3)", STDIN, partial=True) == 0.5
  assert code_reward("print(", STDIN) == 0.0
  assert code_reward("while True: pass", STDIN, wall_seconds=0.5) == 0.0


def test_functions():
  assert code_reward(RIGHT, CALLS) == 1.0
  assert code_reward("class Solution:\n  def add(self, a, b): return a + b", CALLS) == 1.0
  assert code_reward("def add(a, b): return 3", CALLS, partial=True) == 0.5
  assert code_reward("def sub(a, b): return a - b", CALLS) == 0.0
  assert code_reward("def add(a, b): return {1, 2}", CALLS) == 0.0
  # What an answer prints or where it exits does not count.
  assert code_reward("print('[[true, 3], [true, 0.3]]')\nimport os\nos._exit(0)", CALLS) == 0.0
  truth = json.dumps({"fn_name": "f", "inputs": [[]], "outputs": [[1, {"a": True}]]})
  assert code_reward("def f(): return (1, {'a': True})", truth) == 1.0
  assert code_reward("def f(): return (True, {'a': 1})", truth) == 0.0


def test_asserts():
  assert code_reward(RIGHT, ASSERTS) == 1.0
  assert code_reward("def add(a, b): return 3", ASSERTS) == 0.0
  assert code_reward("import os\nos._exit(0)", ASSERTS) == 0.0
  assert code_reward("import sys\nsys.exit(0)", ASSERTS) == 0.0


@pytest.mark.parametrize(
  "tests", ["def check(f):\n  assert f(1, 2) == 3\n",  # HumanEval's
            "METADATA = {}\n\nimport math\n\nclass T:\n  def test(self):\n    assert math.pi\n"],
)  # fmt: skip
def test_asserts_that_nobody_calls_are_refused(tests):
  """Every program passed them."""
  with pytest.raises(UserError, match="call nothing, so that every program would pass"):
    code_reward(RIGHT, tests)


def test_asserts_in_a_function_that_is_called():
  tests = "def check(f):\n  assert f(1, 2) == 3\n\ncheck(add)\n"
  assert code_reward(RIGHT, tests) == 1.0
  assert code_reward("def add(a, b): return 4", tests) == 0.0


def test_tests_that_are_not_python():
  with pytest.raises(UserError, match="are not Python: .* line 1"):
    code_reward(RIGHT, "assert add(1, 2 == 3")
  with pytest.raises(UserError, match="are not Python: .* null bytes"):
    code_reward(RIGHT, "assert add(1, 2) == 3\0")


def test_the_last_block_counts():
  assert program("```python\na\n```\n```\nb\n```") == "b\n"
  assert program("no fence") == "no fence"
  assert program("Say ```x``` and ```y```\n```py\na\n```") == "a\n"
  assert program("Answer:```Python\na\n```") == program("Answer: ```\na\n```") == "a\n"


@pytest.mark.parametrize("tag", ["bash", "cpp", "c++", "json", "text", "sh -x"])
def test_blocks_of_other_languages_are_passed_over(tag):
  other = f"First:\n```{tag}\nx\n```\nThen:\n"
  assert program(f"{other}```python\na\n```\nDone.") == "a\n"
  assert program(f"```python\na\n```\nIt prints\n{other}") == "a\n"
  assert program(f"{other}```\na\n```".replace("\n", "\r\n")) == "a\n"


def test_blocks_are_found_in_linear_time():
  for part in ("```", "```\n", "```x\n", " ", "\n", "`", "```python\n"):
    assert_linear(lambda n, part=part: program(part * n), 10_000)


def test_more_output_than_the_sandbox_allows_by_default():
  """Tests whose expected output was above 64 KiB could not be passed."""
  numbers = list(range(20_000))
  truth = json.dumps({"inputs": ["20000"], "outputs": ["\n".join(map(str, numbers))]})
  assert code_reward("for i in range(int(input())): print(i)", truth) == 1.0
  assert code_reward("while True: print('x' * 1000)", truth) == 0.0
  truth = json.dumps({"fn_name": "f", "inputs": [[20_000]], "outputs": [numbers]})
  assert code_reward("def f(n): return list(range(n))", truth) == 1.0


def test_as_a_reward_of_a_config():
  reward = make_reward("code", {"cpu_seconds": 2}, workers=2)
  assert reward(RIGHT, CALLS).total == 1.0

  async def many():
    return await asyncio.gather(*(reward.grade(r, CALLS) for r in (RIGHT, "x", RIGHT)))

  assert [s.total for s in asyncio.run(many())] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
  "truth", ["", "42", "[]", '{"inputs": [], "outputs": []}', '{"inputs": ["a"], "outputs": []}',
            '{"inputs": [1], "outputs": ["a"]}'],
)  # fmt: skip
def test_truths_without_tests(truth):
  with pytest.raises(UserError, match="holds no tests"):
    code_reward(RIGHT, truth)
