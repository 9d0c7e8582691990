"""The quickstart's verifier: the response is the integer, nothing more."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from trinity_jax.errors import UserError

if TYPE_CHECKING:
  from trinity_jax.experience import Task

_INTEGER = re.compile(r"-?[1-9][0-9]*|0")


def arithmetic_reward(response: str, truth: str, task: Task | None = None) -> float:
  """Returns 1.0 when the response, white space around it aside, is the integer `truth`, else 0.0.

  Digits are compared as text, so "085" is not 85 and any length is cheap.

  Raises:
    UserError: the truth is not an integer.
  """
  if not _INTEGER.fullmatch(truth.strip()):
    raise UserError(
      f"arithmetic reward: truth {truth[:80]!r} is not an integer; expected digits like '85' "
      "(taskset.truth_key names the field it is read from)"
    )
  return float(response.strip() == truth.strip())
