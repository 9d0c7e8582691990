"""An answer as server-sent events, and what happens when its client leaves."""

from __future__ import annotations

import asyncio
import collections
import json
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from trinity_jax.explorer.answer import Answer
from trinity_jax.explorer.reasoning import Splitter
from trinity_jax.server.answers import Writer
from trinity_jax.server.backend import OnText
from trinity_jax.server.gate import json_response
from trinity_jax.server.protocol import ApiError, Ask

if TYPE_CHECKING:
  from starlette.types import Receive, Scope, Send

T = TypeVar("T")
Generate = Callable[[OnText | None], Coroutine[Any, Any, list[Answer]]]


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
  """Awaits `work`, or cancels it when the client leaves.

  Raises:
    ApiError: 499, the client has left.
  """
  task, gone = asyncio.create_task(work), asyncio.create_task(_gone(receive))
  try:
    await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
      raise ApiError(499, "the client has left")
    return task.result()
  finally:
    for each in (task, gone):
      each.cancel()
    await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
  while (await receive())["type"] != "http.disconnect":
    pass


class Events:
  """An ASGI response that streams a request's choices as they are sampled.

  With tools nothing of a choice is sent before it has ended, since text may turn out to be a call;
  log-probs and token ids come with a choice's last chunk.

  Args:
    thinking: replies of chats begin within reasoning, see reasoning.goes_on.
  """

  def __init__(
    self,
    ask: Ask,
    generate: Generate,
    writer: Writer,
    headers: dict[str, str] | None = None,
    thinking: bool = False,
  ):
    self._ask, self._generate, self._writer = ask, generate, writer
    self._headers = headers or {}
    self._started = False
    self._splitters = collections.defaultdict[int, Splitter](lambda: Splitter(thinking))

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      await unless_gone(receive, self._run(scope, receive, send))
    except ApiError as e:
      if e.status != 499:
        raise

  async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
    pieces: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
    live = not (self._ask.tools and self._ask.parse)
    on_text = (lambda i, piece: pieces.put_nowait((i, piece))) if live else None
    work = asyncio.create_task(self._generate(on_text))
    work.add_done_callback(lambda _: pieces.put_nowait(None))
    begun: set[int] = set()
    try:
      more = True
      while more:
        more = await self._pass_on(pieces, begun, send)
      await self._end(work, live, begun, scope, receive, send)
    finally:
      work.cancel()
      await asyncio.gather(work, return_exceptions=True)

  async def _pass_on(self, pieces: asyncio.Queue, begun: set[int], send: Send) -> bool:
    """Sends what has come, a choice's pieces in one: who is behind sends fewer, longer chunks."""
    items = [await pieces.get()]
    while not pieces.empty():
      items.append(pieces.get_nowait())
    texts: dict[int, str] = {}
    for index, piece in filter(None, items):
      texts[index] = texts.get(index, "") + piece
    for index, text in texts.items():
      await self._text(index, text, begun, send)
    return items[-1] is not None

  async def _text(self, index: int, text: str, begun: set[int], send: Send, last=False) -> None:
    """Sends a piece of a choice's text, a chat's reasoning apart."""
    reasoning = ""
    if self._ask.messages is not None:
      reasoning, text = self._splitters[index].push(text, last=last)
    if reasoning or text:
      await self._begin(index, begun, send)
    if reasoning:
      await self._send(send, self._writer.reasoning(index, reasoning))
    if text:
      await self._send(send, self._writer.text(index, text))

  async def _begin(self, index: int, begun: set[int], send: Send) -> None:
    if self._ask.messages is not None and index not in begun:
      await self._send(send, self._writer.role(index))
    begun.add(index)

  async def _end(self, work, live: bool, begun: set[int], scope, receive, send: Send) -> None:
    try:
      answers = work.result()
    except ApiError as e:
      if not self._started:  # nothing was promised yet: an ordinary answer
        await json_response(e.body(), e.status)(scope, receive, send)
        return
      await self._send(send, e.body(), more=False)
      return
    for i, answer in enumerate(answers):
      if live:
        await self._text(i, "", begun, send, last=True)
      await self._begin(i, begun, send)
      for chunk in self._writer.last(i, answer, live):
        await self._send(send, chunk)
    if self._ask.usage:
      await self._send(send, self._writer.totals(answers))
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

  async def _send(self, send: Send, chunk: dict[str, Any], more: bool = True) -> None:
    if not self._started:
      self._started = True
      headers = {"content-type": "text/event-stream", "cache-control": "no-store", **self._headers}
      pairs = [(k.encode(), v.encode()) for k, v in headers.items()]
      await send({"type": "http.response.start", "status": 200, "headers": pairs})
    text = json.dumps(chunk, allow_nan=False, separators=(",", ":"))
    await send(
      {"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": more}
    )
