"""Where the wall time of a step went, from spans of several threads, summing to exactly 100 %.

    with timeline.span("decode"):
      tokens = jax.block_until_ready(generate(...))
    ...
    metrics.update(timeline.step())

jax returns before the device is done: put what waits for the result inside the span too.

**One context, one category.** A span inside another one of the same thread or asyncio task (or of
a task or `asyncio.to_thread` call that it started) suspends the outer one until it ends: publish
inside train counts as publish only.

**One instant, one owner or equal shares.** At every instant some set of categories is active, over
all threads. Two decode spans at once are one active category. The instant belongs to

  1. the device categories that are active: prefill, decode, train, publish, checkpoint, eval, in
     equal shares. `eval` takes the place of prefill and decode while it is active, because the
     sampling is then most likely its own;
  2. else the host categories: reward, environment, in equal shares. Grading that hides behind
     decoding costs no wall time, and is not shown as if it did;
  3. else the waits: wait_for_batch, wait_for_policy, in equal shares;
  4. else `other` (also what an explicit `other` span means).

Time is kept as integer nanoseconds per set of active categories, so memory does not grow, and
shares are integers too: nothing is lost to rounding. Percentages are multiples of 2**-20, made by
largest remainder, so that their float sum is 100.0 in any order.
"""

from __future__ import annotations

import contextvars
import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trinity_jax.errors import suggestion
from trinity_jax.monitor import files

DEVICE = ("prefill", "decode", "train", "publish", "checkpoint", "eval")
HOST = ("reward", "environment")
WAIT = ("wait_for_batch", "wait_for_policy")
CATEGORIES = (*DEVICE, *HOST, *WAIT, "other")
# Who is at work, for the two idle ratios.
TRAINER = ("train", "publish", "checkpoint")
ROLLOUT = ("prefill", "decode", "eval", "reward", "environment")

_INDEX = {name: i for i, name in enumerate(CATEGORIES)}
_SHARES = math.lcm(*range(1, len(CATEGORIES) + 1))  # any equal split of a nanosecond is an integer
_QUANTA = 2**20  # per percent


def _mask(names: tuple[str, ...]) -> int:
  return sum(1 << _INDEX[n] for n in names)


_TIERS = tuple(_mask(names) for names in (DEVICE, HOST, WAIT))
_EVAL, _EVAL_HIDES = _mask(("eval",)), _mask(("prefill", "decode"))


def owners(active: int) -> tuple[int, ...]:
  """Returns the indices into CATEGORIES that share an instant, given the bit set of active ones."""
  if active & _EVAL:
    active &= ~_EVAL_HIDES
  for tier in _TIERS:
    if active & tier:
      return tuple(i for i in range(len(CATEGORIES)) if active & tier & (1 << i))
  return (_INDEX["other"],)


