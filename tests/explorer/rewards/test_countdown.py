"""Countdown: scores of the feature map, and a parser that agrees with arithmetic."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from growth import assert_linear
from hypothesis import given
from hypothesis import strategies as st

from trinity_jax.errors import UserError
from trinity_jax.explorer.rewards.countdown import countdown_reward, evaluate

PUZZLE = json.dumps({"numbers": [3, 5, 7, 7], "target": 24})


@pytest.mark.parametrize(
  "answer, score",
  [
    ("3 + 7 + 7 + 5 + 2", 0.1),  # a number that was not given
    ("3*5+7+7", 0.1),  # 29
    ("(7-5)*7+3+7", 0.1),  # 24, but 7 three times
    ("7*(5-3)+7+3", 0.1),
    ("3*(7+7)-5", 0.1),  # 37
    ("3*5+7+7-5", 0.1),
    ("7*3 - 5 + 7 + 1", 0.1),
    ("(3*7)-(5-7)", 0.1),  # 23
    ("5 * 7 - 3 - 7", 0.1),  # 25
    ("7+7+3*5", 0.1),
    ("7 + 7 + 5 + 3", 0.1),  # 22
    ("7*5-7-3-1", 0.1),
    ("24", 0.1),
    ("3+5+7+7=24", 0.1),
    ("", 0.1),
    ("hello", 0.1),
    ("3/0", 0.1),
    ("3**5", 0.1),
    ("__import__('os')", 0.1),
    ("(" * 900, 0.1),
    ("9**9**9**9", 0.1),
    ("-" * 900 + "3", 0.1),
    ("1+" * 10**6 + "1", 0.1),
    ("9" * 999, 0.1),
  ],
)
def test_wrong_answers_in_the_right_form_score_a_tenth(answer, score):
  assert countdown_reward(f"thinking <answer>{answer}</answer>", PUZZLE) == score


@pytest.mark.parametrize(
  "numbers, target, answer",
  [
    ([3, 5, 7], 8, "3*5-7"),
    ([3, 5, 7], 8, " ( 3 * 5 ) - 7 "),
    ([3, 5, 7], 8, "3\u00d75\u22127"),
    ([1, 5, 5, 5], 24, "5*(5-1/5)"),  # only fractions get there
    ([3, 3, 8, 8], 24, "8/(3-8/3)"),
    ([2, 4], -2, "2-4"),
    ([2, 4], 2, "-2+4"),
    ([10], 10, "10"),
  ],
)
def test_right_answers_score_one(numbers, target, answer):
  truth = json.dumps({"numbers": numbers, "target": target})
  assert countdown_reward(f"<answer>1</answer> no: <answer>{answer}</answer>", truth) == 1.0


@pytest.mark.parametrize("response", ["", "3*5-7", "<answer>3*5-7", "3*5-7</answer>"])
def test_no_answer_scores_zero(response):
  assert countdown_reward(response, PUZZLE) == 0.0


@pytest.mark.parametrize(
  "truth",
  ["", "24", "[3]", "{}", '{"numbers": [], "target": 1}', '{"numbers": ["3"], "target": 1}'],
)
def test_a_truth_that_is_no_puzzle_is_the_users_error(truth):
  with pytest.raises(UserError, match="no puzzle.*expected JSON"):
    countdown_reward("<answer>1</answer>", truth)


expressions = st.recursive(
  st.integers(0, 99).map(lambda n: (str(n), Fraction(n), [n])),
  lambda inner: st.one_of(
    st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: _join(*t)),
    inner.map(lambda e: (f"-{e[0]}" if e[0].isdigit() else f"-({e[0]})", _negate(e[1]), e[2])),
  ),
  max_leaves=12,
)


def _negate(value):
  return None if value is None else -value


def _join(left, sign, right):
  (a, x, m), (b, y, n) = left, right
  if x is None or y is None or (sign == "/" and y == 0):
    value = None
  else:
    value = {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else None}[sign]
  return f"({a}) {sign}({b})", value, m + n


@given(expressions)
def test_the_parser_agrees_with_fractions(expression):
  text, value, used = expression
  if value is None:
    with pytest.raises(ZeroDivisionError):
      evaluate(text)
  else:
    assert evaluate(text) == (value, used)


@pytest.mark.parametrize("text, value", [("2+3*4", 14), ("2-3-4", -5), ("24/4/2", 3), ("2*-3", -6)])
def test_precedence_and_association(text, value):
  assert evaluate(text)[0] == value


@given(st.text("0123456789+-*/() .x\n", max_size=60))
def test_any_text_gives_a_value_or_an_error_of_ours(text):
  try:
    value, used = evaluate(text)
  except (ValueError, ZeroDivisionError):
    return
  assert isinstance(value, Fraction) and all(isinstance(n, int) for n in used)


def test_long_answers_are_read_in_linear_time():
  for part in ("<answer>", "</answer>", "<answer>1</answer>", "1+", "("):
    assert_linear(lambda n, part=part: countdown_reward(part * n, PUZZLE), 10_000)


def test_large_numbers_are_exact():
  assert evaluate("*".join(["9" * 200] * 4))[0] == (10**200 - 1) ** 4
