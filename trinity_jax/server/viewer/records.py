"""Experiences as JSON for the page; strict JSON, so what is not finite becomes null."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trinity_jax.experience import Experience, Source, StopReason
from trinity_jax.server.viewer.index import Row

TOKENS = 4000  # of an experience that are sent at once; the page asks for the next ones


def row_json(row: Row) -> dict[str, Any]:
  """One line of a list."""
  return {
    "id": "/".join(map(str, row.key)),
    "reward": plain(row.reward),
    "stop_reason": _name(StopReason, row.stop_reason),
    "source": _name(Source, row.source),
    "version": row.version,
    "prompt": row.prompt,
    "reply": row.reply,
  }


def experience_json(
  experience: Experience, pieces: Sequence[str] | None, first: int
) -> dict[str, Any]:
  """Everything about an experience, and its tokens from `first` on.

  Args:
    pieces: text of tokens first, first + 1, ... (as many as are sent), None without a tokenizer.
  """
  part = slice(first, first + TOKENS)
  arrays = ("logprobs", "versions", "mixed", "token_rewards", "advantages")
  tokens = {
    "ids": experience.tokens[part].tolist(),
    "text": None if pieces is None else list(pieces),
    "action": experience.action_mask[part].tolist(),
    **{name: _array(getattr(experience, name), part) for name in arrays},
  }
  sampled = experience.versions[experience.action_mask]
  return {
    "id": str(experience.id),
    "reward": plain(experience.reward),
    "stop_reason": experience.stop_reason.name.lower(),
    "source": experience.source.name.lower(),
    "temperature": experience.temperature,
    "num_tokens": len(experience.tokens),
    "num_actions": experience.num_actions,
    "sum_logprob": plain(float(experience.logprobs[experience.action_mask].sum())),
    "all_versions": sorted({int(v) for v in sampled}),
    "messages": plain(experience.messages),
    "metrics": plain(experience.metrics),
    "info": plain(experience.info),
    "extras": {k: f"{v.dtype}{list(v.shape)}" for k, v in experience.extras.items()},
    "first": first,
    "tokens": tokens,
  }


def plain(value: Any) -> Any:
  """A copy that strict JSON can hold."""
  if isinstance(value, Mapping):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _array(values: np.ndarray | None, part: slice) -> list[Any] | None:
  return None if values is None else plain(values[part].tolist())


def _name(kind: Any, value: int) -> str:
  try:
    return kind(value).name.lower()
  except ValueError:  # a record of a newer version
    return str(value)
