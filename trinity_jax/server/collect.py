"""Served sessions as training data: each becomes a group of one run in a run's replay buffer."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import secrets
import threading
from collections.abc import Sequence

from trinity_jax.buffer.record import Key
from trinity_jax.buffer.replay import ReplayBuffer
from trinity_jax.config import Config
from trinity_jax.errors import RunFailed
from trinity_jax.experience import Experience, ExperienceId
from trinity_jax.explorer.workflow import Model, SamplingParams
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.sampler.rollout_engine import RolloutEngine
from trinity_jax.server.protocol import ApiError


class Collector:
  """What a server does with sessions that its clients begin; any thread.

  A session's place in the buffer is claimed when it is committed, as an explorer claims its steps,
  so that explorers and servers can feed one trainer.

  Args:
    config: of the stage; its sampling parameters are those of every session.
    buffer: shared with the trainer's process; order "ready" or "priority".
  """

  def __init__(
    self, config: Config, buffer: ReplayBuffer, engine: RolloutEngine, tokenizer: Tokenizer
  ):
    self._config, self._buffer = config, buffer
    self._engine, self._tokenizer = engine, tokenizer
    self._seed, self._count = secrets.randbits(32), itertools.count()  # no two sessions alike
    self._lock, self._claiming = threading.Lock(), threading.Lock()
    self._free: list[Key] = []
    self._waiting: dict[str, list[ExperienceId]] = {}  # sessions whose reward is to come

  def begin(self, name: str) -> Model:
    """The handle of a new session.

    Raises:
      ApiError: one of this name waits for its reward.
    """
    if name in self._waiting:
      raise ApiError(409, f"a session {name[:60]!r} waits for its reward; take another name")
    c = self._config.sampler
    id = ExperienceId(0, next(self._count), 0, 0)
    params = SamplingParams(c.temperature, c.max_response_length, c.top_p, c.top_k)
    member = self._engine.member((_STREAM, *id))
    return Model(
      member, self._tokenizer, id, self._seed, params, c.max_prompt_length, stream=_STREAM
    )

  def commit(self, name: str, experiences: Sequence[Experience]) -> None:
    """Stores a session's experiences; durable when it returns. Blocks while the buffer is full.

    Args:
      experiences: its token logs; without a reward they wait for `reward`.

    Raises:
      ApiError: too many wait for their reward, or the trainer has finished.
      RunFailed: the buffer stayed full for server.deadline, or failed.
    """
    late = any(e.reward is None for e in experiences)
    with self._lock:
      most = self._config.server.max_sessions
      if late and len(self._waiting) >= most:
        raise ApiError(429, f"{most} sessions wait for their reward; give some of them theirs")
      if late:
        self._waiting[name] = []
    ids: list[ExperienceId] = []
    try:
      ids = self._store(experiences)
    finally:
      with self._lock:
        if late and ids:
          self._waiting[name] = ids
        elif late:
          del self._waiting[name]

  def reward(self, name: str, reward: float) -> bool:
    """The late reward of a committed session; False where none of this name waits for one.

    Raises:
      UserError: it has another reward already.
    """
    with self._lock:
      ids = self._waiting.get(name)
    if not ids:
      return False
    for id in ids:
      self._buffer.give_reward(id, reward)
    with self._lock:
      self._waiting.pop(name, None)
    return True

  def _store(self, experiences: Sequence[Experience]) -> list[ExperienceId]:
    """Puts them where nothing is yet: a claim may have gone to somebody else meanwhile."""
    while True:
      place = self._place()
      ids = [ExperienceId(*place, 0, i) for i in range(len(experiences))]
      group = [dataclasses.replace(e, id=id) for e, id in zip(experiences, ids)]
      try:
        outcome = asyncio.run(self._put(group))
      except BaseException:  # whatever it was, the claimed place must not stay empty
        with self._claiming:  # for the next attempt: a put that was given up may be stored
          self._free.insert(0, place)
        raise
      if outcome != "different":
        return ids

  async def _put(self, group: Sequence[Experience]) -> str:
    seconds = self._config.server.deadline
    try:
      async with asyncio.timeout(seconds):
        return await self._buffer.put(group)
    except TimeoutError:
      raise RunFailed(
        f"the replay buffer stayed full for {seconds:g} s (server.deadline): does the trainer run?"
      ) from None

  def _place(self) -> Key:
    with self._claiming:  # one claim at a time; it may wait for the database
      if not self._free:
        claim = self._buffer.claim(self._config.explorer.name, self._config.buffer.lease)
        if claim is None:
          raise ApiError(409, "the trainer has finished: nothing is trained on any more")
        self._free = [(claim.batch, task) for task in claim.tasks]
      return self._free.pop(0)


_STREAM = -1  # of sampling keys; explorers count theirs from 0
