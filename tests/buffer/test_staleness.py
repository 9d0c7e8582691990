"""What is too old to train on."""

from __future__ import annotations

import numpy as np
from groups import experience, failed_group
from hypothesis import given
from hypothesis import strategies as st

from trinity_jax.buffer.staleness import NEVER, mask_group, mask_stale, newest_version
from trinity_jax.experience import Source

versions = st.lists(st.integers(0, 6), min_size=1, max_size=5)


@given(versions, st.integers(-2, 8))
def test_tokens_before_the_bound_are_masked(versions, oldest):
  before = experience((1, 0, 0, 0), versions)
  after, masked = mask_stale(before, oldest)
  stale = np.array([False, False] + [v < oldest for v in versions])
  assert masked == stale.sum()
  assert (after.action_mask == (before.action_mask & ~stale)).all()
  assert (after.versions == np.where(stale, -1, before.versions)).all()
  assert (after.logprobs == np.where(stale, 0, before.logprobs)).all()
  assert (after.tokens == before.tokens).all() and after.reward == before.reward
  assert (after is before) == (masked == 0)


@given(st.lists(versions, min_size=1, max_size=4), st.integers(-2, 8))
def test_a_group_is_stale_when_no_token_is_left(group, oldest):
  experiences = [experience((1, 0, i, 0), v) for i, v in enumerate(group)]
  left = sum(e.num_actions for e in mask_group(experiences, oldest)[0])
  assert (newest_version(experiences) < oldest) == (left == 0)


def test_what_never_becomes_stale():
  expert = experience((1, 0, 0, 0), (-1, -1), source=Source.EXPERT)
  assert mask_stale(expert, 100) == (expert, 0)
  assert newest_version([expert, experience((1, 0, 1, 0))]) == NEVER
  assert newest_version(failed_group(1, 0)) == NEVER
  assert newest_version([*failed_group(1, 0), experience((1, 0, 2, 0), (3, 4))]) == 4
  rollout = experience((1, 0, 0, 0))
  assert mask_stale(rollout, None) == (rollout, 0)
