"""What the agents' recipes are made of: rows, demonstrations that look as the agent's turns do."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from trinity_jax.errors import UserError
from trinity_jax.experience import Task
from trinity_jax.explorer.environments import retrieval, sql, tools
from trinity_jax.explorer.environments import sudoku as sudoku_board
from trinity_jax.explorer.environments.gym import GymEnvironment
from trinity_jax.explorer.tool_calls import parse
from trinity_jax.explorer.workflows import find_workflow
from trinity_jax.models.tokenizer import Tokenizer, write_byte_tokenizer
from trinity_jax.tasks import blackjack, facts, products, queries, sudoku, walk

TRUTHS = {f"{d['title']}?": d["text"] for d in facts.corpus()} | {
  f"{a}*{b}": str(a * b) for a in range(10, 100) for b in range(10, 100)
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
  folder = tmp_path_factory.mktemp("tokenizer")
  write_byte_tokenizer(folder, vocab_size=320, max_length=1024)
  return Tokenizer.load(folder)


class Demonstrator:
  """A model handle that replies as the demonstrations do, and checks what it is shown."""

  def __init__(self, tokenizer, demonstrations):
    self.t, self.left, self.tool_errors = tokenizer, list(demonstrations), []
    self.total = 0.0

  def reward(self, value):
    self.total += value

  async def chat(self, messages, tools=None):
    shown = self.t.chat_text(list(messages), add_generation_prompt=True, tools=list(tools or ()))
    row = self.left.pop(0)
    assert shown == self.t.chat_text(row["messages"], add_generation_prompt=True)
    parsed = parse(row["response"], tools or ())
    assert not parsed.error
    self.message = {"role": "assistant", "content": row["response"]}  # as the log has it
    if parsed.calls:
      self.message["tool_calls"] = [
        {"id": str(i), "type": "function", "function": {"name": n, "arguments": a}}
        for i, (n, a) in enumerate(parsed.calls)
      ]
    self.messages = [*messages, self.message]
    return row["response"]


def episodes(rows):
  """The rows of `sft` by dialogue: one begins where a row has no reply yet."""
  out = []
  for row in rows:
    if not any(m["role"] == "assistant" for m in row["messages"]):
      out.append([])
    out[-1].append(row)
  return out[:-1]  # the last one may be cut


@pytest.mark.parametrize(
  ("generate", "more"),
  [(facts.generate, {}), (products.generate, {}), (products.generate, {"tool": "python"})],
)
def test_demonstrated_calls_are_the_workflows(tokenizer, generate, more, monkeypatch):
  """Turn by turn the workflow shows what the demonstration was shown, and the answer is right."""
  asked = []

  async def calculates(self, name, arguments):  # as the sandbox would, without one
    asked.append(name)
    if name != "python":
      return await call(self, name, arguments)
    expression = json.loads(arguments)["code"].removeprefix("print(").removesuffix(")")
    return tools.calculator_lib.calculate(expression) + "\n"

  call = tools.Toolbox.call
  monkeypatch.setattr(tools.Toolbox, "call", calculates)
  rows = generate("sft", rows=40, guess_fraction=0.0, **more)
  row = generate("eval", **more)[0]
  for episode in episodes(rows)[:5]:
    prompt = episode[0]["messages"][-1]["content"]
    assert episode[-1]["response"] == TRUTHS[prompt]
    task = Task(0, ({"role": "user", "content": prompt},), "x", raw=row)
    model = Demonstrator(tokenizer, episode)
    assert asyncio.run(find_workflow("tool_use")(task, model)) is None
    assert not model.left
  assert len(asked) == 5


@pytest.mark.parametrize("generate", [facts.generate, products.generate])
def test_guesses_are_as_many_as_asked_for(generate):
  rows = episodes(generate("sft", rows=4000))
  assert 0.57 < sum(len(e) == 1 for e in rows) / len(rows) < 0.63
  wrong = [e[0]["response"] != TRUTHS[e[0]["messages"][-1]["content"]] for e in rows
           if len(e) == 1]  # fmt: skip
  assert sum(wrong) / len(wrong) > 0.9  # a guessed town may be the right one


@pytest.mark.parametrize(
  "generate",
  [m.generate for m in (facts, products, walk, blackjack, sudoku, queries)],
)
def test_splits(generate):
  held = {r["prompt"] for r in generate("eval")}
  assert not held & {r["prompt"] for r in generate("rl", rows=3000)}
  starts = {[m for m in r["messages"] if m["role"] == "user"][0]["content"]
            for r in generate("sft", rows=3000)}  # fmt: skip
  assert not held & starts
  assert generate("rl", rows=5) == generate("rl", rows=5) != generate("rl", rows=5, seed=1)
  assert len(generate("sft", rows=7)) == 7
  for wrong in ({"split": "x"}, {"split": "rl", "rows": -1}, {"split": "eval", "held_out": 0}):
    with pytest.raises(UserError):
      generate(**wrong)


def test_every_person_has_a_document():
  documents = facts.corpus()
  assert len({d["title"] for d in documents}) == facts.PEOPLE == len(documents)
  index = retrieval.load(facts.CORPUS)
  for row in facts.generate("eval"):
    (hit,) = index.search(row["prompt"])
    assert documents[hit.document]["text"] == row["answer"]
  with pytest.raises(UserError, match="no function 'corpora'"):
    retrieval.load("trinity_jax.tasks.facts:corpora")


def test_a_walk_is_worth_what_its_steps_are():
  w = walk.Walk(3, 5)
  assert w.reset() == "3>5"
  steps = [w.step(a) for a in "-++ + ".replace(" ", "")]
  assert [s.observation for s in steps] == ["2>5", "3>5", "4>5", "5>5"]
  assert [round(s.reward, 6) for s in steps] == [-0.1, 0.1, 0.1, 1.1]
  assert [s.done for s in steps] == [False, False, False, True]
  assert walk.Walk(0, 1).step("-").observation == "0>1"
  assert walk.Walk(0, 1).step("x").invalid


def test_walks_and_games_demonstrate_what_the_workflow_shows(tokenizer):
  for generate, workflow in ((walk.generate, "environment"), (blackjack.generate, "gym")):
    rows = generate("sft", rows=60)
    by_start = {r["prompt"]: r for r in walk.generate("rl", rows=3000)}
    for episode in episodes(rows)[:8]:
      start = episode[0]["messages"][0]["content"]
      if workflow == "environment":
        row = by_start[start]
      else:
        row = _game(start)
      raw = row | {"max_turns": 1}
      task = Task(0, ({"role": "user", "content": row["prompt"]},), "x", raw=raw)
      model = Demonstrator(tokenizer, episode[:1])
      score = asyncio.run(find_workflow(workflow)(task, model))
      assert score.total == 0.0 and list(score.components.values()) == [model.total]


def _game(start: str) -> dict:
  """A game that begins so."""
  for row in blackjack.generate("rl", rows=3000):
    env = GymEnvironment(row["environment"], seed=row["seed"], text=row["environment_text"])
    if env.reset() == start:
      return row
  raise AssertionError(start)


def play(tokenizer, row, episode) -> float:
  """The demonstrator's return where the workflow plays the row."""
  task = Task(0, ({"role": "user", "content": row["prompt"]},), "x", raw=row)
  model = Demonstrator(tokenizer, episode)
  asyncio.run(find_workflow("environment")(task, model))
  assert not model.left
  return model.total


