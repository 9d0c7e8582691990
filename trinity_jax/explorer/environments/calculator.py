"""Arithmetic without eval: a parser of our own, exact in fractions, with bounds on everything."""

from __future__ import annotations

import math
import re
from fractions import Fraction

_MAX_LENGTH = 1000  # characters of an expression
_MAX_DEPTH = 100  # nested parentheses, signs and powers
_MAX_BITS = 4096  # of a numerator or denominator
_TOKEN = re.compile(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+|\*\*|//|[-+*/%^()]|sqrt\b|abs\b)")
_TYPOGRAPHY = str.maketrans({"\u00d7": "*", "\u22c5": "*", "\u00f7": "/", "\u2212": "-"})


def calculate(expression: str) -> str:
  """Returns the value: an integer, or a decimal of 12 significant digits.

  Grammar: sum = product {(+|-) product}; product = sign {(*|/|//|%) sign};
  sign = {+|-} power; power = atom [(^|**) sign]; atom = number | "(" sum ")" |
  (sqrt|abs) "(" sum ")". Thousands separators are allowed in numbers.

  Raises:
    ValueError: not such an expression, a division by zero, or numbers beyond the limits.
  """
  value = _Parser(expression).run()
  if value.denominator == 1:
    return str(value.numerator)
  try:
    return f"{float(value):.12g}"
  except OverflowError as e:
    raise ValueError("the value is too large") from e


class _Parser:
  """Recursive descent; depth and sizes are counted, so that no text exhausts stack or memory."""

  def __init__(self, expression: str):
    if len(expression) > _MAX_LENGTH:
      raise ValueError(f"expression of {len(expression)} characters, at most {_MAX_LENGTH}")
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", expression)
    text, end = text.translate(_TYPOGRAPHY).strip(), 0
    self._tokens: list[str] = []
    while end < len(text):
      match = _TOKEN.match(text, end)
      if not match:
        raise ValueError(f"unexpected {text[end : end + 10]!r}")
      self._tokens.append(match.group(1))
      end = match.end()
    self._tokens.append("")  # the end
    self._at = 0

  def run(self) -> Fraction:
    value = self._sum(0)
    if self._tokens[self._at]:
      raise ValueError(f"unexpected {self._tokens[self._at]!r}")
    return value

  def _take(self) -> str:
    token = self._tokens[self._at]
    self._at += bool(token)
    return token

  def _next(self, *tokens: str) -> bool:
    return self._tokens[self._at] in tokens

  def _sum(self, depth: int) -> Fraction:
    value = self._product(depth)
    while self._next("+", "-"):
      sign = 1 if self._take() == "+" else -1
      value = _bounded(value + sign * self._product(depth))
    return value

  def _product(self, depth: int) -> Fraction:
    value = self._sign(depth)
    while self._next("*", "/", "//", "%"):
      operator, right = self._take(), self._sign(depth)
      if operator != "*" and right == 0:
        raise ValueError("division by zero")
      if operator == "*":
        value = value * right
      elif operator == "/":
        value = value / right
      else:
        whole = Fraction(value // right)
        value = whole if operator == "//" else value - whole * right
      value = _bounded(value)
    return value

  def _sign(self, depth: int) -> Fraction:
    if depth > _MAX_DEPTH:
      raise ValueError(f"nested deeper than {_MAX_DEPTH}")
    if not self._next("+", "-"):
      return self._power(depth)
    negative = self._take() == "-"
    value = self._sign(depth + 1)
    return -value if negative else value

  def _power(self, depth: int) -> Fraction:
    base = self._atom(depth)
    if not self._next("^", "**"):
      return base
    self._take()
    return _power(base, self._sign(depth + 1))

  def _atom(self, depth: int) -> Fraction:
    token = self._take()
    if token in ("sqrt", "abs"):
      if not self._next("("):
        raise ValueError(f"expected '(' after {token}")
      value = self._atom(depth)
      return abs(value) if token == "abs" else _sqrt(value)
    if token == "(":
      value = self._sum(depth + 1)
      if self._take() != ")":
        raise ValueError("a parenthesis is not closed")
      return value
    if not token or not (token[0].isdigit() or token[0] == "."):
      raise ValueError(f"expected a number, got {token!r}")
    return _bounded(Fraction(token))


def _bounded(value: Fraction) -> Fraction:
  if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
    raise ValueError("a number is too large")
  return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
  if exponent.denominator != 1:
    if base < 0:
      raise ValueError("a root of a negative number")
    if exponent == Fraction(1, 2):
      return _sqrt(base)
    try:
      return Fraction(math.pow(base, exponent))
    except (OverflowError, ValueError) as e:
      raise ValueError("the power is too large") from e
  if base == 0 and exponent < 0:
    raise ValueError("division by zero")
  bits = max(base.numerator.bit_length(), base.denominator.bit_length())
  if abs(base) != 1 and base != 0 and bits * abs(exponent) > _MAX_BITS:
    raise ValueError("the power is too large")
  return _bounded(base ** (exponent.numerator % 2 if abs(base) == 1 else exponent.numerator))


def _sqrt(value: Fraction) -> Fraction:
  if value < 0:
    raise ValueError("a root of a negative number")
  top, bottom = math.isqrt(value.numerator), math.isqrt(value.denominator)
  if top * top == value.numerator and bottom * bottom == value.denominator:
    return Fraction(top, bottom)
  try:
    return Fraction(math.sqrt(value))
  except OverflowError as e:
    raise ValueError("a number is too large") from e
