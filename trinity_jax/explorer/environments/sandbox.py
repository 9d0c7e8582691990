"""Python that a model wrote, run in a process of its own that cannot do harm or go on for ever.

What the default isolation ("namespaces", Linux) gives a snippet: no network (not even loopback), no
processes but its own, no files but the interpreter and the system's libraries (read-only) and an
empty folder in memory, no environment variables of ours, an ordinary user without privileges, and
limits of CPU time, memory, processes, files, output and wall-clock time. When it ends, or its limit
does, everything that it started is killed.

What it trusts: the kernel. Namespaces and rlimits share one kernel with us, so this stops code that
is wrong, greedy or curious, not an exploit of the kernel: for code written by an adversary, run the
whole training program in a virtual machine without secrets. CPU and memory limits hold for each
process; `processes` and `wall_seconds` bound their sum.

"limits" is for where namespaces are forbidden (many containers) and must be named: it keeps the
limits and the killing, but the snippet can use the network and read the files of its user
(ours, unless we are root; root's snippets get a user of their own).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trinity_jax.errors import RunFailed, UserError

_WORKER = Path(__file__).with_name("sandbox_worker.py")
_GRACE = 20.0  # seconds beyond the wall limit before the worker itself is given up
ISOLATIONS = ("namespaces", "limits")


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a snippet may use.

  Attributes:
    cpu_seconds: CPU time of each of its processes, in whole seconds.
    wall_seconds: time in all; much longer, as a loaded machine must not change a verdict.
    memory_mb: address space of each process in MiB.
    processes: processes and threads at once.
    open_files: file descriptors of each process.
    file_mb: size of a file in MiB.
    disk_mb: size of its folder in MiB (namespaces only).
    output_kb: stdout and stderr together in KiB; a snippet that writes more is stopped.
  """

  cpu_seconds: float = 5.0
  wall_seconds: float = 30.0
  memory_mb: int = 512
  processes: int = 16
  open_files: int = 64
  file_mb: int = 16
  disk_mb: int = 64
  output_kb: int = 64

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise UserError(f"sandbox limit {field.name} = {value!r}: expected a number above 0")


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a snippet ended.

  Attributes:
    reason: ok, error (uncaught exception or exit code), memory, cpu, wall, output, files (a file
      too large), killed (SIGKILL: hard CPU limit or the kernel's memory killer), crash (another
      signal), lost (its worker was killed).
    detail: the signal's name, or the last line of stderr.
    stdout, stderr: what it wrote, cut at the limit; bytes that are not UTF-8 become U+FFFD.
    code: exit code, minus the signal's number when one ended it.
    cpu: seconds of CPU time of its first process and the children that it waited for.
    seconds: wall-clock time.
  """

  reason: str
  detail: str = ""
  stdout: str = ""
  stderr: str = ""
  code: int = 0
  cpu: float = 0.0
  seconds: float = 0.0


class Sandbox:
  """Runs snippets, at most `at_once` at a time on each event loop.

  Args:
    limits: of each snippet.
    isolation: "namespaces" or "limits"; see the module's text. Neither is chosen silently: where
      the kernel refuses the first, `run` raises.
    python: interpreter of the snippets; "" is ours (without the packages of a virtual environment).
    at_once: snippets at a time.
  """

  def __init__(
    self,
    limits: Limits = Limits(),
    *,
    isolation: str = "namespaces",
    python: str = "",
    at_once: int = 4,
  ):
    if isolation not in ISOLATIONS:
      raise UserError(f"sandbox isolation {isolation!r}: expected one of {', '.join(ISOLATIONS)}")
    if at_once < 1:
      raise UserError(f"sandbox at_once = {at_once}: expected at least 1")
    self.limits, self.isolation, self._at_once = limits, isolation, at_once
    self._python = os.path.realpath(python or sys.executable)
    self._places: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
      weakref.WeakKeyDictionary()
    )

  async def run(
    self, code: str, *, stdin: str = "", files: Mapping[str, str] | None = None, output_kb: int = 0
  ) -> Outcome:
    """Runs `code`; whatever it does is an Outcome. Cancelling kills it.

    Args:
      code: the snippet, main.py of its folder.
      stdin: what it can read from stdin.
      files: more files of its folder, {name: text}; names without folders.
      output_kb: instead of the limit of that name, where it is more.

    Raises:
      UserError: the isolation is not allowed here, or a file's name is not a plain one.
    """
    request = self._request(code, stdin, files, output_kb)
    loop = asyncio.get_running_loop()
    async with self._places.setdefault(loop, asyncio.Semaphore(self._at_once)):
      process = await asyncio.create_subprocess_exec(*_command(), **_OPTIONS, limit=1 << 26)
      assert process.stdin and process.stdout
      try:
        async with asyncio.timeout(self.limits.wall_seconds + _GRACE):
          process.stdin.write(request)
          with contextlib.suppress(ConnectionError):
            await process.stdin.drain()
          line = await process.stdout.readline()
      except TimeoutError:
        line = b""
      finally:
        process.stdin.close()  # the worker kills what it started, and ends
        try:
          with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE):
              await process.wait()
        finally:
          if process.returncode is None:
            _kill(process.pid)
    return self._outcome(line)

  def run_blocking(
    self, code: str, *, stdin: str = "", files: Mapping[str, str] | None = None, output_kb: int = 0
  ) -> Outcome:
    """`run` for plain functions: blocks the calling thread."""
    request = self._request(code, stdin, files, output_kb)
    with subprocess.Popen(_command(), **_OPTIONS) as process:
      assert process.stdin and process.stdout
      try:
        with contextlib.suppress(BrokenPipeError):
          process.stdin.write(request)
          process.stdin.flush()
        _readable(process.stdout, self.limits.wall_seconds + _GRACE)
        line = process.stdout.readline()
      except TimeoutError:
        line = b""
      finally:
        with contextlib.suppress(BrokenPipeError):
          process.stdin.close()
        try:
          with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        finally:
          if process.returncode is None:
            _kill(process.pid)
    return self._outcome(line)

  def _request(
    self, code: str, stdin: str, files: Mapping[str, str] | None, output_kb: int = 0
  ) -> bytes:
    files = dict(files or {})
    output_kb = max(output_kb, self.limits.output_kb)
    for name in files:
      if not name or name in (".", "..", "main.py") or "/" in name or "\0" in name:
        raise UserError(f"sandbox file {name!r}: expected a plain name other than main.py")
    request = {
      "files": {**files, "main.py": code},
      "stdin": stdin,
      "python": self._python,
      "owner": os.getpid(),
      "prefix": str(Path(self._python).parents[1]),
      "isolation": self.isolation,
      "limits": {**dataclasses.asdict(self.limits), "output_kb": output_kb},
    }
    return json.dumps(request).encode() + b"\n"

  def _outcome(self, line: bytes) -> Outcome:
    try:
      reply: dict[str, Any] = json.loads(line)
    except ValueError:
      return Outcome("lost", "the sandbox's worker ended without an answer")
    if "refused" in reply:
      fix = (
        "allow user namespaces, or choose isolation='limits', which keeps the limits but neither "
        "network nor files away"
        if self.isolation == "namespaces"
        else f"make {self._python} readable for every user, or name another with python=..."
      )
      raise UserError(f"sandbox isolation {self.isolation!r}: {reply['refused']}; {fix}")
    return Outcome(**reply)


_OPTIONS: dict[str, Any] = dict(
  stdin=subprocess.PIPE,
  stdout=subprocess.PIPE,
  stderr=subprocess.DEVNULL,
  env={},
  cwd="/",
  start_new_session=True,
)


def _command() -> list[str]:
  if sys.platform != "linux":
    raise UserError(f"the sandbox needs Linux, this is {sys.platform}; leave code rewards out")
  return [sys.executable, "-I", "-S", str(_WORKER), str(os.getpid())]


def _kill(group: int) -> None:
  with contextlib.suppress(ProcessLookupError):
    os.killpg(group, signal.SIGKILL)


def _readable(pipe: Any, seconds: float) -> None:
  import select

  poll = select.poll()
  poll.register(pipe, select.POLLIN)
  if not poll.poll(seconds * 1000):
    raise TimeoutError


def available(isolation: str = "namespaces", python: str = "") -> str:
  """Returns "" when snippets can run with this isolation here, else why not."""
  try:
    outcome = Sandbox(isolation=isolation, python=python).run_blocking("pass")
  except UserError as e:
    return str(e)
  if outcome.reason != "ok":
    raise RunFailed(f"sandbox: an empty snippet ended as {outcome}")
  return ""