@pytest.mark.parametrize("careless", [0.0, 1.0])
def test_demonstrated_sudokus(tokenizer, careless):
  """The careful ones solve every board, the careless ones few."""
  shown = episodes(sudoku.generate("sft", rows=300, careless_fraction=careless))
  solved = 0.0
  for episode in shown:
    board = episode[0]["messages"][0]["content"]
    (solution,) = sudoku_board.solutions(board)
    solved += play(tokenizer, sudoku._row(board, solution), episode)
  assert solved == len(shown) if careless == 0 else 0 < solved < 0.5 * len(shown)


def test_demonstrated_queries(tokenizer):
  """They ask for what they were asked, or leave out the condition, and submit what they find."""
  row: dict[str, Any] = {**queries.generate("eval")[0], "own_process": False}
  args, first = row["environment_args"], {"role": "user", "content": row["prompt"]}
  db = sql.Sql(**args)
  told = {"role": "user", "content": db.step(row["answer"]).observation}
  episode = [
    {"messages": [first], "response": row["answer"]},
    {"messages": [first, {"role": "assistant", "content": row["answer"]}, told],
     "response": "submit"},
  ]  # fmt: skip
  assert play(tokenizer, row, episode) == 1.0
  for careless, where in ((0.0, True), (1.0, False)):
    for asked, submitted in episodes(queries.generate("sft", rows=60, careless_fraction=careless)):
      question, query = asked["messages"][0]["content"], asked["response"]
      table, _, rest = question.partition("(")
      function, number, kind, value = rest.partition("): ")[2].replace(",", "").split()
      condition = f" WHERE {kind} = '{value}'" if where else ""
      assert query == f"SELECT {function}({number}) FROM {table}{condition}"
      assert submitted["response"] == "submit"
      assert submitted["messages"][0] == {"role": "user", "content": question}
      assert int(submitted["messages"][-1]["content"]) > 0
