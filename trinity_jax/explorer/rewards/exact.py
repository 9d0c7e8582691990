"""Exact match: the response is the answer, nothing more."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from trinity_jax.experience import Task


def exact_reward(response: str, truth: str, task: Task | None = None) -> float:
  """Returns 1.0 when the response is the truth, case and white space around and between words
  aside, else 0.0.

  Source: the exact match of question answering (Rajpurkar et al., "SQuAD", 2016), articles and
  punctuation kept.
  """
  return float(_plain(response) == _plain(truth))


def _plain(text: str) -> str:
  return " ".join(text.casefold().split())
