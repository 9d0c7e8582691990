"""The server's life: a thread of its own, with its own event loop, beside the sampler."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trinity_jax.errors import RunFailed, UserError
from trinity_jax.explorer.workflow import Model, SamplingParams
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.sampler.rollout_engine import RolloutEngine
from trinity_jax.server import connections
from trinity_jax.server.backend import Limits
from trinity_jax.server.gate import Buckets
from trinity_jax.server.openai import Api, Commit, LateReward, new_token
from trinity_jax.server.sessions import Session, Sessions

_START, _CLOSE = 20.0, 20.0  # seconds
_KEEP_ALIVE = 120  # seconds; longer than clients keep idle connections


def serve(
  engine: RolloutEngine,
  tokenizer: Tokenizer,
  *,
  max_prompt: int,
  max_response: int,
  params: SamplingParams | None = None,
  host: str = "127.0.0.1",
  port: int = 0,
  token: str | None = None,
  model: str = "policy",
  new_session: Callable[[str], Model] | None = None,
  on_commit: Commit | None = None,
  on_reward: LateReward | None = None,
  most_logs: int | None = None,
  max_sessions: int = 1024,
  session_timeout: float = 3600.0,
  max_body: int = 8 * 2**20,
  max_open: int = 1024,
  rate: float = 0.0,
  burst: int = 100,
  deadline: float = 600.0,
  certificate: str | Path | None = None,
  private_key: str | Path | None = None,
) -> Server:
  """Makes a server over a running engine; `start` it.

  Args:
    max_prompt, max_response: tokens; longer requests are refused.
    params: for requests outside a session that leave temperature, top_p or top_k out.
    host: an address of this machine; 127.0.0.1: nobody else can connect.
    port: 0: any free one.
    token: the bearer token; None: a new one, see Server.token.
    model: the name under which the policy is served; requests may use any.
    new_session: name -> Model, to record what is said under the header x-session-id.
    on_commit: takes the experiences of such a session at POST /commit, in a thread of its own.
    on_reward: takes the reward of one that was committed without, see openai.Api.
    most_logs: token logs of such a session that are committed, the latest; None: all.
    max_sessions: such sessions open at once.
    session_timeout: seconds without a request after which one is dropped with its logs.
    max_body: bytes of a request. max_open: requests that sample at once.
    rate, burst: requests a second and bearer token, and at once; a rate of 0: no limit.
    deadline: seconds until a request is given up.
    certificate, private_key: PEM files; the server then speaks TLS.

  Raises:
    UserError: an address that cannot be had, a missing file, or a limit that is none.
  """
  for name, value in (("max_body", max_body), ("max_open", max_open), ("deadline", deadline)):
    if value <= 0:
      raise UserError(f"server {name} = {value}: must be above 0")
  if rate < 0 or burst < 1:
    raise UserError(f"server rate = {rate}, burst = {burst}: from 0 and from 1 up")
  if token is not None and len(token) < 16:
    raise UserError("the server's token is shorter than 16 characters; leave it out to get one")
  if (certificate is None) != (private_key is None):
    raise UserError("TLS needs both a certificate and its private key")
  for path in (certificate, private_key):
    if path is not None and not Path(path).is_file():
      raise UserError(f"{path}: no such file; TLS needs a certificate and its key in PEM form")
  sessions = Sessions(new_session, max_sessions, session_timeout)
  limits = Limits(max_prompt, max_response, params or SamplingParams(1.0, max_response))
  token = token or new_token()
  api = Api(
    engine, tokenizer, limits, sessions, token=token, model=model, on_commit=on_commit,
    on_reward=on_reward, most_logs=most_logs, max_body=max_body, max_open=max_open,
    deadline=deadline, buckets=Buckets(rate, burst),
  )  # fmt: skip
  tls = {} if certificate is None else {"ssl_certfile": certificate, "ssl_keyfile": private_key}
  return Server(api, sessions, host, port, token, tls)


class Server:
  """A server and its thread; see `serve`.

  Attributes:
    url: http(s)://host:port. token: what to send as bearer token.
    error: what killed the thread, None while it lives.
  """

  def __init__(
    self, api: Api, sessions: Sessions, host: str, port: int, token: str, tls: dict[str, Any]
  ):
    self._api, self._sessions, self._tls = api, sessions, tls
    self._socket = _listen(host, port)
    at, self.token = self._socket.getsockname()[1], token
    self.host, self.port = host, at
    self.url = f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{at}"
    self.error: BaseException | None = None
    self._ready = threading.Event()
    self._loop: asyncio.AbstractEventLoop | None = None
    self._server: Any = None
    self._thread = threading.Thread(target=self._run, name="openai-server", daemon=True)

  def start(self) -> Server:
    """Returns once it answers.

    What the process holds by now, modules above all, is no garbage: until `close`, Python's full
    collections leave it alone. Each would hold every thread for as long as it takes to look at it
    all, 0.2 s of CPU.

    Raises:
      RunFailed: it did not come up.
    """
    self._thread.start()
    if not self._ready.wait(_START):
      raise RunFailed(f"the server at {self.url} did not start within {_START:g} s")
    if self.error is not None:
      raise RunFailed(f"the server at {self.url} did not start: {self.error}") from self.error
    gc.freeze()
    return self

  def session(self, model: Model) -> Session:
    """Begins a session for a run, from a coroutine of the loop that the run lives in."""
    return self._sessions.add(Session(model, asyncio.get_running_loop(), f"{self.url}/v1"))

  def close(self) -> None:
    """Cancels what is open and ends the thread; no second call hurts.

    Raises:
      RunFailed: the thread did not end.
    """
    gc.unfreeze()
    self._sessions.close()
    loop, server = self._loop, self._server
    if loop is not None and server is not None:

      def stop() -> None:
        self._api.stop()
        server.should_exit = True

      with contextlib.suppress(RuntimeError):  # it has ended already
        loop.call_soon_threadsafe(stop)
    if self._thread.is_alive():
      self._thread.join(_CLOSE)
      if self._thread.is_alive():
        raise RunFailed(f"the server at {self.url} did not end within {_CLOSE:g} s of close()")
    self._socket.close()

  def _run(self) -> None:
    try:
      asyncio.run(self._serve())
    except BaseException as e:  # uvicorn leaves by SystemExit when its start-up fails
      self.error = e
    finally:
      self._ready.set()

  async def _serve(self) -> None:
    import uvicorn

    self._loop = asyncio.get_running_loop()
    config = uvicorn.Config(
      self._api.app(self._ready.set),
      log_config=None,
      log_level="error",  # a warning for every line that is not HTTP would let anybody fill the log
      access_log=False,
      server_header=False,
      ws="none",
      http=connections.protocol(),
      lifespan="on",
      timeout_keep_alive=_KEEP_ALIVE,
      timeout_graceful_shutdown=2,
      **self._tls,
    )
    self._server = uvicorn.Server(config)
    await self._server.serve(sockets=[self._socket])


def _listen(host: str, port: int) -> socket.socket:
  try:
    family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
  except ValueError:
    family = socket.AF_INET
  try:
    found = socket.create_server((host, port), family=family, backlog=2048)
  except (OSError, OverflowError) as e:
    raise UserError(
      f"server address {host}:{port}: {e}; choose an address of this machine and a free port, or "
      "port 0 for any"
    ) from e
  # Connections inherit it. asyncio sets it only on sockets that name their protocol; without it an
  # answer's second segment waits for the client's delayed acknowledgement, 40 ms.
  found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
  return found
