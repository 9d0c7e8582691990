"""Groups in this process's memory: for one process that has nothing to lose.

Its uses and claims follow the same rules as a database's. Nothing survives the process.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import threading
import time
from collections.abc import Callable, Sequence

from trinity_jax.buffer.bell import ThreadBell
from trinity_jax.buffer.record import Claim, Group, Key, Outcome, Rules, Stats, Status
from trinity_jax.buffer.rewards import rewarded
from trinity_jax.errors import UserError
from trinity_jax.experience import Experience, ExperienceId


@dataclasses.dataclass
class _Row:
  group: Group
  status: Status
  experiences: tuple[Experience, ...] | None  # None when deleted
  pending: int
  priority: float
  uses: dict[int, bool] = dataclasses.field(default_factory=dict)  # step -> dropped
  masked: dict[int, int] = dataclasses.field(default_factory=dict)

  @property
  def count(self) -> int:
    return sum(not dropped for dropped in self.uses.values())


@dataclasses.dataclass
class _Batch:
  stored: set[int] = dataclasses.field(default_factory=set)
  owner: str | None = None
  expires: float = 0.0


class MemoryStore:
  """Args: clock: seconds, for leases."""

  place = "the buffer in memory"

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self.bell = ThreadBell()
    self._clock = clock
    self._lock = threading.RLock()
    self._rows: dict[Key, _Row] = {}
    self._ready: list[Key] = []  # sorted
    self._batches: dict[int, _Batch] = {}
    self._open: set[int] = set()  # batches that lack groups
    self._ended: dict[Key, int] = {}  # used or dropped, payload still there: at which step
    self._counts = dict.fromkeys(Status, 0)
    self._fresh = self._masked = self._committed = 0
    self._consumed: Key = (0, -1)  # the last group in id order that was used or dropped
    self._finished = False

  # --- producers ---------------------------------------------------------------------------------

  def put(self, groups: Sequence[Group], rules: Rules) -> list[Outcome | None]:
    with self._lock:
      out: list[Outcome | None] = [self._put(group, rules) for group in groups]
    if "stored" in out:
      self.bell.ring()
    return out

  def _put(self, group: Group, rules: Rules) -> Outcome | None:
    row = self._rows.get(group.key)
    if row is not None:
      return "same" if row.group.digest == group.digest else "different"
    due = rules.order == "id" and group.key <= self.due(rules)
    if self._fresh >= rules.capacity and not due and not self._finished:
      return None
    bare = group._replace(experiences=())
    row = _Row(bare, group.status, group.experiences, group.pending, 0.0)
    self._rows[group.key] = row
    self._book(row, 1, rules)
    batch, task = group.key
    entry = self._batches.setdefault(batch, _Batch())
    entry.stored.add(task)
    (self._open.discard if len(entry.stored) >= rules.tasks_per_step else self._open.add)(batch)
    return "stored"

  def _book(self, row: _Row, sign: int, rules: Rules) -> None:
    """Adds a row to (or takes it out of) the counts and the order of the ready ones."""
    key = row.group.key
    self._counts[row.status] += sign
    if row.status is not Status.READY:
      return
    if not row.count:
      self._fresh += sign * len(row.experiences or ())
    if sign > 0:
      row.priority = rules.priority(key, row.group.version, row.count)
      bisect.insort(self._ready, key)
    else:
      del self._ready[bisect.bisect_left(self._ready, key)]

  def give_reward(self, id: ExperienceId, reward: float, rules: Rules) -> None:
    with self._lock:
      row = self._rows.get(id.group)
      if row is None or row.experiences is None:
        raise UserError(f"reward for experience {id}: {self.place} does not hold it")
      place = next((i for i, e in enumerate(row.experiences) if e.id == id), None)
      if place is None:
        raise UserError(f"reward for experience {id}: {self.place} does not hold it")
      given = rewarded(row.experiences[place], reward)
      if given is None:
        return
      self._book(row, -1, rules)
      row.experiences = (*row.experiences[:place], given, *row.experiences[place + 1 :])
      if row.pending:  # else the group waits for nothing: it is to be dropped
        row.pending -= 1
        row.status = Status.WAITING if row.pending else Status.READY
      self._book(row, 1, rules)
    self.bell.ring()

  # --- the trainer -------------------------------------------------------------------------------

  def due(self, rules: Rules) -> Key:
    with self._lock:
      return max((rules.first_batch, 0), rules.after(self._consumed))

  def take(self, n: int, step: int, rules: Rules) -> list[Key]:
    with self._lock:
      oldest = rules.oldest(step)
      before = self._counts[Status.DROPPED]
      if rules.order == "id":
        taken = self._take_in_order(n, step, oldest, rules)
      else:
        for key in [k for k in self._ready if self._stale(k, oldest)]:
          self._use(key, step, rules, dropped=True)
        free = [k for k in self._ready if self._free(self._rows[k], step, rules)]
        if rules.order == "priority":
          free = heapq.nsmallest(n, free, key=lambda k: (-self._rows[k].priority, k))
        taken = free[:n]
        if len(taken) < n and self._fresh < rules.capacity:
          taken = []
        for key in taken:
          self._use(key, step, rules)
      changed = bool(taken) or self._counts[Status.DROPPED] != before
    if changed:
      self.bell.ring()
    return taken

  def _take_in_order(self, n: int, step: int, oldest: int | None, rules: Rules) -> list[Key]:
    taken: list[Key] = []
    while len(taken) < n and self._ready and self._ready[0] <= self.due(rules):
      key = self._ready[0]
      stale = self._stale(key, oldest)
      self._use(key, step, rules, dropped=stale)
      if not stale:
        taken.append(key)
    return taken

  def _stale(self, key: Key, oldest: int | None) -> bool:
    return oldest is not None and self._rows[key].group.newest < oldest

  def _free(self, row: _Row, step: int, rules: Rules) -> bool:
    return not row.uses or step >= rules.free_at(max(row.uses))

  def _use(self, key: Key, step: int, rules: Rules, dropped: bool = False) -> None:
    row = self._rows[key]
    self._book(row, -1, rules)
    row.uses[step] = dropped
    if dropped:
      row.status = Status.DROPPED
    elif row.count >= rules.max_uses:
      row.status = Status.USED
    if row.status is not Status.READY:
      self._ended[key] = step
      self._consumed = max(self._consumed, key)
    self._book(row, 1, rules)

  def load(self, keys: Sequence[Key]) -> list[list[Experience]]:
    with self._lock:
      return [list(self._rows[k].experiences or ()) for k in keys]

  def note_masked(self, step: int, masked: dict[Key, int]) -> None:
    with self._lock:
      for key, count in masked.items():
        self._rows[key].masked[step] = count
        self._masked += count

  def untake(self, keys: Sequence[Key], step: int, rules: Rules) -> None:
    with self._lock:
      for key in keys:
        self._forget(self._rows[key], step - 1, rules)
      self._recede()
    self.bell.ring()

  def _forget(self, row: _Row, step: int, rules: Rules) -> None:
    """Undoes uses after `step`."""
    self._book(row, -1, rules)
    row.uses = {s: dropped for s, dropped in row.uses.items() if s <= step}
    self._masked -= sum(n for s, n in row.masked.items() if s > step)
    row.masked = {s: n for s, n in row.masked.items() if s <= step}
    row.status = Status.READY
    self._ended.pop(row.group.key, None)
    self._book(row, 1, rules)

  def _recede(self) -> None:
    self._consumed = max(
      (k for k, r in self._rows.items() if r.status in (Status.USED, Status.DROPPED)),
      default=(0, -1),
    )

  def commit(self, step: int, rules: Rules) -> None:
    with self._lock:
      self._committed = max(self._committed, step)
      if not rules.keep:
        for key in [k for k, at in self._ended.items() if at <= step]:
          self._rows[key].experiences = None
          del self._ended[key]

  def restore(self, step: int, rules: Rules) -> None:
    with self._lock:
      later = [r for r in self._rows.values() if r.uses and max(r.uses) > step]
      for row in later:
        if row.experiences is None:
          raise UserError(deleted(self.place, step, self._committed))
      for row in later:
        self._forget(row, step, rules)
      self._recede()
      self._committed = step
      self._finished = False
    self.commit(step, rules)
    self.bell.ring()

  # --- explorers ---------------------------------------------------------------------------------

  def claim(self, owner: str, lease: float, rules: Rules, new: bool) -> Claim | None:
    with self._lock:
      if self._finished:
        return None
      now = self._clock()
      free = (
        b for b in self._open if self._batches[b].owner is None or self._batches[b].expires < now
      )
      batch = min(free, default=None)
      if batch is None:
        if not new:
          return None
        batch = max(rules.first_batch, max(self._batches, default=0) + 1)
        self._batches[batch] = _Batch()
        self._open.add(batch)
      entry = self._batches[batch]
      entry.owner, entry.expires = owner, now + lease
      return Claim(batch, tuple(t for t in range(rules.tasks_per_step) if t not in entry.stored))

  def heartbeat(self, owner: str, lease: float) -> None:
    with self._lock:
      for batch in self._open:
        if self._batches[batch].owner == owner:
          self._batches[batch].expires = self._clock() + lease

  def release(self, owner: str) -> None:
    with self._lock:
      for batch in self._open:
        if self._batches[batch].owner == owner:
          self._batches[batch].owner = None
    self.bell.ring()

  def held(self, batch: int) -> set[int]:
    with self._lock:
      entry = self._batches.get(batch)
      return set(entry.stored) if entry else set()

  def claimed(self, rules: Rules) -> int:
    with self._lock:
      now = self._clock()
      live = (self._batches[b] for b in self._open)
      return sum(rules.tasks_per_step - len(b.stored) for b in live if b.owner and b.expires >= now)

  def stats(self) -> Stats:
    with self._lock:
      ready, waiting, used, dropped = (self._counts[s] for s in Status)
      return Stats(ready, waiting, used, dropped, self._fresh, self._masked)

  def finish(self) -> None:
    with self._lock:
      self._finished = True
    self.bell.ring()

  @property
  def finished(self) -> bool:
    with self._lock:
      return self._finished

  def close(self) -> None:
    self.bell.close()


def deleted(place: str, step: int, committed: int) -> str:
  """Why a checkpoint older than the buffer's cannot be gone back to."""
  return (
    f"{place}: it was committed up to step {committed} and groups used after step {step} are "
    f"deleted; resume from the checkpoint of step {committed}, or start a new --workdir"
  )
