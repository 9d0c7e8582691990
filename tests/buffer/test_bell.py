"""Bells wake those who wait: threads, loops, other processes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time

import pytest

from trinity_jax.buffer.bell import FileBell, ThreadBell
from trinity_jax.errors import RunFailed

WAIT = 30


@pytest.fixture(params=["thread", "file", "postgresql"])
def bell(request, tmp_path):
  if request.param == "thread":
    made = ThreadBell()
  elif request.param == "file":
    made = FileBell(tmp_path / "bell")
  else:
    from trinity_jax.buffer.storage_postgres import PostgresBell

    server = request.getfixturevalue("server")
    made = PostgresBell(server.url, "a_channel", "the server")
  yield made
  made.close()
  made.close()


def test_a_ring_between_looking_and_waiting_is_not_missed(bell):
  seen = bell.count
  bell.ring()
  start = time.monotonic()
  assert bell.wait(seen, WAIT) > seen
  assert time.monotonic() - start < WAIT / 2


def test_a_wait_without_a_ring_ends_at_its_timeout():
  bell = ThreadBell()
  assert bell.wait(0, 0.01) == 0


def test_threads_and_loops_are_woken(bell):
  woken = threading.Event()
  seen = bell.count
  thread = threading.Thread(target=lambda: bell.wait(seen, WAIT) != seen and woken.set())
  thread.start()

  async def wait():
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    unsubscribe = bell.subscribe(lambda: loop.call_soon_threadsafe(event.set))
    loop.run_in_executor(None, bell.ring)
    await asyncio.wait_for(event.wait(), WAIT)
    unsubscribe()
    unsubscribe()

  asyncio.run(wait())
  bell.ring()  # nobody's loop is called any more
  thread.join(WAIT)
  assert woken.is_set()


def test_another_bell_on_the_same_folder(tmp_path):
  bells = [FileBell(tmp_path) for _ in range(2)]
  for one, other in (bells, bells[::-1]):
    seen = other.count
    one.ring()
    assert other.wait(seen, WAIT) != seen
  for bell in bells:
    bell.close()
  bells[0].ring()  # of a closed bell: for this process only


def drain(bell):
  """Waits until earlier changes of the folder have been heard; returns the count."""
  seen = bell.count
  while (now := bell.wait(seen, 0.05)) != seen:
    seen = now
  return seen


def test_another_process_rings(tmp_path):
  bell = FileBell(tmp_path)
  code = """if True:
    import sys
    from trinity_jax.buffer.bell import FileBell
    bell = FileBell(sys.argv[1])
    seen = bell.count
    print("ready", flush=True)
    print(bell.wait(seen, 30) != seen, flush=True)
    sys.stdin.readline()
    bell.ring()
  """
  other = subprocess.Popen(
    [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
  )
  with other:
    assert other.stdin and other.stdout and other.stdout.readline() == b"ready\n"
    bell.ring()
    assert other.stdout.readline() == b"True\n"
    seen = drain(bell)
    other.stdin.write(b"\n")
    other.stdin.flush()
    assert bell.wait(seen, WAIT) != seen
    assert other.wait(WAIT) == 0
  bell.close()


def test_reading_a_watched_folder_rings_nothing(tmp_path):
  (tmp_path / "file").write_text("x")
  bell = FileBell(tmp_path)
  seen = drain(bell)
  (tmp_path / "file").read_text()
  os.listdir(tmp_path)
  assert bell.wait(seen, 0.1) == seen
  bell.close()


def test_a_cut_connection_is_made_again_and_rings(server):
  from trinity_jax.buffer.storage_postgres import PostgresBell

  bells = [PostgresBell(server.url, "a_channel", "the server") for _ in range(2)]
  for bell in bells:
    bell.ring()  # its sending connection is cut too
  seen = [b.count for b in bells]
  assert server.cut_connections() >= 2
  assert all(b.wait(s, WAIT) != s for b, s in zip(bells, seen))
  seen = bells[1].count
  bells[0].ring()
  assert bells[1].wait(seen, WAIT) != seen
  for bell in bells:
    bell.close()


def test_a_ring_waits_for_a_server_that_starts_again(server):
  from trinity_jax.buffer.storage_postgres import PostgresBell

  bells = [PostgresBell(server.url, "a_channel", "the server") for _ in range(2)]
  bells[0].ring()
  server.stop("immediate")
  ringing = threading.Thread(target=bells[0].ring)
  ringing.start()
  seen = bells[1].count
  server.start()
  ringing.join(WAIT)
  assert not ringing.is_alive()
  assert bells[1].wait(seen, WAIT) != seen
  for bell in bells:
    bell.close()


def test_a_ring_that_nobody_hears_says_so(server):
  from trinity_jax.buffer.storage_postgres import PostgresBell

  bell = PostgresBell(server.url, "a_channel", "the server", patience=0.2)
  server.stop("immediate")
  try:
    with pytest.raises(RunFailed, match="the server: not reached for 0 s: .*"):
      bell.ring()
  finally:
    server.start()
    bell.close()


def test_no_server():
  pytest.importorskip("psycopg")
  from trinity_jax.buffer.storage_postgres import PostgresBell

  with pytest.raises(RunFailed, match="the server: .*no_such_folder"):
    PostgresBell("postgresql://a@/b?host=/no_such_folder", "a_channel", "the server")
