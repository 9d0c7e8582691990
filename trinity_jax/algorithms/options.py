"""Checks of hyper-parameters: a value out of range is named together with what is expected."""

from __future__ import annotations

from typing import Any

from trinity_jax.errors import UserError


def number(name: str, value: Any, low: float, high: float = float("inf")) -> None:
  """Raises UserError unless low <= value < high. A traced value cannot be looked at."""
  if value is None or (isinstance(value, (int, float)) and not low <= value < high):
    raise UserError(f"{name} = {value!r}: expected a number in [{low:g}, {high:g})")


def choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
  """Raises UserError unless `value` is one of `choices`."""
  if value not in choices:
    raise UserError(f"{name} = {value!r}: expected one of {', '.join(choices)}")


def band(low: Any, high: Any) -> None:
  """Raises UserError unless 0 <= low <= 1 <= high: a ratio of 1 must be inside."""
  numbers = all(isinstance(x, (int, float)) for x in (low, high))
  if low is None or high is None or (numbers and not 0 <= low <= 1 <= high):
    raise UserError(f"low = {low!r}, high = {high!r}: expected 0 <= low <= 1 <= high")
