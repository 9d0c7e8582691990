"""The endpoints of an OpenAI-compatible server over a rollout engine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from trinity_jax.errors import UserError
from trinity_jax.experience import Experience
from trinity_jax.explorer import reasoning
from trinity_jax.explorer.answer import Answer
from trinity_jax.explorer.dialogue import LONG
from trinity_jax.explorer.threads import in_thread
from trinity_jax.explorer.workflow import Model
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.sampler.rollout_engine import RolloutEngine
from trinity_jax.server import protocol
from trinity_jax.server.answers import Writer
from trinity_jax.server.backend import Limits, OnText, Plain, Recorded, api_errors, gathered
from trinity_jax.server.gate import Buckets, Gate, bearer, json_response, read_body, same
from trinity_jax.server.metrics import CONTENT_TYPE, Counters
from trinity_jax.server.openapi import document
from trinity_jax.server.protocol import MOST_NAME, ApiError, Ask
from trinity_jax.server.sessions import Session, Sessions
from trinity_jax.server.stream import Events, unless_gone

if TYPE_CHECKING:
  from starlette.requests import Request
  from starlette.types import ASGIApp

log = logging.getLogger(__name__)

SESSION_HEADER = "x-session-id"
_COMMITS = 16  # at once: a full buffer keeps each waiting, in a thread that others may need
Commit = Callable[[str, Sequence[Experience]], None]
LateReward = Callable[[str, float], bool]


class Api:
  """Endpoints and their state.

  Args:
    token: the bearer token of whoever runs the server; sessions have their own.
    model: the name under which the policy is served.
    on_commit: given the experiences of a session that a header began, in a thread of its own.
    on_reward: given (session, reward) for a session that was committed without one, likewise;
      False where there is none. None: sessions are not committed without a reward.
    most_logs: token logs of such a session that are committed, the latest ones.
    max_body: bytes.
    max_open: requests that sample at once; more are answered with 429.
    deadline: seconds for one request.
  """

  def __init__(
    self,
    engine: RolloutEngine,
    tokenizer: Tokenizer,
    limits: Limits,
    sessions: Sessions,
    *,
    token: str,
    model: str,
    on_commit: Commit | None,
    on_reward: LateReward | None,
    most_logs: int | None,
    max_body: int,
    max_open: int,
    deadline: float,
    buckets: Buckets,
  ):
    self._engine, self._tokenizer, self._sessions = engine, tokenizer, sessions
    self._plain = Plain(engine, tokenizer, limits)
    self._token, self._model, self._on_commit = token, model, on_commit
    self._on_reward, self._most_logs = on_reward, most_logs
    self._max_body, self._max_open, self._deadline = max_body, max_open, deadline
    self._buckets = buckets
    self._sampling: set[asyncio.Task] = set()
    self._commits = asyncio.Semaphore(_COMMITS)
    self._document = document(limits.max_response, tokenizer.vocab_size)

  def app(self, started: Callable[[], None]) -> ASGIApp:
    """The ASGI application; `started` is called when its loop runs."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
      started()
      yield

    async def api_error(_: Request, e: Any) -> Any:
      return json_response(e.body(), e.status)

    async def http_error(_: Request, e: Any) -> Any:
      error = ApiError(e.status_code, str(e.detail))
      return json_response(error.body(), error.status, dict(e.headers or {}))

    async def bug(request: Request, e: Exception) -> Any:
      log.error("%s %s failed", request.method, request.url.path, exc_info=e)
      return json_response(ApiError(500, "internal error; see the server's log").body(), 500)

    endpoints = {
      ("/health", "GET"): self.health,
      ("/metrics", "GET"): self.metrics,
      ("/openapi.json", "GET"): self.openapi,
      ("/v1/models", "GET"): self.models,
      ("/v1/models/{name:path}", "GET"): self.model,
      ("/v1/chat/completions", "POST"): self.chat,
      ("/v1/completions", "POST"): self.completion,
      ("/feedback", "POST"): self.feedback,
      ("/commit", "POST"): self.commit,
    }
    starlette = Starlette(
      routes=[Route(path, f, methods=[method]) for (path, method), f in endpoints.items()],
      exception_handlers={ApiError: api_error, HTTPException: http_error, Exception: bug},
      lifespan=lifespan,
    )
    starlette.router.redirect_slashes = False
    self.counters = Counters(tuple(path for path, _ in endpoints))
    return Gate(starlette, self._known, self._buckets, self.counters)

  def stop(self) -> None:
    """Cancels what samples. On the server's loop."""
    for task in self._sampling:
      task.cancel()

  # --- who asks ----------------------------------------------------------------------------------

  def _known(self, token: str) -> bool:
    return same(token, self._token) or self._sessions.of(token) is not None

  def _session(self, request: Request, name: str | None = None, *, begin: bool) -> Session | None:
    """The session of a request: of its token, or the one that its header or body names."""
    token = bearer(request.scope)
    session = self._sessions.of(token)
    name = name or request.headers.get(SESSION_HEADER)
    if session is not None:
      if name and name != session.name:
        raise ApiError(403, "this token is that of a session; it may not name another")
      session.model  # noqa: B018 (raises when the session has ended)
      return session
    if not name:
      return None
    if len(name) > MOST_NAME or not name.isprintable():
      raise ApiError(400, f"session {name[:60]!r}: expected up to {MOST_NAME} printable characters")
    session = self._sessions.named(name, begin=begin)
    if session.committing:  # what came now would be lost
      raise ApiError(409, "this session is being committed")
    return session

  async def _body(self, request: Request) -> dict[str, Any]:
    return protocol.parse_json(await read_body(request, self._max_body))

  # --- sampling ----------------------------------------------------------------------------------

  async def chat(self, request: Request) -> Any:
    return await self._sample(request, protocol.read_chat(await self._body(request)))

  async def completion(self, request: Request) -> Any:
    body = await self._body(request)
    ask = protocol.read_completion(body, self._tokenizer.vocab_size)
    return await self._sample(request, ask)

  async def _sample(self, request: Request, ask: Ask) -> Any:
    session, headers = self._session(request, begin=True), {}
    if self._engine.error is not None:
      raise ApiError(503, f"the sampler has died: {self._engine.error}")
    if session is not None and ask.sampling:
      # A run's log-probs are of one distribution: that of its recipe.
      headers["x-trinity-ignored"] = ", ".join(ask.sampling)
    backend = self._plain if session is None else Recorded(session, self._tokenizer)

    async def generate(on_text: OnText | None) -> list[Answer]:
      if len(self._sampling) >= self._max_open:
        raise ApiError(429, f"{self._max_open} requests are open; try again later")
      task = asyncio.current_task()
      assert task is not None
      self._sampling.add(task)
      # From here on, for nothing may be committed while the prompt is being made.
      in_use = contextlib.nullcontext() if session is None else session.in_use()
      try:
        with in_use:
          with api_errors(ask.prompt_name):
            if ask.size > LONG:  # seconds of tokenising are not for the event loop
              choices = await in_thread(backend.choices, ask, on_text)
            else:
              choices = backend.choices(ask, on_text)
          answers = await gathered(choices, self._deadline, ask.prompt_name)
      finally:
        self._sampling.discard(task)
      self.counters.answered(answers)
      return answers

    writer = Writer(ask, self._tokenizer, self._model, self._engine.version)
    if ask.stream:
      return Events(ask, generate, writer, headers, ask.messages is not None and self._thinking)
    answers = await unless_gone(request.receive, generate(None))
    return json_response(writer.whole(answers), 200, headers)

  @functools.cached_property
  def _thinking(self) -> bool:
    """Whether the chat template opens the reasoning of every reply."""
    hello = [{"role": "user", "content": "hello"}]
    with contextlib.suppress(UserError):
      return reasoning.goes_on(self._tokenizer.chat_text(hello, add_generation_prompt=True))
    return False

  # --- rewards -----------------------------------------------------------------------------------

  async def feedback(self, request: Request) -> Any:
    name, reward = protocol.read_feedback(await self._body(request), reward=True)
    assert reward is not None
    try:
      session = self._needed(self._session(request, name, begin=False))
    except ApiError as e:
      if e.status != 404 or not await self._reward_late(request, name, reward):
        raise
    else:
      session.give(reward)
    return json_response({"object": "feedback", "reward": reward})

  async def _reward_late(self, request: Request, name: str | None, reward: float) -> bool:
    name = name or request.headers.get(SESSION_HEADER, "")
    if self._on_reward is None:
      return False
    with api_errors():
      return await in_thread(self._on_reward, name, reward)

  async def commit(self, request: Request) -> Any:
    name, reward = protocol.read_feedback(await self._body(request), reward=False)
    session = self._needed(self._session(request, name, begin=False))
    if reward is not None:
      session.give(reward)
    model = session.model
    if session.name is None:  # its run hands its experiences on itself
      turns = model.turns
      session.close()
      return json_response({"object": "commit", "turns": turns})
    if session.reward is None and self._on_reward is None:
      raise ApiError(400, "no reward came for this session yet; give one here or to /feedback")
    if session.busy:
      raise ApiError(409, "a request of this session is under way")
    if not model.turns:
      raise ApiError(400, "this session has no reply yet")
    experiences = recorded(model, session, self._most_logs)
    session.committing = True  # it stays open when that fails
    try:
      with session.in_use(), api_errors():
        async with asyncio.timeout(self._deadline):
          await self._commits.acquire()
        try:
          if self._on_commit is not None:
            await in_thread(self._on_commit, session.name, experiences)
        finally:
          self._commits.release()
    finally:
      session.committing = False
    self._sessions.end(session)
    model.close()
    turns = sum(int(e.metrics["num_turns"]) for e in experiences)
    dropped = len(model.logs) - len(experiences)
    self.counters.totals["committed_sessions"] += 1
    self.counters.totals["dropped_logs"] += dropped
    return json_response({"object": "commit", "turns": turns, "dropped_logs": dropped})

  def _needed(self, session: Session | None) -> Session:
    if session is None:
      raise ApiError(
        400, f"which session? Use its token, the header {SESSION_HEADER} or the field session"
      )
    return session

  # --- the rest ----------------------------------------------------------------------------------

  async def health(self, _: Request) -> Any:
    alive = self._engine.error is None
    return json_response({"status": "ok" if alive else "failed"}, 200 if alive else 503)

  async def metrics(self, _: Request) -> Any:
    from starlette.responses import Response

    self.counters.totals["expired_sessions"] = self._sessions.expired
    text = self.counters.text(self._engine, len(self._sessions))
    return Response(text, media_type=CONTENT_TYPE)

  async def openapi(self, _: Request) -> Any:
    return json_response(self._document)

  def _about(self) -> dict[str, Any]:
    return {"id": self._model, "object": "model", "created": 0, "owned_by": "trinity_jax"}

  async def models(self, _: Request) -> Any:
    return json_response({"object": "list", "data": [self._about()]})

  async def model(self, request: Request) -> Any:
    if request.path_params["name"] != self._model:
      raise ApiError(404, f"there is no such model; this server has {self._model!r}")
    return json_response(self._about())


def recorded(model: Model, session: Session, most: int | None) -> list[Experience]:
  """A session's token logs; where its reward has not come yet, without one."""
  info = {"session": session.name}
  if session.reward is not None:
    return model.experiences(session.reward, info, most=most)
  waiting = model.experiences({}, {**info, "awaits_reward": True}, most=most)
  return [dataclasses.replace(e, reward=None) for e in waiting]


def new_token() -> str:
  """A bearer token that nobody guesses."""
  return secrets.token_urlsafe(24)
