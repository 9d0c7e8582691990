"""DAPO's reward: right or wrong as 1 or -1, and a penalty that grows near the length limit.

Source: Yu et al., DAPO (arXiv 2503.14476), section 3.4, equation 13 (soft overlong punishment) and
section 2.4 (rule-based reward of 1 or -1).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trinity_jax.errors import UserError
from trinity_jax.explorer.rewards.math import WORKERS, math_reward, math_reward_async

if TYPE_CHECKING:
  from trinity_jax.experience import Task

# How many tokens the policy wrote for the response being graded; set by whoever knows, see
# `response_tokens`. Threads that run a reward inherit it.
_TOKENS: contextvars.ContextVar[int | None] = contextvars.ContextVar("tokens", default=None)


@contextlib.contextmanager
def response_tokens(count: int) -> Iterator[None]:
  """Tells rewards called inside how many tokens the response has."""
  mark = _TOKENS.set(count)
  try:
    yield
  finally:
    _TOKENS.reset(mark)


def overlong_penalty(length: int, max_length: int, cache_length: int) -> float:
  """0 up to max_length - cache_length tokens, then linearly down to -1 at max_length and beyond.

  Raises:
    UserError: not 0 < cache_length <= max_length.
  """
  if not 0 < cache_length <= max_length:
    raise UserError(
      f"dapo reward: cache_length = {cache_length}, max_length = {max_length}; expected 0 < "
      "cache_length <= max_length (tokens)"
    )
  return min(0.0, max(-1.0, (max_length - cache_length - length) / cache_length))


def dapo_reward(
  response: str,
  truth: str,
  task: Task | None = None,
  *,
  max_length: int,
  cache_length: int,
  penalty: float = 1.0,
  tokenizer: str = "",
  workers: int = WORKERS,
) -> dict[str, float]:
  """Accuracy as 1 or -1, and the overlong penalty.

  Args:
    max_length: tokens at and beyond which the penalty is whole (the sampler's response limit).
    cache_length: length of the ramp before it, tokens.
    penalty: factor of the penalty.
    tokenizer: HF folder to count tokens with where the caller does not tell their number
      (`response_tokens`); text tokenised again may differ by a few tokens from what was sampled.

  Returns:
    accuracy (1.0 or -1.0) and overlong (-penalty to 0).

  Raises:
    UserError: lengths that do not fit, no way to count tokens, or a truth without an answer.
  """
  overlong = penalty * overlong_penalty(_count(response, tokenizer), max_length, cache_length)
  right = math_reward(response, truth, task, workers=workers)
  return {"accuracy": 1.0 if right else -1.0, "overlong": overlong}


async def dapo_reward_async(
  response: str, truth: str, task: Task | None = None, *, max_length: int, cache_length: int,
  penalty: float = 1.0, tokenizer: str = "", workers: int = WORKERS,
) -> dict[str, float]:  # fmt: skip
  """`dapo_reward` for coroutines."""
  overlong = penalty * overlong_penalty(_count(response, tokenizer), max_length, cache_length)
  right = await math_reward_async(response, truth, task, workers=workers)
  return {"accuracy": 1.0 if right else -1.0, "overlong": overlong}


def _count(response: str, tokenizer: str) -> int:
  count = _TOKENS.get()
  if count is not None:
    return count
  if not tokenizer:
    raise UserError(
      "dapo reward: the number of the response's tokens is not known here; set "
      "reward_args.tokenizer to the model's folder to count them"
    )
  return len(_load(tokenizer).encode(response, add_special_tokens=False).ids)


@functools.lru_cache(4)
def _load(folder: str) -> Any:
  from tokenizers import Tokenizer

  file = Path(folder) / "tokenizer.json"
  if not file.is_file():
    raise UserError(f"reward_args.tokenizer = {folder!r}: has no tokenizer.json")
  return Tokenizer.from_file(str(file))
