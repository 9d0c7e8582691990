"""Environments in processes of their own: one that hangs is killed, one that dies is replaced.

Not a sandbox: an environment is the user's code and may do what we may. It gets none of our
environment variables but those that programs need to start.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trinity_jax.errors import UserError
from trinity_jax.explorer.environments.environment import Step

_WORKER = Path(__file__).with_name("process_worker.py")
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "HOME", "TMPDIR", "LANG")
_LONGEST = 1 << 24  # bytes of a reply


class EnvironmentDied(RuntimeError):
  """The environment's process ended in the middle of an episode."""


class EnvironmentHung(RuntimeError):
  """The environment did not answer within its deadline; its process was killed."""


class EnvironmentRaised(RuntimeError):
  """The environment raised; holds its own traceback."""


class _Worker:
  """One process; used by one episode at a time."""

  def __init__(self, process: asyncio.subprocess.Process):
    self._process = process
    self.busy = False  # a request is not answered: whoever gave up cannot hand the process on

  @staticmethod
  async def start() -> _Worker:
    process = await asyncio.create_subprocess_exec(
      sys.executable, "-P", str(_WORKER), str(os.getpid()), stdin=asyncio.subprocess.PIPE,
      stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, limit=_LONGEST,
      env={k: os.environ[k] for k in _ENVIRONMENT if k in os.environ}, start_new_session=True,
    )  # fmt: skip
    return _Worker(process)

  @property
  def alive(self) -> bool:
    return self._process.returncode is None

  @property
  def usable(self) -> bool:
    return self.alive and not self.busy

  async def ask(self, request: dict[str, Any], deadline: float) -> Any:
    """Returns the answer's value.

    Raises:
      EnvironmentDied, EnvironmentHung, EnvironmentRaised: there is none.
    """
    assert self._process.stdin and self._process.stdout
    what, self.busy = next(iter(request)), True
    try:
      async with asyncio.timeout(deadline):
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        line = await self._process.stdout.readline()
    except TimeoutError as e:
      raise EnvironmentHung(f"{what}: no answer within {deadline:g} s") from e
    except (ConnectionError, ValueError) as e:  # ValueError: a reply beyond the limit
      raise EnvironmentDied(f"{what}: {e}") from e
    if not line:
      raise EnvironmentDied(f"{what}: its process ended")
    reply = json.loads(line)
    self.busy = False
    if "raised" in reply:
      raise EnvironmentRaised(f"{reply['raised']}: {reply['text']}\n{reply['traceback']}")
    return reply["value"]

  def kill(self) -> None:
    """Ends it and what it started, at once; asyncio reaps it."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)

  async def gone(self) -> None:
    await self._process.wait()


class Processes:
  """Up to `at_once` processes for environments on each event loop, started when needed and reused.

  Args:
    at_once: processes; an episode beyond that waits for one.
    deadline: seconds that making, resetting or one step may take.

  Attributes:
    started: processes so far; those beyond the number at once replaced others.
  """

  def __init__(self, at_once: int = 16, *, deadline: float = 300.0):
    if at_once < 1 or deadline <= 0:
      raise UserError(f"environment processes: at_once = {at_once}, deadline = {deadline}: above 0")
    self.at_once, self.deadline, self.started = at_once, deadline, 0
    self._loops: weakref.WeakKeyDictionary[
      asyncio.AbstractEventLoop, tuple[asyncio.Semaphore, list[_Worker], list[_Worker]]
    ] = weakref.WeakKeyDictionary()

  def environment(self, factory: str, args: Mapping[str, Any] | None = None) -> ProcessEnvironment:
    """An environment that `factory` ("module:function") makes of keyword arguments (JSON)."""
    module, _, name = factory.partition(":")
    if not module or not name:
      raise UserError(f"environment {factory!r}: expected 'module:function'")
    return ProcessEnvironment(self, factory, dict(args or {}))

  async def take(self) -> _Worker:
    places, idle, _ = self._here()
    await places.acquire()
    try:
      while idle:
        if (worker := idle.pop()).usable:
          return worker
        self._end(worker)
      self.started += 1
      return await _Worker.start()
    except BaseException:  # cancelled too: nobody else would give the place back
      places.release()
      raise

  def give(self, worker: _Worker) -> None:
    places, idle, _ = self._here()
    if worker.usable:
      idle.append(worker)
    else:
      self._end(worker)
    places.release()

  async def close(self) -> None:
    """Ends the idle processes of this loop; returns when those and all killed ones are gone."""
    _, idle, ending = self._here()
    while idle:
      self._end(idle.pop())
    while ending:
      await ending.pop().gone()

  def _end(self, worker: _Worker) -> None:
    ending = self._here()[2]
    ending[:] = [w for w in ending if w.alive]
    worker.kill()
    ending.append(worker)

  def _here(self) -> tuple[asyncio.Semaphore, list[_Worker], list[_Worker]]:
    """This loop's places, idle processes and killed ones that may not have ended yet."""
    loop = asyncio.get_running_loop()
    if loop not in self._loops:
      self._loops[loop] = asyncio.Semaphore(self.at_once), [], []
    return self._loops[loop]


class ProcessEnvironment:
  """An environment that lives in one of `Processes` from reset to close.

  When the run that uses it is cancelled, or the environment hangs or dies, its process is killed;
  the next episode gets another.
  """

  def __init__(self, processes: Processes, factory: str, args: dict[str, Any]):
    self._processes, self._factory, self._args = processes, factory, args
    self._worker: _Worker | None = None

  async def reset(self) -> str:
    """Makes the environment and starts its episode."""
    if self._worker is None:
      self._worker = await self._processes.take()
    request = {"make": self._factory, "args": self._args, "path": sys.path}
    await self._worker.ask(request, self._processes.deadline)
    return await self._worker.ask({"reset": []}, self._processes.deadline)

  async def step(self, action: str, /) -> Step:
    assert self._worker is not None, "step before reset"
    value = await self._worker.ask({"step": [action]}, self._processes.deadline)
    try:
      return Step(**value)
    except TypeError as e:
      raise ValueError(f"the environment's step returned {value!r}; expected a Step") from e

  async def close(self) -> None:
    """Gives the process back, or ends it when the episode left it in the middle of something."""
    worker, self._worker = self._worker, None
    if worker is None:
      return
    try:
      if worker.usable:
        await worker.ask({"close": []}, self._processes.deadline)
    finally:
      self._processes.give(worker)
