"""How the processes of a run train on the same experiences: the leader's, told before each step.

Every process also samples for the leader, with its own devices.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trinity_jax.distributed import World
from trinity_jax.errors import UserError
from trinity_jax.experience import Experience
from trinity_jax.preemption import Preempted
from trinity_jax.sampler.remote import Host
from trinity_jax.sampler.scheduler import Sampler
from trinity_jax.source import Source

if TYPE_CHECKING:
  from trinity_jax.stage import Stage

PATIENCE = 2  # times sync.timeout that other processes wait for the first one
_END = b"end"
_SIZE = struct.Struct("<Q")


def tell(world: World, experiences: Sequence[Experience]) -> None:
  """The leader's experiences of the next step."""
  if world.count > 1:
    blobs = [e.to_bytes() for e in experiences]
    world.tell(b"step" + b"".join(_SIZE.pack(len(b)) + b for b in blobs), step=True)


def tell_end(world: World) -> None:
  """There is no next step: the run was asked to end."""
  world.tell(_END)


def hear(world: World, seconds: float) -> list[Experience] | None:
  """What the leader told; None when the run was asked to end.

  Raises:
    RunFailed: nothing came in time.
    UserError: what came is damaged.
  """
  message = world.hear(seconds)
  if message == _END:
    return None
  if not message.startswith(b"step"):
    raise UserError(f"process 0 told {message[:20]!r}: expected a step; do all run the same code?")
  out, at = [], 4
  while at < len(message):
    (size,) = _SIZE.unpack_from(message, at)
    at += _SIZE.size
    out.append(Experience.from_bytes(message[at : at + size]))
    at += size
  return out


class Followed(Source):
  """What the leader tells a process, whose sampler serves the leader meanwhile.

  Args:
    sampler: of this process, None in a stage without.
  """

  def __init__(self, stage: Stage, sampler: Sampler | None):
    super().__init__(stage, engine=sampler)
    self._failed = False
    self._host = None
    if sampler is not None:
      self._host = Host(stage.world.channel(0), sampler, stage.synchronizer.wait)

  def may_need(self, version: int) -> bool:
    """Whether the leader, as far as is known here, may yet have this sampler take a version."""
    return self._host is not None and version >= self._host.asked

  def start(self) -> None:
    if self._host is not None:
      self._host.start()

  def sample(self) -> list[Experience] | None:
    c = self.stage.config
    found = hear(self.stage.world, PATIENCE * c.sync.timeout)
    if found and c.sampler.release and self.engine is not None and not self.stage.offline:
      self.engine.release()
    return found

  def fail(self, error: BaseException) -> None:
    if not isinstance(error, Preempted):  # the leader says when that happens
      self._failed = True
      super().fail(error)

  def close(self) -> None:
    if self._host is not None and not self._failed:
      self._host.close()
