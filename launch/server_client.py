"""The clients of launch/perf_server.py, in a process of their own: open streams, and /health.

Usage: server_client.py HOST PORT TOKEN STREAMS PROBES LIMIT. Says "ready" when all streams run,
counts from the line "go" to the line "stop", and prints a line of JSON: the events a second and
the milliseconds of each /health. Nothing but sockets, so that the client costs little beside a
server that it shares the machine with.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any


def post(host: str, token: str, path: str, body: dict[str, Any]) -> bytes:
  data = json.dumps(body).encode()
  head = (
    f"POST {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {token}\r\n"
    f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
  )
  return head.encode() + data


class Client:
  """Streams that begin again when they end, and probes of /health that keep to a timetable."""

  def __init__(self, host: str, port: int, token: str, probes: int, limit: int):
    self._host, self._port, self._token = host, port, token
    self._every, self._limit = 1 / probes, limit
    self.begun: asyncio.Queue[int] = asyncio.Queue()
    self.events, self.health_ms = 0, list[float]()

  async def stream(self, number: int) -> None:
    reader, writer = await asyncio.open_connection(self._host, self._port)
    text, first, rng = f"{number:02}" * 8, True, random.Random(number)
    while True:
      limit = rng.randint(self._limit // 2, self._limit)
      messages = [{"role": "user", "content": text}]
      body = {"messages": messages, "max_tokens": limit, "stream": True}
      writer.write(post(self._host, self._token, "/v1/chat/completions", body))
      async for line in reader:
        if line == b"data: [DONE]\n":
          break
        if line.startswith(b"data: "):
          assert b'"error"' not in line, line
          self.events += 1
          if first:
            self.begun.put_nowait(number)
            first = False
      await reader.readuntil(b"0\r\n\r\n")  # the last chunk

  async def probe(self) -> None:
    """A request every so often, whatever has become of those before."""
    ask = f"GET /health HTTP/1.1\r\nhost: {self._host}\r\n\r\n".encode()
    free: list[Any] = []

    async def one() -> None:
      start = time.perf_counter()
      reader, writer = free.pop() if free else await asyncio.open_connection(self._host, self._port)
      writer.write(ask)
      head = await reader.readuntil(b"\r\n\r\n")
      assert b" 200 " in head, head
      length = next(x for x in head.lower().split(b"\r\n") if x.startswith(b"content-length"))
      await reader.readexactly(int(length.split(b":")[1]))
      self.health_ms.append(1e3 * (time.perf_counter() - start))
      free.append((reader, writer))

    due, open_ = time.perf_counter(), set[asyncio.Task]()
    try:
      while True:
        due += self._every
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(one())
        open_.add(task)
        task.add_done_callback(open_.discard)
    finally:
      for task in open_:
        task.cancel()


async def main(host: str, port: str, token: str, *numbers: str) -> None:
  streams, probes, limit = map(int, numbers)
  client = Client(host, int(port), token, probes, limit)
  tasks = [asyncio.create_task(client.stream(i)) for i in range(streams)]
  for _ in range(streams):
    await client.begun.get()
  loop = asyncio.get_running_loop()
  print("ready", flush=True)
  await loop.run_in_executor(None, sys.stdin.readline)
  client.events, start = 0, time.perf_counter()
  prober = asyncio.create_task(client.probe())
  await loop.run_in_executor(None, sys.stdin.readline)
  rate = client.events / (time.perf_counter() - start)
  report = {"events": rate, "health_ms": [round(x, 3) for x in client.health_ms]}
  for task in (prober, *tasks):
    broken = task.done() and task.exception()
    assert not broken, broken
    task.cancel()
  await asyncio.gather(prober, *tasks, return_exceptions=True)
  print(json.dumps(report), flush=True)


if __name__ == "__main__":
  asyncio.run(main(*sys.argv[1:]))
