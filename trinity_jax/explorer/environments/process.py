"""Environments in processes of their own: one that hangs is killed, one that dies is replaced.

Not a sandbox: an environment is the user's code and may do what we may. It gets none of our
environment variables but those that programs need to start. Its module is imported once, by a
process that the others are forked from (see process_worker), so it must not start threads when it
is imported.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trinity_jax.errors import UserError
from trinity_jax.explorer.environments.environment import Step
from trinity_jax.explorer.threads import in_thread

if TYPE_CHECKING:
  from trinity_jax.sampler.rollout_engine import Member

_WORKER = Path(__file__).with_name("process_worker.py")
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "HOME", "TMPDIR", "LANG")
_LONGEST = 1 << 24  # bytes of a reply
_STARTING = 120.0  # seconds for a process to be there, its module's import included
_CLOSING = 10.0  # seconds in which a template ends the processes that it has forked


class EnvironmentDied(RuntimeError):
  """The environment's process ended in the middle of an episode."""


class EnvironmentHung(RuntimeError):
  """The environment did not answer within its deadline; its process was killed."""


class EnvironmentRaised(RuntimeError):
  """The environment raised; holds its own traceback."""


class _Template:
  """A process with a module imported, and forks of it."""

  def __init__(self, module: str):
    self._control, theirs = socket.socketpair()
    self._forks = 0
    with theirs:
      self._process = subprocess.Popen(
        [sys.executable, "-P", str(_WORKER), str(os.getpid()), json.dumps(sys.path), module],
        stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={k: os.environ[k] for k in _ENVIRONMENT if k in os.environ}, start_new_session=True,
      )  # fmt: skip
    self._control.setblocking(False)

  @property
  def alive(self) -> bool:
    return self._process.poll() is None

  def fork(self, module: str, memory_mb: int) -> _Worker:
    """Asks for another process.

    Raises:
      EnvironmentDied: the template takes no requests any more.
    """
    ours, theirs = socket.socketpair()
    self._forks += 1
    request = json.dumps({"fork": self._forks, "memory_mb": memory_mb}).encode() + b"\n"
    try:
      with theirs:
        socket.send_fds(self._control, [request], [theirs.fileno()])
    except OSError as e:
      ours.close()
      raise EnvironmentDied(f"{module}: the process that forks its environments: {e}") from e
    ours.setblocking(False)
    return _Worker(self, self._forks, module, ours)

  def kill(self, number: int) -> None:
    """Ends one of its processes and what that has started."""
    with contextlib.suppress(OSError):  # it has ended, and they with it
      self._control.send(json.dumps({"kill": number}).encode() + b"\n")

  def close(self) -> None:
    """Ends it and all of its processes; blocks until they are gone."""
    self._control.close()
    try:
      self._process.wait(_CLOSING)
    except subprocess.TimeoutExpired:
      self.abort()

  def abort(self) -> None:
    """`close` for a template that does not listen: the kernel ends its processes with it."""
    self._control.close()
    self._process.kill()
    self._process.wait()


class _Worker:
  """One process; used by one episode at a time."""

  def __init__(self, template: _Template, number: int, module: str, own: socket.socket):
    self.template, self.module = template, module
    self._number, self._socket = number, own
    self._read = bytearray()
    self.busy = False  # a request is not answered: whoever gave up cannot hand the process on

  @property
  def usable(self) -> bool:
    """Whether it waits for a request."""
    if self.busy or self._socket.fileno() < 0:
      return False
    try:
      self._socket.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
      return True
    except OSError:
      return False
    return False  # it has ended, or talks unasked

  async def ask(self, request: dict[str, Any], deadline: float) -> Any:
    """Returns the answer's value; of no request, what it says when it is there.

    Raises:
      EnvironmentDied, EnvironmentHung, EnvironmentRaised: there is none.
    """
    loop, what, self.busy = asyncio.get_running_loop(), next(iter(request), "start"), True
    try:
      async with asyncio.timeout(deadline):
        if request:
          await loop.sock_sendall(self._socket, json.dumps(request).encode() + b"\n")
        line = await self._line(loop, what)
    except TimeoutError as e:
      raise EnvironmentHung(f"{what}: no answer within {deadline:g} s") from e
    except OSError as e:
      raise EnvironmentDied(f"{what}: {e}") from e
    reply = json.loads(line)
    self.busy = False
    if "raised" in reply:
      raise EnvironmentRaised(f"{reply['raised']}: {reply['text']}\n{reply['traceback']}")
    return reply["value"]

  async def _line(self, loop: asyncio.AbstractEventLoop, what: str) -> bytearray:
    while not self._read.endswith(b"\n"):
      data = await loop.sock_recv(self._socket, 1 << 18)
      if not data:
        raise EnvironmentDied(f"{what}: its process ended")
      self._read += data
      if len(self._read) > _LONGEST:
        raise EnvironmentDied(f"{what}: a reply of more than {_LONGEST} bytes")
    line, self._read = self._read, bytearray()
    return line

  def kill(self) -> None:
    """Ends it and what it started, at once."""
    self.template.kill(self._number)
    self._socket.close()


class _Waiting(NamedTuple):
  """For a process."""

  turn: asyncio.Future[None]
  member: Member | None


