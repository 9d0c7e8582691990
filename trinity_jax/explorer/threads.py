"""A user's plain function off the event loop, in a thread that may never end.

asyncio's own threads are joined when the loop and the process end: one that hangs would keep a
finished run from ending, and 32 of them every later call from being made.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
MOST = 32  # calls at once; more would only wait for one another

_limits: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
  weakref.WeakKeyDictionary()
)


async def in_thread(function: Callable[..., T], *args: Any) -> T:
  """Returns function(*args), called in a daemon thread of its own.

  When the caller is cancelled (a deadline, say), the thread is left alone and its place is free.
  """
  loop = asyncio.get_running_loop()
  done: Future[T] = Future()
  done.set_running_or_notify_cancel()  # a caller that gave up must not fail who answers
  context = contextvars.copy_context()

  def call() -> None:
    try:
      done.set_result(context.run(function, *args))
    except BaseException as e:  # raised where it is awaited
      done.set_exception(RuntimeError(f"raised {e!r}") if isinstance(e, StopIteration) else e)

  async with _limits.setdefault(loop, asyncio.Semaphore(MOST)):
    name = getattr(function, "__name__", type(function).__name__)
    threading.Thread(target=call, name=name, daemon=True).start()
    return await asyncio.wrap_future(done)
