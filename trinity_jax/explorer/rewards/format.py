"""A small reward for stating a final answer in a form that a verifier finds."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from trinity_jax.explorer.rewards import answers

if TYPE_CHECKING:
  from trinity_jax.experience import Task

_DIGIT = re.compile(r"[0-9]")


def format_reward(
  response: str, truth: str = "", task: Task | None = None, *, scale: float = 0.1
) -> float:
  """Scores the form of a response, whatever its answer.

  Args:
    response: what the model wrote.
    truth: not used.
    task: not used.
    scale: the best score.

  Returns:
    `scale` for a final answer marked by `\\boxed{...}` or `#### ...` that holds a number; half of
    it for a response that ends in a number; a fifth when there is a digit at all; else 0. The
    lower two give a model that knows no format yet something to climb.
  """
  answer = answers.final_answer(response)
  if answer is not None and _DIGIT.search(answer):
    return scale
  if answers.ends_in_number(response):
    return scale / 2
  return scale / 5 if _DIGIT.search(response) else 0.0
