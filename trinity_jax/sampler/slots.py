"""The host's picture of the slots: who sits where, what the cache holds, what to prefill next.

Bookkeeping without a device: the scheduler asks it what to do and does it. Every choice is a
function of the order of events, never of a clock.
"""

from __future__ import annotations

import bisect
import dataclasses
import enum
import heapq
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import numpy as np

from trinity_jax.sampler.cache import bucket_for
from trinity_jax.sampler.prefix import BLOCK, PrefixIndex
from trinity_jax.sampler.request import Completion, Request

WORTH_COPYING = 64  # tokens; computing fewer again costs less than a copy and waiting for it
NEVER = float("inf")
MIXED = -1  # context of a cache that several versions have written


@dataclasses.dataclass(eq=False)
class Open:
  """A request that was accepted and has not ended.

  Attributes:
    parts: what was sampled in earlier stays in a slot.
    home: the sampler whose participants it belongs to; keeper: the one that works on it.
    sink: called with every new stretch of tokens, for streams.
    given_up: ends as soon as its keeper sees it.
  """

  request: Request
  future: Future
  home: Any
  parts: list[Completion] = dataclasses.field(default_factory=list)
  sink: Callable[[Completion], None] | None = None
  keeper: Any = None
  given_up: bool = False

  @property
  def sampled(self) -> int:
    return sum(len(p.tokens) for p in self.parts)

  @property
  def left(self) -> int:
    """Most tokens that may still be sampled."""
    return self.request.limit - self.sampled

  @property
  def order(self) -> tuple:
    """Priority, then those that were under way, then the order asked for."""
    return self.request.priority, not self.parts, self.request.order

  @property
  def ends(self) -> float:
    """time.monotonic() when it is to be dropped: its deadline, or at once."""
    if self.given_up:
      return -NEVER
    return NEVER if self.request.deadline is None else self.request.deadline

  def tokens(self) -> np.ndarray:
    """Prompt and what was sampled so far."""
    return np.concatenate([self.request.tokens, *(p.tokens for p in self.parts)]).astype(np.int32)


class Stage(enum.Enum):
  FREE = 0  # may hold a prefix for a later turn
  PREFILL = 1
  DECODE = 2


@dataclasses.dataclass(eq=False)
class Slot:
  """One slot.

  Attributes:
    tokens: what the cache must hold before decoding begins.
    filled: entries of `tokens` that it holds.
    source: (slot, entries): copies them from there once they exist. With all entries of an equal
      prompt (a twin), its logits are shared as well.
    touched: when it last advanced; the longest waiting goes first.
    context: version that computed the cache, or MIXED.
    generated: tokens sampled in this stay; sent: how many of them a stream has been given.
    mixed: per dispatch, (tokens sampled, whether in a context of another version).
  """

  index: int
  stage: Stage = Stage.FREE
  open: Open | None = None
  tokens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
  filled: int = 0
  source: tuple[int, int] | None = None
  touched: int = 0
  context: int = MIXED
  generated: int = 0
  sent: int = 0
  mixed: list[tuple[int, bool]] = dataclasses.field(default_factory=list)

  @property
  def length(self) -> int:
    """Cache entries in use while decoding; the newest token is not there yet."""
    return len(self.tokens) + self.generated - 1

  @property
  def twin(self) -> bool:
    return self.source is not None and self.source[1] == len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Chunk:
  """One row of an extend: tokens[start : start + count] of a slot."""

  slot: Slot
  row: int  # within the shard
  start: int
  count: int


