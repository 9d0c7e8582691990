"""Countdown: reach a target with + - * / from given numbers, each used exactly once.

Scores as in TinyZero (github.com/Jiayi-Pan/TinyZero): 0 without an answer, 0.1 for an answer in the
right form, 1 for a right one. Expressions are parsed and computed here, exactly, in fractions.
"""

from __future__ import annotations

import json
import re
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from trinity_jax.errors import UserError

if TYPE_CHECKING:
  from trinity_jax.experience import Task

_MAX_LENGTH = 1000  # characters of an expression
_MAX_DEPTH = 100  # nested parentheses and signs
_TOKEN = re.compile(r"\s*([0-9]+|[-+*/()])")
_TYPOGRAPHY = str.maketrans({"\u00d7": "*", "\u22c5": "*", "\u00f7": "/", "\u2212": "-"})


def countdown_reward(
  response: str,
  truth: str,
  task: Task | None = None,
  *,
  format_score: float = 0.1,
  score: float = 1.0,
) -> float:
  """Scores the expression in the last <answer>...</answer> of the response.

  Args:
    response: what the model wrote.
    truth: JSON object {"numbers": [int, ...], "target": int}.
    task: not used.
    format_score: reward of an answer that is there but wrong.
    score: reward of an expression that uses each number once and equals the target.

  Raises:
    UserError: the truth is not such an object.
  """
  numbers, target = _puzzle(truth)
  expression = _answer(response)
  if expression is None:
    return 0.0
  try:
    value, used = evaluate(expression)
  except (ValueError, ZeroDivisionError):
    return format_score
  return score if sorted(used) == sorted(numbers) and value == target else format_score


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
  """Returns the exact value of an expression and the integers it is made of.

  Grammar: sum = product {(+|-) product}; product = factor {(*|/) factor};
  factor = {+|-} (integer | "(" sum ")").

  Raises:
    ValueError: not such an expression, or longer or deeper than the limits.
    ZeroDivisionError: it divides by zero.
  """
  return _Parser(expression).run()


class _Parser:
  """Recursive descent; depth is counted, so that no text can exhaust the stack."""

  def __init__(self, expression: str):
    if len(expression) > _MAX_LENGTH:
      raise ValueError(f"expression of {len(expression)} characters, at most {_MAX_LENGTH}")
    text, self.tokens, end = expression.translate(_TYPOGRAPHY).strip(), [], 0
    while end < len(text):
      match = _TOKEN.match(text, end)
      if not match:
        raise ValueError(f"unexpected {text[end : end + 10]!r}")
      self.tokens.append(match.group(1))
      end = match.end()
    self.tokens.append("")  # the end
    self.at = 0
    self.used: list[int] = []

  def run(self) -> tuple[Fraction, list[int]]:
    value = self.sum(0)
    if self.tokens[self.at]:
      raise ValueError(f"unexpected {self.tokens[self.at]!r}")
    return value, self.used

  def take(self) -> str:
    token = self.tokens[self.at]
    self.at += bool(token)
    return token

  def sum(self, depth: int) -> Fraction:
    value = self.product(depth)
    while self.tokens[self.at] in ("+", "-"):
      value = value + self.product(depth) if self.take() == "+" else value - self.product(depth)
    return value

  def product(self, depth: int) -> Fraction:
    value = self.factor(depth)
    while self.tokens[self.at] in ("*", "/"):
      value = value * self.factor(depth) if self.take() == "*" else value / self.factor(depth)
    return value

  def factor(self, depth: int) -> Fraction:
    if depth > _MAX_DEPTH:
      raise ValueError(f"nested deeper than {_MAX_DEPTH}")
    token = self.take()
    if token == "(":
      value = self.sum(depth + 1)
      if self.take() != ")":
        raise ValueError("a parenthesis is not closed")
      return value
    if token in ("+", "-"):
      value = self.factor(depth + 1)
      return -value if token == "-" else value
    if not token.isdigit():
      raise ValueError(f"expected a number, got {token!r}")
    self.used.append(int(token))
    return Fraction(self.used[-1])


def _answer(response: str) -> str | None:
  start = response.rfind("<answer>")
  end = response.find("</answer>", start)
  return None if start < 0 or end < 0 else response[start + len("<answer>") : end].strip()


def _puzzle(truth: str) -> tuple[list[int], int]:
  try:
    puzzle: Any = json.loads(truth)
    numbers, target = puzzle["numbers"], puzzle["target"]
    if not numbers or not all(type(n) is int for n in [*numbers, target]):
      raise TypeError
  except (ValueError, KeyError, TypeError) as e:
    raise UserError(
      f"countdown reward: truth {truth[:80]!r} is no puzzle; expected JSON like "
      '{"numbers": [3, 5, 7], "target": 8} (taskset.truth_key names the field it is read from)'
    ) from e
  return numbers, target
