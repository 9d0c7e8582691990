"""Runs the engine for the scheduler: prefills, decodes, collects; one dispatch at a time.

Belongs to one thread. Knows slots and programs, but no queue, no locks and no futures.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from trinity_jax.experience import StopReason
from trinity_jax.sampler import roofline, scoring
from trinity_jax.sampler.cache import bucket_for
from trinity_jax.sampler.engine import Requests
from trinity_jax.sampler.programs import Programs
from trinity_jax.sampler.request import Completion, join
from trinity_jax.sampler.roofline import Rates
from trinity_jax.sampler.slots import Chunk, Open, Slot, Slots, Stage

Span = Callable[[str], contextlib.AbstractContextManager]


class Driver:
  """The engine's state and the slots' bookkeeping.

  Attributes:
    slots: who sits where.
    params: prepared weights, None before the first `set_params`.
  """

  def __init__(
    self,
    programs: Programs,
    steps: int,
    refill_fraction: float,
    span: Span,
    rates: Rates | None = None,
  ):
    self._programs, self._steps, self._span = programs, steps, span
    self._rates = rates
    spec = programs.spec
    self._refill = max(1, int(refill_fraction * spec.slots))
    self.slots = Slots(spec.slots, programs.shards, programs.prompt_counts, programs.prompt_lengths)
    self.params: Any = None
    self.version = -1
    self._state: Any = None
    self._tainted = False  # the cache may hold numbers that are not finite
    self._opened = time.perf_counter()
    self._counts: dict[str, float] = dict.fromkeys(_COUNTS, 0)

  def open(self) -> None:
    """Allocates the cache."""
    self._state = self._programs.init_state()
    self._opened = time.perf_counter()

  @property
  def occupied(self) -> bool:
    return any(s.open for s in self.slots)

  def set_params(self, version: int, params: Any) -> None:
    """Takes new weights; what the cache holds becomes a context of another version."""
    self.params = None  # the old copy makes room before the new one is made
    self.params = self._programs.prepare(params)
    self.version = version
    self.slots.new_version()
    if self._state is None:
      self._state = self._programs.init_state()

  def release(self) -> None:
    """Frees cache and weights until the next `set_params`; the slots must be empty."""
    self.params = self._state = None
    self.slots.new_version()

  def clean(self) -> bool:
    """Returns whether requests may be admitted.

    Where log-probs were not finite, neither may the cache be, and it would spoil every later
    sequence (a masked weight of 0 times NaN is NaN): it is allocated anew once the slots are empty.
    """
    if not self._tainted:
      return True
    if self.occupied:
      return False
    self._state = None
    self._state = self._programs.init_state()
    self.slots.new_version()
    self._tainted = False
    return True

  # --- one round ---------------------------------------------------------------------------------

  def step(self, waiting: bool, more: bool) -> list[tuple[Open, Completion]]:
    """Prefills and decodes once; returns what has ended.

    At most about as many prompt tokens are prefilled as the decode steps that follow may sample:
    free slots fill at once, and long prompts hold nobody up.

    Args:
      waiting: whether requests wait for a slot.
      more: whether one may come at any time, so that a dispatch with free slots is kept short.
    """
    self._copy()
    budget = self._steps * self._programs.spec.slots
    while budget > 0 and (done := self._prefill()):
      budget -= done
    if self.slots.at(Stage.DECODE):
      self._decode(waiting, more)
    return self._collect(waiting)

  def score(self, taken: Sequence[scoring.Asked]) -> list[np.ndarray]:
    """Log-probs f32[n] of each of those that scoring.take took."""
    programs = self._programs
    args = scoring.rows_of(taken, programs.spec, programs.shards)
    with self._timed("score"):
      found = np.asarray(programs.score(self.params, *args))
    self._counts["scored_tokens"] += sum(len(a.tokens) for a in taken)
    return [found[i, : len(a.tokens)].copy() for i, a in enumerate(taken)]

  def _copy(self) -> None:
    copies = self.slots.copies()
    if copies:
      self._copy_entries(copies)

  def _copy_entries(self, copies: list[tuple[Slot, Slot, int]]) -> None:
    """(source, target, entries) of slots in one shard each."""
    slots = self.slots
    source, target = np.zeros((2, slots.shards, slots.per_shard), np.int32)
    count = np.zeros(slots.shards, np.int32)
    for a, b, _ in copies:
      d = slots.shard(b)
      source[d, count[d]], target[d, count[d]] = slots.local(a), slots.local(b)
      count[d] += 1
    live = bucket_for(max(n for _, _, n in copies), self._programs.live_lengths)
    with self._timed("prefill"):
      self._state = self._programs.copy(self._state, source.ravel(), target.ravel(), count, live)
      jax.block_until_ready(self._state.active)

  def _prefill(self) -> int:
    """One extend, and the start of the prompts it completed. Returns its tokens, 0 for none."""
    chunks, T = self.slots.chunks()
    if not chunks:
      return 0
    slots, programs = self.slots, self._programs
    rows = bucket_for(max(c.row for c in chunks) + 1, programs.prompt_counts)
    P = rows * slots.shards
    tokens = np.zeros((P, T), np.int32)
    starts, counts, targets = np.zeros((3, P), np.int32)
    targets -= 1
    for c in chunks:
      p = slots.shard(c.slot) * rows + c.row
      tokens[p, : c.count] = c.slot.tokens[c.start : c.start + c.count]
      starts[p], counts[p], targets[p] = c.start, c.count, slots.local(c.slot)
    self._counts["prompt_tokens"] += int(counts.sum())
    with self._timed("prefill"):
      self._state, logits = self._programs.extend(
        self.params, self._state, tokens, starts, counts, targets
      )
      jax.block_until_ready(logits)
    self._start(chunks, logits)
    self._copy()
    return int(counts.sum())

  def _start(self, chunks: list[Chunk], logits: Any) -> None:
    """Samples first tokens of prompts that are complete, and of their twins."""
    done = self.slots.advance(chunks)
    if not done:
      return
    copies = [(s, twin, len(s.tokens)) for s, _, twins in done for twin in twins]
    if copies:
      self._copy_entries(copies)
    S = self._programs.spec.slots
    rows, lengths = np.full(S, -1, np.int32), np.zeros(S, np.int32)
    requests = Requests.empty(S)
    for first, row, twins in done:
      for s in (first, *twins):
        rows[s.index], lengths[s.index] = row, len(s.tokens)
        _fill(requests, s)
    with self._timed("prefill"):
      self._state = self._programs.start(self._state, logits, rows, lengths, requests, self.version)
      jax.block_until_ready(self._state.active)
    started = [s for first, _, twins in done for s in (first, *twins)]
    self.slots.started(started)
    for s in started:
      s.mixed.append((1, False))

  def _decode(self, waiting: bool, more: bool) -> None:
    """Up to steps_per_dispatch tokens for each; fewer when refilling pays, or may soon."""
    used = [s for s in self.slots.at(Stage.DECODE) if s.open]
    left = [s.open.left - s.generated for s in used if s.open]
    S = self._programs.spec.slots
    most = self._steps // 4 if more and len(used) < S else self._steps
    steps = max(1, min(most, max(left)))
    live = self._live(max(s.length + min(steps, n) for s, n in zip(used, left)))
    # Stopping where the longest sequence fills a shorter live length costs a dispatch and saves
    # reading what no step until then needs.
    longest = max(s.length for s in used)
    near = self._live(longest + 1)
    if near < live and 4 * (near - longest) >= steps:
      steps, live = near - longest, near
    # An ended run may ask again, in which case waiting for all others would keep its slot idle.
    enough = S - len(used) + self._refill
    with self._timed("decode"):
      self._state, done = self._programs.generate(
        self.params, self._state, self.version, steps, enough, live
      )
      done = int(done)
    self._counts["decode_steps"] += done
    self._counts["slot_steps"] += done * S
    self._counts["queued_slot_steps"] += done * S * waiting
    if self._rates is not None:
      entries = sum(s.length + min(done, n) / 2 for s, n in zip(used, left))
      self._counts["roofline_seconds"] += done * roofline.step_seconds(
        roofline.work(self._programs.spec), self._rates, self._programs.mesh.size, entries
      )

  def _live(self, entries: int) -> int:
    """The smallest live length that holds as many entries."""
    return bucket_for(entries, self._programs.spec.live_lengths)

  # --- what came out -----------------------------------------------------------------------------

  def _collect(self, waiting: bool) -> list[tuple[Open, Completion]]:
    """Books progress and empties the slots of ended sequences."""
    s = self._state
    active, generated, reason = jax.device_get((s.active, s.generated, s.stop_reason))
    used = self.slots.at(Stage.DECODE)
    for slot in used:
      new = int(generated[slot.index]) - slot.generated
      if new:
        slot.mixed.append((new, slot.context != self.version))
      slot.generated += new
      self._counts["busy_slot_steps"] += new
      self._counts["queued_busy_slot_steps"] += new * waiting
    ended = [slot for slot in used if not active[slot.index]]
    streamed = [slot for slot in used if slot.open and slot.open.sink]
    if not ended and not streamed:
      return []
    columns = jax.device_get((s.tokens, s.logprobs, s.versions))
    for slot in streamed:
      if slot.generated > slot.sent and slot.open and slot.open.sink:
        slot.open.sink(_stretch(columns, slot, slot.sent))
        slot.sent = slot.generated
    out = []
    for slot in ended:
      assert slot.open is not None
      parts = [*slot.open.parts, _stretch(columns, slot)]
      self._tainted |= not np.isfinite(parts[-1].logprobs).all()
      self._counts["sampled_tokens"] += slot.generated
      out.append((slot.open, join(parts, StopReason(int(reason[slot.index])))))
      # The last token's keys and values were never computed.
      held = np.concatenate([slot.tokens, parts[-1].tokens[:-1]])
      self.slots.free(slot, held)
    return out

  def evict(self, opens: Collection[Open]) -> list[Open]:
    """Takes requests (in a set or dict) out of their slots; what they have is in their `parts`."""
    out = [s for s in self.slots if s.open in opens]
    if not out:
      return []
    decoding = np.array([s.open in opens and s.stage is Stage.DECODE for s in self.slots])
    if decoding.any():
      s = self._state
      columns = jax.device_get((s.tokens, s.logprobs, s.versions))
      self._state = self._programs.release(self._state, decoding)
    evicted = []
    for slot in out:
      assert slot.open is not None
      if slot.stage is Stage.DECODE:
        slot.open.parts.append(_stretch(columns, slot))
        self._tainted |= not np.isfinite(slot.open.parts[-1].logprobs).all()
        self._counts["sampled_tokens"] += slot.generated
      evicted.append(slot.open)
      self.slots.free(slot, None)
    return evicted

  def abandon(self) -> None:
    """Empties the slots without a word; for a thread that has ended."""
    for s in self.slots:
      s.open, s.source, s.stage = None, None, Stage.FREE

  # --- figures -----------------------------------------------------------------------------------

  @contextlib.contextmanager
  def _timed(self, kind: str) -> Iterator[None]:
    before = time.perf_counter()
    with self._span(kind):
      yield
    self._counts[f"{kind}_seconds"] += time.perf_counter() - before

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Time with nothing to do."""
    before = time.perf_counter()
    yield
    self._counts["wait_seconds"] += time.perf_counter() - before

  @property
  def stats(self) -> dict[str, float]:
    """Counters since the start.

    Tokens: sampled_tokens, prompt_tokens (computed), reused_tokens (prompt tokens found in the
    cache), scored_tokens. Decode: decode_steps, slot_steps (times all slots), busy_slot_steps
    (tokens), both also while requests waited (queued_...). Seconds: prefill_seconds,
    decode_seconds, score_seconds, wait_seconds (nothing to do), host_seconds (the rest);
    roofline_seconds (what decoding would have taken at best) where rates were given.
    """
    out = {**self._counts, "reused_tokens": self.slots.reused}
    spent = sum(out[f"{k}_seconds"] for k in ("prefill", "decode", "score", "wait"))
    if self._rates is None:
      del out["roofline_seconds"]
    return {**out, "host_seconds": max(0.0, time.perf_counter() - self._opened - spent)}

  def gauges(self) -> dict[str, float]:
    """Running sequences and the share of the cache they use."""
    used = [s for s in self.slots if s.open]
    entries = sum(max(s.length, s.filled) for s in used)
    spec = self._programs.spec
    return {
      "sampler/running": float(len(used)),
      "sampler/kv_cache_use": entries / (spec.slots * spec.cache_length),
    }


_COUNTS = (
  "sampled_tokens", "prompt_tokens", "decode_steps", "slot_steps", "busy_slot_steps",
  "queued_slot_steps", "queued_busy_slot_steps",
  "scored_tokens", "prefill_seconds", "decode_seconds", "score_seconds", "wait_seconds",
  "roofline_seconds",
)  # fmt: skip


def _fill(requests: Requests, slot: Slot) -> None:
  assert slot.open is not None
  r, i = slot.open.request, slot.index
  requests.key[i], requests.temperature[i] = r.key, r.temperature
  requests.top_p[i], requests.min_p[i], requests.top_k[i] = r.top_p, r.min_p, r.top_k
  requests.limit[i] = slot.open.left
  requests.stop_ids[i, : len(r.stop_ids)] = r.stop_ids


def _stretch(columns: Any, slot: Slot, first: int = 0) -> Completion:
  """Tokens first.. of a slot's stay."""
  mixed = np.repeat([m for _, m in slot.mixed], [n for n, _ in slot.mixed]).astype(bool)
  cut = lambda x: x[slot.index, first : slot.generated].copy()
  tokens, logprobs, versions = map(cut, columns)
  return Completion(tokens, logprobs, versions, mixed[first:], StopReason.RUNNING)