def split(masks: Mapping[int, int]) -> dict[str, float]:
  """Returns percent per category; the values sum to exactly 100.0 in any order.

  Args:
    masks: bit set of active categories -> nanoseconds. Without any time, `other` gets 100.
  """
  shares = [0] * len(CATEGORIES)
  for active, ns in masks.items():
    own = owners(active)
    for i in own:
      shares[i] += ns * (_SHARES // len(own))
  total = sum(shares)
  if total == 0:
    return {name: 100.0 if name == "other" else 0.0 for name in CATEGORIES}
  quanta, rest = zip(*(divmod(share * 100 * _QUANTA, total) for share in shares))
  missing = 100 * _QUANTA - sum(quanta)
  largest = sorted(range(len(shares)), key=lambda i: (-rest[i], i))[:missing]
  return {name: (quanta[i] + (i in largest)) / _QUANTA for i, name in enumerate(CATEGORIES)}


def union(masks: Mapping[int, int], names: tuple[str, ...]) -> int:
  """Returns the nanoseconds in which at least one of the categories was active."""
  wanted = _mask(names)
  return sum(ns for active, ns in masks.items() if active & wanted)


def report(masks: Mapping[int, int]) -> dict[str, float]:
  """Returns time/*, time_split/*, trainer/idle_ratio and rollout/idle_ratio of a window.

  `time/<category>` are the seconds in which some thread was in the category: they overlap and may
  sum to more than `time/step`. In a synchronous run the two idle ratios sum to about 1; only
  asynchronous ones can bring both towards 0.
  """
  total = sum(masks.values())
  out = {"time/step": total / 1e9}
  for name in CATEGORIES:
    ns = masks.get(0, 0) + union(masks, (name,)) if name == "other" else union(masks, (name,))
    out[f"time/{name}"] = ns / 1e9
  out.update({f"time_split/{name}": percent for name, percent in split(masks).items()})
  out["trainer/idle_ratio"] = 1 - union(masks, TRAINER) / total if total else 1.0
  out["rollout/idle_ratio"] = 1 - union(masks, ROLLOUT) / total if total else 1.0
  return out


class _Span:
  """Context manager of one span; cheap: a lock, a clock read and a few integer operations."""

  __slots__ = ("_children", "_context", "_label", "_line", "_parent", "_start", "_thread", "index",
               "is_open")

  def __init__(self, line: Timeline, index: int, label: str | None):
    self._line, self.index, self._label = line, index, label
    self._children, self.is_open = 0, False

  def __enter__(self) -> _Span:
    line = self._line
    parent = self._context = line._current.get()
    self._thread = threading.get_ident()
    with line._lock:
      self._start = line._advance()
      if parent is not None and parent.is_open:
        if not parent._children:
          line._leave(parent.index)
        parent._children += 1
        self._parent = parent
      else:
        self._parent = None  # it ended before this task began
      line._enter(self.index)
      self.is_open = True
    line._current.set(self)
    return self

  def __exit__(self, *exc: object) -> None:
    line, parent = self._line, self._parent
    # Not ContextVar.reset: an async generator may be closed in another context.
    line._current.set(self._context)
    with line._lock:
      end = line._advance()
      if not self._children:
        line._leave(self.index)
      self.is_open = False
      if parent is not None and parent.is_open:
        parent._children -= 1
        if not parent._children:
          line._enter(parent.index)
      line._ended = (self._label or CATEGORIES[self.index], end)
      if line._spans is not None:
        line._finished += 1
        line._spans.append((self._thread, self.index, self._start, end, self._label))


class Timeline:
  """Collects spans of all threads of a process.

  Args:
    clock: monotonic nanoseconds.
    keep: newest finished spans kept for `write_trace` (about 150 bytes each); 0 keeps none.
  """

  def __init__(self, *, clock: Callable[[], int] = time.perf_counter_ns, keep: int = 50_000):
    self._clock, self._lock = clock, threading.Lock()
    self._current: contextvars.ContextVar[_Span | None] = contextvars.ContextVar(
      "span", default=None)
    self._counts = [0] * len(CATEGORIES)
    self._active = 0
    self._start = self._last = clock()
    self._window: dict[int, int] = {}
    self._total: dict[int, int] = {}
    self._spans: deque[tuple[int, int, int, int, str | None]] | None = (
      deque(maxlen=keep) if keep else None)
    self._finished = 0
    self._ended: tuple[str, int] | None = None

  def span(self, category: str, label: str | None = None) -> _Span:
    """Returns a context manager that accounts for its body.

    Args:
      category: one of CATEGORIES.
      label: name in the trace; default the category.

    Raises:
      ValueError: unknown category.
    """
    index = _INDEX.get(category)
    if index is None:
      raise ValueError(f"unknown timeline category {category!r}{suggestion(category, CATEGORIES)}")
    return _Span(self, index, label)

  def step(self) -> dict[str, float]:
    """Ends the current window, begins the next one, and returns the window's `report`.

    Spans that are open now count up to now here and from now on in the next window.
    """
    with self._lock:
      self._advance()
      masks, self._window = self._window, {}
      for active, ns in masks.items():
        self._total[active] = self._total.get(active, 0) + ns
    return report(masks)

  def total(self) -> dict[str, float]:
    """Returns the `report` of the whole time since construction; ends no window."""
    with self._lock:
      self._advance()
      masks = dict(self._total)
      for active, ns in self._window.items():
        masks[active] = masks.get(active, 0) + ns
    return report(masks)

  def last_progress(self) -> tuple[str, float] | None:
    """(label of the span that ended last, seconds since then), None before the first."""
    with self._lock:
      if self._ended is None:
        return None
      label, end = self._ended
      return label, (self._clock() - end) / 1e9

  # --- called with the lock held ---

  def _advance(self) -> int:
    now = self._clock()
    if now != self._last:
      self._window[self._active] = self._window.get(self._active, 0) + now - self._last
      self._last = now
    return now

  def _enter(self, index: int) -> None:
    self._counts[index] += 1
    self._active |= 1 << index

  def _leave(self, index: int) -> None:
    self._counts[index] -= 1
    if not self._counts[index]:
      self._active &= ~(1 << index)

  # --- trace ---

  def trace(self) -> dict[str, Any]:
    """Returns the kept spans as a Chrome trace, for ui.perfetto.dev or chrome://tracing.

    Microseconds since construction. Spans of one thread that overlap without nesting (asyncio
    tasks) are put on several lanes, because the format cannot draw them on one.
    """
    with self._lock:
      spans, finished = list(self._spans or ()), self._finished
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lanes: dict[int, list[list[int]]] = {}  # thread -> lane -> stack of ends
    ids: dict[tuple[int, int], int] = {}
    events: list[dict[str, Any]] = []
    for thread, index, start, end, label in sorted(spans, key=lambda s: (s[2], -s[3])):
      lane = _lane(lanes.setdefault(thread, []), start, end)
      if (thread, lane) not in ids:
        ids[thread, lane] = len(ids)
        name = names.get(thread, f"thread {thread}") + (f" ({lane + 1})" if lane else "")
        events.append({"ph": "M", "pid": 0, "tid": ids[thread, lane], "name": "thread_name",
                       "args": {"name": name}})
      events.append({"ph": "X", "pid": 0, "tid": ids[thread, lane], "cat": CATEGORIES[index],
                     "name": label or CATEGORIES[index], "ts": (start - self._start) / 1e3,
                     "dur": (end - start) / 1e3})
    return {"traceEvents": events, "displayTimeUnit": "ms",
            "otherData": {"spans_finished": finished, "spans_dropped": finished - len(spans)}}

  def write_trace(self, path: str | Path) -> Path:
    """Writes `trace()` as JSON, atomically, and returns the path."""
    files.write_atomic(path, json.dumps(self.trace()).encode())
    return Path(path)


def _lane(lanes: list[list[int]], start: int, end: int) -> int:
  """Returns the first lane on which [start, end] follows or nests, and takes it there."""
  for number, ends in enumerate(lanes):
    while ends and ends[-1] <= start:
      ends.pop()
    if not ends or end <= ends[-1]:
      ends.append(end)
      return number
  lanes.append([end])
  return len(lanes) - 1
