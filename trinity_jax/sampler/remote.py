"""The samplers of a run's other processes, for the one that explores.

Each process samples with its own devices; process 0 asks. Requests and answers go through the
processes' own channel, in order, several at a time: what the other sampler sees is the sequence of
calls that a sampler here would have seen, so that the same requests give the same tokens.

    process 0: RemoteSampler --enter, ask, abort, leave, set--> Host: Sampler of process 1
                             <--done, scored, failed, news------
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from trinity_jax import blobs
from trinity_jax.distributed import Channel
from trinity_jax.errors import RunFailed, UserError
from trinity_jax.experience import StopReason
from trinity_jax.sampler import scoring
from trinity_jax.sampler.engine import EngineSpec
from trinity_jax.sampler.request import Completion, Request, check
from trinity_jax.sampler.scheduler import Sampler

Arrays = Mapping[str, np.ndarray]
_CLOSING = 60  # seconds
_LISTS, _INTS = ("order", "stop_ids", "salt"), ("limit", "top_k", "priority")
_FLOATS = ("temperature", "top_p", "min_p")
_NONE: Arrays = {}
_COLUMNS = ("tokens", "logprobs", "versions", "mixed")


class RemoteSampler:
  """Another process's sampler, as an engine and as its member.

  Args:
    channel: to that process, whose Host serves.
    spec: what samplers of this run were compiled for.
  """

  def __init__(self, channel: Channel, spec: EngineSpec):
    self._spec, self._name = spec, f"process {channel.other}"
    self._lock = threading.Lock()
    self._open: dict[int, Future] = {}
    self._numbers = itertools.count()
    self._given = self.version = -1
    self._news: dict[str, Any] = {"stats": {}, "metrics": {}}
    self.error: BaseException | None = None
    self._closed = False
    self._post = _Post(channel, self._hear, self._lost, f"to the sampler of {self._name}")

  def start(self) -> None:
    self._post.start()

  def close(self) -> None:
    """Raises RunFailed when the other process does not answer any more."""
    with self._lock:
      self._closed = True
    self._post.send({"kind": "end"})
    try:
      self._post.join(f"the sampler of {self._name} did not answer within {_CLOSING} s of close()")
    finally:
      self._fail_open()

  def set_params(self, version: int, params: Any) -> None:
    """The other process has published the same version, to itself: only its number is sent."""
    del params
    with self._lock:
      if version < self._given:
        raise ValueError(f"version {version} offered to a sampler that has {self._given}")
      self._refuse_if_closed()
      self._given = version
      self._post.send({"kind": "set", "version": version})

  def release(self) -> None:
    """Nothing: the other process frees its cache before its own part of the train step."""

  def member(self, order: Sequence[int]) -> RemoteSampler:
    return self

  def enter(self) -> None:
    self._post.send({"kind": "enter"})

  def leave(self) -> None:
    self._post.send({"kind": "leave"})

  async def generate(self, request: Request) -> Completion:
    """See Member.generate."""
    check(request, self._spec)
    arrays = {"tokens": np.asarray(request.tokens, np.int32), "key": request.key}
    return await self._ask({"kind": "ask", "request": _plain(request)}, arrays)

  async def logprobs(self, tokens: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """See Member.logprobs."""
    asked = scoring.ask(tokens, temperature, self._spec)
    self.enter()  # who waits for it may ask for samples next
    try:
      header = {"kind": "score", "temperature": asked.temperature}
      return await self._ask(header, {"tokens": asked.tokens})
    finally:
      self.leave()

  async def _ask(self, header: dict[str, Any], arrays: Arrays) -> Any:
    future: Future = Future()
    future.set_running_or_notify_cancel()
    with self._lock:
      self._refuse_if_closed()
      number = next(self._numbers)
      self._open[number] = future
      self._post.send({**header, "number": number}, arrays)
    try:
      return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
      self._post.send({"kind": "abort", "number": number})
      raise

  def describe(self) -> str:
    with self._lock:
      return f"sampler of {self._name} at version {self.version}: {len(self._open)} requests open"

  def metrics(self) -> dict[str, float]:
    """As of its last answer."""
    return self._news["metrics"]

  @property
  def stats(self) -> dict[str, float]:
    """As of its last answer."""
    return self._news["stats"]

  # --- the receiving thread ----------------------------------------------------------------------

  def _hear(self, header: dict[str, Any], arrays: Arrays) -> None:
    kind = header["kind"]
    if kind == "news":
      self.version, self._news = header["version"], header
      return
    with self._lock:
      future = self._open.pop(header["number"], None)
    if future is None:  # failed already, with all others
      return
    if kind == "done":
      columns = {name: arrays[name] for name in _COLUMNS}
      future.set_result(Completion(**columns, stop_reason=StopReason(header["stop_reason"])))
    elif kind == "scored":
      future.set_result(arrays["logprobs"])
    else:
      error = UserError if header["user"] else RunFailed
      future.set_exception(error(f"{self._name}: {header['error']}"))

  def _lost(self, error: BaseException) -> None:
    self.error = error
    self._fail_open()

  def _fail_open(self) -> None:
    with self._lock:
      opens, self._open = list(self._open.values()), {}
    for future in opens:
      future.set_exception(self._failure())

  def _refuse_if_closed(self) -> None:
    if self._closed or self.error is not None:
      raise self._failure()

  def _failure(self) -> RunFailed:
    if self.error is None:
      return RunFailed(f"the sampler of {self._name} was closed")
    return RunFailed(f"the sampler of {self._name} is lost: {self.error}", self.error)


class Host:
  """Serves process 0 with the sampler of this process.

  Args:
    channel: to process 0.
    weights: version -> (that version, or a newer one where it is not kept; its parameters); waits
      until there is one.

  Attributes:
    asked: the version that process 0 samples from, as far as is known here.
  """

  def __init__(
    self, channel: Channel, sampler: Sampler, weights: Callable[[int], tuple[int, Any]]
  ):
    self.asked = self._given = -1
    self._sampler, self._weights = sampler, weights
    self._open: dict[int, Future] = {}
    self._post = _Post(channel, self._hear, lambda _: None, "for process 0", self._news)

  def start(self) -> None:
    self._post.start()

  def close(self) -> None:
    """Waits until process 0 needs this sampler no more.

    Raises:
      RunFailed: it did not say so in time.
    """
    self._post.join(f"process 0 did not close this process's sampler within {_CLOSING} s")

  def _news(self) -> dict[str, Any]:
    s = self._sampler
    return {"kind": "news", "version": s.version, "stats": s.stats, "metrics": s.metrics()}

  # --- the receiving thread ----------------------------------------------------------------------

  def _hear(self, header: dict[str, Any], arrays: Arrays) -> None:
    kind = header["kind"]
    if kind == "enter":
      self._sampler.enter()
    elif kind == "leave":
      self._sampler.leave()
    elif kind == "set":
      self._set(header["version"])
    elif kind == "abort":
      if (future := self._open.get(header["number"])) is not None:
        self._sampler.abort(future)
    else:
      self._serve(kind, header, arrays)

  def _set(self, version: int) -> None:
    """The weights of process 0; newer ones where it took what came and this process has passed."""
    self.asked = version
    found, params = self._weights(version)
    if found < self._given:
      found, params = self._weights(self._given)
    self._given = found
    self._sampler.set_params(found, params)

  def _serve(self, kind: str, header: dict[str, Any], arrays: Arrays) -> None:
    number = header["number"]
    try:
      if kind == "score":
        future = self._sampler.score(arrays["tokens"], header["temperature"])
      else:
        future = self._sampler.submit(_request(header["request"], arrays))
    except (UserError, RunFailed) as e:
      self._answer(number, e)
      return
    self._open[number] = future
    future.add_done_callback(lambda done: self._answer(number, done.exception() or done.result()))

  def _answer(self, number: int, found: BaseException | Completion | np.ndarray) -> None:
    self._open.pop(number, None)
    if isinstance(found, Completion):
      header = {"kind": "done", "stop_reason": int(found.stop_reason)}
      arrays = {name: getattr(found, name) for name in _COLUMNS}
    elif isinstance(found, np.ndarray):
      header, arrays = {"kind": "scored"}, {"logprobs": found}
    else:
      user = isinstance(found, UserError)
      header, arrays = {"kind": "failed", "user": user, "error": str(found)}, _NONE
    self._post.send({**header, "number": number}, arrays)


def _plain(request: Request) -> dict[str, Any]:
  """All but the arrays, as JSON holds it."""
  given = {name: [int(n) for n in getattr(request, name)] for name in _LISTS}
  given |= {name: int(getattr(request, name)) for name in _INTS}
  given |= {name: float(getattr(request, name)) for name in _FLOATS}
  # Clocks differ, what is left of the time does not.
  left = None if request.deadline is None else request.deadline - time.monotonic()
  return {**given, "left": left}


def _request(plain: dict[str, Any], arrays: Arrays) -> Request:
  left = plain.pop("left")
  for name in _LISTS:
    plain[name] = tuple(plain[name])
  deadline = None if left is None else time.monotonic() + left
  return Request(arrays["tokens"], arrays["key"], deadline=deadline, **plain)


class _Post:
  """Sends and receives what happens at the two ends of a channel, with a thread for each.

  Either end says {"kind": "end"} last, the one that serves as its answer to the other's.

  Args:
    hear: called with (header, arrays) of each event.
    lost: called with what made it impossible to go on.
    news: an event that goes with everything that is sent; with it, this end serves.
  """

  def __init__(
    self,
    channel: Channel,
    hear: Callable[[dict[str, Any], Arrays], None],
    lost: Callable[[BaseException], None],
    name: str,
    news: Callable[[], dict[str, Any]] | None = None,
  ):
    self._channel, self._hear, self._lost, self._news = channel, hear, lost, news
    self._outbox: queue.SimpleQueue[tuple[dict[str, Any], Arrays]] = queue.SimpleQueue()
    self._threads = [
      threading.Thread(target=self._run, args=(what,), name=f"{what.__name__} {name}", daemon=True)
      for what in (self._receive, self._send)
    ]

  def start(self) -> None:
    for thread in self._threads:
      thread.start()

  def send(self, header: dict[str, Any], arrays: Arrays = _NONE) -> None:
    """Returns at once; from any thread."""
    self._outbox.put((header, arrays))

  def join(self, late: str) -> None:
    """Raises RunFailed(late) when the other end has not said its last within a minute."""
    for thread in self._threads:
      if thread.is_alive():
        thread.join(_CLOSING)
      if thread.is_alive():
        raise RunFailed(late)

  def _run(self, what: Callable[[], None]) -> None:
    try:
      what()
    except BaseException as e:  # reported at both ends
      self._lost(e)
      self.send({"kind": "lost", "error": f"{type(e).__name__}: {e}"})

  def _receive(self) -> None:
    while True:
      for header, arrays in _decode(self._channel.receive()):
        if header["kind"] == "lost":
          raise RunFailed(header["error"])
        if header["kind"] == "end":
          if self._news is not None:
            self.send(header)
          return
        self._hear(header, arrays)

  def _send(self) -> None:
    last = False
    while not last:
      events = []
      while not last:  # what follows the last event is for nobody
        events.append(self._outbox.get())
        last = events[-1][0]["kind"] in ("end", "lost")
        if self._outbox.empty():
          break
      if self._news is not None:
        events.insert(0, (self._news(), _NONE))
      self._channel.send(_encode(events))


def _encode(events: Sequence[tuple[dict[str, Any], Arrays]]) -> bytes:
  arrays = {f"{i}.{k}": v for i, (_, given) in enumerate(events) for k, v in given.items()}
  return blobs.pack("events", [header for header, _ in events], arrays)


def _decode(data: bytes) -> Iterator[tuple[dict[str, Any], Arrays]]:
  headers, arrays = blobs.unpack("events", data)
  given: list[dict[str, np.ndarray]] = [{} for _ in headers]
  for key, value in arrays.items():
    index, _, name = key.partition(".")
    given[int(index)][name] = value
  yield from zip(headers, given)
