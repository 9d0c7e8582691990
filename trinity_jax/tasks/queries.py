"""Questions about small tables that SQL answers, and demonstrations that forget the condition.

Each database has one table of a few rows. The agent is told its name and columns and what to find:
"pets(kind, age): max age, kind cat". It asks, reads the result, and submits. A demonstration leaves
out WHERE with `careless_fraction`: above one half that is what imitation learns to do, while the
condition keeps a probability for reinforcement to find.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trinity_jax.errors import UserError
from trinity_jax.explorer.environments.sql import SUBMIT, Sql

TABLES = ("pets", "cars", "trees", "books", "shops", "boats")
KINDS = ("kind", "colour", "town", "owner")  # columns of text
NUMBERS = ("age", "price", "size", "weight")
VALUES = ("red", "cat", "oslo", "anna", "oak", "blue", "rome", "paul")
FUNCTIONS = ("max", "min", "sum", "count")
_PARTS = (TABLES, KINDS, NUMBERS, VALUES, FUNCTIONS)
_COMBINATIONS = len(TABLES) * len(KINDS) * len(NUMBERS) * len(VALUES) * len(FUNCTIONS)
_ROWS = {"sft": 20_000, "rl": 4096}
_STREAM = {"eval": 0, "sft": 1, "rl": 2}  # independent random numbers for each split
_SEEN = 3  # different values in a table, the one that is asked for among them


def generate(
  split: str,
  *,
  seed: int = 0,
  careless_fraction: float = 0.6,
  rows: int = 0,
  held_out: int = 200,
) -> list[dict[str, Any]]:
  """Returns rows {"prompt": question, "answer": query} for the `environment` workflow, each
  environment in a process of its own.

  The held-out questions are a function of (seed, held_out) alone, and no training split has one.

  Args:
    split: "rl" or "eval"; "sft": {"messages", "response"}, dialogues up to a query or "submit".
    seed: seed of everything.
    careless_fraction: share of the demonstrated dialogues without the condition.
    rows: rows of a training split; 0 means 20,000 for sft and 4,096 for rl.
    held_out: questions that are only asked in "eval".

  Raises:
    UserError: an argument out of its limits.
  """
  if split not in _STREAM:
    raise UserError(f"queries split {split!r}: expected one of {', '.join(sorted(_STREAM))}")
  if not 0.0 <= careless_fraction <= 1.0 or rows < 0 or not 1 <= held_out <= 1000:
    raise UserError(
      f"queries careless_fraction = {careless_fraction}, rows = {rows}, held_out = {held_out}: "
      "expected 0.0 to 1.0, 0 or more, and 1 to 1000"
    )
  held_rng = np.random.default_rng([seed, _STREAM["eval"]])
  order = held_rng.permutation(_COMBINATIONS)
  if split == "eval":
    return [_row(_names(i), held_rng) for i in order[:held_out].tolist()]
  rng, count = np.random.default_rng([seed, _STREAM[split]]), rows or _ROWS[split]
  chosen = rng.choice(order[held_out:], count).tolist()
  if split == "rl":
    return [_row(_names(i), rng) for i in chosen]
  out: list[dict[str, Any]] = []
  for i in chosen:
    out += _demonstration(_names(i), rng, careless=rng.random() < careless_fraction)
    if len(out) >= count:
      break
  return out[:count]


def words() -> tuple[str, ...]:
  """What questions and queries are made of: tokens for a tiny model (config.model.tiny.words)."""
  names = [name for part in _PARTS for name in part]
  return (*names, "SELECT ", " FROM ", " WHERE ", " = '", "): ", ", ", SUBMIT)


def _names(number: int) -> tuple[str, ...]:
  """Table, text column, number column, value and function of a combination."""
  shape = [len(part) for part in _PARTS]
  return tuple(part[i] for part, i in zip(_PARTS, np.unravel_index(number, shape)))


def _question(names: tuple[str, ...]) -> str:
  table, kind, number, value, function = names
  return f"{table}({kind}, {number}): {function} {number}, {kind} {value}"


def _query(names: tuple[str, ...], *, careless: bool = False) -> str:
  table, kind, number, value, function = names
  condition = "" if careless else f" WHERE {kind} = '{value}'"
  return f"SELECT {function}({number}) FROM {table}{condition}"


def _database(names: tuple[str, ...], rng: np.random.Generator) -> str:
  table, kind, number, value, _ = names
  others = [v for v in VALUES if v != value]
  seen = [value, *rng.choice(others, _SEEN - 1, replace=False).tolist()]
  kinds = [*seen, *rng.choice(seen, int(rng.integers(3, 8))).tolist()]
  rows = ", ".join(f"('{k}', {n})" for k, n in zip(kinds, rng.integers(1, 100, len(kinds))))
  return f"CREATE TABLE {table}({kind} TEXT, {number} INTEGER); INSERT INTO {table} VALUES {rows};"


def _row(names: tuple[str, ...], rng: np.random.Generator) -> dict[str, Any]:
  question, query = _question(names), _query(names)
  return {
    "prompt": question,
    "answer": query,
    "environment": "trinity_jax.explorer.environments.sql:Sql",
    "environment_args": {
      "database": _database(names, rng), "question": question, "reference": query,
    },
    "own_process": True,
    "max_turns": 3,
  }  # fmt: skip


def _demonstration(
  names: tuple[str, ...], rng: np.random.Generator, *, careless: bool
) -> list[dict[str, Any]]:
  """A query and, whatever its result, its submission."""
  question, query = _question(names), _query(names, careless=careless)
  environment = Sql(_database(names, rng), question, query)
  result = environment.step(query).observation
  environment.close()
  first = [{"role": "user", "content": question}]
  told = [{"role": "assistant", "content": query}, {"role": "user", "content": result}]
  return [
    {"messages": first, "response": query},
    {"messages": [*first, *told], "response": SUBMIT},
  ]
