"""Packing: every token once, nothing across rows, the shortest rows that cost least."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_jax.errors import UserError
from trinity_jax.experience import Experience, ExperienceId, Source, StopReason
from trinity_jax.trainer.packing import PackSpec, assign_rows, choose_row_length, pack

LENGTHS = st.lists(st.one_of(st.just(0), st.integers(2, 20)), max_size=24)
FAST = settings(deadline=None, max_examples=60)


def experiences_of(lengths, seed=0):
  rng = np.random.default_rng(seed)
  out = []
  for i, n in enumerate(lengths):
    id = ExperienceId(3, i // 4, i % 4, 0)
    if not n:
      out.append(Experience.failed(id, StopReason.TIMEOUT, {}))
      continue
    mask = rng.random(n) < 0.6
    mask[0] = False
    out.append(
      Experience(
        tokens=1 + np.arange(n) + 100 * i,  # unique over all sequences, never the padding's 0
        action_mask=mask,
        logprobs=np.where(mask, -rng.random(n), 0),
        versions=np.where(mask, i, -1),
        id=id,
        reward=float(i),
        temperature=0.5 + i,
        source=Source.EXPERT if i % 2 else Source.ROLLOUT,
      )
    )
  return out


@given(LENGTHS, st.integers(1, 5), st.sampled_from([(20,), (20, 30, 64), (64,)]))
@FAST
def test_every_token_exactly_once(lengths, rows, row_lengths):
  experiences = experiences_of(lengths)
  b = pack(experiences, PackSpec(row_lengths, rows, 24))
  assert b.tokens.shape[:2] == (-(-24 // rows), rows) and b.tokens.shape[2] in row_lengths
  live = b.segment_ids > 0
  seen = np.zeros(len(lengths), int)
  for m, r in np.ndindex(b.tokens.shape[:2]):
    segments = b.segment_ids[m, r]
    used = int(live[m, r].sum())
    assert (segments[:used] > 0).all() and not segments[used:].any()  # padding only at the end
    for s in range(1, segments.max(initial=0) + 1):
      at = np.flatnonzero(segments == s)
      assert at.size and (np.diff(at) == 1).all()  # contiguous, numbered without a gap
      i = int(b.sequence_index[m, r, at[0]])
      e = experiences[i]
      seen[i] += 1
      assert (b.sequence_index[m, r, at] == i).all()
      np.testing.assert_array_equal(b.positions[m, r, at], np.arange(len(e.tokens)))
      for name in ("tokens", "action_mask", "logprobs", "versions"):
        np.testing.assert_array_equal(getattr(b, name)[m, r, at], getattr(e, name), err_msg=name)
    if m >= b.num_micro:
      assert used == 0
  np.testing.assert_array_equal(seen, np.array(lengths, int) > 0)
  for name, empty in (("tokens", 0), ("positions", 0), ("action_mask", False), ("logprobs", 0),
                      ("versions", -1), ("sequence_index", 0)):  # fmt: skip
    assert (getattr(b, name)[~live] == empty).all(), name
  assert not b.ref_logprobs.any()
  assert b.num_tokens == sum(e.num_actions for e in experiences) == b.action_mask.sum()
  full = int(live.any(-1).sum())
  assert b.num_micro == -(-full // rows)


@given(LENGTHS)
@FAST
def test_table_of_sequences(lengths):
  experiences = experiences_of(lengths)
  b = pack(experiences, PackSpec((20,), 4, 26), pairs=list(range(len(lengths))))
  n = len(lengths)
  good = np.array([e.num_actions > 0 for e in experiences], bool)
  np.testing.assert_array_equal(b.valid, np.r_[good, np.zeros(26 - n, bool)])
  np.testing.assert_array_equal(b.rewards[:n], np.where(good, np.arange(n), 0))
  np.testing.assert_array_equal(b.group[:n], np.arange(n) // 4)  # a failed run keeps its group
  np.testing.assert_array_equal(b.run[:n], np.arange(n) % 4)
  np.testing.assert_array_equal(b.temperature[:n], [e.temperature for e in experiences])
  np.testing.assert_array_equal(b.source[:n], [e.source for e in experiences])
  np.testing.assert_array_equal(b.stop_reason[:n], [e.stop_reason for e in experiences])
  np.testing.assert_array_equal(b.pair, np.r_[np.arange(n), np.full(26 - n, -1)])
  assert b.num_sequences == good.sum()
  assert not b.rewards[n:].any() and (b.temperature[n:] == 1).all()


@given(LENGTHS.filter(any), st.integers(1, 4))
@FAST
def test_rows_are_few_and_order_is_fixed(lengths, rows):
  a, b = assign_rows(lengths, 24), assign_rows(tuple(lengths), 24)
  assert a == b
  filled = [sum(lengths[i] for i in row) for row in a]
  assert max(filled) <= 24 and sorted(i for row in a for i in row) == [
    i for i, n in enumerate(lengths) if n
  ]
  # First fit: no sequence of a later row would have fitted into an earlier one when it came.
  for r, row in enumerate(a):
    for i in row:
      for earlier in range(r):
        before = sum(lengths[j] for j in a[earlier] if (-lengths[j], j) < (-lengths[i], i))
        assert before + lengths[i] > 24
  # Equal lengths keep their order.
  flat = [i for row in a for i in row]
  for n in set(lengths):
    of_length = [i for i in flat if lengths[i] == n]
    assert of_length == sorted(of_length)

  spec = PackSpec((48, 20, 96, 33), rows, 24)
  chosen, plan = choose_row_length(lengths, spec)
  cost = {t: -(-len(assign_rows(lengths, t)) // rows) * t for t in spec.row_lengths}
  assert cost[chosen] == min(cost.values())
  assert chosen == min(t for t in cost if cost[t] == min(cost.values()))
  assert plan == assign_rows(lengths, chosen)


def test_choice_by_hand():
  # Two rows of 10 cost 20; one of 16 costs 16; with two rows a micro-batch, 10 wins.
  assert choose_row_length([8, 8], PackSpec((10, 16), 1, 2)) == (16, [[0, 1]])
  assert choose_row_length([8, 8], PackSpec((10, 16), 2, 2)) == (10, [[0], [1]])
  assert assign_rows([3, 9, 4, 0, 6], 10) == [[1], [4, 2], [0]]


def test_nothing_to_train_on():
  failed = [Experience.failed(ExperienceId(1, 0, r, 0), StopReason.ERROR, {}) for r in range(3)]
  for experiences in ([], failed):
    b = pack(experiences, PackSpec((8, 16), 2, 4))
    assert b.num_micro == b.num_tokens == b.num_sequences == 0
    assert b.tokens.shape == (2, 2, 8) and not b.valid.any() and not b.segment_ids.any()


def test_a_reward_that_is_missing_or_belongs_to_a_failed_run_is_zero():
  good, failed = experiences_of([5, 0])
  good, failed = dataclasses.replace(good, reward=None), dataclasses.replace(failed, reward=7.0)
  assert pack([good, failed], PackSpec((8,), 1, 2)).rewards.tolist() == [0, 0]


def test_errors_name_what_is_wrong():
  experiences = experiences_of([5, 5, 5])
  with pytest.raises(UserError, match=r"3 experiences in one step.*room for 2: runs x"):
    pack(experiences, PackSpec((8,), 1, 2))
  with pytest.raises(UserError, match=r"5 tokens does not fit trainer\.row_lengths=\(3, 4\).*5"):
    pack(experiences, PackSpec((3, 4), 1, 4))
  with pytest.raises(UserError, match="sequence 1 has 9 tokens, more than the row length 8"):
    assign_rows([3, 9], 8)
  first = experiences[1]
  first.action_mask[0] = True
  with pytest.raises(UserError, match="experience 3/0/1/0: its first token is an action"):
    pack(experiences, PackSpec((8,), 1, 4))
