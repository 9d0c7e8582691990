"""math_reward: what counts as the answer, on real rows and on hostile text."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trinity_jax.errors import UserError
from trinity_jax.explorer import rewards
from trinity_jax.explorer.rewards import answers
from trinity_jax.explorer.rewards import math as math_rewards_module
from trinity_jax.explorer.rewards.grader_pool import FAILURES, GraderPool

ROOT = Path(__file__).parents[3]
GSM8K = Path(os.environ.get("TRINITY_GSM8K", ROOT.parent / "shared" / "data" / "gsm8k"))


@pytest.fixture(scope="module")
def gsm8k():
  file = GSM8K if GSM8K.suffix == ".jsonl" else GSM8K / "train.jsonl"
  if not file.is_file():
    pytest.skip(f"GSM8K is not at {file}; set TRINITY_GSM8K to its folder or to train.jsonl")
  return [json.loads(line)["answer"] for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
  "response, truth, score",
  [
    ("so 24+48=72.\n#### 72", "reasoning\n#### 72", 1.0),
    ("#### 73", "#### 72", 0.0),
    ("72", "72", 1.0),
    ("The answer is 72.", "72", 1.0),
    ("The answer is 27.", "72", 0.0),
    ("\\boxed{72}", "72", 1.0),
    ("We get $\\boxed{\\frac{1}{2}}$.", "0.5", 1.0),
    ("$\\boxed{x^2 + 2x + 1}$", "(x+1)^2", 1.0),
    ("$\\boxed{x^2 + 2x + 2}$", "(x+1)^2", 0.0),
    ("\\boxed{\\dfrac{\\sqrt{8}}{2}}", "$\\sqrt{2}$", 1.0),
    ("#### 1,080", "1080", 1.0),
    ("#### $1,080.00", "#### 1,080", 1.0),
    ("#### 40 minutes.", "40", 1.0),
    ("#### -5", "5", 0.0),
    ("#### \u22125", "-5", 1.0),
    ("#### **72**", "72", 1.0),
    ("#### Final answer: 72", "72", 1.0),
    # The later mark counts, and only what it marks.
    ("\\boxed{71}\n#### 72", "72", 1.0),
    ("#### 72\nno: \\boxed{71}", "72", 0.0),
    ("\\boxed{72} or rather \\boxed{7}", "72", 0.0),
    ("\\boxed{\\boxed{72}}", "72", 1.0),
    ("#### Step 1: 3*4=12\nso it is 72", "72", 1.0),
    ("#### 1. Add\n3+4=7\n#### 2. Multiply\n7*6=42\nThe answer is 42.", "42", 1.0),
    # Scales are no units, nor is a letter that stands for none, nor a sentence.
    ("\\boxed{2 million}", "2 thousand", 0.0),
    ("\\boxed{2,000,000}", "2 million", 1.0),
    ("\\boxed{1.5 million dollars}", "\\$1,500,000", 1.0),
    ("\\boxed{3 x}", "3 y", 0.0),
    ("\\boxed{3 x}", "3x", 1.0),
    ("\\boxed{5 x}", "5", 0.0),
    ("\\boxed{6 C}", "6 F", 0.0),
    ("\\boxed{5 pm}", "5 am", 0.0),
    ("\\boxed{72 is not the answer}", "72", 0.0),
    ("\\boxed{12 apples}", "12", 1.0),
    ("\\boxed{12 m}", "12", 1.0),
    ("\\boxed{40 miles per hour}", "40", 1.0),
    # Neither an empty mark nor a list of guesses is an answer.
    ("24+48=72\n#### ", "72", 0.0),
    ("24+48=72\n#### unknown", "72", 0.0),
    ("\\boxed{}", "72", 0.0),
    ("#### 70 71 72", "72", 0.0),
    ("\\boxed{71, 72}", "72", 0.0),
    ("\\boxed{71 or 72}", "72", 0.0),
    ("#### 71 or 72", "72", 0.0),
    ("#### 71. 72", "72", 0.0),
    ("\\boxed{71 $72$}", "72", 0.0),
    ("\\boxed{ \\$72 }", "72", 1.0),
    ("\\boxed{72\\text{ apples}}", "72", 1.0),
    ("\\boxed{72 \\%}", "72", 1.0),
    ("\\boxed{(1,2)}", "(1, 2)", 1.0),
    ("\\boxed{(2,1)}", "(1, 2)", 0.0),
    ("\\boxed{\\text{even}}", "even", 1.0),
    ("\\boxed{x = 3}", "3", 1.0),
    ("", "72", 0.0),
    ("no idea", "72", 0.0),
  ],
)
def test_answers(response, truth, score):
  assert rewards.math_reward(response, truth) == score


def corrupted(solution: str, rng: random.Random) -> tuple[str, str]:
  """Returns (how, solution) with its final number made wrong in one of many ways."""
  head, number = solution.rsplit("#### ", 1)
  number = number.strip().replace(",", "")
  value = float(number)
  ways = {
    "plus one": f"{head}#### {value + 1:g}",
    "minus one": f"{head}#### {value - 1:g}",
    "other sign": f"{head}#### {-value:g}" if value else f"{head}#### 7",
    "times ten": f"{head}#### {number}0" if value else f"{head}#### 10",
    "digit in front": f"{head}#### 3{number.lstrip('-')}",
    "a half more": f"{head}#### {value + 0.5:.1f}",
    "a hundredth more": f"{head}#### {value + 0.01:.2f}",
    "nothing": f"{head}#### ",
    "a word": f"{head}#### unknown",
    "two guesses": f"{head}#### {value + 1:g} or {number}",
    "boxed": f"{head}\\boxed{{{value + 2:g}}}",
    "later box": f"{solution}\nNo, it is \\boxed{{{value + 10:g}}}.",
  }
  how = rng.choice(sorted(ways))
  return how, ways[how]


def test_gsm8k_reference_answers_are_correct_and_corrupted_ones_are_not(gsm8k):
  rng = random.Random(0)
  wrong = [(i, *corrupted(gsm8k[i], rng)) for i in rng.sample(range(len(gsm8k)), 200)]
  assert len({how for _, how, _ in wrong}) == 12
  responses = [*gsm8k, *(text for *_, text in wrong)]
  truths = [*gsm8k, *(gsm8k[i] for i, *_ in wrong)]
  before = rewards.grading_counts()
  scores = rewards.math_rewards(responses, truths)
  missed = [t[-60:] for t, s in zip(gsm8k, scores) if s != 1.0]
  accepted = [w for w, s in zip(wrong, scores[len(gsm8k) :]) if s != 0.0]
  assert len(gsm8k) == 7473 and not missed
  assert not accepted
  failed = {k: v - before.get(k, 0) for k, v in rewards.grading_counts().items() if k in FAILURES}
  assert not any(failed.values()), failed


HOSTILE = {
  "tower": "9**9**9**9",
  "boxed tower": "\\boxed{9^{9^{9^9}}}",
  "nested fractions": "\\boxed{" + "\\frac{1}{" * 5000 + "2" + "}" * 5001,
  "parentheses": "(" * 10**5,
  "boxed parentheses": "\\boxed{" + "(" * 10**5 + "}",
  "huge power": "#### 10^{10^{10}}",
  "factorial": "\\boxed{100000000!}",
  "digits": "#### " + "9" * 10**5,
  "plain digits": "9" * 10**5,
  "long sum": "1+" * 20000 + "1",
  "endless series": "$\\sum_{n=1}^{10^{12}} n^{n}$",
  "open boxes": "\\boxed{" * 20000,
  "hashes": "#### 1\n" * 30000 + "#### ",
  "dollars": "$" * 50000,
  "backslashes": "\\" * 50001,
  "nul and surrogate": "\0\ud800\udfff",
  "code": "#### __import__('os').system('exit 72')",
}


def test_hostile_responses_end_in_time_as_zero_and_are_counted():
  grader = Path(math_rewards_module.__file__).with_name("math_grader.py")
  with GraderPool(grader, workers=2, cpu_seconds=0.5) as pool:
    requests = [math_rewards_module.request(text, "72") for text in HOSTILE.values()]
    grades = dict(zip(HOSTILE, pool.grade_all(requests)))
    assert {k: g.score for k, g in grades.items()} == dict.fromkeys(HOSTILE, 0.0)
    assert pool.grade(*math_rewards_module.request("#### 72", "72")).score == 1.0
    assert sum(pool.counts().values()) == len(HOSTILE) + 1
  for name in ("tower", "boxed tower", "huge power", "factorial", "endless series"):
    assert grades[name].reason == "timeout", (name, grades[name])
  assert not {g.reason for g in grades.values()} & {"lost", "killed", "hang"}


def test_works_from_threads_and_coroutines_alike():
  scores = []
  threads = [
    threading.Thread(target=lambda: scores.append(rewards.math_reward("#### 3", "3")))
    for _ in range(4)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  assert scores == [1.0] * 4

  async def main():
    pairs = [(f"#### {i}", "3") for i in range(8)]
    return await asyncio.gather(*(rewards.math_reward_async(r, t) for r, t in pairs))

  assert asyncio.run(main()) == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("truth", ["", "  ", "reasoning\n#### ", "\\boxed{}"])
def test_a_truth_without_an_answer_is_the_users_error(truth):
  with pytest.raises(UserError, match="holds no answer.*truth_key"):
    rewards.math_reward("72", truth)


def test_the_pool_starts_with_the_first_call_and_the_process_exits_cleanly():
  code = (
    "import sys, threading\n"
    "from trinity_jax.explorer.rewards import math_reward\n"
    "heavy = {'math_verify', 'sympy', 'jax'} & set(sys.modules)\n"
    "before = threading.active_count()\n"
    "print(sorted(heavy), before, math_reward('#### 1', '1'), threading.active_count())\n"
  )
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  assert (out.stdout.strip(), out.stderr, out.returncode) == ("[] 1 1.0 3", "", 0)


@pytest.mark.parametrize(
  "text, answer",
  [
    ("no mark", None),
    ("\\boxed{a{b}c}", "a{b}c"),
    ("\\boxed {7}", "7"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("\\boxed{7} \\boxed{8", "7"),
    ("#### 7\n\n", "7"),
    ("#### \\frac{1}{2}\nthen more", "\\frac{1}{2}"),
    ("#### Conclusion\nmore", None),
    ("#### Conclusion", "Conclusion"),
  ],
)
def test_final_answer(text, answer):
  assert answers.final_answer(text) == answer


@pytest.mark.parametrize(
  "text, number",
  [
    ("1,234,567.5", "1234567.5"),
    ("-$3", "-3"),
    ("$-3", "-3"),
    (".5", ".5"),
    ("25%", "25"),
    ("12 apples", "12"),
    ("1,23", None),
    ("1 2", None),
    ("x", None),
    ("3/4", None),
    ("", None),
    ("\u0663", None),
  ],
)
def test_number(text, number):
  assert answers.number(text) == number
