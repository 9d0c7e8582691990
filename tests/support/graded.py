"""Rewards that an untrained model gets some of."""

from __future__ import annotations


def by_length(response: str, truth: str, task=None) -> dict[str, float]:
  """Accuracy 0, 0.5 or 1."""
  return {"accuracy": len(response) % 3 / 2}
