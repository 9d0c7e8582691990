"""Asks a model behind an OpenAI-compatible server to judge, and reads its verdict as JSON.

What is judged was written by a policy that is rewarded for pleasing the judge: it is quoted between
marks that hold a random word, and the verdict is read from the judge's reply only. A judge that
cannot be reached or gives no verdict is an error of that run, never a score.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import secrets
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from trinity_jax.errors import UserError

T = TypeVar("T")
_BACKOFF = 0.5  # seconds before the first further attempt, then twice as long each time
_LONGEST = 1 << 20  # characters of a reply that are looked at


class NoVerdict(RuntimeError):
  """The judge was not reached, or what it answered is no verdict."""


@dataclasses.dataclass(frozen=True)
class Judge:
  """Where the judge is and how it is asked.

  Attributes:
    base_url: http(s)://host:port/v1.
    model: its name there.
    api_key_env: environment variable that holds the key; "" sends none. The key itself belongs in
      no config.
    temperature, max_tokens: of the judge's reply.
    timeout: seconds for a verdict, further attempts included, waiting for one of the places not.
    retries: further attempts after a connection error, 429, 5xx or a reply without a verdict.
    concurrency: requests in flight at most, per event loop.

  Raises:
    UserError: no base_url or model, or api_key_env names a variable that is not set.
  """

  base_url: str
  model: str
  api_key_env: str = ""
  temperature: float = 0.0
  max_tokens: int = 1024
  timeout: float = 120.0
  retries: int = 2
  concurrency: int = 16

  def __post_init__(self):
    if not self.base_url.startswith(("http://", "https://")):
      raise UserError(f"judge: base_url = {self.base_url!r}; expected http(s)://host:port/v1")
    if not self.model:
      raise UserError("judge: model is empty; name the model that the judge's server has")
    if self.api_key_env and self.api_key_env not in os.environ:
      raise UserError(f"judge: api_key_env = {self.api_key_env!r} names a variable that is not set")

  async def ask(self, system: str, user: str, read: Callable[[Mapping[str, Any]], T]) -> T:
    """Returns what `read` makes of the last JSON object in the judge's reply.

    Args:
      read: raises ValueError, KeyError or TypeError for what is no verdict.

    Raises:
      NoVerdict: after the last attempt, or when the time is up.
    """
    import httpx

    client, places = _client(self)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    body = {
      "model": self.model, "messages": messages, "temperature": self.temperature,
      "max_tokens": self.max_tokens,
    }  # fmt: skip
    reason = "no answer"
    try:
      async with places, asyncio.timeout(self.timeout):
        for used in range(self.retries + 1):
          if used:
            await asyncio.sleep(_BACKOFF * 2 ** (used - 1))  # back-off, the server needs time
          try:
            response = await client.post("chat/completions", json=body)
            if response.status_code == 429 or response.status_code >= 500:
              reason = f"status {response.status_code}"
              continue
            if response.status_code != 200:
              raise NoVerdict(f"{self._name}: status {response.status_code}: {response.text[:200]}")
            return read(last_object(response.json()["choices"][0]["message"]["content"] or ""))
          except httpx.HTTPError as e:
            reason = f"{type(e).__name__}: {e}"
          except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
            reason = f"its reply is no verdict: {e}"
    except TimeoutError:
      reason = f"nothing in {self.timeout:g} s (last: {reason})"
    raise NoVerdict(f"{self._name}: {reason}")

  @property
  def _name(self) -> str:
    return f"judge {self.model} at {self.base_url}"


_clients: weakref.WeakKeyDictionary[
  asyncio.AbstractEventLoop, dict[Judge, tuple[Any, asyncio.Semaphore]]
] = weakref.WeakKeyDictionary()


def _client(judge: Judge) -> tuple[Any, asyncio.Semaphore]:
  """One per event loop and judge: connections are kept, and belong to their loop."""
  import httpx

  found = _clients.setdefault(asyncio.get_running_loop(), {})
  if judge not in found:
    key = os.environ.get(judge.api_key_env, "") if judge.api_key_env else ""
    client = httpx.AsyncClient(
      base_url=judge.base_url.rstrip("/") + "/",
      headers={"Authorization": f"Bearer {key}"} if key else {},
      timeout=judge.timeout,
    )
    found[judge] = client, asyncio.Semaphore(judge.concurrency)
  return found[judge]


def last_object(text: str) -> Mapping[str, Any]:
  """The last JSON object that stands in a text by itself, at whatever depth of prose.

  Raises:
    ValueError: there is none among the last hundred opening braces.
  """
  text = text[-_LONGEST:]
  decoder, end, found = json.JSONDecoder(), len(text), None
  for _ in range(100):
    start = text.rfind("{", 0, end)
    if start < 0:
      break
    try:
      value, stop = decoder.raw_decode(text, start)
    except (ValueError, RecursionError):
      value, stop = None, 0
    # An object inside a later found one's text is a part of it: keep the outermost.
    if isinstance(value, dict) and (found is None or stop >= found[1]):
      found = value, stop
    end = start
  if found is None:
    raise ValueError(f"no JSON object in {text[-200:]!r}")
  return found[0]


def quoted(title: str, text: str, word: str) -> str:
  """A part of the prompt whose end the text cannot fake, not knowing the word."""
  return f"<<{title} {word}>>\n{text}\n<<end of {title} {word}>>"


def new_word() -> str:
  return secrets.token_hex(6)


def dialogue(messages: Sequence[Mapping[str, Any]]) -> str:
  """Messages as the judge reads them."""
  return "\n\n".join(f"[{m.get('role', '?')}]\n{m.get('content') or ''}" for m in messages)


def number(value: Any, low: float, high: float) -> float:
  """A number of a verdict.

  Raises:
    ValueError: it is none, or outside low to high.
  """
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
    raise ValueError(f"{value!r} is no number from {low:g} to {high:g}")
  return float(value)
