"""Clients that neither send nor read lose their connection; all others keep it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest
import uvicorn

from trinity_jax.server import connections

SHORT, WAIT = 0.4, 20  # seconds


class App:
  """An ASGI application that is slow, endless, or reads nothing."""

  def __init__(self):
    self.left = threading.Event()

  async def __call__(self, scope, receive, send):
    if scope["path"] == "/slow":
      await asyncio.sleep(3 * SHORT)
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


def test_who_waits_for_an_answer_or_for_the_next_request_keeps_the_connection(app):
  with connect(app) as client:
    for path in ("/", "/slow", "/"):
      client.sendall(head(path))
      assert answer(client).endswith(b"done\r\n0\r\n\r\n")
      time.sleep(1.5 * SHORT)


def test_who_never_reads_an_answer_loses_it(app):
  with socket.socket() as client:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(app.socket.getsockname())
    client.sendall(head("/endless"))
    assert app.left.wait(WAIT)


def test_who_reads_slowly_does_not(app):
  with connect(app) as client:
    client.sendall(head("/endless"))
    end = time.monotonic() + 4 * SHORT
    while time.monotonic() < end:
      time.sleep(SHORT / 8)
      assert client.recv(1 << 22)
    assert not app.left.is_set()
