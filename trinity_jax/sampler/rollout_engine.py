"""What an explorer needs of whatever samples for it: our own engine or a remote server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from trinity_jax.sampler.request import Completion, Request


class Member(Protocol):
  """What one run asks."""

  async def generate(self, request: Request) -> Completion:
    """Samples one sequence. Cancelling the call frees what works on it.

    Request.deadline ends it with StopReason.TIMEOUT and what is there by then, perhaps nothing.

    Raises:
      UserError: a request that this engine does not serve.
      RunFailed: the engine has died, was closed or cannot get an answer.
    """
    ...

  async def logprobs(self, tokens: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """Log-probs f32[n] of given tokens under softmax(logits / temperature) of the newest weights.

    Each is given the tokens before it; the first, which has none, gets 0. Nothing is sampled.

    Raises:
      UserError: more tokens than the engine serves, an unknown token, or an engine that was not
        set up to score.
      RunFailed: the engine has died or was closed.
    """
    ...

  def enter(self) -> None:
    """Counts a run in that may send requests, until `leave`.

    An engine with deterministic admission admits nothing while such a run is busy elsewhere.
    """
    ...

  def leave(self) -> None:
    """Counts a run out."""
    ...


@runtime_checkable
class RolloutEngine(Protocol):
  """Samples sequences from the newest policy it was given.

  Every token comes with the log-prob of the distribution that it was really drawn from (after
  temperature and truncation; greedy: of temperature 1) and with the policy version that drew it.
  An engine that cannot know either of them refuses the request; it never guesses.
  """

  @property
  def version(self) -> int:
    """The version that samples now, -1 before the first; never goes back."""
    ...

  @property
  def error(self) -> BaseException | None:
    """What killed the engine, None while it lives. It then fails every request, open or new."""
    ...

  def start(self) -> None:
    """Begins to serve; requests may be given before."""
    ...

  def close(self) -> None:
    """Stops serving. Requests still open, and every later one, fail with RunFailed."""
    ...

  def set_params(self, version: int, params: Any) -> None:
    """Takes new weights; returns at once, from any thread.

    Tokens drawn from them carry `version`. A token whose context was partly computed by another
    version has Completion.mixed set.

    Raises:
      ValueError: an older version than the newest given.
      UserError: the engine was set up without a way to change its weights.
      RunFailed: the engine has died or was closed.
    """
    ...

  def release(self) -> None:
    """Frees cache and weights until the next `set_params`, unless requests are open."""
    ...

  def member(self, order: Sequence[int]) -> Member:
    """Who serves the runs whose order begins with (stream, batch, task); itself, unless several."""
    ...

  def describe(self) -> str:
    """Who is where, for the message of a wait that expired."""
    ...

  def metrics(self) -> dict[str, float]:
    """Gauges, under the names of monitor.metrics."""
    ...

  @property
  def stats(self) -> dict[str, float]:
    """Counters since the start."""
    ...
