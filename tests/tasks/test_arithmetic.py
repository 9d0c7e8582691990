"""The quickstart's data: what is held out stays out, what is wrong is wrong in one way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_jax.config import TasksetConfig
from trinity_jax.errors import UserError
from trinity_jax.explorer.rewards import arithmetic_reward
from trinity_jax.tasks import load_taskset
from trinity_jax.tasks.arithmetic import generate, wrong_sum


def pair(row):
  a, b = row["prompt"].removesuffix("=").split("+")
  return int(a), int(b)


def test_the_wrong_rule_forgets_the_carry_out_of_the_ones():
  a, b = np.array([27, 20, 75, 99, 15]), np.array([58, 31, 58, 99, 15])
  assert wrong_sum(a, b).tolist() == [75, 51, 123, 188, 20]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), digits=st.sampled_from([2, 3]))
def test_held_out_pairs_occur_in_neither_training_set(seed, digits):
  held = {pair(row) for row in generate("eval", seed=seed, digits=digits)}
  assert len(held) == 200
  assert len({tuple(sorted(p)) for p in held}) == 200
  either_order = held | {(b, a) for a, b in held}
  for split in ("sft", "rl"):
    rows = generate(split, seed=seed, digits=digits, rows=3000)
    assert len(rows) == 3000
    assert not either_order & {pair(row) for row in rows}


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), wrong=st.sampled_from([0.0, 0.5, 0.6, 0.7, 1.0]))
def test_demonstrations_are_right_or_follow_the_rule(seed, wrong):
  rows = generate("sft", seed=seed, wrong_fraction=wrong, rows=4000)
  carried = followed = 0
  for row in rows:
    a, b = pair(row)
    assert 10 <= a <= 99 and 10 <= b <= 99
    assert row["prompt"] == f"{a}+{b}=" and row["answer"] == str(a + b)
    if a % 10 + b % 10 < 10:
      assert row["response"] == row["answer"]
    else:
      assert row["response"] in (str(a + b), str(a + b - 10))
      carried, followed = carried + 1, followed + (row["response"] != row["answer"])
  assert carried / len(rows) == pytest.approx(0.45, abs=0.05)
  assert followed / carried == pytest.approx(wrong, abs=0.06)


def test_imitation_alone_levels_off_between_the_required_bounds():
  """Answering with each held-out sum's most likely demonstration, for the quickstart's seeds."""
  for seed in range(3):
    rows = generate("eval", seed=seed)
    a, b = np.array([pair(row) for row in rows]).T
    answers = wrong_sum(a, b)
    right = [arithmetic_reward(str(x), row["answer"]) for x, row in zip(answers, rows)]
    assert 0.45 <= np.mean(right) <= 0.65


def test_the_whole_default_sft_set_has_the_rule_as_its_mode():
  rows = generate("sft")
  assert len(rows) == 20_000
  by_ones = {}
  for row in rows:
    a, b = pair(row)
    if a % 10 + b % 10 >= 10:
      by_ones.setdefault((a % 10, b % 10), []).append(row["response"] != row["answer"])
  assert len(by_ones) == 45
  assert all(0.5 < np.mean(flags) < 0.7 for flags in by_ones.values())


def test_splits_are_functions_of_their_arguments():
  assert generate("sft", seed=1, rows=50) == generate("sft", seed=1, rows=50)
  assert generate("sft", seed=1, rows=50) != generate("sft", seed=2, rows=50)
  assert generate("eval", seed=1) != generate("eval", seed=2)
  assert generate("eval", seed=1) == generate("eval", seed=1, wrong_fraction=0.1, rows=3)
  sft, rl = generate("sft", rows=50), generate("rl", rows=50)
  assert [pair(r) for r in sft] != [pair(r) for r in rl]
  assert all("response" not in row for row in rl + generate("eval"))


def test_as_a_taskset():
  args = {"split": "sft", "rows": 30}
  config = TasksetConfig(generate="trinity_jax.tasks.arithmetic:generate", generate_args=args)
  taskset = load_taskset(config, seed=3, require=("truth", "response"))
  rows = generate("sft", seed=3, rows=30)
  assert [t.response for t in taskset.tasks] == [row["response"] for row in rows]
  assert [t.truth for t in taskset.tasks] == [row["answer"] for row in rows]


@pytest.mark.parametrize("digits, held_out", [(1, 27), (2, 2047), (4, 200), (6, 200)])
def test_other_digits_and_extreme_hold_outs(digits, held_out):
  rows = generate("eval", digits=digits, held_out=held_out)
  assert len({tuple(sorted(pair(r))) for r in rows}) == held_out
  assert len(generate("rl", digits=digits, held_out=held_out, rows=500)) == 500


@pytest.mark.parametrize(
  "args, message",
  [
    ({"split": "train"}, "split 'train': expected one of eval, preferences, rl, sft, text"),
    ({"split": "rl", "digits": 0}, "digits = 0: expected 1 to 6"),
    ({"split": "rl", "digits": 1}, "held_out = 200: expected 1 to 27, half of the 55 pairs"),
    ({"split": "rl", "held_out": 0}, "held_out = 0"),
    ({"split": "sft", "wrong_fraction": 1.5}, "wrong_fraction = 1.5: expected 0.0 to 1.0"),
    ({"split": "sft", "rows": -1}, "rows = -1"),
  ],
)
def test_bad_arguments_are_named(args, message):
  with pytest.raises(UserError, match=message):
    generate(**args)
