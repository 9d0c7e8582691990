"""Continuous batching: one thread admits requests into free slots and runs the engine.

Weights are swapped between two dispatches. In deterministic mode nothing is admitted while a
participant (a run that may still ask) is busy elsewhere, so the admission plan, and with it every
bit of every result, is a function of the requests alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from trinity_jax.errors import RunFailed, UserError
from trinity_jax.experience import StopReason
from trinity_jax.sampler.cache import bucket_for
from trinity_jax.sampler.engine import STOP_IDS, Requests
from trinity_jax.sampler.programs import Programs


@dataclasses.dataclass(frozen=True)
class Request:
  """One sequence to sample.

  Attributes:
    tokens: i32[T], the prompt.
    key: u32[2], see sampling.request_key.
    order: admission order, smallest first; also the request's name in messages.
    limit: most tokens to sample.
    stop_ids: tokens that end the sequence; the stop token is part of the result.
    temperature, top_p, min_p, top_k: 0 temperature is greedy; see sampling.sample.
  """

  tokens: np.ndarray
  key: np.ndarray
  order: tuple[int, ...]
  limit: int
  stop_ids: tuple[int, ...]
  temperature: float = 1.0
  top_p: float = 1.0
  min_p: float = 0.0
  top_k: int = 0


@dataclasses.dataclass(frozen=True)
class Completion:
  """What was sampled: tokens i32[n], logprobs f32[n], versions i32[n], and why it ended."""

  tokens: np.ndarray
  logprobs: np.ndarray
  versions: np.ndarray
  stop_reason: StopReason


@dataclasses.dataclass
class _Slot:
  request: Request
  future: Future
  length: int  # cache entries in use
  generated: int = 0


class Sampler:
  """The scheduler thread and its engine.

  `error`, once set, is the exception that killed the thread. Every request still open fails with
  RunFailed from it, and so does every later `submit` and `set_params`.
  """

  def __init__(
    self,
    programs: Programs,
    *,
    steps_per_dispatch: int,
    refill_fraction: float,
    deterministic: bool,
    span: Callable[[str], contextlib.AbstractContextManager] = lambda _: contextlib.nullcontext(),
  ):
    self._programs = programs
    self._steps = steps_per_dispatch
    self._refill = max(1, int(refill_fraction * programs.spec.slots))
    self._deterministic = deterministic
    self._span = span
    self._changed = threading.Condition()
    self._waiting: list[tuple[Request, Future]] = []
    self._slots: list[_Slot | None] = [None] * programs.spec.slots
    self._cancelled: set[Future] = set()
    self._busy = 0
    self._next_params: tuple[int, Any] | None = None
    self._params: Any = None
    self._state: Any = None
    self._stopping = self._ended = False
    self.version = -1
    self.error: BaseException | None = None
    self.stats = {"sampled_tokens": 0, "prompt_tokens": 0, "decode_steps": 0, "slot_steps": 0,
                  "busy_slot_steps": 0}
    self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

  # --- any thread --------------------------------------------------------------------------------

  def start(self) -> None:
    self._thread.start()

  def close(self) -> None:
    """Stops the thread; requests still open fail."""
    with self._changed:
      self._stopping = True
      self._changed.notify_all()
    if self._thread.is_alive():
      self._thread.join(timeout=60)
      if self._thread.is_alive():
        raise RunFailed("the sampler thread did not end within 60 s of close()")
    self._end()  # for a thread that was never started

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

  def submit(self, request: Request) -> Future:
    """Queues a request of a participant; the future gives a Completion.

    Raises:
      UserError: a prompt or response longer than the engine was compiled for.
      RunFailed: the sampler has died or was closed; so does the future, when that comes later.
    """
    self._check(request)
    future: Future = Future()
    future.set_running_or_notify_cancel()
    with self._changed:
      if self._ended:
        raise self._failure()
      self._waiting.append((request, future))
      self._busy -= 1
      self._changed.notify_all()
    return future

  async def generate(self, request: Request) -> Completion:
    """`submit` for coroutines; cancelling it frees the slot."""
    future = self.submit(request)
    try:
      return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
      self._cancel(future)
      raise

  def _cancel(self, future: Future) -> None:
    """Gives a request up. Its run is busy again from this moment, as after a result."""
    with self._changed:
      if not future.done():
        self._cancelled.add(future)
        self._busy += 1
        self._changed.notify_all()

  def describe(self) -> str:
    """Who is where, for the message of a wait that expired."""
    with self._changed:
      active = [s.request.order for s in self._slots if s]
      waiting = [r.order for r, _ in self._waiting]
      return (
        f"sampler at version {self.version}: {len(active)} decoding {active[:4]}, "
        f"{len(waiting)} waiting {waiting[:4]}, {self._busy} participants busy elsewhere"
      )

  def _check(self, request: Request) -> None:
    spec, prompt = self._programs.spec, len(request.tokens)
    if not 1 <= prompt <= self._programs.prompt_lengths[-1]:
      raise UserError(
        f"prompt of {prompt} tokens: sampler.max_prompt_length allows 1 to "
        f"{self._programs.prompt_lengths[-1]}"
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
      self._state = self._programs.init_state()
      while self._wait_for_work():
        self._drop_cancelled()
        self._admit_waiting()
        if any(self._slots):
          self._dispatch()
          self._collect()
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
      futures = [f for _, f in self._waiting] + [s.future for s in self._slots if s]
      self._waiting, self._slots = [], [None] * len(self._slots)
      for future in futures:
        self._hand_back(future)
        future.set_exception(self._failure())

  def _wait_for_work(self) -> bool:
    """Blocks until there is something to do (False: stop) and takes new weights."""

    def ready():
      if self._stopping:
        return True
      work = self._waiting or self._cancelled or any(self._slots)
      have_params = self._params is not None or self._next_params is not None
      return work and have_params and not (self._deterministic and self._busy > 0)

    with self._changed:
      self._changed.wait_for(ready)
      if self._stopping:
        return False
      if self._next_params is not None:
        self.version, self._params = self._next_params
        self._next_params = None
    return True

  def _drop_cancelled(self) -> None:
    with self._changed:
      cancelled = set(self._cancelled)
      dropped = [f for _, f in self._waiting if f in cancelled]
      self._waiting = [(r, f) for r, f in self._waiting if f not in cancelled]
    mask = np.array([s is not None and s.future in cancelled for s in self._slots])
    if mask.any():
      self._state = self._programs.release(self._state, mask)
      for i, slot in enumerate(self._slots):
        if slot is not None and mask[i]:
          dropped.append(slot.future)
          self._slots[i] = None
    for future in dropped:
      self._resolve(future, Completion(*_NOTHING, StopReason.ABORTED))

  def _admit_waiting(self) -> None:
    """Fills free slots in request order; equal prompts share one prefill row."""
    with self._changed:
      self._waiting.sort(key=lambda w: w[0].order)
    while self._waiting:
      free = [i for i, s in enumerate(self._slots) if s is None]
      prompts: dict[bytes, int] = {}
      chosen: list[tuple[int, int, Request, Future]] = []  # slot, row, request, future
      for slot, (request, future) in zip(free, self._waiting):
        name = request.tokens.tobytes()
        if name not in prompts and len(prompts) == self._programs.prompt_counts[-1]:
          break
        chosen.append((slot, prompts.setdefault(name, len(prompts)), request, future))
      if not chosen:
        return
      with self._changed:  # a request is always in one of the two, or its future would be lost
        for slot, _, r, future in chosen:
          self._slots[slot] = _Slot(r, future, length=len(r.tokens), generated=1)
        del self._waiting[: len(chosen)]
      self._prefill([(slot, row, r) for slot, row, r, _ in chosen], len(prompts))

  def _prefill(self, chosen, num_prompts: int) -> None:
    P = bucket_for(num_prompts, self._programs.prompt_counts)
    longest = max(len(r.tokens) for _, _, r in chosen)
    T = bucket_for(longest, self._programs.prompt_lengths)
    S = self._programs.spec.slots
    tokens, lengths = np.zeros((P, T), np.int32), np.ones(P, np.int32)
    source, requests = np.full(S, -1, np.int32), Requests.empty(S)
    for slot, row, r in chosen:
      tokens[row, : len(r.tokens)], lengths[row] = r.tokens, len(r.tokens)
      source[slot] = row
      requests.key[slot], requests.temperature[slot] = r.key, r.temperature
      requests.top_p[slot], requests.min_p[slot] = r.top_p, r.min_p
      requests.top_k[slot], requests.limit[slot] = r.top_k, r.limit
      requests.stop_ids[slot, : len(r.stop_ids)] = r.stop_ids
    self.stats["prompt_tokens"] += int(lengths[:num_prompts].sum())
    with self._span("prefill"):
      self._state = self._programs.admit(
        self._params, self._state, tokens, lengths, source, requests, self.version
      )
      jax.block_until_ready(self._state.active)

  def _dispatch(self) -> None:
    """Decodes up to steps_per_dispatch tokens, fewer when refilling pays."""
    used = [s for s in self._slots if s]
    left = [s.request.limit - s.generated for s in used]
    steps = max(1, min(self._steps, max(left)))
    live = max(s.length + min(steps, n) for s, n in zip(used, left))
    live = bucket_for(max(live, 1), self._programs.live_lengths)
    free = len(self._slots) - len(used)
    enough = free + self._refill if self._waiting else len(self._slots)
    with self._span("decode"):
      self._state = self._programs.generate(
        self._params, self._state, self.version, steps, enough, live
      )
      jax.block_until_ready(self._state.active)

  def _collect(self) -> None:
    """Books progress and resolves the futures of ended sequences."""
    s = self._state
    active, generated, reason = jax.device_get((s.active, s.generated, s.stop_reason))
    done = [(i, slot) for i, slot in enumerate(self._slots) if slot and not active[i]]
    longest = 0
    for i, slot in enumerate(self._slots):
      if slot:
        new = int(generated[i]) - slot.generated
        slot.generated += new
        slot.length += new
        longest = max(longest, new)
        self.stats["busy_slot_steps"] += new
    self.stats["decode_steps"] += longest
    self.stats["slot_steps"] += longest * len(self._slots)
    if not done:
      return
    tokens, logprobs, versions = jax.device_get((s.tokens, s.logprobs, s.versions))
    for i, slot in done:
      n = int(generated[i])
      self._slots[i] = None
      self.stats["sampled_tokens"] += n
      rows = [x[i, :n].copy() for x in (tokens, logprobs, versions)]
      answer = Completion(rows[0], rows[1], rows[2], StopReason(int(reason[i])))
      self._resolve(slot.future, answer)

  def _resolve(self, future: Future, completion: Completion) -> None:
    with self._changed:
      self._hand_back(future)
      future.set_result(completion)

  def _hand_back(self, future: Future) -> None:
    """The run is busy from this moment, not from when it wakes up, or since it gave up."""
    if future in self._cancelled:
      self._cancelled.discard(future)
    else:
      self._busy += 1


_NOTHING = (np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32))
