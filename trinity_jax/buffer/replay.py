"""ReplayBuffer: complete groups in, experiences of one optimizer step out; nothing lost or doubled.

A group is put whole (failed runs included, as empty experiences), so a synchronous run can train in
the order of the ids, whatever the order of arrival. What is stored, used and claimed lives in a
store (memory, SQLite, PostgreSQL) that several processes may share; each makes a buffer of its own.

Durability: a group that `put` accepted survives the end (`kill -9`) of every process of ours. With
SQLite the last transactions may be lost with power unless the store was opened with
durability="power"; the file stays consistent. PostgreSQL has its server's `synchronous_commit`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from trinity_jax.buffer.bell import ThreadBell
from trinity_jax.buffer.priority import Priority, make_priority
from trinity_jax.buffer.record import Claim, Key, Outcome, Rules, Store, describe_group
from trinity_jax.buffer.staleness import mask_group
from trinity_jax.buffer.writer import Writer
from trinity_jax.errors import RunFailed, UserError
from trinity_jax.experience import Experience, ExperienceId

ORDERS = ("id", "ready", "priority")


class ReplayBuffer:
  """Groups between explorers and trainers, by the rules of one run.

  Explorer steps ("batches") and trainer steps count from 1; a group is (batch, task), task from 0.
  Trainer step t trains policy version t - 1.

  Args:
    store: see `open_store`; the buffer does not close it.
    capacity: `put` waits while this many experiences are ready and not used.
    order: "id", strictly by (batch, task); "ready", the complete group with the lowest id;
      "priority", the highest first.
    tasks_per_step: tasks of each explorer step.
    max_staleness: most trainer steps by which a token's version may lag; None for any.
    max_uses: trainer steps that may use a group; more than one needs order "ready" or "priority".
      What has been used stays until it is used up or stale: with neither in sight the store grows.
    cool_down: least difference of two steps that use the same group.
    priority: name in `priority.PRIORITIES` or a function, for order "priority" only ("linear_decay"
      when None).
    bell: takes the place of the store's own, which rings when something changed.
    seed, priority_args: of the priority.
    first_batch: explorer step that comes first where the store is empty.
    keep: never delete what has been used, so that the run can be replayed from its store.
    min_runs: groups with fewer runs that did not fail are dropped; needs a max_staleness.

  Raises:
    UserError: arguments that contradict one another.
  """

  def __init__(
    self,
    store: Store,
    *,
    capacity: int,
    order: Literal["id", "ready", "priority"],
    tasks_per_step: int,
    max_staleness: int | None = None,
    max_uses: int = 1,
    cool_down: int = 0,
    priority: str | Priority | None = None,
    bell: ThreadBell | None = None,
    seed: int = 0,
    priority_args: Mapping[str, Any] | None = None,
    first_batch: int = 1,
    keep: bool = False,
    min_runs: int = 0,
  ):
    if order not in ORDERS:
      raise UserError(f"replay order {order!r}: expected one of {', '.join(ORDERS)}")
    if order == "id" and max_uses > 1:
      raise UserError(
        f"replay order 'id' uses each group once, max_uses is {max_uses}; "
        "take order 'ready' or 'priority'"
      )
    if order != "priority" and priority is not None:
      raise UserError(
        f"replay priority {priority!r} needs order 'priority', the order is {order!r}"
      )
    for name, value, least in (("max_uses", max_uses, 1), ("cool_down", cool_down, 0),
                               ("tasks_per_step", tasks_per_step, 1)):  # fmt: skip
      if value < least:
        raise UserError(f"replay {name} = {value}: expected at least {least}")
    if min_runs and max_staleness is None:
      raise UserError(
        f"replay min_runs = {min_runs}: dropping groups needs a max_staleness; give it any"
      )
    self.store, self._min_runs = store, min_runs
    if bell is not None:
      store.bell = bell
    self.bell = store.bell
    self.rules = Rules(
      capacity, order, tasks_per_step, max_staleness, max_uses, cool_down,
      first_batch=first_batch, keep=keep,
      **({"priority": make_priority(priority or "linear_decay", seed, priority_args or {})}
         if order == "priority" else {}),
    )  # fmt: skip
    self._closed: BaseException | None = None
    self._writer = Writer(lambda groups: store.put(groups, self.rules), self.bell)

  def __len__(self) -> int:
    """Experiences that are ready and not used."""
    return self.store.stats().fresh

  # --- producers ---------------------------------------------------------------------------------

  async def put(self, group: Sequence[Experience]) -> Outcome:
    """Takes one task's runs; they are durable when it returns.

    Waits, without blocking the event loop, while the buffer is full. The group that is due next
    (order "id") is always taken, or a full buffer of later groups would wait for it for ever. Once
    the trainer has finished nothing waits.

    Returns:
      "stored"; or, when a group of that id is there already (a restarted explorer's), "same" or
      "different" by tokens, versions, rewards and log-probs. The stored one stays.

    Raises:
      RunFailed: the buffer was closed, or the store failed.
    """
    put = self._writer.submit(describe_group(group, self._min_runs))
    try:
      return await asyncio.wrap_future(put.done)
    except asyncio.CancelledError:
      self._writer.abandon(put)
      raise

  def give_reward(self, id: ExperienceId, reward: float) -> None:
    """The reward of an experience that was put with info["awaits_reward"] and without one.

    Its group is ready when the last has come. The same reward again changes nothing.

    Raises:
      UserError: the experience is not held, waits for nothing, or has another reward.
    """
    self.store.give_reward(id, reward, self.rules)

  def claim(self, owner: str, lease: float, *, new: bool = True) -> Claim | None:
    """An explorer step for `owner` to run within `lease` seconds (see `heartbeat`).

    First those whose owner released them or let the lease expire, then the next new one.

    Args:
      new: False to look for abandoned steps only, e.g. while waiting for a policy version.

    Returns:
      The step and its tasks that are not stored; None when the trainer has finished (or, without
      `new`, nothing is abandoned).
    """
    return self.store.claim(owner, lease, self.rules, new)

  def heartbeat(self, owner: str, lease: float) -> None:
    """Extends the owner's claims to `lease` seconds from now."""
    self.store.heartbeat(owner, lease)

  def release(self, owner: str) -> None:
    """Gives back the owner's claims: at start-up (after a kill) and at a clean end."""
    self.store.release(owner)

  def held(self, batch: int) -> set[int]:
    """Tasks of an explorer step whose groups are stored, used ones included."""
    return self.store.held(batch)

  # --- the trainer -------------------------------------------------------------------------------

  def sample(
    self,
    groups: int,
    step: int,
    deadline: float,
    describe: Callable[[], str] = lambda: "",
  ) -> list[Experience]:
    """The experiences of `groups` groups for trainer step `step`, in id order; blocks.

    The groups are marked as used by `step`, durably; `restore` takes that back. Action tokens older
    than max_staleness come with action_mask False; groups without any other are dropped on the way.

    Args:
      deadline: seconds to wait.
      describe: called when the wait expires; says what the producers are doing.

    Raises:
      RunFailed: the wait expired (says what is missing), the buffer was closed, the store failed.
      UserError: a stored experience is damaged.
    """
    taken: list[Key] = []
    found: dict[Key, list[Experience]] = {}
    end = time.monotonic() + deadline
    try:
      while True:
        seen = self.bell.count
        new = self.store.take(groups - len(taken), step, self.rules)
        taken += new
        found |= zip(new, self.store.load(new))
        if len(taken) >= groups:
          return self._masked(found, step)
        if self._closed is not None:
          raise RunFailed("the replay buffer was closed while the trainer waited") from self._closed
        left = end - time.monotonic()
        if left <= 0:
          raise RunFailed(self._missing(groups, len(taken), deadline, describe))
        self.bell.wait(seen, left)
    except BaseException:  # an interrupt too must not keep what nobody will train on
      if taken:
        self.store.untake(taken, step, self.rules)
      raise

  def _masked(self, found: dict[Key, list[Experience]], step: int) -> list[Experience]:
    oldest = self.rules.oldest(step)
    out: list[Experience] = []
    counts: dict[Key, int] = {}
    for key in sorted(found):
      experiences, masked = mask_group(found[key], oldest)
      out += experiences
      if masked:
        counts[key] = masked
    if counts:
      self.store.note_masked(step, counts)
    return out

  def _missing(self, groups: int, have: int, deadline: float, describe: Callable[[], str]) -> str:
    stats = self.store.stats()
    what = (
      f"group {self.store.due(self.rules)} (explorer step, task) is missing"
      if self.rules.order == "id"
      else f"none more may be used (max_uses {self.rules.max_uses}, cool_down "
      f"{self.rules.cool_down})"
    )
    late = f", {stats.waiting} wait for a reward" if stats.waiting else ""
    return (
      f"the trainer waited {deadline:.0f} s (sync.timeout) for {groups} groups and has {have}: "
      f"{what}, {stats.ready} ready ones are here{late}. {describe()}"
    )

  def commit(self, step: int) -> None:
    """A checkpoint of `step` is durable: uses up to it are final.

    The experiences of groups that are used up are deleted (not with `keep`); their ids, uses and
    digests stay.
    """
    self.store.commit(step, self.rules)

  def restore(self, step: int) -> None:
    """The run goes on from the checkpoint of `step` (0: from the start): later uses are forgotten.

    Raises:
      UserError: a later checkpoint was committed and what it used is deleted.
    """
    self.store.restore(step, self.rules)

  def finish(self) -> None:
    """The trainer is done: `claim` returns None from now on, in every process."""
    self.store.finish()

  @property
  def finished(self) -> bool:
    return self.store.finished

  def close(self, error: BaseException | None = None) -> None:
    """Fails everyone of this process who waits, now and later; what is complete can be sampled."""
    self._closed = error or RunFailed("the replay buffer was closed")
    self._writer.close(self._closed)
    self.bell.ring_here()

  # --- what there is -----------------------------------------------------------------------------

  @property
  def dropped(self) -> int:
    """Groups dropped as stale or short: the schedule does not count them."""
    return self.store.stats().dropped

  def stats(self) -> dict[str, int]:
    """Groups ready, waiting (for a reward), claimed (and not stored), used, dropped; experiences
    that are ready and not used; stale action tokens masked."""
    now = self.store.stats()
    return {
      "ready": now.ready,
      "waiting": now.waiting,
      "claimed": self.store.claimed(self.rules),
      "used": now.used,
      "dropped": now.dropped,
      "experiences": now.fresh,
      "masked_tokens": now.masked,
    }