class Slots:
  """All slots of an engine.

  Args:
    count: slots; shards: equal parts of them, each with a cache of its own.
    prompt_counts, prompt_lengths: rows per shard and lengths that extends are compiled for.
  """

  def __init__(self, count: int, shards: int, prompt_counts, prompt_lengths):
    self.all = [Slot(i) for i in range(count)]
    self.per_shard, self.shards = count // shards, shards
    self.prompt_counts, self.prompt_lengths = prompt_counts, prompt_lengths
    self.index = PrefixIndex()
    self.reused = 0  # prompt tokens found in the cache
    self._first: dict[tuple, list[Slot]] = {}  # (salt, prompt) -> who prefills it, one a shard
    self._clock = 0
    # What `stage` says of each slot, so that none is looked for among thousands. Free ones, by
    # shard: those that hold nothing, as a heap of their numbers; those that hold a prefix, the
    # least recent first.
    whole = [range(d * self.per_shard, (d + 1) * self.per_shard) for d in range(shards)]
    self._blank = [list(numbers) for numbers in whole]
    self._kept: list[dict[int, None]] = [{} for _ in whole]
    # Those in PREFILL: the ones that wait for nobody, as (touched, index), the longest waiting
    # first; the others by the slot that they wait for.
    self._waiting: list[tuple[int, int]] = []
    self._after: dict[int, dict[int, Slot]] = {}

  def __iter__(self):
    return iter(self.all)

  def at(self, stage: Stage) -> list[Slot]:
    return [s for s in self.all if s.stage is stage]

  def shard(self, slot: Slot | int) -> int:
    return (slot if isinstance(slot, int) else slot.index) // self.per_shard

  def local(self, slot: Slot | int) -> int:
    """A slot's number within its shard."""
    return (slot if isinstance(slot, int) else slot.index) % self.per_shard

  def _tick(self) -> int:
    self._clock += 1
    return self._clock

  # --- taking and leaving ------------------------------------------------------------------------

  def assign(self, open_: Open, version: int) -> bool:
    """Gives a request a slot, where possible one whose cache already holds its beginning.

    Returns whether there was a free one.
    """
    with_room = {d for d in range(self.shards) if self._room(d)}
    if not with_room:
      return False
    tokens = open_.tokens()
    salt = (version, *open_.request.salt)
    prompt = (salt, tokens.tobytes())
    slot, source, filled = self._place(with_room, prompt, tokens)
    self._take(slot)
    slot.stage, slot.open, slot.tokens = Stage.PREFILL, open_, tokens
    slot.filled, slot.source, slot.context = filled, source, version
    slot.generated, slot.sent, slot.mixed, slot.touched = 0, 0, [], self._tick()
    self.reused += source[1] if source else filled
    if source:
      self._after.setdefault(source[0], {})[slot.index] = slot
    else:
      self._wait(slot)
    if not slot.twin:
      self._first.setdefault(prompt, []).append(slot)
    self.index.put(slot.index, salt, tokens)
    return True

  def _place(self, with_room: set[int], prompt: tuple, tokens):
    """(slot, source, entries it holds already), in one of the shards with room."""
    for first in self._first.get(prompt, ()):
      if self.shard(first) in with_room:
        return self._fresh({self.shard(first)}), (first.index, len(tokens)), 0
    # The last token must be computed: its logits are what sampling starts from.
    for index, common in self.index.find(prompt[0], tokens[:-1]):
      held = self.all[index]
      common = min(common, len(held.tokens) if held.stage is Stage.PREFILL else held.filled)
      if common < BLOCK:
        continue
      if held.stage is Stage.FREE:
        return held, None, common
      if common >= WORTH_COPYING and self.shard(held) in with_room:
        return self._fresh({self.shard(held)}), (index, common), 0
    return self._fresh(with_room), None, 0

  def _leaves_prefill(self, slot: Slot) -> None:
    """Nobody can join its prefill any more."""
    if slot.stage is Stage.PREFILL and not slot.twin:
      prompt = self._prompt(slot)
      self._first[prompt].remove(slot)
      if not self._first[prompt]:
        del self._first[prompt]

  def _prompt(self, slot: Slot) -> tuple:
    """What equal prompts have in common."""
    assert slot.open is not None
    return (slot.context, *slot.open.request.salt), slot.tokens.tobytes()

  def _fresh(self, shards: set[int]) -> Slot:
    """A free slot, in the emptiest of these shards; the least worth keeping."""
    return self.all[min((-self._room(d), *self._least(d)) for d in shards)[2]]

  def _room(self, shard: int) -> int:
    return len(self._blank[shard]) + len(self._kept[shard])

  def _least(self, shard: int) -> tuple[int, int]:
    """(touched, index) of the free slot that is the least worth keeping."""
    blank = self._blank[shard]
    index = blank[0] if blank else next(iter(self._kept[shard]))
    return self.all[index].touched, index

  def _take(self, slot: Slot) -> None:
    """Of those that `_place` chooses: one that holds a prefix, or the first that holds nothing."""
    shard = self.shard(slot)
    if slot.index in self._kept[shard]:
      del self._kept[shard][slot.index]
    else:
      taken = heapq.heappop(self._blank[shard])
      assert taken == slot.index

  def _wait(self, slot: Slot) -> None:
    bisect.insort(self._waiting, (slot.touched, slot.index))

  def _wait_no_more(self, slot: Slot) -> None:
    """In PREFILL: it waits neither for rows of an extend nor for another slot."""
    if slot.source is None:
      del self._waiting[bisect.bisect_left(self._waiting, (slot.touched, slot.index))]
      return
    others = self._after[slot.source[0]]
    del others[slot.index]
    if not others:
      del self._after[slot.source[0]]
    slot.source = None

  def free(self, slot: Slot, held: np.ndarray | None) -> None:
    """Empties a slot. held: tokens its cache goes on holding, for a later turn; None: nothing."""
    self._leaves_prefill(slot)
    if slot.stage is Stage.PREFILL:
      self._wait_no_more(slot)
    for other in self._after.pop(slot.index, {}).values():
      if other.twin:
        self._first.setdefault(self._prompt(other), []).append(other)
      other.source = None  # it had not been copied yet: prefills by itself
      self._wait(other)
    salt = (slot.context, *slot.open.request.salt) if slot.open else ()
    keep = held is not None and len(held) >= BLOCK and slot.context != MIXED
    slot.stage, slot.open = Stage.FREE, None
    if keep:
      assert held is not None
      slot.tokens, slot.filled, slot.touched = held, len(held), self._tick()
      self._kept[self.shard(slot)][slot.index] = None
      self.index.put(slot.index, salt, held)
    else:
      slot.filled = slot.touched = 0
      heapq.heappush(self._blank[self.shard(slot)], slot.index)
      self.index.drop(slot.index)

  def new_version(self) -> None:
    """The cache of every slot is now of an old version: nothing can be reused."""
    self.index.clear()
    for s in self.all:
      s.context = MIXED
      if s.stage is Stage.FREE:
        s.filled = s.touched = 0
    for blank, kept in zip(self._blank, self._kept):
      blank.extend(kept)
      heapq.heapify(blank)
      kept.clear()

  # --- prefilling --------------------------------------------------------------------------------

  def copies(self) -> list[tuple[Slot, Slot, int]]:
    """(source, target, entries) that can be copied now, twins apart; books them as done."""
    out = []
    targets = (t for others in self._after.values() for t in others.values() if not t.twin)
    for s in sorted(targets, key=lambda t: t.index):
      assert s.source is not None
      source, entries = self.all[s.source[0]], s.source[1]
      if source.filled >= entries:
        out.append((source, s, entries))
        self._wait_no_more(s)
        s.filled = entries
        self._wait(s)
    return out

  def chunks(self) -> tuple[list[Chunk], int]:
    """The rows of the next extend and their length T; empty when nothing is to be prefilled.

    The longest waiting slot decides T; others whose next chunk fits come along. A prompt longer
    than the largest T takes turns with the others.
    """
    longest, most = self.prompt_lengths[-1], self.prompt_counts[-1]
    if not self._waiting:
      return [], 0
    count = lambda s: min(len(s.tokens) - s.filled, longest)
    T = bucket_for(count(self.all[self._waiting[0][1]]), self.prompt_lengths)
    rows = [0] * self.shards
    out = []
    for _, index in self._waiting:
      s = self.all[index]
      d = self.shard(s)
      if count(s) <= T and rows[d] < most:
        out.append(Chunk(s, rows[d], s.filled, count(s)))
        rows[d] += 1
        if len(out) == most * self.shards:
          break
    return out, T

  def advance(self, chunks: list[Chunk]) -> list[tuple[Slot, int, list[Slot]]]:
    """Books an extend; returns (slot, row, its twins) of those whose prompt is complete."""
    out, now = [], self._tick()
    for c in chunks:
      s = c.slot
      self._wait_no_more(s)
      s.filled, s.touched = c.start + c.count, now
      self._wait(s)
      if s.filled == len(s.tokens):
        twins = [t for t in self._after.get(s.index, {}).values() if t.twin]
        out.append((s, c.row, sorted(twins, key=lambda t: t.index)))
    return out

  def started(self, slots: Iterable[Slot]) -> None:
    """Books first tokens sampled."""
    for s in slots:
      self._leaves_prefill(s)
      self._wait_no_more(s)
      s.stage = Stage.DECODE
      s.filled, s.generated = len(s.tokens), 1
