"""The host's picture of the slots against a cache that is written as it says."""

from __future__ import annotations

from concurrent.futures import Future

import hypothesis.strategies as st
import numpy as np
import pytest
from growth import assert_linear
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trinity_jax.sampler.prefix import BLOCK
from trinity_jax.sampler.request import Request
from trinity_jax.sampler.sampling import request_key
from trinity_jax.sampler.slots import MIXED, WORTH_COPYING, Open, Slots, Stage

LONGEST = 400


def open_(prompt, salt=(), i=0) -> Open:
  tokens = np.array(prompt, np.int32)
  return Open(Request(tokens, request_key(i), (i,), 50, (), salt=salt), Future(), None)


class Cache:
  """What each slot really holds: (token, version) per entry."""

  def __init__(self, slots: Slots):
    self.slots, self.held = slots, [[] for _ in slots]

  def write(self, slot, start, tokens, version):
    assert start <= len(self.held[slot])
    self.held[slot][start:] = [(int(t), version) for t in tokens]

  def holds(self, slot, tokens, version) -> bool:
    return self.held[slot][: len(tokens)] == [(int(t), version) for t in tokens]

  def copy(self, source, target, n):
    assert self.slots.shard(source) == self.slots.shard(target) and source is not target
    assert len(self.held[source.index]) >= n, "copied before it was there"
    self.held[target.index] = self.held[source.index][:n]

  def extend(self, chunks, T):
    """As the engine's; the prompts that are complete start."""
    slots, rows = self.slots, set()
    assert T in slots.prompt_lengths
    for c in chunks:
      assert 1 <= c.count <= T and c.row < slots.prompt_counts[-1]
      rows.add((slots.shard(c.slot), c.row))
      assert self.holds(c.slot.index, c.slot.tokens[: c.start], c.slot.context)
      self.write(c.slot.index, c.start, c.slot.tokens[c.start :][: c.count], c.slot.context)
    assert len(rows) == len(chunks) == len({c.slot for c in chunks})
    done = slots.advance(chunks)
    for first, _, twins in done:
      for twin in twins:
        assert twin.context == first.context
        self.copy(first, twin, len(twin.tokens))
    slots.started([s for first, _, twins in done for s in (first, *twins)])
    return done


class Machine(RuleBasedStateMachine):
  @initialize(shards=st.sampled_from([1, 2, 3]), per=st.integers(1, 4), rows=st.integers(1, 3))
  def begin(self, shards, per, rows):
    self.slots = Slots(shards * per, shards, (rows,), (20, 90))
    self.cache, self.version, self.count, self.said = Cache(self.slots), 0, 0, []

  @rule(
    head=st.integers(0, 2), shared=st.integers(0, 300), tail=st.integers(1, 99),
    salt=st.sampled_from([(), (1,)]), again=st.booleans(), data=st.data(),
  )  # fmt: skip
  def assign(self, head, shared, tail, salt, again, data):
    prompt = [head] * shared + [10 + data.draw(st.integers(0, 2))] * tail
    if again and self.said:  # the next turn of a dialogue, or the same question
      prompt = [*data.draw(st.sampled_from(self.said)), *prompt[: data.draw(st.integers(0, 40))]]
    o = open_(prompt[:LONGEST], salt, self.count)
    room = bool(self.slots.at(Stage.FREE))
    assert self.slots.assign(o, self.version) == room
    self.count += room
    self.said = [*self.said, prompt[:LONGEST]][-6:]

  @rule()
  def copy(self):
    for source, target, n in self.slots.copies():
      assert n >= WORTH_COPYING and n < len(target.tokens)
      self.cache.copy(source, target, n)

  @rule()
  def extend(self):
    self.copy()
    chunks, T = self.slots.chunks()
    ready = [s for s in self.slots.at(Stage.PREFILL) if s.source is None]
    assert bool(chunks) == bool(ready)
    if chunks:
      for first, _, twins in self.cache.extend(chunks, T):
        assert all(np.array_equal(t.tokens, first.tokens) for t in twins)

  @precondition(lambda self: self.slots.at(Stage.DECODE))
  @rule(data=st.data(), n=st.integers(1, 40), keep=st.booleans())
  def finish(self, data, n, keep):
    slot = data.draw(st.sampled_from(self.slots.at(Stage.DECODE)))
    made = np.full(n, 5, np.int32)
    # Decoding writes all but the last; of the version that decodes.
    self.cache.write(slot.index, len(slot.tokens), made[:-1], self.version)
    slot.generated = n
    held = np.concatenate([slot.tokens, made[:-1]])
    self.said = [*self.said, [*held.tolist(), 5]][-6:]
    self.slots.free(slot, held if keep else None)

  @precondition(lambda self: any(s.open for s in self.slots))
  @rule(data=st.data())
  def give_up(self, data):
    slot = data.draw(st.sampled_from([s for s in self.slots if s.open]))
    self.slots.free(slot, None)

  @rule()
  def swap(self):
    for s in self.slots.at(Stage.PREFILL):
      self.slots.free(s, None)
    self.slots.new_version()
    self.version += 1
    assert len(self.slots.index) == 0

  @invariant()
  def consistent(self):
    if not hasattr(self, "slots"):
      return
    slots = self.slots
    opens = [s.open for s in slots if s.open]
    assert len(set(opens)) == len(opens), "a request in two slots"
    for d in range(slots.shards):  # kept as they change, not looked for: there may be thousands
      free = [s for s in slots.at(Stage.FREE) if slots.shard(s) == d]
      assert slots._room(d) == len(free)
      assert not free or slots._least(d) == min((s.touched, s.index) for s in free)
    prefilling = slots.at(Stage.PREFILL)
    assert slots._waiting == sorted((s.touched, s.index) for s in prefilling if s.source is None)
    after = {(s.source[0], s.index) for s in prefilling if s.source is not None}
    assert {(a, b) for a, others in slots._after.items() for b in others} == after
    assert all(slots._after.values())
    blocks = 0
    for s in slots:
      assert (s.open is None) == (s.stage is Stage.FREE)
      if s.stage is not Stage.DECODE:
        assert s.filled == 0 or s.context == self.version
        assert self.cache.holds(s.index, s.tokens[: s.filled], self.version)
      elif s.context != MIXED:
        assert self.cache.holds(s.index, s.tokens, s.context)
      if s.stage is Stage.PREFILL:
        assert s.filled < len(s.tokens)
      if s.source is not None:
        source, n = slots.all[s.source[0]], s.source[1]
        assert s.stage is Stage.PREFILL and source.stage is not Stage.FREE
        assert slots.shard(source) == slots.shard(s) and s.context == source.context
        assert np.array_equal(source.tokens[:n], s.tokens[:n])
      if s.stage is Stage.FREE and not s.filled:
        assert s.index not in slots.index._held, "the index knows what no slot holds"
      blocks += len(s.tokens) // BLOCK
    assert len(slots.index) <= blocks, "the index knows more than the slots hold"


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestSlots = Machine.TestCase


