"""Maps, what is said about them, and demonstrations that are wrong as often as they should be."""

from __future__ import annotations

import itertools

import pytest

from trinity_jax.errors import UserError
from trinity_jax.tasks import frozen_lake
from trinity_jax.tasks.frozen_lake import ACTIONS, describe, distances, generate

LAKE = ("SFHF", "FHFF", "FFFH", "HFFG")


def lakes(rows):
  return [tuple(r["environment_args"]["desc"]) for r in rows]


def map_of(row) -> tuple[str, ...]:
  text = row["messages"][0]["content"][:16]
  return tuple(text[i : i + 4] for i in range(0, 16, 4))


def test_what_a_turn_shows():
  assert describe(LAKE, 0, first=True) == "SFHFFHFFFFFHHFFG" + "a#FF#"
  assert describe(LAKE, 1) == "bSHH#"
  assert describe(LAKE, 14) == "oF#GF"


def test_distances_and_the_right_action():
  far = distances(LAKE)
  assert far[0] == 6 and far[15] == 0 and far[14] == 1 and far[2] > 99
  assert frozen_lake._shortest(LAKE) == "DDRRDR"
  assert frozen_lake.right_action(LAKE, 1, far) == ACTIONS.index("L")  # back from a dead end


def test_held_out_maps_are_in_no_training_split():
  held = set(lakes(generate("eval")))
  assert len(held) == 100
  assert all(distances(lake)[0] < 99 for lake in held)
  assert generate("eval", wrong_fraction=0.1, rows=7) == generate("eval")
  assert not held & set(lakes(generate("rl", rows=1000)))
  assert not held & {map_of(r) for r in generate("sft", rows=1000)}
  assert generate("eval", seed=1) != generate("eval")
  assert generate("rl", rows=20) == generate("rl", rows=20)


def test_demonstrations():
  rows = generate("sft", rows=3000, wrong_fraction=0.6)
  assert len(rows) == 3000
  differ = wrong = 0
  for row in rows:
    lake, messages = map_of(row), row["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2) + ["user"]
    cell = ord(messages[-1]["content"][-5]) - ord("a")
    assert messages[-1]["content"].endswith(describe(lake, cell))
    right = ACTIONS[frozen_lake.right_action(lake, cell, distances(lake))]
    blind = ACTIONS[frozen_lake.wrong_action(4, cell)]
    assert row["response"] in (right, blind)
    if right != blind:
      differ, wrong = differ + 1, wrong + (row["response"] == blind)
  assert differ > 300 and 0.55 < wrong / differ < 0.65


def test_the_blind_rule_reaches_some_goals():
  """What imitation can reach: the share of held-out maps whose straight way is free."""

  def blind(lake):
    way = itertools.chain((0, c) for c in range(4))
    return all(lake[r][c] != "H" for r, c in [*way, (1, 3), (2, 3)])

  share = sum(map(blind, lakes(generate("eval", held_out=100)))) / 100
  assert 0.15 <= share <= 0.4


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (dict(split="test"), "split 'test': expected one of eval, rl, sft"),
    (dict(size=9), "size = 9: expected 3 to 5"),
    (dict(frozen=0.1), "frozen = 0.1: expected 0.3 to 1.0"),
    (dict(wrong_fraction=2), "wrong_fraction = 2: expected 0.0 to 1.0"),
    (dict(max_turns=3), "max_turns = 3: the goal is 6 steps away"),
    (dict(size=3, frozen=1.0), "there are only 1 maps"),
    (dict(rows=-1), "rows = -1"),
  ],
)
def test_arguments_out_of_range(args, message):
  with pytest.raises(UserError, match=message):
    generate(**{"split": "eval", **args})
