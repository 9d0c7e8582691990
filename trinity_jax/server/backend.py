"""Who samples for a request: a run, which records, or the engine alone, which does not."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import secrets
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import numpy as np

from trinity_jax.errors import RunFailed, UserError
from trinity_jax.explorer import tool_calls
from trinity_jax.explorer.answer import Answer, PromptTooLong, RunEnded, SamplingParams
from trinity_jax.explorer.replies import sample
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.sampler.request import Request
from trinity_jax.sampler.rollout_engine import RolloutEngine
from trinity_jax.sampler.sampling import request_key
from trinity_jax.server.protocol import ApiError, Ask
from trinity_jax.server.sessions import Session, ended

OnText = Callable[[int, str], None]  # (choice, piece), on the server's loop


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the engine was compiled for, and what requests get that ask for nothing else.

  Attributes:
    max_prompt, max_response: tokens.
    params: temperature, top_p and top_k where a request leaves them out.
  """

  max_prompt: int
  max_response: int
  params: SamplingParams


@contextlib.contextmanager
def api_errors(prompt: str = "messages") -> Iterator[None]:
  """Makes what the engine says of a request an answer; prompt: the field that holds it."""
  try:
    yield
  except PromptTooLong as e:
    raise ApiError(400, str(e), param=prompt, code="context_length_exceeded") from e
  except UserError as e:
    raise ApiError(400, str(e)) from e
  except RecursionError as e:
    raise ApiError(400, "the request's JSON is nested too deeply") from e
  except RunEnded as e:
    raise ended() from e
  except RunFailed as e:
    raise ApiError(503, str(e)) from e
  except TimeoutError as e:
    raise ApiError(504, "the request took longer than this server allows") from e


class Plain:
  """Samples without recording; everything a request asks for is honoured."""

  def __init__(self, engine: RolloutEngine, tokenizer: Tokenizer, limits: Limits):
    self._engine, self._tokenizer, self._limits = engine, tokenizer, limits
    self._count = itertools.count()

  def choices(self, ask: Ask, on_text: OnText | None) -> list[Coroutine[Any, Any, Answer]]:
    """One coroutine per choice."""
    base = secrets.randbits(63) if ask.seed is None else ask.seed
    prompts = [self._tokenizer.encode(p) if isinstance(p, str) else list(p) for p in ask.prompts]
    if ask.messages is not None:
      for_template = [tool_calls.for_template(m) for m in ask.messages]
      text = self._tokenizer.chat_text(
        for_template, add_generation_prompt=True, tools=ask.tools or None
      )
      prompts = [self._tokenizer.encode(text)]
    # One number a prompt: its choices go to one sampler of a pool, the next prompt's to another.
    numbers = [next(self._count) for _ in prompts]
    keys = [request_key(base, i) for i in range(len(prompts) * ask.n)]
    return [
      self._one(ask, i, (0, numbers[i // ask.n], 0, i), prompts[i // ask.n], key, on_text)
      for i, key in enumerate(keys)
    ]

  async def _one(
    self, ask: Ask, index: int, order: tuple[int, ...], prompt: list[int], key: np.ndarray,
    on_text: OnText | None,
  ) -> Answer:  # fmt: skip
    most = self._limits
    if len(prompt) > most.max_prompt:
      raise PromptTooLong(
        f"prompt of {len(prompt)} tokens exceeds the longest of this server, {most.max_prompt}"
      )
    limit = ask.limit or most.max_response
    if limit > most.max_response:
      name = ask.limit_name
      raise ApiError(400, f"{name} = {limit}: at most {most.max_response} here", param=name)
    p = most.params
    request = Request(
      tokens=np.array(prompt, np.int32),
      key=key,
      order=order,
      limit=limit,
      stop_ids=self._tokenizer.stop_ids,
      temperature=p.temperature if ask.temperature is None else ask.temperature,
      top_p=p.top_p if ask.top_p is None else ask.top_p,
      top_k=p.top_k if ask.top_k is None else ask.top_k,
      min_p=ask.min_p or 0.0,
    )
    member = self._engine.member(order)
    member.enter()
    try:
      each = None if on_text is None else lambda piece: on_text(index, piece)
      reply = await sample(member, request, self._tokenizer, stop=ask.stop, on_text=each)
    finally:
      member.leave()
    if ask.messages is None:
      return Answer({"role": "assistant", "content": reply.text}, prompt, reply.completion)
    parsed = tool_calls.parse(reply.whole, ask.tools if ask.parse else ())
    if ask.single_call:
      parsed = dataclasses.replace(parsed, calls=parsed.calls[:1])
    ids = [secrets.token_hex(5)[:9] for _ in parsed.calls]
    return Answer(tool_calls.message(parsed, ids), prompt, reply.completion, parsed.error)


class Recorded:
  """Samples as turns of a session's run, with the run's own sampling parameters."""

  def __init__(self, session: Session, tokenizer: Tokenizer):
    self._session, self._tokenizer = session, tokenizer

  def choices(self, ask: Ask, on_text: OnText | None) -> list[Coroutine[Any, Any, Answer]]:
    """One coroutine per choice."""
    self._session.model  # noqa: B018 (raises when the session has ended)
    prompts = [self._tokenizer.encode(p) if isinstance(p, str) else list(p) for p in ask.prompts]
    if ask.messages is not None:
      prompts = [[]]  # the session's log is what they continue
    return [self._one(ask, i, prompts[i // ask.n], on_text) for i in range(len(prompts) * ask.n)]

  async def _one(self, ask: Ask, index: int, prompt: list[int], on_text: OnText | None) -> Answer:
    model, home = self._session.model, asyncio.get_running_loop()

    def pass_on(piece: str) -> None:
      assert on_text is not None
      with contextlib.suppress(RuntimeError):  # the server has closed: nobody listens any more
        home.call_soon_threadsafe(on_text, index, piece)

    how: dict[str, Any] = {
      "limit": ask.limit, "stop": ask.stop, "seed": ask.seed,
      "on_text": None if on_text is None else pass_on,
    }  # fmt: skip
    if ask.messages is not None:
      turn = model.complete(
        ask.messages, ask.tools, parse=ask.parse, single_call=ask.single_call, **how
      )
    else:
      turn = model.continue_tokens(prompt, **how)
    if not self._session.name:
      return await self._session.call(turn)
    # Nobody else counts a run in that a header began.
    model.sampler.enter()
    try:
      return await self._session.call(turn)
    finally:
      model.sampler.leave()


async def gathered(
  choices: Sequence[Coroutine[Any, Any, Answer]], deadline: float, prompt: str
) -> list[Answer]:
  """All choices of a request; when one fails, or the caller is cancelled, so are the others.

  Args:
    deadline: seconds.
    prompt: the request's field that holds it.

  Raises:
    ApiError: whatever went wrong.
  """
  tasks = [asyncio.create_task(c) for c in choices]
  try:
    with api_errors(prompt):
      async with asyncio.timeout(deadline):
        return list(await asyncio.gather(*tasks))
  finally:
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
