"""A workflow that says who samples, and rewards that an untrained model gets some of."""

from __future__ import annotations


async def told(task, model) -> None:
  """Asks once; prints whose sampler answers."""
  await model.chat(task.messages)
  print("asked a", type(model.sampler).__name__, flush=True)


def by_length(response: str, truth: str, task=None) -> dict[str, float]:
  """Accuracy 0, 0.5 or 1."""
  return {"accuracy": len(response) % 3 / 2}
