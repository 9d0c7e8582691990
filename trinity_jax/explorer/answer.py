"""What a model is asked with, what it answers, and why it does not."""

from __future__ import annotations

import dataclasses
from typing import Any

from trinity_jax.errors import UserError
from trinity_jax.sampler.request import Completion


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How responses are drawn: temperature (0 is greedy), top_p, top_k, tokens per response."""

  temperature: float
  limit: int
  top_p: float = 1.0
  top_k: int = 0


class PromptTooLong(UserError):
  """The dialogue no longer fits the sampler; ends the run with StopReason.PROMPT_TOO_LONG."""


class RunEnded(ValueError):
  """The run is over: its model answers no more."""


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a turn of a dialogue gave.

  Attributes:
    message: the assistant's message, with `tool_calls` where it calls tools.
    prompt: token ids that were continued.
    completion: what was sampled.
    tool_error: why text that looks like a tool call is none, "" otherwise.
  """

  message: dict[str, Any]
  prompt: list[int]
  completion: Completion
  tool_error: str = ""
