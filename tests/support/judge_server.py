"""An OpenAI-compatible judge that answers what a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class JudgeServer:
  """Calls `answer(user prompt, number of the request)` for a reply or a status.

  Attributes:
    requests: bodies, with the headers under "headers".
  """

  def __init__(self, answer: Callable[[str, int], str | int]):
    self.requests: list[dict[str, Any]] = []
    server = self

    class Handler(BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append({**body, "headers": dict(self.headers), "path": self.path})
        reply = answer(body["messages"][-1]["content"], len(server.requests))
        status, out = (reply, {"error": "as told"}) if isinstance(reply, int) else (200, {
          "choices": [{"message": {"role": "assistant", "content": reply}}]})  # fmt: skip
        data = json.dumps(out).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

      def log_message(self, format: str, *args: Any) -> None:
        pass

    self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self._server.daemon_threads = True
    self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

  def __enter__(self) -> JudgeServer:
    threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._server.shutdown()
    self._server.server_close()
