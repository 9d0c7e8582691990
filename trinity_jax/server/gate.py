"""Who may ask, how often, and how much: the checks before every endpoint."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trinity_jax.server.metrics import Counters
from trinity_jax.server.protocol import ApiError

if TYPE_CHECKING:
  from starlette.requests import Request
  from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = ("/health",)
_BODY_SECONDS = 30.0  # to send a request's body
_MOST_BUCKETS = 10_000


class Buckets:
  """Token buckets: `rate` requests a second and caller, `burst` at once. A rate of 0: no limit."""

  def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic):
    self._rate, self._burst, self._clock = rate, float(burst), clock
    self._level: dict[str, tuple[float, float]] = {}

  def wait(self, caller: str) -> float:
    """Takes one; returns 0, or the seconds until there is one again."""
    if not self._rate:
      return 0.0
    now = self._clock()
    level, then = self._level.pop(caller, (self._burst, now))
    level = min(self._burst, level + (now - then) * self._rate)
    self._level[caller] = (level - 1 if level >= 1 else level), now
    if len(self._level) > _MOST_BUCKETS:
      self._level.pop(next(iter(self._level)))  # who has not asked for longest
    return 0.0 if level >= 1 else (1 - level) / self._rate


def bearer(scope: Scope) -> str:
  """The bearer token of a request, "" without one."""
  for name, value in scope["headers"]:
    if name == b"authorization":
      kind, _, token = value.decode("latin-1").partition(" ")
      return token.strip() if kind.lower() == "bearer" else ""
  return ""


def same(a: str, b: str) -> bool:
  """Compares secrets in constant time."""
  return hmac.compare_digest(a.encode(), b.encode())


class Gate:
  """ASGI middleware: bearer tokens, rate limit, counters, and errors in OpenAI's form.

  Args:
    known: whether a bearer token may ask.
  """

  def __init__(
    self, app: ASGIApp, known: Callable[[str], bool], buckets: Buckets, counters: Counters
  ):
    self._app, self._known, self._buckets, self._counters = app, known, buckets, counters

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    started, status = time.monotonic(), 0

    async def sent(message: Message) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
      await send(message)

    self._counters.open += 1
    try:
      try:
        self._check(scope)
        await self._app(scope, receive, sent)
      except ApiError as e:
        if not status:
          await answer(e, scope, receive, sent)
      except Exception:  # logged where it came from, and answered: the connection may go on
        if not status:
          raise
    finally:
      self._counters.open -= 1
      self._counters.count(scope["path"], status, time.monotonic() - started)

  def _check(self, scope: Scope) -> None:
    if scope["path"] in OPEN_PATHS:
      return
    token = bearer(scope)
    if not self._known(token):
      raise ApiError(401, "expected a bearer token of this server", code="invalid_api_key")
    if wait := self._buckets.wait(token):
      e = ApiError(429, f"too many requests; again in {wait:.2f} s", code="rate_limit_exceeded")
      e.headers = {"retry-after": str(int(wait) + 1)}  # type: ignore[attr-defined]
      raise e


async def answer(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
  """Sends an error."""
  headers = getattr(error, "headers", {})
  if error.status == 401:
    headers = {"www-authenticate": "Bearer"}
  await json_response(error.body(), error.status, headers)(scope, receive, send)


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Any:
  """A response of JSON in ASCII, so that whatever text there is can be sent."""
  from starlette.responses import Response

  text = json.dumps(body, allow_nan=False, separators=(",", ":"))
  return Response(text, status, headers, media_type="application/json")


async def read_body(request: Request, most: int) -> bytes:
  """The whole body.

  Raises:
    ApiError: longer than `most` bytes, or too slow.
  """
  from starlette.requests import ClientDisconnect

  body = bytearray()
  too_long = ApiError(413, f"the body is longer than {most} bytes", code="request_too_large")
  length = request.headers.get("content-length", "")
  if length.isascii() and length.isdigit() and int(length[:20]) > most:
    raise too_long
  try:
    async with asyncio.timeout(_BODY_SECONDS):
      async for part in request.stream():
        body += part
        if len(body) > most:
          raise too_long
  except TimeoutError as e:
    raise ApiError(408, f"the body did not come within {_BODY_SECONDS:g} s") from e
  except ClientDisconnect as e:
    raise ApiError(499, "the client has left") from e
  return bytes(body)
