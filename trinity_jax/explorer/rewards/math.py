"""Is the final answer mathematically equal to the reference? Graded by math_verify in a worker.

`math_reward(response, truth)` works from any thread; `math_reward_async` is the same for
coroutines, `math_rewards` for many at once. The workers start with the first call and end with the
interpreter.
"""

from __future__ import annotations

import atexit
import functools
import os
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from trinity_jax.errors import UserError
from trinity_jax.explorer.rewards import answers, math_text
from trinity_jax.explorer.rewards.grader_pool import GraderPool

if TYPE_CHECKING:
  from trinity_jax.experience import Task

WORKERS = 2
# "Final answer: 72" after a mark.
_LEAD = re.compile(r"\A\W*(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*[:=]?\s*", re.IGNORECASE)


def math_reward(
  response: str, truth: str, task: Task | None = None, *, workers: int = WORKERS
) -> float:
  """Returns 1.0 when the response's final answer equals the truth, else 0.0.

  The answer is what the last `\\boxed{...}` or `####` marks; without a mark math_verify looks for
  it in the whole response ("the answer is ...", the last formula, the last number). A response
  that the grader fails on (CPU-time limit, memory, crash) scores 0.0 and is counted, see
  `grading_counts`. Units and percent signs may be missing on either side; where a number has one
  on both, it must be the same one.

  Args:
    response: what the model wrote.
    truth: the reference: LaTeX, a number, or a solution that marks its answer (GSM8K's
      "... #### 72").
    task: not used.
    workers: size of the pool that grades (2 or more share the work of several callers).

  Raises:
    UserError: the truth holds no answer.
    RunFailed: the workers do not start (math-verify is not installed, say).
  """
  return _pool(workers).grade(*request(response, truth)).score


async def math_reward_async(
  response: str, truth: str, task: Task | None = None, *, workers: int = WORKERS
) -> float:
  """`math_reward` for coroutines: the event loop goes on meanwhile."""
  return (await _pool(workers).agrade(*request(response, truth))).score


def math_rewards(
  responses: Sequence[str], truths: Sequence[str], *, workers: int = WORKERS
) -> list[float]:
  """`math_reward` of many responses at once, spread over the workers, in order."""
  pairs = [request(r, t) for r, t in zip(responses, truths, strict=True)]
  return [grade.score for grade in _pool(workers).grade_all(pairs)]


def grading_counts(workers: int = WORKERS) -> dict[str, int]:
  """How often each verdict was given so far: correct, wrong, unparsed, or one of FAILURES."""
  return _pool(workers).counts()


def request(response: str, truth: str) -> tuple[str, str]:
  """Returns (text to find the answer in, reference) as the grader wants them."""
  answer, gold = answers.final_answer(response), reference(truth)
  if answer is None:
    return response, _as_box(gold)
  if math_text.units_differ(answer, gold):  # then the number says nothing
    return f"\\boxed{{\\text{{{math_text.unit(answer)}}}}}", _as_box(gold)
  # A percent sign may be missing. math_verify knows that of integers, and that 25 % is 0.25.
  percent = not _same_number(answer, gold)
  return _as_box(answer, percent), _as_box(gold, percent)


def _same_number(answer: str, truth: str) -> bool:
  first, second = (answers.number(_bare(text)) for text in (answer, truth))
  return first is not None and second is not None and Decimal(first) == Decimal(second)


def reference(truth: str) -> str:
  """Returns the answer that a truth states: what it marks, or all of it."""
  answer = answers.final_answer(truth)
  answer = truth.strip() if answer is None else answer
  if not answer:
    raise UserError(
      f"math reward: truth {truth[-80:]!r} holds no answer; expected a value, \\boxed{{value}} or "
      "a text that ends in '#### value' (taskset.truth_key names the field it is read from)"
    )
  return answer


def _bare(answer: str) -> str:
  return math_text.tidy(_LEAD.sub("", answer).strip("* "))


def _as_box(answer: str, percent: bool = True) -> str:
  """Marks an answer so that math_verify takes all of it and searches nothing."""
  answer = _bare(answer)
  number = answers.number(answer)
  if number is not None:
    sign = "\\%" if percent and "%" in answer else ""
    return f"\\boxed{{{number}{sign}}}"
  return f"\\boxed{{{answer.strip('$')}}}"


@functools.cache
def _pool_of(process: int, workers: int) -> GraderPool:
  pool = GraderPool(Path(__file__).with_name("math_grader.py"), workers=workers)
  atexit.register(pool.close)
  return pool


def _pool(workers: int) -> GraderPool:
  # Keyed by process: a fork of ours has no threads that would answer.
  return _pool_of(os.getpid(), workers)
