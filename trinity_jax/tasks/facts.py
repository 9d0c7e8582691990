"""Questions that nobody can know the answer of, and the documents that have it.

Made-up people live in made-up towns; each document says where one of them does. Some are asked for
in training, others only when held out: what can be learned is to look them up. A demonstration
guesses instead, with `guess_fraction`, always the town where most people live: above one half that
is what imitation learns to do, while the search keeps a probability for reinforcement to find.
"""

from __future__ import annotations

import collections
import json
from typing import Any

import numpy as np

from trinity_jax.errors import UserError

CORPUS = "trinity_jax.tasks.facts:corpus"
PEOPLE = 400
_ROWS = {"sft": 10_000, "rl": 4096}
_STREAM = {"eval": 0, "sft": 1, "rl": 2}  # independent random numbers for each split
_STARTS, _VOWELS, _ENDS = "bdfgklmnprstvz", "aeiou", "lmnrs"


def corpus() -> list[dict[str, str]]:
  """The documents {"title": person, "text": town}, PEOPLE of them."""
  rng = np.random.default_rng(7)
  towns = _words(rng, 40)
  people = [w for w in _words(rng, PEOPLE + len(towns)) if w not in towns][:PEOPLE]
  chosen = rng.choice(towns, PEOPLE).tolist()
  return [{"title": person, "text": town} for person, town in zip(people, chosen)]


def generate(
  split: str, *, seed: int = 0, guess_fraction: float = 0.6, rows: int = 0, held_out: int = 100
) -> list[dict[str, Any]]:
  """Returns rows {"prompt": "bor?", "answer": "kem", "tools", "corpus"} for `tool_use`.

  Args:
    split: "rl" or "eval"; "sft": {"messages", "response"}, dialogues up to a reply. Their first
      message is what the tiny models' chat template writes where the tool is offered.
    seed: seed of everything but the documents.
    guess_fraction: share of the demonstrated dialogues that guess.
    rows: rows of a training split; 0 means 10,000 for sft and 4,096 for rl.
    held_out: people that are only asked for in "eval".

  Raises:
    UserError: an argument out of its limits.
  """
  if split not in _STREAM:
    raise UserError(f"facts split {split!r}: expected one of {', '.join(sorted(_STREAM))}")
  if not 0.0 <= guess_fraction <= 1.0 or rows < 0 or not 1 <= held_out < PEOPLE:
    raise UserError(
      f"facts guess_fraction = {guess_fraction}, rows = {rows}, held_out = {held_out}: expected "
      f"0.0 to 1.0, at least 0, and 1 to {PEOPLE - 1}"
    )
  documents = corpus()
  order = np.random.default_rng([seed, _STREAM["eval"]]).permutation(PEOPLE)
  if split == "eval":
    return [_row(documents[i]) for i in order[:held_out]]
  rng, count = np.random.default_rng([seed, _STREAM[split]]), rows or _ROWS[split]
  asked = [documents[i] for i in rng.choice(order[held_out:], count)]
  if split == "rl":
    return [_row(document) for document in asked]
  guesses = rng.random(count) < guess_fraction
  commonest, _ = collections.Counter(d["text"] for d in documents).most_common(1)[0]
  out: list[dict[str, Any]] = []
  for document, guess in zip(asked, guesses.tolist()):
    out += _demonstration(document, commonest if guess else None)
  return out[:count]


def words() -> tuple[str, ...]:
  """What every dialogue repeats: the tools offered, the call up to the person, and its end.

  For config.model.tiny.words: a tiny model need not read and write them letter by letter.
  """
  from trinity_jax.explorer.environments.tools import make

  before, _, after = _call("|").partition("|")
  return json.dumps([make("search", {"corpus": CORPUS}).schema]), before, after


def _call(query: str) -> str:
  return json.dumps({"name": "search", "arguments": {"query": query}})


def _row(document: dict[str, str]) -> dict[str, Any]:
  return {
    "prompt": f"{document['title']}?",
    "answer": document["text"],
    "tools": ["search"],
    "corpus": CORPUS,
    "max_turns": 3,
  }


def _demonstration(document: dict[str, str], guess: str | None) -> list[dict[str, Any]]:
  person, town = document["title"], document["text"]
  first = [
    {"role": "system", "content": words()[0]},
    {"role": "user", "content": f"{person}?"},
  ]
  if guess is not None:
    return [{"messages": first, "response": guess}]
  call = _call(person)
  found = [
    {"role": "assistant", "content": call},
    {"role": "tool", "content": f"[1] {person}: {town}"},
  ]
  return [
    {"messages": first, "response": call},
    {"messages": [*first, *found], "response": town},
  ]


def _words(rng: np.random.Generator, count: int) -> list[str]:
  """Different words of one or two syllables."""
  found: dict[str, None] = {}
  while len(found) < count:
    syllables = [str(rng.choice(list(_STARTS))) + str(rng.choice(list(_VOWELS)))
                 for _ in range(int(rng.integers(1, 3)))]  # fmt: skip
    found["".join(syllables) + str(rng.choice(list(_ENDS)))] = None
  return list(found)
