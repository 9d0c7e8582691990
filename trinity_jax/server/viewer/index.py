"""Finds rollouts in a stage's replay buffer: an index that follows a growing one, and search.

Only the JSON header of a record is read for the index (token arrays may be megabytes), and nothing
is ever written, see `stores`.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from trinity_jax.errors import UserError
from trinity_jax.experience import Experience, Source, StopReason
from trinity_jax.server.viewer.stores import Key, Reader, Store

SEARCH_SECONDS = 10.0  # a text search says how far it came by then
ORDERS = ("newest", "oldest", "highest", "lowest")
EMPTY: dict[str, int] = dict.fromkeys(
  ["groups", "deleted", "waiting", "experiences", "generation"], 0
)  # what `refresh` says of nothing


class Row(NamedTuple):
  """What lists show of an experience."""

  key: Key
  reward: float | None
  stop_reason: int
  source: int
  version: int  # newest policy version of its group, -1 without any
  prompt: str  # beginnings, for people
  reply: str


@dataclasses.dataclass(frozen=True)
class Query:
  """Which rollouts, all conditions together; None or "" asks for nothing.

  Attributes:
    text: somewhere in a message's content, whatever its case.
    reward_min, reward_max: inclusive; a rollout without a reward has none that fits.
    stop: name of a StopReason.
    batch_min, batch_max: explorer steps, inclusive.
    task: its place in the explorer step.
    order: one of ORDERS; by reward, those without one come last.
  """

  text: str = ""
  reward_min: float | None = None
  reward_max: float | None = None
  stop: str = ""
  batch_min: int | None = None
  batch_max: int | None = None
  task: int | None = None
  order: str = "newest"

  def __post_init__(self):
    if self.order not in ORDERS:
      raise UserError(f"order = {self.order!r}; expected one of {', '.join(ORDERS)}")
    if self.stop and self.stop.upper() not in StopReason.__members__:
      known = ", ".join(s.name.lower() for s in StopReason)
      raise UserError(f"stop = {self.stop!r}; expected one of {known}")

  def fits(self, row: Row) -> bool:
    """All but the text."""
    low, high, reward = self.reward_min, self.reward_max, row.reward
    batch, task = row.key[:2]
    return (
      (low is None or (reward is not None and reward >= low))
      and (high is None or (reward is not None and reward <= high))
      and (not self.stop or row.stop_reason == StopReason[self.stop.upper()])
      and (self.batch_min is None or batch >= self.batch_min)
      and (self.batch_max is None or batch <= self.batch_max)
      and (self.task is None or task == self.task)
    )

  def sort(self, rows: list[Row]) -> list[Row]:
    if self.order in ("newest", "oldest"):
      return sorted(rows, key=lambda r: r.key, reverse=self.order == "newest")
    sign = 1 if self.order == "lowest" else -1
    return sorted(
      rows,
      key=lambda r: (r.reward is None, sign * r.reward if r.reward is not None else 0.0, r.key),
    )


class Page(NamedTuple):
  """One page of a search.

  Attributes:
    rows: those of the page.
    total: how many fit, as far as was searched.
    searched, candidates: rollouts whose text was looked at, of how many; equal when complete.
  """

  rows: list[Row]
  total: int
  searched: int
  candidates: int


class Index:
  """The rollouts of one stage; thread-safe.

  Raises:
    UserError: the store is no buffer of ours.
    RunFailed: it is locked for longer than a few seconds, cannot be reached, or is unreadable.
  """

  def __init__(self, store: Store):
    self.store = store
    self._lock = threading.Lock()
    self._groups: dict[tuple[int, int], tuple[Any, list[Row]]] = {}
    self._counts = {"groups": 0, "deleted": 0, "waiting": 0}
    self._generation = 0
    self._last: tuple[Any, Page, list[Row]] | None = None

  def refresh(self) -> dict[str, int]:
    """Reads what is new; returns counts: groups, deleted (groups without experiences), waiting
    (groups that wait for a reward), experiences, generation (changes when anything does)."""
    with self._lock:
      if self.store.exists():
        with self.store.opened() as reader:
          self._read_groups(reader)
      elif self._groups:  # removed while we looked
        self._groups, self._generation = {}, self._generation + 1
        self._counts = dict.fromkeys(self._counts, 0)
      rows = sum(len(rows) for _, rows in self._groups.values())
      return {**self._counts, "experiences": rows, "generation": self._generation}

  def _read_groups(self, reader: Reader) -> None:
    found, changed = {}, []
    for batch, task, payload, pending, version, digest in reader.groups():
      sign = (payload, pending, version, digest)
      found[batch, task] = sign
      known = self._groups.get((batch, task))
      if known is None or known[0] != sign:
        changed.append((batch, task))
    gone = [key for key in self._groups if key not in found]
    for key in gone:  # a resumed run starts its unfinished step again
      del self._groups[key]
    for key in changed:
      sign = found[key]
      rows = list(_read_rows(reader, key, sign[2])) if sign[0] else []
      self._groups[key] = sign, rows
    self._generation += bool(gone or changed)
    self._counts = {
      "groups": len(found),
      "deleted": sum(not sign[0] for sign in found.values()),
      "waiting": sum(sign[1] > 0 for sign in found.values()),
    }

  def search(self, query: Query, offset: int, limit: int) -> Page:
    """Rows offset to offset + limit of those that fit, after `refresh`."""
    with self._lock:
      if self._last is None or self._last[0] != (query, self._generation):
        rows = [r for _, group in self._groups.values() for r in group if query.fits(r)]
        rows = query.sort(rows)
        candidates = searched = len(rows)
        if query.text:
          rows, searched = self._with_text(rows, query.text)
        page = Page([], len(rows), searched, candidates)
        self._last = (query, self._generation), page, rows
      _, page, rows = self._last
      return page._replace(rows=rows[offset : offset + limit])

  def _with_text(self, rows: list[Row], text: str) -> tuple[list[Row], int]:
    end, wanted, out = time.monotonic() + SEARCH_SECONDS, text.casefold(), []
    with self.store.opened() as reader:
      for i, row in enumerate(rows):
        if time.monotonic() > end:
          return out, i
        header = _parsed(reader.header(row.key))
        if header and any(wanted in c.casefold() for c in _contents(header)):
          out.append(row)
    return out, len(rows)

  def group(self, batch: int, task: int) -> list[Row]:
    """The runs of one group, in order; empty when it is not stored."""
    with self._lock:
      return list(self._groups.get((batch, task), (None, []))[1])

  def load(self, key: Key) -> Experience | None:
    """The experience, None when it is not (or no longer) stored."""
    if not self.store.exists():
      return None
    with self.store.opened() as reader:
      data = reader.record(key)
    return None if data is None else Experience.from_bytes(data)


def _read_rows(reader: Reader, group: tuple[int, int], version: int) -> Iterator[Row]:
  for key, text in reader.headers(group):
    header = _parsed(text)
    if header is None:
      continue
    contents = _contents(header)
    reward = header.get("reward")
    yield Row(
      key,
      float(reward) if isinstance(reward, (int, float)) else None,
      int(header.get("stop_reason", StopReason.RUNNING)),
      int(header.get("source", Source.ROLLOUT)),
      int(version),
      contents[0][-200:] if contents else "",
      contents[-1][:200] if len(contents) > 1 else "",
    )


def _parsed(text: bytes | None) -> dict[str, Any] | None:
  """What Experience.to_bytes wrote beside the arrays; None for a record that is gone or damaged."""
  try:
    header = json.loads(json.loads(text or b"")["__metadata__"]["experience"])
    return header if isinstance(header, dict) else None
  except (ValueError, KeyError, TypeError, RecursionError):
    return None


def _contents(header: dict[str, Any]) -> list[str]:
  """The messages as text: contents, and tool calls as JSON."""
  out = []
  for message in header.get("messages") or ():
    content = message.get("content") if isinstance(message, dict) else message
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    text = content if isinstance(content, str) else json.dumps(content) if content else ""
    out.append(text + (" " + json.dumps(calls, ensure_ascii=False) if calls else ""))
  return out
