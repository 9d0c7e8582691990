"""How the processes of a run train on the same experiences: the leader's, told before each step."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from trinity_jax.distributed import World
from trinity_jax.errors import UserError
from trinity_jax.experience import Experience

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
