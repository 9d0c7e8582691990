"""What is asked of an engine and what comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from trinity_jax.errors import UserError
from trinity_jax.experience import StopReason
from trinity_jax.sampler.engine import STOP_IDS, EngineSpec


@dataclasses.dataclass(frozen=True)
class Request:
  """One sequence to sample.

  Attributes:
    tokens: i32[T], the prompt.
    key: u32[2], see sampling.request_key.
    order: admission order, smallest first; also the request's name in messages.
    limit: most tokens to sample.
    stop_ids: tokens that end the sequence; the stop token is part of the result.
    temperature, top_p, min_p, top_k: 0 temperature is greedy; see sampling.sample.
    priority: requests of a smaller number are admitted first, whatever their order.
    deadline: time.monotonic() at which the sequence ends with what it has (StopReason.TIMEOUT).
    salt: cached prefixes are shared only between requests of equal salt. The explorer gives the
      step, so that what a resumed step finds in the cache is what it found the first time.
  """

  tokens: np.ndarray
  key: np.ndarray
  order: tuple[int, ...]
  limit: int
  stop_ids: tuple[int, ...]
  temperature: float = 1.0
  top_p: float = 1.0
  min_p: float = 0.0
  top_k: int = 0
  priority: int = 0
  deadline: float | None = None
  salt: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
  """What was sampled, and why it ended.

  Attributes:
    tokens: i32[n]; logprobs: f32[n], of the distribution sampled from.
    versions: i32[n], the policy version that sampled each token.
    mixed: bool[n], True where the context was (partly) computed by another version than the one
      that sampled the token: its log-prob is not what a forward pass of that version gives.
    stop_reason: STOP, LENGTH, TIMEOUT (deadline) or ABORTED; the last two keep what was sampled.
  """

  tokens: np.ndarray
  logprobs: np.ndarray
  versions: np.ndarray
  mixed: np.ndarray
  stop_reason: StopReason

  def after(self, n: int) -> Completion:
    """The same without its first n tokens."""
    rest = {k: getattr(self, k)[n:] for k in ("tokens", "logprobs", "versions", "mixed")}
    return Completion(**rest, stop_reason=self.stop_reason)


def check(request: Request, spec: EngineSpec, so_far: Completion | None = None) -> None:
  """Raises UserError for a request that an engine was not compiled for, or that has ended."""
  prompt, longest = len(request.tokens), spec.cache_length - 1
  if not 1 <= prompt <= longest:
    raise UserError(
      f"prompt of {prompt} tokens: the cache of sampler.max_prompt_length + "
      f"max_response_length allows 1 to {longest}"
    )
  most = min(spec.max_response, spec.cache_length - prompt)
  if not 1 <= request.limit <= most:
    raise UserError(
      f"response limit {request.limit} after a prompt of {prompt} tokens: must be 1 to {most} "
      "(sampler.max_response_length)"
    )
  if len(request.stop_ids) > STOP_IDS:
    raise UserError(f"{len(request.stop_ids)} stop tokens: at most {STOP_IDS}")
  done = [] if so_far is None else so_far.tokens.tolist()
  if len(done) >= request.limit or (done and done[-1] in request.stop_ids):
    raise UserError(
      f"so_far has {len(done)} tokens of {request.limit}, ending in {done[-1]}: nothing is left "
      "to sample; use it as the result"
    )


def join(parts: Sequence[Completion], stop_reason: StopReason) -> Completion:
  """Consecutive stretches of one sequence as one; no parts give an empty completion."""

  def column(name: str, dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(getattr(p, name) for p in parts)]).astype(dtype)

  return Completion(
    column("tokens", np.int32),
    column("logprobs", np.float32),
    column("versions", np.int32),
    column("mixed", bool),
    stop_reason,
  )
