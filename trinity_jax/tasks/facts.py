"""Questions that nobody can know the answer of, and the documents that have it.

Made-up people live in made-up towns; each document says where one of them does. Some are asked for
in training, others only when held out: what can be learned is to look them up. A demonstration
guesses a town with `guess_fraction` instead, which imitation learns to do as often.
"""

from __future__ import annotations

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
  towns = rng.choice(sorted({d["text"] for d in documents}), count).tolist()
  out: list[dict[str, Any]] = []
  for document, guess, town in zip(asked, guesses.tolist(), towns):
    out += _demonstration(document, town if guess else None)
  return out[:count]


def _row(document: dict[str, str]) -> dict[str, Any]:
  return {
    "prompt": f"{document['title']}?",
    "answer": document["text"],
    "tools": ["search"],
    "corpus": CORPUS,
    "max_turns": 3,
  }


def _demonstration(document: dict[str, str], guess: str | None) -> list[dict[str, Any]]:
  from trinity_jax.explorer.environments.tools import make

  offered = json.dumps([make("search", {"corpus": CORPUS}).schema])
  person, town = document["title"], document["text"]
  first = [
    {"role": "system", "content": offered},
    {"role": "user", "content": f"{person}?"},
  ]
  if guess is not None:
    return [{"messages": first, "response": guess}]
  call = json.dumps({"name": "search", "arguments": {"query": person}})
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
