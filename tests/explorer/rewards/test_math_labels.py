"""math_reward against labels that a person would give; see tests/support/math_labels.py."""

from __future__ import annotations

import math_labels
import pytest
from growth import assert_linear

from trinity_jax.explorer.rewards import math_rewards, math_text

LEAST = 0.99


def disagreements(rows: list[math_labels.Labelled]) -> list[math_labels.Labelled]:
  whole = ("responses", "nothing")
  texts = [r.answer if r.kind in whole else f"\\boxed{{{r.answer}}}" for r in rows]
  scores = math_rewards(texts, [r.truth for r in rows])
  return [r for r, score in zip(rows, scores) if bool(score) != r.correct]


def test_there_are_enough_of_each_label():
  rows = math_labels.labelled()
  assert len(rows) >= 500
  assert min(sum(r.correct for r in rows), sum(not r.correct for r in rows)) >= 200
  by_pair = {(r.answer, r.truth) for r in rows}
  assert len(by_pair) == len({(r.answer, r.truth, r.correct) for r in rows})  # none has both


def test_the_grader_agrees_on_some_of_them():
  rows = math_labels.labelled()[::20]
  assert len(disagreements(rows)) <= 2


@pytest.mark.slow
def test_the_grader_agrees():
  """Prints what it disagrees on: pytest -rP shows it."""
  rows = math_labels.labelled()
  found = disagreements(rows)
  print(f"{len(rows) - len(found)} of {len(rows)} agree; not:", *found, sep="\n")
  assert 1 - len(found) / len(rows) >= LEAST


@pytest.mark.parametrize(
  "answer, tidied",
  [
    ("1\\,080", "1080"),
    ("1,\\,2", "1,\\,2"),
    ("1 1/2", "1\\frac{1}{2}"),
    ("even.", "even"),
    ("1.", "1"),
    ("...", "..."),
    ("no solution", "\\text{no solution}"),
    ("a b", "a b"),
    ("0.1\\overline{6}", "\\frac{15}{90}"),
    ("-2.\\bar{3}", "-\\frac{21}{9}"),
    ("\\sqrt[3]4", "\\sqrt[3]{4}"),
    ("\\binom52", "\\binom{5}{2}"),
    ("", ""),
  ],
)
def test_tidy(answer, tidied):
  assert math_text.tidy(answer) == tidied


@pytest.mark.parametrize(
  "answer, unit",
  [
    ("12 km", "km"),
    ("12\\,\\mathrm{Kilometers}", "km"),
    ("30\\text{ cm}^2", "cm2"),
    ("25 km/h", "km/h"),
    ("25 km/lightyear", None),
    ("1101_{2}", "base 2"),
    ("12 apples", None),
    ("12x", None),
    ("km", None),
    ("12", None),
  ],
)
def test_unit(answer, unit):
  assert math_text.unit(answer) == unit


def test_hostile_answers_are_read_in_linear_time():
  def read(answer):
    math_text.tidy(answer)
    math_text.units_differ(answer, answer)

  for part in (" ", "1 ", "1\\,", "~", "1", "\\sqrt[", "\\text{", "1/", "\\log_", "}", ".", "ab ",
               "\\sin 1", "\\big", "-", "1" * 12 + "."):  # fmt: skip
    for before, after in (("", ""), ("1", ""), ("", "!"), ("\\text{1", "}"), ("1", "km!")):
      assert_linear(lambda n, p=part, b=before, a=after: read(b + p * n + a), 2_500)
