"""What buffer and stores speak about: groups with what is known of them, rules, claims."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from trinity_jax.buffer.bell import ThreadBell
from trinity_jax.buffer.staleness import SHORT, newest_version, policy_version
from trinity_jax.experience import Experience, ExperienceId

FILE = "buffer.sqlite"  # of a stage, in its folder
Key = tuple[int, int]  # (explorer step, task)
Outcome = Literal["stored", "same", "different"]


class Status(enum.IntEnum):
  """Where a group stands. The numbers are in databases: never change one."""

  READY = 0
  WAITING = 1  # for a delayed reward
  USED = 2  # as often as it may be
  DROPPED = 3  # too stale


@dataclasses.dataclass(frozen=True)
class Rules:
  """What a buffer asks of its store; see ReplayBuffer."""

  capacity: int
  order: Literal["id", "ready", "priority"]
  tasks_per_step: int
  max_staleness: int | None = None
  max_uses: int = 1
  cool_down: int = 0
  priority: Callable[[Key, int, int], float] = lambda key, version, uses: 0.0
  first_batch: int = 1
  keep: bool = False

  def after(self, key: Key) -> Key:
    """The group that follows in id order."""
    batch, task = key
    return (batch, task + 1) if task + 1 < self.tasks_per_step else (batch + 1, 0)

  def oldest(self, step: int) -> int | None:
    """The oldest version that trainer step `step` may train on, None when any is."""
    return None if self.max_staleness is None else step - 1 - self.max_staleness

  def free_at(self, used_at: int) -> int:
    """First step that may use a group again; never the same step twice."""
    return used_at + max(1, self.cool_down)


class Claim(NamedTuple):
  """An explorer step to run."""

  batch: int
  tasks: tuple[int, ...]  # places of its tasks that are not stored yet


class Group(NamedTuple):
  """All runs of one task, with what selection needs to know."""

  key: Key
  experiences: tuple[Experience, ...]
  digest: bytes  # of what is compared when a group comes twice
  pending: int  # rewards that have not come
  version: int  # newest policy version of its action tokens, -1 without any
  newest: int  # the same for staleness: NEVER where it cannot become stale, SHORT where it is

  @property
  def status(self) -> Status:
    return Status.WAITING if self.pending else Status.READY


class Stats(NamedTuple):
  """Counts of a store: groups per status, then experiences and tokens."""

  ready: int
  waiting: int
  used: int
  dropped: int
  fresh: int  # experiences that are ready and not used yet
  masked: int  # stale tokens masked out


class Store(Protocol):
  """Groups, uses and claims. Thread-safe; each method is one durable transaction."""

  bell: ThreadBell

  @property
  def place(self) -> str:
    """What it is, for messages."""
    ...

  def put(self, groups: Sequence[Group], rules: Rules) -> list[Outcome | None]:
    """Stores each; None where the capacity does not allow it."""
    ...

  def take(self, n: int, step: int, rules: Rules) -> list[Key]:
    """Marks up to n groups as used by `step`; drops stale ones it meets."""
    ...

  def load(self, keys: Sequence[Key]) -> list[list[Experience]]: ...
  def note_masked(self, step: int, masked: dict[Key, int]) -> None: ...
  def untake(self, keys: Sequence[Key], step: int, rules: Rules) -> None: ...
  def commit(self, step: int, rules: Rules) -> None: ...
  def restore(self, step: int, rules: Rules) -> None: ...
  def give_reward(self, id: ExperienceId, reward: float, rules: Rules) -> None: ...
  def claim(self, owner: str, lease: float, rules: Rules, new: bool) -> Claim | None: ...
  def heartbeat(self, owner: str, lease: float) -> None: ...
  def release(self, owner: str) -> None: ...
  def held(self, batch: int) -> set[int]: ...
  def claimed(self, rules: Rules) -> int: ...
  def due(self, rules: Rules) -> Key: ...
  def stats(self) -> Stats: ...
  def finish(self) -> None: ...
  @property
  def finished(self) -> bool: ...
  def close(self) -> None: ...


def awaits_reward(experience: Experience) -> bool:
  """Whether the experience's reward will come later (`ReplayBuffer.give_reward`)."""
  return experience.reward is None and bool(experience.info.get("awaits_reward"))


def good_runs(experiences: Sequence[Experience]) -> int:
  """Runs that did not fail, however many experiences each has."""
  return len({e.id.run for e in experiences if not e.stop_reason.failed})


def describe_group(experiences: Sequence[Experience], min_runs: int = 0) -> Group:
  """A group as stores take it, its experiences in id order.

  Args:
    min_runs: with fewer good runs it waits for nothing and is dropped when its turn comes.

  Raises:
    ValueError: it is empty, or its experiences are not of one group or not distinct.
  """
  if not experiences:
    raise ValueError("a group holds at least one experience; failed runs are empty experiences")
  found = tuple(sorted(experiences, key=lambda e: e.id))
  ids = [e.id for e in found]
  if len({i.group for i in ids}) != 1 or len(set(ids)) != len(ids):
    raise ValueError(f"not one group of distinct experiences: {', '.join(map(str, ids))}")
  short = good_runs(found) < min_runs
  return Group(
    (int(ids[0].batch), int(ids[0].task)),
    found,
    digest(found),
    0 if short else sum(map(awaits_reward, found)),
    policy_version(found),
    SHORT if short else newest_version(found),
  )


def digest(experiences: Sequence[Experience]) -> bytes:
  """16 bytes that tell groups apart by ids, tokens, versions, rewards and log-probs."""
  out = hashlib.blake2b(digest_size=16)
  for e in experiences:
    reward = b"later" if awaits_reward(e) else b"none"
    if e.reward is not None:
      reward = struct.pack("<d", e.reward)
    out.update(struct.pack("<5q", *e.id, len(e.tokens)) + reward)
    for array in (e.tokens, e.versions, e.logprobs):
      out.update(array.tobytes())
  return out.digest()
