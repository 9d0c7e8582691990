"""Connections that would be kept open for nothing: those of clients that neither send nor read."""

from __future__ import annotations

import asyncio
from typing import Any

HEAD = 30.0  # seconds to send a request's head, or what is left of a body that nobody reads
STUCK = 60.0  # seconds to make room for more of an answer


def protocol() -> type[Any]:
  """uvicorn's HTTP/1.1 protocol (h11) with these deadlines; its own is that of idle connections."""
  import h11
  from uvicorn.protocols.http.h11_impl import H11Protocol

  class Impatient(H11Protocol):
    _head: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
      super().connection_made(transport)
      self._await_head()

    def data_received(self, data: bytes) -> None:
      super().data_received(data)
      self._await_head()

    def _await_head(self) -> None:
      """One deadline for a whole head, however many pieces it comes in."""
      theirs, ours = self.conn.their_state, self.conn.our_state
      if theirs is h11.IDLE or (theirs is h11.SEND_BODY and ours is h11.DONE):
        self._head = self._head or self.loop.call_later(HEAD, self.transport.close)
      elif self._head is not None:
        self._head.cancel()
        self._head = None

    def pause_writing(self) -> None:
      super().pause_writing()
      self._give_up_later()

    def resume_writing(self) -> None:
      super().resume_writing()
      if self._stuck is not None:
        self._stuck.cancel()

    def timeout_keep_alive_handler(self) -> None:
      super().timeout_keep_alive_handler()
      self._give_up_later()  # to close means to send what is left first

    def _give_up_later(self) -> None:
      self._stuck = self.loop.call_later(STUCK, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
      super().connection_lost(exc)
      for timer in (self._head, self._stuck):
        if timer is not None:
          timer.cancel()

  return Impatient
