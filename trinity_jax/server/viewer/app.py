"""The viewer's web server: a page of our own, and JSON that only a bearer of the token gets.

The page and its script hold nothing of a run and are given to anybody on this machine; the token
comes in the fragment of the printed address, which browsers never send, and goes back in a header.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trinity_jax.errors import RunFailed, UserError
from trinity_jax.server import connections
from trinity_jax.server.viewer import records
from trinity_jax.server.viewer.folder import WATCHED, Folder
from trinity_jax.server.viewer.index import Page, Query

if TYPE_CHECKING:
  from starlette.applications import Starlette
  from starlette.requests import Request

log = logging.getLogger(__name__)

_FILES = ("viewer.js", "common.js", "curves.js", "rollout.js", "viewer.css")
STATIC = {"/": "viewer.html", **{f"/{name}": name for name in _FILES}}
PAGE, LONGEST_PAGE = 50, 500  # rollouts of a page
_QUIET = 15.0  # seconds after which a stream of changes says that it is there
_GAP = 0.5  # seconds between two changes that are told
_START = 20.0  # seconds
_HEADERS = {
  "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
  "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "no-referrer",
  "Cache-Control": "no-store",
  "Cross-Origin-Resource-Policy": "same-origin",
}


class Changes:
  """Tells coroutines that a file of the run changed; watches the folder, no poll.

  Attributes:
    problem: why it cannot, "" when it can; the page then has its button to reload.
  """

  def __init__(self, folder: Path):
    from watchdog.events import (
      FileCreatedEvent,
      FileModifiedEvent,
      FileMovedEvent,
      FileSystemEvent,
      FileSystemEventHandler,
    )
    from watchdog.observers import Observer

    changes, self.problem = self, ""
    self._listeners: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}
    self._lock = threading.Lock()

    class Handler(FileSystemEventHandler):
      def on_any_event(self, event: FileSystemEvent) -> None:
        # A reader makes an empty log, so only what is written to one counts.
        created = isinstance(event, FileCreatedEvent)
        names = {Path(str(p)).name for p in (event.src_path, event.dest_path) if p}
        if names & set(WATCHED) and not (created and any(n.endswith("-wal") for n in names)):
          changes.ring()

    self._observer = Observer()
    self._observer.daemon = True
    kinds: list[type[FileSystemEvent]] = [FileCreatedEvent, FileModifiedEvent, FileMovedEvent]
    try:
      self._observer.schedule(Handler(), str(folder), recursive=True, event_filter=kinds)
      self._observer.start()
    except OSError as e:
      self.problem = f"the folder cannot be watched ({e}); use the Reload button"

  def ring(self) -> None:
    with self._lock:
      for event, loop in self._listeners.items():
        with contextlib.suppress(RuntimeError):  # a loop that is closed needs to know nothing
          loop.call_soon_threadsafe(event.set)

  @contextlib.contextmanager
  def listen(self):
    event = asyncio.Event()
    with self._lock:
      self._listeners[event] = asyncio.get_running_loop()
    try:
      yield event
    finally:
      with self._lock:
        self._listeners.pop(event)

  def close(self) -> None:
    self._observer.stop()
    if self._observer.is_alive():
      self._observer.join(5)


def make_app(folder: Folder, token: str, changes: Changes | None = None) -> Starlette:
  """The ASGI application; see the module.

  Args:
    token: what `Authorization: Bearer` must carry on every path below /api.
    changes: where /api/changes hears of them; without, the page is not told.
  """
  from starlette.applications import Starlette
  from starlette.responses import JSONResponse, Response, StreamingResponse
  from starlette.routing import Route

  def allowed(request: Request) -> bool:
    given = request.headers.get("authorization", "").encode()
    return hmac.compare_digest(given, f"Bearer {token}".encode())

  def answer(value: Any, status: int = 200) -> Response:
    return JSONResponse(value, status, headers=_HEADERS)

  def static(request: Request) -> Response:
    name = STATIC[request.url.path]
    kind = {"html": "text/html", "js": "text/javascript", "css": "text/css"}[name.split(".")[1]]
    return Response(Path(__file__).with_name(name).read_bytes(), media_type=kind, headers=_HEADERS)

  def guarded(function: Callable[[Folder, Any], Any]) -> Callable[[Request], Response]:
    def endpoint(request: Request) -> Response:
      if not allowed(request):
        return answer({"error": "no or wrong token; open the address that was printed"}, 401)
      try:
        value = function(folder, request.query_params)
      except UserError as e:
        return answer({"error": str(e)}, 400)
      except RunFailed as e:
        return answer({"error": str(e)}, 503)
      return answer({"error": "not stored (any more)"}, 404) if value is None else answer(value)

    return endpoint  # a plain function: starlette calls it in a thread

  async def told(request: Request) -> Response:
    if not allowed(request):
      return answer({"error": "no or wrong token"}, 401)
    problem = "not told of changes; use the Reload button" if changes is None else changes.problem
    if changes is None or problem:
      return answer({"error": problem}, 501)
    stream = _stream(changes)
    return StreamingResponse(stream, media_type="application/x-ndjson", headers=_HEADERS)

  routes = [Route(path, static) for path in STATIC]
  routes += [Route("/health", lambda _: answer({"status": "ok"}))]
  routes += [Route(f"/api/{name}", guarded(f)) for name, f in _ENDPOINTS.items()]
  return Starlette(routes=[*routes, Route("/api/changes", told)])


async def _stream(changes: Changes) -> AsyncIterator[bytes]:
  """A line per change, at most two per second, and one when nothing happened for a while."""
  with changes.listen() as event:
    yield b'{"changed": false}\n'
    while True:
      try:
        async with asyncio.timeout(_QUIET):
          await event.wait()
      except TimeoutError:
        yield b'{"changed": false}\n'  # fails where the browser has gone
        continue
      event.clear()
      yield b'{"changed": true}\n'
      await asyncio.sleep(_GAP)  # a rate limit: what happens meanwhile sets the event again


# --- endpoints -----------------------------------------------------------------------------------


def _run(folder: Folder, _: Any) -> dict[str, Any]:
  return {"workdir": folder.path.name, "stages": [folder.describe(s) for s in folder.stages()]}


def _curves(folder: Folder, params: Any) -> dict[str, Any]:
  names = [n for n in params.get("names", "").split(",") if n][:24]
  return folder.curves(params.get("stage", ""), names)


def _rollouts(folder: Folder, params: Any) -> dict[str, Any]:
  query = Query(
    text=params.get("text", ""),
    reward_min=_read(params, "reward_min", float),
    reward_max=_read(params, "reward_max", float),
    stop=params.get("stop", ""),
    batch_min=_read(params, "batch_min", int),
    batch_max=_read(params, "batch_max", int),
    task=_read(params, "task", int),
    order=params.get("order") or "newest",
  )
  offset = max(_read(params, "offset", int) or 0, 0)
  limit = min(max(_read(params, "limit", int) or PAGE, 1), LONGEST_PAGE)
  index = folder.index(params.get("stage", ""))
  page = Page([], 0, 0, 0)
  if index is not None:
    index.refresh()
    page = index.search(query, offset, limit)
  return {**page._asdict(), "rows": [records.row_json(r) for r in page.rows], "offset": offset}


def _rollout(folder: Folder, params: Any) -> dict[str, Any] | None:
  stage, id = params.get("stage", ""), params.get("id", "")
  try:
    batch, task, run, step = (int(part) for part in id.split("/"))
  except ValueError as e:
    raise UserError(f"id = {id[:80]!r}; expected step/task/run/step such as 1/0/0/0") from e
  index = folder.index(stage)
  first = max(_read(params, "first", int) or 0, 0)
  if index is None or max(map(abs, (batch, task, run, step))) >= 1 << 63:  # beyond databases
    return None
  experience = index.load((batch, task, run, step))
  if experience is None:
    return None
  ids = experience.tokens[first : first + records.TOKENS].tolist()
  pieces, where = folder.pieces(stage, ids)
  out = records.experience_json(experience, pieces, first)
  index.refresh()
  group = [records.row_json(r) for r in index.group(batch, task)]
  return {**out, "group": group, "tokenizer": where}


_ENDPOINTS = {"run": _run, "curves": _curves, "rollouts": _rollouts, "rollout": _rollout}


def _read(params: Any, name: str, kind: Callable[[str], Any]) -> Any:
  text = params.get(name, "").strip()
  if not text:
    return None
  try:
    return kind(text)
  except ValueError as e:
    raise UserError(f"{name} = {text[:80]!r}; expected a number") from e


# --- the server ----------------------------------------------------------------------------------


class Viewer:
  """Serves a run's folder until it is closed.

  Args:
    workdir, tokenizer: see Folder.
    host: address to bind to; others than this machine's own send the token unencrypted.
    port: 0 takes a free one.
    token: "" makes one.

  Attributes:
    url: what to open; holds the token.

  Raises:
    UserError: no such folder, or the address cannot be bound.
  """

  def __init__(
    self,
    workdir: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str = "",
    tokenizer: str | Path = "",
  ):
    import uvicorn
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    folder = Folder(workdir, tokenizer)
    self.token = token or secrets.token_urlsafe(24)
    self._socket = _bind(host, port)
    port = self._socket.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    self.url = f"http://{shown}:{port}/#token={self.token}"
    self._changes = Changes(folder.path)
    app = make_app(folder, self.token, self._changes)
    if host in ("127.0.0.1", "localhost", "::1"):
      # A page elsewhere whose name is made to point here is not this one.
      app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    config = uvicorn.Config(
      app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, lifespan="off",
      server_header=False, http=connections.protocol(), ws="none",
    )  # fmt: skip
    self._server = uvicorn.Server(config)
    self._thread: threading.Thread | None = None

  def run(self) -> None:
    """Serves in the calling thread until SIGINT or SIGTERM (in the main thread)."""
    try:
      with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again when it has ended
        self._server.run(sockets=[self._socket])
    finally:
      self.close()

  def start(self) -> Viewer:
    """Serves in a thread; connections are taken when this returns (the socket listens)."""
    self._thread = threading.Thread(
      target=self._server.run, kwargs={"sockets": [self._socket]}, name="viewer", daemon=True
    )
    self._thread.start()
    return self

  def close(self) -> None:
    """Ends what `start` began.

    Raises:
      RunFailed: it does not end.
    """
    self._server.should_exit = True
    if self._thread is not None:
      self._thread.join(_START)
      if self._thread.is_alive():
        raise RunFailed(f"the viewer's server did not end within {_START:.0f} s")
    self._changes.close()
    self._socket.close()

  def __enter__(self) -> Viewer:
    return self.start()

  def __exit__(self, *_: object) -> None:
    self.close()


def _bind(host: str, port: int) -> socket.socket:
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  out = socket.socket(family, socket.SOCK_STREAM)
  try:
    out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    out.bind((host, port))
    out.listen(128)
  except (OSError, OverflowError) as e:
    out.close()
    raise UserError(f"cannot listen on {host}:{port}: {e}; choose another --port or --host") from e
  return out
