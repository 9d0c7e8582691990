"""Tools answer whatever an agent does with them."""

from __future__ import annotations

import asyncio
import json
import math

import pytest

from trinity_jax.errors import UserError
from trinity_jax.explorer.environments import retrieval, sandbox, tools
from trinity_jax.explorer.environments.calculator import calculate


@pytest.mark.parametrize(
  ("expression", "value"),
  [
    ("1 + 2 * 3", "7"), ("(1 + 2) * 3", "9"), ("-2^2", "-4"), ("2^-1", "0.5"), ("2**3**2", "512"),
    ("7 // 2", "3"), ("-7 % 3", "2"), ("1/3", "0.333333333333"), ("0.1 + 0.2", "0.3"),
    ("1,234,567 + 1", "1234568"), ("sqrt(144)", "12"), ("sqrt(2)", "1.41421356237"),
    ("2 - -3", "5"),
    ("3 \u00d7 4 \u00f7 6 \u2212 1", "1"), ("abs(-5) * 2", "10"), ("1^99999999999", "1"),
    ("(-1)^99999999999", "-1"), ("0^5", "0"), ("4^0.5", "2"), (".5 * 4", "2"),
    ("2^0.1 - 2^0.1", "0"),
    ("10^20", "1" + "0" * 20), ("3-2-1", "0"), ("100/10/5", "2"),
  ],
)  # fmt: skip
def test_calculator(expression, value):
  assert calculate(expression) == value


@pytest.mark.parametrize(
  "expression",
  ["", "1 +", "1 2", "__import__('os')", "1/0", "1 % 0", "0^-1", "9^9^9", "2^5000", "(" * 500,
   "sqrt(-1)", "sqrt 4", "-" * 999, "1" * 2000, "x", "sqrt", "9" * 999 + "^9",
   "2^(1/99999999999)^-1",   "(-8)^(1/3)",
   "10^300 ^ 1.5", "1e5"],
)  # fmt: skip
def test_calculator_refuses(expression):
  with pytest.raises(ValueError):
    calculate(expression)


def box() -> tools.Toolbox:
  return tools.Toolbox([tools.make("calculator", {})])


@pytest.mark.parametrize(
  ("name", "arguments", "answer"),
  [
    ("calculator", '{"expression": "6*7"}', "42"),
    ("calculator", '{"expression": 42}', "42"),
    ("calculator", '{"expression": "1/0"}', "error: division by zero"),
    ("calculator", "{", "error: Expecting"),
    ("calculator", "[]", "error: calculator takes an object with expression"),
    ("calculator", '{"formula": "1"}', "error: calculator takes an object with expression"),
    ("calculator", "[" * 100000, "error: "),
    ("shell", "{}", "error: no tool 'shell'; there are calculator"),
  ],
)
def test_calls_are_answered(name, arguments, answer):
  assert asyncio.run(box().call(name, arguments)).startswith(answer)


def test_schemas_are_openais():
  (schema,) = box().schemas
  function = schema["function"]
  assert schema["type"] == "function" and function["name"] == "calculator"
  assert function["parameters"]["required"] == ["expression"]
  json.dumps(schema)


def test_python():
  if why := sandbox.available():
    pytest.skip(why)
  row = {"sandbox": {"wall_seconds": 20, "output_kb": 8}}
  kit = tools.Toolbox([tools.make("python", row)])

  def call(code):
    return asyncio.run(kit.call("python", json.dumps({"code": code})))

  assert call("print(6 * 7)") == "42\n"
  assert call("pass") == "(no output)"
  assert call("print(1); 1 / 0") == "1\nerror: ZeroDivisionError: division by zero"
  assert tools._shown(sandbox.Outcome("cpu", stdout="1\n")) == "1\nerror: cpu"
  assert call("print('x' * 3000)").endswith("... (3001 characters)")


def test_search_finds_what_bm25_finds(tmp_path):
  documents = [
    {"title": "Cats", "text": "the cat sat on the mat"},
    {"title": "Dogs", "text": "the dog chased the cat and the other cat"},
    {"text": "fish swim"},
  ]
  path = tmp_path / "corpus.jsonl"
  path.write_text("\n".join(map(json.dumps, documents)))
  index = retrieval.load(str(path))
  assert [h.document for h in index.search("CAT")] == [1, 0]
  assert index.search("whale") == [] and index.search("") == []
  assert index.show(index.search("fish")[0]) == "fish swim"
  # By hand: N = 3, the word in 2 documents, 2 of 10 words of the second, mean length 19 / 3.
  idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
  want = idf * 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 10 / (19 / 3)))
  assert math.isclose(index.search("cat")[0].score, want, rel_tol=1e-12)
  kit = tools.Toolbox([tools.make("search", {"corpus": str(path)})])
  answer = asyncio.run(kit.call("search", '{"query": "cat"}'))
  assert answer.startswith("[1] Dogs: the dog") and "[2] Cats: " in answer
  assert asyncio.run(kit.call("search", '{"query": "whale"}')) == "nothing"


def test_rows_that_are_wrong(tmp_path):
  with pytest.raises(UserError, match="tool 'calculater' does not exist; did you mean"):
    tools.make("calculater", {})
  with pytest.raises(UserError, match="corpus = None"):
    tools.make("search", {})
  with pytest.raises(UserError, match="sandbox = "):
    tools.make("python", {"sandbox": {"cpus": 3}})
  path = tmp_path / "bad.jsonl"
  path.write_text('{"title": "x"}')
  with pytest.raises(UserError, match="bad.jsonl:1: text = None"):
    retrieval.load(str(path))
  with pytest.raises(UserError, match="no documents"):
    retrieval.Index([])
