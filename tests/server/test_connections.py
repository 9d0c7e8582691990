"""Clients that neither send nor read lose their connection; all others keep it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest
import uvicorn
from uvicorn.server import ServerState

from trinity_jax.server import connections

SHORT, WAIT = 1.0, 30  # seconds


class App:
  """An ASGI application that reads nothing, and is endless where it is asked to be."""

  def __init__(self):
    self.left = threading.Event()

  async def __call__(self, scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/endless":
      gone = asyncio.create_task(self._gone(receive))
      while not gone.done():
        await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
      self.left.set()
    await send({"type": "http.response.body", "body": b"done"})

  async def _gone(self, receive):
    while (await receive())["type"] != "http.disconnect":
      pass


@pytest.fixture
def app(monkeypatch):
  monkeypatch.setattr(connections, "HEAD", SHORT)
  monkeypatch.setattr(connections, "STUCK", SHORT)
  app = App()
  app.socket = socket.create_server(("127.0.0.1", 0))
  config = uvicorn.Config(app, http=connections.protocol(), log_config=None, lifespan="off")
  server = uvicorn.Server(config)
  thread = threading.Thread(target=server.run, kwargs={"sockets": [app.socket]})
  thread.start()
  yield app
  server.should_exit = True
  thread.join(WAIT)
  app.socket.close()
  assert not thread.is_alive()


def connect(app) -> socket.socket:
  return socket.create_connection(app.socket.getsockname(), timeout=WAIT)


def head(path="/", *lines) -> bytes:
  return "\r\n".join([f"GET {path} HTTP/1.1", "Host: a", *lines, "", ""]).encode()


def answer(client) -> bytes:
  """One whole answer, or what came before the end."""
  got = b""
  while not got.endswith(b"0\r\n\r\n") and (piece := client.recv(4096)):
    got += piece
  return got


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\n", head()])
def test_a_head_that_comes_bit_by_bit_has_one_deadline(app, first):
  with connect(app) as client:
    client.sendall(first)
    if first == head():
      assert answer(client)
      client.sendall(b"GET")  # what follows on the same connection has one, too
    start = time.monotonic()
    client.settimeout(SHORT / 8)
    while time.monotonic() < start + WAIT:
      try:
        if first:
          client.sendall(b"x: y\r\n")
        if client.recv(4096) == b"":
          break
      except TimeoutError:
        continue
      except OSError:
        break
    assert time.monotonic() - start < WAIT / 2


def test_a_body_that_nobody_reads_has_a_deadline(app):
  with connect(app) as client:
    client.sendall(head("/", "Content-Length: 1000000000"))
    assert answer(client).endswith(b"done\r\n0\r\n\r\n")
    deadline = time.monotonic() + WAIT
    with pytest.raises(OSError):
      while time.monotonic() < deadline:
        client.sendall(b"x" * 10)
        time.sleep(SHORT / 8)


def test_who_never_reads_an_answer_loses_it(app):
  with socket.socket() as client:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(app.socket.getsockname())
    client.sendall(head("/endless"))
    assert app.left.wait(WAIT)


class Transport(asyncio.Transport):
  """Takes whatever is written."""

  def __init__(self):
    super().__init__()
    self.written, self.open = b"", True

  def write(self, data):
    self.written += data

  def is_closing(self):
    return not self.open

  def close(self):
    self.open = False

  abort = close

  def pause_reading(self):
    pass

  resume_reading = pause_reading


def test_deadlines_end_with_what_they_are_for():
  """Looked at where they are kept, so that a busy machine makes no difference."""

  async def talk():
    config = uvicorn.Config(App(), log_config=None, lifespan="off")
    config.load()
    made = connections.protocol()(config=config, server_state=ServerState(), app_state={})
    transport = Transport()
    made.connection_made(transport)
    first = made._head
    assert first is not None and not first.cancelled()
    for _ in range(3):  # requests on one connection
      whole = head()
      made.data_received(whole[:9])
      begun = made._head
      assert begun is not None and not begun.cancelled()
      made.data_received(whole[9:20])
      assert made._head is begun  # not a new one for each piece
      made.data_received(whole[20:])
      assert begun.cancelled() and made._head is None  # nor while it is answered
      await asyncio.gather(*made.server_state.tasks)
      assert transport.written.endswith(b"0\r\n\r\n") and made._head is None
      transport.written = b""
    assert first.cancelled() and transport.open
    made.pause_writing()
    stuck = made._stuck
    assert stuck is not None and not stuck.cancelled()
    made.resume_writing()
    assert stuck.cancelled()
    made.data_received(b"G")
    made.pause_writing()
    left = made._head, made._stuck
    made.connection_lost(None)
    assert all(timer is not None and timer.cancelled() for timer in left)

  asyncio.run(talk())
