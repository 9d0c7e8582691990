"""Checks of hyper-parameters: a value out of range is named together with what is expected."""

from __future__ import annotations

from typing import Any

from trinity_jax.errors import UserError, suggestion


def number(name: str, value: Any, low: float, high: float = float("inf")) -> None:
  """Raises UserError unless low <= value < high. A traced value cannot be looked at."""
  wrong = value is None or isinstance(value, (str, bool))
  if wrong or (isinstance(value, (int, float)) and not low <= value < high):
    raise UserError(f"{name} = {value!r}: expected a number in [{low}, {high})")


def choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
  """Raises UserError unless `value` is one of `choices`."""
  if value not in choices:
    hint = suggestion(value, choices) if isinstance(value, str) else ""
    raise UserError(f"{name} = {value!r}: expected one of {', '.join(choices)}{hint}")


def band(low: Any, high: Any) -> None:
  """Raises UserError unless 0 <= low <= 1 <= high: a ratio of 1 must be inside."""
  numbers = all(isinstance(x, (int, float)) for x in (low, high))
  if low is None or high is None or (numbers and not 0 <= low <= 1 <= high):
    raise UserError(f"low = {low!r}, high = {high!r}: expected 0 <= low <= 1 <= high")
