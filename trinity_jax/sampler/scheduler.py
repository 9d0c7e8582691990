"""Continuous batching: one thread admits requests into free slots and runs the engine.

Weights are swapped between two dispatches. In deterministic mode nothing is admitted while a
participant (a run that may still ask) is busy elsewhere, so the admission plan, and with it every
bit of every result, is a function of the requests alone.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from trinity_jax.errors import RunFailed, UserError, suggestion
from trinity_jax.experience import StopReason
from trinity_jax.sampler import scoring
from trinity_jax.sampler.desk import Desk
from trinity_jax.sampler.driver import Driver
from trinity_jax.sampler.programs import Programs
from trinity_jax.sampler.request import Completion, check, join
from trinity_jax.sampler.roofline import Rates
from trinity_jax.sampler.slots import NEVER, Open, Stage

SWAPS = ("keep", "recompute", "drain")


class Sampler(Desk):
  """The scheduler thread and its engine; desk.py has what its callers ask.

  Args:
    programs: compiled programs of the engine.
    steps_per_dispatch: most decode steps of one dispatch.
    refill_fraction: a dispatch returns when this share of the slots is idle and requests wait.
    deterministic: admit only when no participant is busy elsewhere.
    on_swap: what becomes of sequences under way when weights change: "keep" decodes on with the
      cache of the old version (tokens are flagged `mixed`), "recompute" computes their cache again,
      "drain" lets them end first.
    max_waiting: requests that may wait for a slot, 0 for any number. When as many wait, `submit`
      raises Overloaded; `generate` and `stream`, whose callers wait anyway, still queue up.
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
    super().__init__(programs, max_waiting)
    self._driver = Driver(programs, steps_per_dispatch, refill_fraction, span, rates)
    self._deterministic, self._on_swap = deterministic, on_swap
    self._scored: list[scoring.Asked] = []  # of the dispatch under way
    self._next_params: tuple[int, Any] | None = None
    self._paused = self._idle = False
    self.version = self._given = -1  # in use; the newest offered, which may be being taken
    self._linger_until = 0.0
    self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

  # --- life (any thread) -------------------------------------------------------------------------

  def start(self) -> None:
    self._thread.start()

  def close(self, *, drain: bool = False) -> None:
    """Stops the thread; requests still open fail, or with `drain` are finished first.

    A drain ends a pause and waits for no participant. Without weights it finishes nothing.
    """
    with self._changed:
      if drain:
        self._draining, self._paused = True, False
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
    """Ends this sampler and returns its open requests with what they have so far, to `adopt`.

    `abort` of a request that went on to another sampler works here as well as there.
    """
    with self._changed:
      self.pause()  # the thread stays where it is until the lock is given back
      self._driver.evict(set(self._accepted.values()))
      self._handed |= self._accepted
      out = sorted(self._accepted.values(), key=lambda o: o.order)
      self._accepted, self._waiting = {}, []
      self._stopping = True
    self.close()
    return out

  def adopt(self, opens: Sequence[Open]) -> None:
    """Continues requests of another sampler. Their futures stay those their callers hold.

    Raises:
      UserError: one is longer than this engine was compiled for; then none is taken.
      RunFailed: the sampler has died or was closed.
    """
    for open_ in opens:
      check(open_.request, self._programs.spec)
    with self._changed:
      self._refuse_if_closed()
      for open_ in opens:
        open_.keeper = self
        self._accepted[open_.future] = open_
        self._waiting.append(open_)
      self._changed.notify_all()

  def set_params(self, version: int, params: Any) -> None:
    """Swaps weights at the next dispatch boundary. Versions never go back."""
    with self._changed:
      if self._ended:
        raise self._failure()
      if version < self._given:
        raise ValueError(f"version {version} offered to a sampler that has {self._given}")
      self._given, self._next_params = version, (version, params)
      self._changed.notify_all()

  def release(self) -> None:
    """Frees cache and weights until the next `set_params`, unless requests are open."""
    with self._changed:
      if self._paused or self._ended:
        return
      self.pause()  # the thread stays where it is until the lock is given back
      if not self._accepted and not self._scores and self._next_params is None:
        self._driver.release()
      self.resume()

  def member(self, order: Sequence[int]) -> Sampler:
    """The sampler that serves runs of this order: this one."""
    return self

  def describe(self) -> str:
    """Who is where, for the message of a wait that expired."""
    with self._changed:
      active = [o.request.order for s in self._driver.slots if (o := s.open)]
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

  # --- the sampler thread ------------------------------------------------------------------------

  def _run(self) -> None:
    try:
      self._driver.open()
      while (work := self._next()) != "stop":
        self._drop()
        if work in ("go", "score"):
          self._swap()
          self._score()
        if work == "go":
          self._admit()
          ended = self._driver.step(bool(self._waiting), more=not self._deterministic)
          for open_, completion in ended:
            self._resolve(open_, completion)
          if ended:
            self._linger_until = time.monotonic() + _LINGER
    except BaseException as e:  # reported through every future and `error`
      self.error = e
    self._end()

  def _end(self) -> None:
    """Fails the requests still open, and from now on every new one."""
    with self._changed:
      self._ended = True
      opens, self._accepted, self._waiting = list(self._accepted.values()), {}, []
      self._driver.abandon()
      self._changed.notify_all()
      scores, self._scores = self._scores, []
    for asked in scores:
      if asked.future.set_running_or_notify_cancel():
        self._scored.append(asked)
    for open_ in opens:
      self._hand_back(open_)
      open_.future.set_exception(self._failure())
    for asked in self._scored:
      asked.future.set_exception(self._failure())
    self._scored = []

  def _next(self) -> str:
    """Blocks until there is something to do: "stop", "go", "score" or "drop" (only clear up)."""
    with self._changed:
      while True:
        open_, scores = bool(self._accepted), bool(self._scores)
        if self._stopping or (self._draining and not ((open_ or scores) and self._have_params)):
          return "stop"
        if open_ and not self._held():
          linger = self._linger_until - time.monotonic() if self._busy > 0 else 0.0
          if self._deterministic or self._draining or linger <= 0:
            return "go"
          if not scores:
            with self._driver.waiting():
              self._changed.wait(linger)
            continue
        if scores and self._ready:
          return "score"
        due = self._due()
        if due <= time.monotonic():
          return "drop"
        self._idle = True
        self._changed.notify_all()
        with self._driver.waiting():
          self._changed.wait(None if due == NEVER else max(0.0, due - time.monotonic()))
        self._idle = False

  @property
  def _have_params(self) -> bool:
    return self._driver.params is not None or self._next_params is not None

  @property
  def _ready(self) -> bool:
    return self._have_params and not self._paused

  def _held(self) -> bool:
    busy = self._deterministic and self._busy > 0 and not self._draining
    return busy or not self._ready

  def _due(self) -> float:
    """When the next request is to be dropped."""
    return min((o.ends for o in self._accepted.values()), default=NEVER)

  def _drop(self) -> None:
    """Ends requests that were given up or whose deadline has passed, with what they have."""
    now = time.monotonic()
    with self._changed:
      gone = dict.fromkeys(o for o in self._accepted.values() if o.ends <= now)
      if not gone:
        return
      self._waiting = [o for o in self._waiting if o not in gone]
    self._driver.evict(gone)
    for open_ in gone:
      reason = StopReason.ABORTED if open_.given_up else StopReason.TIMEOUT
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

  def _score(self) -> None:
    """One dispatch of the log-probs that are waited for."""
    with self._changed:
      taken = scoring.take(self._scores, self._programs.spec, self._programs.shards)
      self._scored = taken  # so that they fail where the dispatch does
    if taken:
      for asked, logprobs in zip(taken, self._driver.score(taken)):
        asked.future.set_result(logprobs)
    self._scored = []

  def _admit(self) -> None:
    """Fills free slots in order; equal prompts share one prefill."""
    with self._changed:
      if self._next_params is not None or not self._driver.clean():
        return  # nobody new before the swap that drains, or before the cache is empty
      self._waiting.sort(key=lambda o: o.order)
      admitted = 0
      while admitted < len(self._waiting) and self._driver.slots.assign(
        self._waiting[admitted], self.version
      ):
        admitted += 1
      del self._waiting[:admitted]

  def _resolve(self, open_: Open, completion: Completion) -> None:
    with self._changed:
      del self._accepted[open_.future]
    # Without the lock: what is called from here may take another sampler's.
    self._hand_back(open_)
    open_.future.set_result(completion)

  def _hand_back(self, open_: Open) -> None:
    """The run is busy from this moment, not from when it wakes up, or since it gave up."""
    if not open_.given_up:
      open_.home.enter()


# Seconds. Runs that get a result often ask again at once: their next turns are prefilled together.
_LINGER = 0.005
