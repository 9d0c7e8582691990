"""Continuous batching: one thread admits requests into free slots and runs the engine.

Weights are swapped between two dispatches. In deterministic mode nothing is admitted while a
participant (a run that may still ask) is busy elsewhere, so the admission plan, and with it every
bit of every result, is a function of the requests alone.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from trinity_jax.errors import RunFailed, UserError, suggestion
from trinity_jax.experience import StopReason
from trinity_jax.sampler.driver import Driver
from trinity_jax.sampler.engine import STOP_IDS
from trinity_jax.sampler.programs import Programs
from trinity_jax.sampler.request import Completion, Request, join
from trinity_jax.sampler.roofline import Rates
from trinity_jax.sampler.slots import Open, Stage

SWAPS = ("keep", "recompute", "drain")


class Overloaded(RunFailed):
  """The queue is full: nothing was accepted; try again later."""


class Sampler:
  """The scheduler thread and its engine.

  `error`, once set, is the exception that killed the thread. Every request still open fails with
  RunFailed from it, and so does every later `submit` and `set_params`.

  Args:
    programs: compiled programs of the engine.
    steps_per_dispatch: most decode steps of one dispatch.
    refill_fraction: a dispatch returns when this share of the slots is idle and requests wait.
    deterministic: admit only when no participant is busy elsewhere.
    on_swap: what becomes of sequences under way when weights change: "keep" decodes on with the
      cache of the old version (tokens are flagged `mixed`), "recompute" computes their cache again,
      "drain" lets them end first.
    max_waiting: requests that may wait for a slot, 0 for any number. When as many wait, `submit`
      raises Overloaded and `generate` waits for room.
    span: timeline.span.
    rates: of roofline.measure, to report how near decoding comes to them.

  Raises:
    UserError: an unknown on_swap; max_waiting together with deterministic.
  """

  def __init__(
    self,
    programs: Programs,
    *,
    steps_per_dispatch: int,
    refill_fraction: float,
    deterministic: bool,
    on_swap: str = "keep",
    max_waiting: int = 0,
    span: Callable[[str], contextlib.AbstractContextManager] = lambda _: contextlib.nullcontext(),
    rates: Rates | None = None,
  ):
    if on_swap not in SWAPS:
      raise UserError(f"on_swap = {on_swap!r}: expected one of {SWAPS}{suggestion(on_swap, SWAPS)}")
    if deterministic and max_waiting:
      raise UserError(
        f"max_waiting = {max_waiting}: deterministic admission needs every request of a batch in "
        "the queue; use 0, or deterministic=False"
      )
    self._driver = Driver(programs, steps_per_dispatch, refill_fraction, span, rates)
    self._programs = programs
    self._deterministic, self._on_swap, self._max_waiting = deterministic, on_swap, max_waiting
    self._changed = threading.Condition()
    self._waiting: list[Open] = []
    self._cancelled: set[Open] = set()
    self._room: collections.deque[Future] = collections.deque()
    self._busy = 0
    self._next_params: tuple[int, Any] | None = None
    self._paused = self._idle = False
    self._stopping = self._draining = self._ended = False
    self.version = -1
    self.error: BaseException | None = None
    self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

  # --- life (any thread) -------------------------------------------------------------------------

  def start(self) -> None:
    self._thread.start()

  def close(self, *, drain: bool = False) -> None:
    """Stops the thread; requests still open fail, or with `drain` are finished first."""
    with self._changed:
      if drain:
        self._draining = True
      else:
        self._stopping = True
      self._changed.notify_all()
    if self._thread.is_alive():
      self._thread.join(timeout=None if drain else 60)
      if self._thread.is_alive():
        raise RunFailed("the sampler thread did not end within 60 s of close()")
    self._end()  # for a thread that was never started

  def pause(self) -> None:
    """Returns when the thread has stopped at a dispatch boundary; `resume` lets it go on."""
    with self._changed:
      self._paused = True
      self._changed.notify_all()
      if self._thread.is_alive():
        self._changed.wait_for(lambda: self._idle or self._ended)

  def resume(self) -> None:
    with self._changed:
      self._paused = False
      self._changed.notify_all()

  def hand_over(self) -> list[Open]:
    """Ends this sampler and returns its open requests with what they have so far, to `adopt`."""
    self.pause()
    with self._changed:
      out = sorted([*self._driver.evict(set(self._open())), *self._waiting], key=_order)
      self._waiting = []
    self.close()
    return out

  def adopt(self, opens: Sequence[Open]) -> None:
    """Continues requests of another sampler. Their futures stay those their callers hold."""
    with self._changed:
      if self._ended:
        raise self._failure()
      self._waiting.extend(opens)
      self._changed.notify_all()

  def set_params(self, version: int, params: Any) -> None:
    """Swaps weights at the next dispatch boundary. Versions never go back."""
    with self._changed:
      if self._ended:
        raise self._failure()
      newest = self._next_params[0] if self._next_params else self.version
      if version < newest:
        raise ValueError(f"version {version} offered to a sampler that has {newest}")
      self._next_params = (version, params)
      self._changed.notify_all()

  def member(self, order: Sequence[int]) -> Sampler:
    """The sampler that serves runs of this order: this one."""
    return self

  # --- requests (any thread) ---------------------------------------------------------------------

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
      sink: called from the sampler's thread with each new stretch of tokens (StopReason.RUNNING).

    Raises:
      UserError: a prompt or response longer than the engine was compiled for.
      Overloaded: max_waiting requests wait already.
      RunFailed: the sampler has died or was closed; so does the future, when that comes later.
    """
    self._check(request)
    future: Future = Future()
    future.set_running_or_notify_cancel()
    open_ = Open(request, future, self, [so_far] if so_far else [], sink)
    with self._changed:
      if self._ended or self._draining:
        raise self._failure()
      if self._max_waiting and len(self._waiting) >= self._max_waiting:
        raise Overloaded(
          f"{len(self._waiting)} requests wait for a slot (max_waiting); try again later"
        )
      self._waiting.append(open_)
      self._busy -= 1
      self._changed.notify_all()
    return future

  async def generate(self, request: Request) -> Completion:
    """`submit` for coroutines; waits for room in the queue; cancelling it frees the slot."""
    return await self._answer(await self._submitted(request))

  async def stream(self, request: Request) -> AsyncIterator[Completion]:
    """Yields each new stretch of tokens as it is sampled; the last has the stop reason."""
    loop, chunks = asyncio.get_running_loop(), asyncio.Queue()

    def sink(chunk: Completion) -> None:
      with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
        loop.call_soon_threadsafe(chunks.put_nowait, chunk)

    future = await self._submitted(request, sink)
    future.add_done_callback(lambda _: sink(join([], StopReason.RUNNING)))
    sent = 0
    try:
      while not (future.done() and chunks.empty()):
        chunk = await chunks.get()
        if len(chunk.tokens):
          sent += len(chunk.tokens)
          yield chunk
      whole = future.result()
      rest = {name: getattr(whole, name)[sent:] for name in _COLUMNS}
      yield Completion(**rest, stop_reason=whole.stop_reason)
    finally:
      self.abort(future)

  async def _submitted(self, request: Request, sink=None) -> Future:
    while True:
      try:
        return self.submit(request, sink=sink)
      except Overloaded:
        room: Future = Future()
        with self._changed:
          self._room.append(room)
          if len(self._waiting) < self._max_waiting:  # it emptied in between
            self._make_room()
        await asyncio.wrap_future(room)

  async def _answer(self, future: Future) -> Completion:
    try:
      return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
      self.abort(future)
      raise

  def abort(self, future: Future) -> None:
    """Gives a request up: it ends at the next dispatch boundary with what it has (ABORTED).

    Its run is busy again from this moment, as after a result.
    """
    with self._changed:
      found = [o for o in self._open() if o.future is future and o not in self._cancelled]
      if found and not future.done():
        self._cancelled.add(found[0])
        self._busy += 1
        self._changed.notify_all()

  def describe(self) -> str:
    """Who is where, for the message of a wait that expired."""
    with self._changed:
      active = [s.open.request.order for s in self._driver.slots if s.open]
      waiting = [o.request.order for o in self._waiting]
      state = ", paused" if self._paused else ""
      return (
        f"sampler at version {self.version}{state}: {len(active)} decoding {active[:4]}, "
        f"{len(waiting)} waiting {waiting[:4]}, {self._busy} participants busy elsewhere"
      )

  @property
  def stats(self) -> dict[str, float]:
    """Counters since the start; see driver.Driver.stats."""
    return self._driver.stats

  def metrics(self) -> dict[str, float]:
    """What is going on now: see monitor.metrics, sampler/*."""
    with self._changed:
      return {"sampler/waiting": float(len(self._waiting)), **self._driver.gauges()}

  def _check(self, request: Request) -> None:
    spec, prompt = self._programs.spec, len(request.tokens)
    longest = spec.cache_length - 1
    if not 1 <= prompt <= longest:
      raise UserError(
        f"prompt of {prompt} tokens: the cache of sampler.max_prompt_length + "
        f"max_response_length allows 1 to {longest}"
      )
    if not 1 <= request.limit <= min(spec.max_response, spec.cache_length - prompt):
      raise UserError(
        f"response limit {request.limit} after a prompt of {prompt} tokens: must be 1 to "
        f"{min(spec.max_response, spec.cache_length - prompt)} (sampler.max_response_length)"
      )
    if len(request.stop_ids) > STOP_IDS:
      raise UserError(f"{len(request.stop_ids)} stop tokens: at most {STOP_IDS}")

  # --- the sampler thread ------------------------------------------------------------------------

  def _run(self) -> None:
    try:
      self._driver.open()
      while (work := self._next()) != "stop":
        self._drop()
        if work == "go":
          self._swap()
          self._admit()
          for open_, completion in self._driver.step(bool(self._waiting)):
            self._resolve(open_, completion)
    except BaseException as e:  # reported through every future and `error`
      self.error = e
    self._end()

  def _failure(self) -> RunFailed:
    """A new exception for each who waits: they are raised in several tasks."""
    if self.error is None:
      return RunFailed("the sampler was closed")
    failure = RunFailed(f"the sampler thread has died: {type(self.error).__name__}: {self.error}")
    failure.__cause__ = self.error
    return failure

  def _end(self) -> None:
    """Fails the requests still open, and from now on every new one."""
    with self._changed:
      self._ended = True
      opens, self._waiting = [*self._waiting, *self._driver.abandon()], []
      rooms, self._room = list(self._room), collections.deque()
      for open_ in opens:
        self._hand_back(open_)
        open_.future.set_exception(self._failure())
      self._changed.notify_all()
    for room in rooms:
      room.set_result(None)  # who waits for room finds out by asking

  def _next(self) -> str:
    """Blocks until there is something to do: "stop", "go", or "drop" (only clear up)."""
    with self._changed:
      while True:
        open_ = bool(self._waiting) or self._driver.occupied
        if self._stopping or (self._draining and not open_):
          return "stop"
        have_params = self._params_known or self._next_params is not None
        held = self._paused or (self._deterministic and self._busy > 0)
        if open_ and have_params and not held:
          return "go"
        if self._cancelled or self._due() <= time.monotonic():
          return "drop"
        self._idle = True
        self._changed.notify_all()
        with self._driver.waiting():
          due = self._due()
          self._changed.wait(None if due == _NEVER else max(0.0, due - time.monotonic()))
        self._idle = False

  @property
  def _params_known(self) -> bool:
    return self._driver.params is not None

  def _open(self) -> list[Open]:
    return [*self._waiting, *(s.open for s in self._driver.slots if s.open)]

  def _due(self) -> float:
    """The next deadline."""
    return min((o.request.deadline or _NEVER for o in self._open()), default=_NEVER)

  def _drop(self) -> None:
    """Ends requests that were given up or whose deadline has passed, with what they have."""
    now = time.monotonic()
    with self._changed:
      given_up = set(self._cancelled)
      late = {o for o in self._open() if (o.request.deadline or _NEVER) <= now} - given_up
      gone = given_up | late
      if not gone:
        return
      queued = [o for o in self._waiting if o in gone]
      self._waiting = [o for o in self._waiting if o not in gone]
      self._make_room()
      self._cancelled -= given_up - set(self._open()) - set(queued)  # ended in between
    for opens in (lambda: queued, lambda: self._driver.evict(gone)):
      for open_ in opens():
        reason = StopReason.TIMEOUT if open_ in late else StopReason.ABORTED
        self._resolve(open_, join(open_.parts, reason))

  def _swap(self) -> None:
    """Takes new weights, if there are any and the sequences under way allow it."""
    with self._changed:
      if self._next_params is None or (self._on_swap == "drain" and self._driver.occupied):
        return
      version, params = self._next_params
      self._next_params = None
    # Half a prompt by one version and half by another would be neither's.
    unfit = [
      s.open for s in self._driver.slots if s.stage is Stage.PREFILL or self._on_swap == "recompute"
    ]
    evicted = self._driver.evict({o for o in unfit if o is not None})
    with self._changed:
      self._waiting.extend(evicted)
    self._driver.set_params(version, params)
    with self._changed:
      self.version = version

  def _admit(self) -> None:
    """Fills free slots in order; equal prompts share one prefill."""
    with self._changed:
      if self._next_params is not None:  # draining: nobody new before the swap
        return
      self._waiting.sort(key=_order)
      admitted = 0
      while admitted < len(self._waiting) and self._driver.slots.assign(
        self._waiting[admitted], self.version
      ):
        admitted += 1
      del self._waiting[:admitted]
      self._make_room()

  def _make_room(self) -> None:
    """Wakes as many who wait for room as there is (caller holds the lock)."""
    for _ in range(self._max_waiting - len(self._waiting)):
      if not self._room:
        return
      room = self._room.popleft()
      if not room.cancelled():
        room.set_result(None)

  def _resolve(self, open_: Open, completion: Completion) -> None:
    with self._changed:
      self._hand_back(open_)
      open_.future.set_result(completion)

  def _hand_back(self, open_: Open) -> None:
    """The run is busy from this moment, not from when it wakes up, or since it gave up."""
    if open_ in self._cancelled:
      self._cancelled.discard(open_)
    elif open_.home is self:
      self._busy += 1
    else:
      open_.home.enter()


def _order(open_: Open) -> tuple:
  """Priority, then those that were under way, then the order asked for."""
  return (open_.request.priority, not open_.parts, open_.request.order)


_NEVER = float("inf")
_COLUMNS = ("tokens", "logprobs", "versions", "mixed")
