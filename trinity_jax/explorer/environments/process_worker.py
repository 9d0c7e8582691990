"""Processes that environments live in: started by `process` as a script, standard library only.

The first process is a template. It imports the environments' module once, and forks a process for
each one that is asked for: that takes milliseconds, where an interpreter and its imports take a
second. It reaps and kills them, and when its control socket (stdin) closes they all end with it.

Control socket: JSON lines; with each "fork" comes the descriptor of that process's own socket.

  -> {"fork": number, "memory_mb"} | {"kill": number}

Socket of a process: JSON lines. What the environment prints goes nowhere.

  <- {"value": null}                        it is there
  -> {"make": "module:factory", "args": {...}, "path": [sys.path]} | {"reset": []} |
     {"step": [action]} | {"close": []}
  <- {"value": text, Step's fields, or null} | {"raised": class, "text", "traceback"}
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import threading
import traceback
from typing import Any

_PR_SET_PDEATHSIG = 1


def answer(request: dict, environment: Any) -> tuple[Any, Any]:
  """Returns (value, environment)."""
  if "make" in request:
    sys.path[:] = request["path"]
    module, _, name = request["make"].partition(":")
    return None, getattr(importlib.import_module(module), name)(**request["args"])
  ((function, args),) = request.items()
  if environment is None and function == "close":  # it could not be made
    return None, None
  value = getattr(environment, function)(*args)
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    value = dataclasses.asdict(value)
  return value, environment


def serve(own: socket.socket, refused: str) -> None:
  """A process's life: answers until its socket closes.

  Args:
    refused: why there can be no environment, or "".
  """
  environment = None
  with own.makefile("r", encoding="utf-8") as lines, own.makefile("w", encoding="utf-8") as out:
    out.write(json.dumps(
      {"raised": "RuntimeError", "text": refused, "traceback": ""} if refused else {"value": None}
    ) + "\n")  # fmt: skip
    out.flush()
    for line in lines:
      try:
        request = json.loads(line)
        environment = None if "make" in request else environment
        value, environment = answer(request, environment)
        reply = json.dumps({"value": value})
      except Exception as e:  # told to whoever asked, where it is raised
        told = traceback.format_exc()[-3000:]
        reply = json.dumps({"raised": type(e).__name__, "text": str(e), "traceback": told})
      out.write(reply + "\n")
      out.flush()


def confine(memory_mb: int, parent: int) -> None:
  """A group of its own, an end with the template's, and a limit of memory (0: none)."""
  with contextlib.suppress(PermissionError):  # the template has done it
    os.setpgid(0, 0)
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
      os._exit(1)
    if memory_mb:  # beyond what it has to begin with
      with open("/proc/self/statm") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + (memory_mb << 20)
      resource.setrlimit(resource.RLIMIT_AS, (most, most))


class Template:
  """The process that forks the others.

  Args:
    module: imported before the first fork, if it can be: what goes wrong is told by whoever imports
      it again.
  """

  def __init__(self, control: socket.socket, module: str):
    self._control, self._children = control, dict[int, int]()
    self._buffer, self._sockets = b"", list[int]()
    self._wake, wake = os.pipe()
    for end in (self._wake, wake):
      os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with contextlib.suppress(Exception):
      importlib.import_module(module)
    others = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    self._refused = ""
    if others:
      self._refused = (
        f"{module} starts threads when it is imported ({', '.join(others)}), and processes are "
        "forked after that; start them when an environment is made"
      )

  def run(self) -> None:
    """Does what it is told until the control socket closes."""
    while self._take():
      *lines, self._buffer = self._buffer.split(b"\n")
      for request in map(json.loads, lines):
        if "fork" in request:
          self._fork(request, self._sockets.pop(0))
        elif request["kill"] in self._children:
          _kill(self._children[request["kill"]])
    for child in self._children.values():
      _kill(child)
    while self._children:
      self._reap(0)

  def _take(self) -> bool:
    """Waits for requests; False: there will be none."""
    while True:
      ready, _, _ = select.select([self._control, self._wake], [], [])
      if self._wake in ready:
        os.read(self._wake, 4096)
        while self._reap(os.WNOHANG):
          pass
      if self._control in ready:
        data, sockets, _, _ = socket.recv_fds(self._control, 1 << 16, 64)
        self._buffer, self._sockets = self._buffer + data, self._sockets + sockets
        return bool(data)

  def _fork(self, request: dict, own: int) -> None:
    parent = os.getpid()
    try:
      child = os.fork()
    except OSError:  # no more processes: whoever asked sees the socket close
      os.close(own)
      return
    if child:
      with contextlib.suppress(OSError):  # it has ended, or done so itself
        os.setpgid(child, child)
      self._children[request["fork"]] = child
      os.close(own)
      return
    try:
      signal.set_wakeup_fd(-1)
      signal.signal(signal.SIGCHLD, signal.SIG_DFL)
      confine(request["memory_mb"], parent)
      self._control.close()
      for other in self._sockets:
        os.close(other)
      serve(socket.socket(fileno=own), self._refused)
    finally:
      os._exit(0)

  def _reap(self, flags: int) -> bool:
    """Waits for a process to end; what it started ends too. False: none has, or is left."""
    try:
      ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | flags)
    except ChildProcessError:
      return False
    if ended is None:
      return False
    _kill(ended.si_pid)  # the group, while its number cannot be another's
    os.waitpid(ended.si_pid, 0)
    self._children = {k: pid for k, pid in self._children.items() if pid != ended.si_pid}
    return True


def _kill(group: int) -> None:
  with contextlib.suppress(ProcessLookupError):
    os.killpg(group, signal.SIGKILL)


def main(path: list[str], module: str) -> None:
  control = socket.socket(fileno=os.dup(0))
  null = os.open(os.devnull, os.O_RDWR)
  for number in (0, 1, 2):
    os.dup2(null, number)
  sys.path[:] = path
  Template(control, module).run()


if __name__ == "__main__":
  # sys.argv[1], its owner's process id, is for people who look at a list of processes.
  main(json.loads(sys.argv[2]), sys.argv[3])
