"""Functions in threads: results, errors, limits; one that never ends holds nothing up."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
import time

import pytest

from trinity_jax.explorer import threads
from trinity_jax.explorer.threads import in_thread

WAIT = 30


def test_results_errors_and_context():
  name = contextvars.ContextVar("name")

  def fail(error):
    raise error

  async def main():
    name.set("mine")
    assert await in_thread(lambda a, b: (name.get(), a + b), 1, 2) == ("mine", 3)
    with pytest.raises(KeyError, match="what"):
      await in_thread(fail, KeyError("what"))
    with pytest.raises(RuntimeError, match=r"raised StopIteration\(4\)"):
      await in_thread(fail, StopIteration(4))
    with pytest.raises(SystemExit):
      await in_thread(sys.exit, 3)

  asyncio.run(main())


def test_no_more_than_the_limit_at_once(monkeypatch):
  monkeypatch.setattr(threads, "MOST", 4)
  now, most, lock = 0, 0, threading.Lock()

  def work(i):
    nonlocal now, most
    with lock:
      now, most = now + 1, max(most, now + 1)
    time.sleep(0.01)
    with lock:
      now -= 1
    return i

  async def main():
    return await asyncio.gather(*(in_thread(work, i) for i in range(20)))

  assert asyncio.run(main()) == list(range(20))
  assert most == 4


def test_those_that_hang_leave_their_places(monkeypatch):
  monkeypatch.setattr(threads, "MOST", 2)
  go_on = threading.Event()

  async def main():
    for _ in range(5):
      with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
          await in_thread(go_on.wait, WAIT)
    assert await in_thread(lambda: "still here") == "still here"
    go_on.set()  # answers that nobody waits for any more
    await asyncio.sleep(0.05)

  asyncio.run(main())


def test_a_process_ends_beside_one_that_hangs():
  code = (
    "import asyncio, time\n"
    "from trinity_jax.explorer.threads import in_thread\n"
    "async def main():\n"
    "  try:\n"
    "    async with asyncio.timeout(0.1): await in_thread(time.sleep, 1e6)\n"
    "  except TimeoutError: print('went on')\n"
    "asyncio.run(main())"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
  assert done.stdout == "went on\n" and not done.stderr
