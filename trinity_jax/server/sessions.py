"""Sessions: whose calls are recorded as one run, wherever the agent that makes them lives.

A session is a Model with its own event loop; requests come in on the server's. A bearer token
names the session of a training run; where the server may begin sessions itself, a header does.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

from trinity_jax.explorer.workflow import Model
from trinity_jax.server.protocol import ApiError

T = TypeVar("T")


def ended() -> ApiError:
  return ApiError(410, "this session has ended; begin another", code="session_ended")


class Session:
  """One recorded run.

  Attributes:
    token: the bearer token that names it.
    base_url: for clients of OpenAI's API.
    feedback: the first reward that came through /feedback; None once the session has ended.
    reward: the latest.
    committing: its experiences are being handed on.
    used: time.monotonic() at which its last request ended.
  """

  def __init__(
    self, model: Model, loop: asyncio.AbstractEventLoop, base_url: str, name: str | None = None
  ):
    self.token, self.base_url, self.name = secrets.token_urlsafe(24), base_url, name
    self.feedback: Future[float | None] = Future()
    self.reward: float | None = None
    self.committing = False
    self.busy = 0  # requests under way
    self.used = time.monotonic()
    # A run's own handle keeps its session alive, not the other way round.
    self._model: Callable[[], Model | None] = (lambda: model) if name else weakref.ref(model)
    self._loop, self._ended = loop, False

  @property
  def model(self) -> Model:
    """Raises ApiError when the run has ended."""
    model = None if self._ended or self._loop.is_closed() else self._model()
    if model is None:
      raise ended()
    return model

  async def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
    """Awaits a coroutine of the model in the model's loop; cancelling this cancels it there."""
    try:
      future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
    except RuntimeError as e:
      coroutine.close()
      raise ended() from e
    try:
      return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
      task = asyncio.current_task()
      if task is not None and task.cancelling():
        raise
      raise ended() from None  # the run was, not this request

  def give(self, reward: float) -> None:
    """Takes a reward; the latest counts, the first wakes whoever waits for one."""
    if self._ended:
      raise ended()
    self.reward, self.used = reward, time.monotonic()
    self._tell(reward)

  def close(self) -> None:
    """Ends it: calls are refused from now on, and who waits for a reward gets None."""
    self._ended = True
    self._tell(None)

  @contextlib.contextmanager
  def in_use(self) -> Iterator[None]:
    """A session does not expire while a request of it is under way."""
    self.busy += 1
    try:
      yield
    finally:
      self.busy -= 1
      self.used = time.monotonic()

  def _tell(self, reward: float | None) -> None:
    with contextlib.suppress(InvalidStateError):  # told before, or nobody waits any more
      self.feedback.set_result(reward)


class Sessions:
  """All of a server's; any thread.

  Args:
    new: name -> Model, for sessions that a header begins; None where only runs have them.
    most: open sessions of that kind at once.
    timeout: seconds without a request after which one of that kind is dropped with its logs.

  Attributes:
    expired: sessions that were dropped.
  """

  def __init__(
    self,
    new: Callable[[str], Model] | None = None,
    most: int = 1024,
    timeout: float = 3600.0,
  ):
    self._new, self._most, self._timeout = new, most, timeout
    self.expired = 0
    self._lock = threading.Lock()
    self._by_token: weakref.WeakValueDictionary[str, Session] = weakref.WeakValueDictionary()
    self._named: dict[str, Session] = {}

  def __len__(self) -> int:
    return len(self._by_token)

  def add(self, session: Session) -> Session:
    with self._lock:
      self._by_token[session.token] = session
    return session

  def of(self, token: str) -> Session | None:
    with self._lock:
      return self._by_token.get(token)

  def named(self, name: str, *, begin: bool) -> Session:
    """The session of a name, begun if need be. On the server's loop.

    Raises:
      ApiError: no such session, none may be begun, or too many are open.
    """
    session = self._named.get(name)
    if session is not None:
      return session
    if self._new is None or not begin:
      raise ApiError(404, f"there is no session {name[:60]!r}", code="session_not_found")
    if len(self._named) >= self._most:
      raise ApiError(429, f"{self._most} sessions are open; commit some of them first")
    loop = asyncio.get_running_loop()
    session = self.add(Session(self._new(name), loop, "", name))
    self._named[name] = session
    loop.call_later(self._timeout, self._expire, weakref.ref(session))
    return session

  def _expire(self, mine: weakref.ref[Session]) -> None:
    """Ends a session that nobody has used for so long, or looks again when that may be."""
    session = mine()  # one that has ended is not kept, with its logs, for the rest of the time
    if session is None or self._named.get(session.name or "") is not session:
      return
    left = session.used + self._timeout - time.monotonic()
    if session.busy:
      left = self._timeout
    if left > 0:
      asyncio.get_running_loop().call_later(left, self._expire, mine)
      return
    model = session.model
    self.end(session)
    model.close()
    self.expired += 1

  def end(self, session: Session) -> None:
    session.close()
    with self._lock:
      self._by_token.pop(session.token, None)
    if session.name:
      self._named.pop(session.name, None)

  def close(self) -> None:
    """Ends all of them."""
    for session in list(self._by_token.values()):
      self.end(session)