def test_the_work_is_linear_in_the_number_of_slots():
  """Looking at every slot for each prompt, the host needed seconds to fill thousands of them."""

  def fill(n):
    slots = Slots(n, 1, (8,), (16,))
    opens = [open_([1 + i % 50] * 14 + [i // 50, i % 2], i=i) for i in range(n)]
    for o in opens:
      slots.assign(o, 0)
    for s in slots.at(Stage.PREFILL)[::2]:
      slots.free(s, None)
    slots.copies()
    while (chunks := slots.chunks()[0]):
      done = slots.advance(chunks)
      slots.started([s for first, _, twins in done for s in (first, *twins)])
    for s in slots:
      if s.open is not None:
        slots.free(s, None)

  assert_linear(fill, 400)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_long_prompt_and_many_short_ones_take_turns(rows):
  slots = Slots(6, 1, (rows,), (16, 64))
  cache = Cache(slots)
  slots.assign(open_([1] * 640, i=0), 0)
  assigned, ended, extends = {}, [], 0
  for i in range(1, 400):
    while slots.at(Stage.FREE):
      o = open_([2 + i % 7] * 12 + [i] * 4 + [extends], i=i)
      slots.assign(o, 0)
      assigned[o] = extends
    cache.extend(*slots.chunks())
    extends += 1
    for s in slots.at(Stage.DECODE):
      ended.append((s.open, extends - assigned.get(s.open, 0)))
      slots.free(s, None)
    if any(len(o.request.tokens) == 640 for o, _ in ended):
      break
  # Ten chunks; each waits for at most the five others, shared by `rows`.
  assert extends <= 10 * (5 // rows + 1)
  assert len(ended) > 10 and max(n for o, n in ended if o in assigned) <= 2 * (5 // rows + 1)


def test_a_group_shares_one_prefill_in_one_shard():
  slots = Slots(8, 2, (2,), (32,))
  opens = [open_([3] * 20, i=i) for i in range(4)]
  for o in opens:
    assert slots.assign(o, 0)
  members = [s for s in slots if s.open]
  assert len({slots.shard(s) for s in members}) == 1
  (done,) = Cache(slots).extend(*slots.chunks())
  assert {done[0], *done[2]} == set(members) and slots.reused == 3 * 20


def test_an_aborted_leader_leaves_its_twins_to_prefill_themselves():
  slots = Slots(4, 1, (4,), (32,))
  for i in range(3):
    slots.assign(open_([3] * 20, i=i), 0)
  leader = slots.all[0]
  assert [s.twin for s in slots] == [False, True, True, False]
  slots.free(leader, None)
  done = Cache(slots).extend(*slots.chunks())
  assert len(done) == 2 and all(not twins for _, _, twins in done)


def test_the_least_recently_used_prefix_goes_first():
  slots = Slots(3, 1, (4,), (64,))
  cache = Cache(slots)
  for head in (1, 2, 3):
    slots.assign(open_([head] * 40), 0)
    cache.extend(*slots.chunks())
  for index in (1, 0, 2):  # the order in which they end
    slots.free(slots.all[index], slots.all[index].tokens)
  slots.assign(open_([9] * 40), 0)
  assert slots.all[1].open is not None
  slots.assign(open_([1] * 40 + [7]), 0)  # continues where its prefix is
  assert slots.all[0].open is not None and slots.all[0].filled == 40
