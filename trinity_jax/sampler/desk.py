"""What the callers of a sampler see: requests that are accepted, awaited and given up."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np

from trinity_jax.errors import RunFailed, UserError
from trinity_jax.experience import StopReason
from trinity_jax.sampler import scoring
from trinity_jax.sampler.engine import EngineSpec
from trinity_jax.sampler.programs import Programs
from trinity_jax.sampler.request import Completion, Request, check, join
from trinity_jax.sampler.slots import Open


class Overloaded(RunFailed):
  """The queue is full: nothing was accepted; try again later."""


class Desk:
  """Takes requests from any thread for the one that serves them; the base of a Sampler.

  `error`, once set, is the exception that killed that thread. Every request still open fails with
  RunFailed from it, and so does every later one, and `set_params`.

  Args:
    programs: compiled programs of the engine.
    max_waiting: see Sampler.
  """

  def __init__(self, programs: Programs, max_waiting: int):
    self._programs, self._max_waiting = programs, max_waiting
    self._changed = threading.Condition()
    self._accepted: dict[Future, Open] = {}  # all that have not ended, wherever they are
    self._waiting: list[Open] = []
    self._handed: dict[Future, Open] = {}  # went to another sampler
    self._scores: list[scoring.Asked] = []  # wait for log-probs
    self._busy = 0  # participants that are busy elsewhere
    self._stopping = self._draining = self._ended = False
    self.error: BaseException | None = None

  @property
  def spec(self) -> EngineSpec:
    """What its programs were compiled for."""
    return self._programs.spec

  @contextlib.contextmanager
  def participant(self) -> Iterator[None]:
    """A run that may send requests: holds deterministic admission back while it is busy."""
    self.enter()
    try:
      yield
    finally:
      self.leave()

  def enter(self) -> None:
    with self._changed:
      self._busy += 1

  def leave(self) -> None:
    with self._changed:
      self._busy -= 1
      if not self._held():
        self._changed.notify_all()

  def submit(
    self,
    request: Request,
    so_far: Completion | None = None,
    sink: Callable[[Completion], None] | None = None,
  ) -> Future:
    """Queues a request of a participant; the future gives a Completion.

    Args:
      so_far: what an earlier sampler had sampled of it; continued from there.
      sink: called from the sampler's thread with each new stretch of tokens (StopReason.RUNNING);
        must neither block nor raise.

    Raises:
      UserError: longer than the engine was compiled for; so_far that has ended.
      Overloaded: max_waiting requests wait already.
      RunFailed: the sampler has died or was closed; so does the future, when that comes later.
    """
    return self._accept(request, so_far, sink, self._max_waiting)

  def _accept(self, request: Request, so_far=None, sink=None, most: int = 0) -> Future:
    """most: requests that may wait already, 0 for any number."""
    check(request, self._programs.spec, so_far)
    future: Future = Future()
    future.set_running_or_notify_cancel()
    open_ = Open(request, future, self, [so_far] if so_far else [], sink, keeper=self)
    with self._changed:
      self._refuse_if_closed()
      if most and len(self._waiting) >= most:
        raise Overloaded(
          f"{len(self._waiting)} requests wait for a slot (max_waiting); try again later"
        )
      self._accepted[future] = open_
      self._waiting.append(open_)
      self._busy -= 1
      # Looking at all requests for each new one would take quadratic time.
      if request.deadline is not None or not self._held():
        self._changed.notify_all()
    return future

  async def generate(self, request: Request) -> Completion:
    """`submit` for coroutines, who wait however many others do; cancelling it frees the slot."""
    future = self._accept(request)
    try:
      return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
      self.abort(future)
      raise

  async def stream(self, request: Request) -> AsyncIterator[Completion]:
    """Yields each new stretch of tokens as it is sampled; the last has the stop reason."""
    loop, chunks = asyncio.get_running_loop(), asyncio.Queue()

    def sink(chunk: Completion) -> None:
      with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
        loop.call_soon_threadsafe(chunks.put_nowait, chunk)

    future = self._accept(request, sink=sink)
    future.add_done_callback(lambda _: sink(join([], StopReason.RUNNING)))
    sent = 0
    try:
      while not (future.done() and chunks.empty()):
        chunk = await chunks.get()
        if len(chunk.tokens):
          sent += len(chunk.tokens)
          yield chunk
      whole = future.result()
      yield whole.after(sent)
    finally:
      self.abort(future)

  async def logprobs(self, tokens: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """See Member.logprobs."""
    with self.participant():  # who waits for it may ask for samples next
      return await asyncio.wrap_future(self.score(tokens, temperature))

  def score(self, tokens: Sequence[int] | np.ndarray, temperature: float = 1.0) -> Future:
    """Queues `logprobs`: scored between two dispatches, also while admission waits for a run."""
    if not self._programs.scores:
      raise UserError("log-probs of given tokens need config.sampler.scores = True")
    asked = scoring.ask(tokens, temperature, self._programs.spec)
    with self._changed:
      self._refuse_if_closed()
      self._scores.append(asked)
      self._changed.notify_all()
    return asked.future

  def abort(self, future: Future) -> None:
    """Gives a request up: it ends at the next dispatch boundary with what it has (ABORTED).

    Its run is busy again from this moment, as after a result.
    """
    with self._changed:
      open_ = self._accepted.get(future) or self._handed.get(future)
      if open_ is None or open_.given_up or future.done():
        return
      open_.given_up = True
      if open_.home is self:
        self._busy += 1
      self._changed.notify_all()
    # One lock at a time: two samplers may give up requests of each other.
    if open_.home is not self:
      open_.home.enter()
    if open_.keeper is not self:
      open_.keeper.wake()

  def _held(self) -> bool:
    """Whether requests would only wait, however many there are; a Sampler says."""
    raise NotImplementedError

  def wake(self) -> None:
    """Makes the thread look again for something to do."""
    with self._changed:
      self._changed.notify_all()

  def _failure(self) -> RunFailed:
    """A new exception for each who waits: they are raised in several tasks."""
    if self.error is None:
      return RunFailed("the sampler was closed")
    why = f"the sampler thread has died: {type(self.error).__name__}: {self.error}"
    return RunFailed(why, self.error)

  def _refuse_if_closed(self) -> None:
    if self._ended or self._draining or self._stopping:
      raise self._failure()