class Processes:
  """Up to `at_once` processes for environments, started when needed and reused.

  Used by one event loop at a time. Whoever comes when all are taken waits, first come, first
  served, and is no participant of its sampler meanwhile: deterministic admission waits for every
  run that is busy, and those that have a process must get on for this one to have its turn.

  Args:
    at_once: processes; an episode beyond that waits for one.
    deadline: seconds that making, resetting or one step may take.
    memory_mb: MiB that an environment may use beyond what a process has to begin with (Linux); 0
      any.

  Attributes:
    started: processes so far; those beyond the number at once replaced others.
  """

  def __init__(self, at_once: int = 64, *, deadline: float = 300.0, memory_mb: int = 0):
    if at_once < 1 or deadline <= 0 or memory_mb < 0:
      raise UserError(
        f"environment processes: at_once = {at_once}, deadline = {deadline}, memory_mb = "
        f"{memory_mb}: expected 1 or more, above 0, 0 or more"
      )
    self.at_once, self.deadline, self.memory_mb, self.started = at_once, deadline, memory_mb, 0
    self._templates: dict[str, _Template] = {}
    self._idle: list[_Worker] = []
    self._busy = 0
    self._waiting: collections.deque[_Waiting] = collections.deque()
    weakref.finalize(self, _end_all, self._templates, self._idle)

  def environment(
    self, factory: str, args: Mapping[str, Any] | None = None, member: Member | None = None
  ) -> ProcessEnvironment:
    """An environment that `factory` ("module:function") makes of keyword arguments (JSON).

    Args:
      member: the sampler in which the run that will use it is counted (`model.sampler`).
    """
    module, _, name = factory.partition(":")
    if not module or not name:
      raise UserError(f"environment {factory!r}: expected 'module:function'")
    return ProcessEnvironment(self, factory, dict(args or {}), member)

  async def take(self, module: str, member: Member | None = None) -> _Worker:
    """A process for an environment of this module, when there is a place; `give` it back."""
    await self._place(member)
    try:
      return self._idle_one(module) or await self._another(module)
    except BaseException:  # cancelled too: nobody else would give the place back
      self._pass_on()
      raise

  def give(self, worker: _Worker) -> None:
    """Takes a process back, to be used again or, in the middle of something, to be killed."""
    if worker.usable:
      self._idle.append(worker)
    else:
      worker.kill()
    self._pass_on()

  async def _place(self, member: Member | None) -> None:
    if self._busy < self.at_once:  # then nobody waits
      self._busy += 1
      return
    turn = asyncio.get_running_loop().create_future()
    waiting = _Waiting(turn, member)
    self._waiting.append(waiting)
    if member is not None:
      member.leave()
    try:
      await turn
    except BaseException:  # cancelled: leaves the queue, or passes on the place it just got
      if turn.cancelled():
        self._waiting.remove(waiting)
        if member is not None:
          member.enter()
      else:
        self._pass_on()
      raise

  def _pass_on(self) -> None:
    """A place is free: for who has waited longest, who is counted in again before anybody else is
    counted out, so that nothing is admitted between."""
    for waiting in self._waiting:
      if not waiting.turn.done():
        self._waiting.remove(waiting)
        if waiting.member is not None:
          waiting.member.enter()
        waiting.turn.set_result(None)
        return
    self._busy -= 1

  def close(self) -> None:
    """Ends all processes and blocks until they are gone (milliseconds). Later episodes start new
    ones. Without it they end with our process."""
    _end_all(self._templates, self._idle)

  def _idle_one(self, module: str) -> _Worker | None:
    for i in range(len(self._idle) - 1, -1, -1):  # the last one used first
      if self._idle[i].module == module:
        worker = self._idle.pop(i)
        if worker.usable:
          return worker
        worker.kill()
    return None

  async def _another(self, module: str) -> _Worker:
    while self._idle and self._busy + len(self._idle) > self.at_once:
      self._idle.pop(0).kill()  # of another module
    template = self._templates.get(module)
    if template is None or not template.alive:
      if template is not None:
        template.close()
      template = self._templates[module] = _Template(module)
    worker = template.fork(module, self.memory_mb)
    self.started += 1
    try:
      await worker.ask({}, _STARTING)
    except EnvironmentHung:  # importing the module, which holds up every other fork as well
      worker.kill()
      if self._templates.get(module) is template:
        del self._templates[module]
        await in_thread(template.abort)
      raise EnvironmentHung(f"{module} was not imported within {_STARTING:g} s") from None
    except BaseException:  # a cancelled run too must not leave its process behind
      worker.kill()
      raise
    return worker


def _end_all(templates: dict[str, _Template], idle: list[_Worker]) -> None:
  while idle:
    idle.pop().kill()
  while templates:
    templates.popitem()[1].close()


class ProcessEnvironment:
  """An environment that lives in one of `Processes` from reset to close.

  When the run that uses it is cancelled, or the environment hangs or dies, its process is killed;
  the next episode gets another.
  """

  def __init__(
    self, processes: Processes, factory: str, args: dict[str, Any], member: Member | None
  ):
    self._processes, self._factory, self._args = processes, factory, args
    self._member = member
    self._worker: _Worker | None = None

  async def reset(self) -> str:
    """Makes the environment and starts its episode."""
    if self._worker is None:
      self._worker = await self._processes.take(self._factory.partition(":")[0], self._member)
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
