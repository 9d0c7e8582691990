"""A pool of processes that grade what a model wrote.

Model text may hang a computer algebra system or exhaust its memory, and neither a thread nor a
signal can stop that from inside, so it happens in `grader_worker` processes whose limits the
kernel enforces. The limit is CPU time: a loaded machine changes when a verdict comes, not which.

What it is not: a sandbox for code. A worker has no secrets in its environment, cannot write
into files and is capped in CPU time and memory, but it runs as the same user.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trinity_jax.errors import RunFailed, UserError

_WORKER = Path(__file__).with_name("grader_worker.py")
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR", "LANG", "LC_ALL")
_ENDINGS = {
  signal.SIGPROF: "timeout",
  signal.SIGXCPU: "timeout",
  signal.SIGALRM: "hang",
  signal.SIGKILL: "killed",
}
# Verdicts about the grading rather than about the answer; each scores 0.0.
FAILURES = ("timeout", "hang", "memory", "error", "crash", "killed", "lost")
_START_SECONDS = 300.0  # wall clock for importing the grader's libraries on a loaded machine


@dataclasses.dataclass(frozen=True)
class Grade:
  """A verdict.

  Attributes:
    score: what the grader returned, 0.0 if it failed.
    reason: the grader's word for it, or one of FAILURES: timeout (CPU time), hang (wall clock),
      memory, error (it raised), crash (died), killed (SIGKILL, as by the kernel when memory is
      short), lost (took its worker with it).
    detail: the exception's type, or the signal or exit code it died with.
  """

  score: float
  reason: str
  detail: str = ""


class _Lost(Exception):
  """The worker is gone or does not speak any more."""


class _Worker:
  """One worker process and the pipes to it. Used by one thread, except `interrupt`."""

  def __init__(self, grader: Path, cpu: float, wall: float, memory_mb: int, requests: int):
    self._command = [sys.executable, "-P", str(_WORKER), str(grader), str(requests), str(memory_mb)]
    self._cpu, self._wall = cpu, wall
    self._process: subprocess.Popen[bytes] | None = None
    self._errors = tempfile.TemporaryFile()
    self._closed = False
    self._stdin = self._stdout = -1
    self._buffer = b""
    self._fresh = True  # the child that answers next has graded nothing

  def grade(self, response: str, truth: str) -> Grade:
    """Grades one response.

    The verdict of a used child stands only when it came quickly and without failure; anything else
    is graded again by a fresh child with the whole limit, so that a failure is never due to what
    was graded before.
    """
    for last_try in (False, True):
      try:
        if self._process is None:
          self.start()
        if not self._fresh:
          grade = self._ask(response, truth, self._cpu / 4)
          if grade.reason not in FAILURES or grade.reason == "hang":
            return grade
        return self._ask(response, truth, self._cpu)
      except _Lost as e:
        self.stop()
        if self._closed:
          raise RunFailed("the grader pool was closed while it graded") from e
        if last_try:
          return Grade(0.0, "lost", str(e))
    raise AssertionError("unreachable")

  def start(self) -> None:
    """Starts the process and waits until the grader is loaded.

    Raises:
      RunFailed: it cannot be loaded; holds the worker's own traceback.
    """
    # PYTHONHASHSEED: equal requests take equal paths. No credentials of ours go along.
    environment = {k: os.environ[k] for k in _ENVIRONMENT if k in os.environ}
    self._process = subprocess.Popen(
      self._command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      env={**environment, "PYTHONHASHSEED": "0"},
      start_new_session=True,  # Ctrl-C is for us; and the whole session can be killed
      bufsize=0,
    )
    if self._closed:
      raise _Lost("closed while starting")
    assert self._process.stdin and self._process.stdout
    self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
    os.set_blocking(self._stdin, False)
    self._buffer, self._fresh = b"", True
    try:
      hello = self._receive(time.monotonic() + _START_SECONDS)
    except _Lost as e:
      self._errors.seek(0)
      hello = {"failed": f"{e}\n{self._errors.read()[-3000:].decode(errors='replace')}"}
    if "failed" in hello:
      self.stop()
      raise RunFailed(f"grader worker {self._command[3]} did not start: {hello['failed']}")

  def interrupt(self) -> None:
    """Ends the processes for good, from any thread; whoever waits for them notices."""
    self._closed = True
    if (process := self._process) is not None:
      _kill(process)

  def stop(self) -> None:
    """Ends the processes and closes the pipes."""
    process, self._process = self._process, None
    if process is None:
      return
    _kill(process)
    process.wait()
    for pipe in (process.stdin, process.stdout):
      assert pipe
      pipe.close()

  def _ask(self, response: str, truth: str, cpu: float) -> Grade:
    # The kernel keeps both limits for us. Ours is the last resort, for a worker that is gone.
    deadline = time.monotonic() + self._wall + 60.0
    request = {"response": response, "truth": truth, "cpu": cpu, "wall": self._wall}
    self._send(json.dumps(request).encode() + b"\n", deadline)
    reply = self._receive(deadline)
    if "died" not in reply:
      self._fresh = reply["last"]
      if reply["last"]:
        self._receive(deadline)  # its end; the next child is there
      return Grade(reply["score"], reply["reason"], reply["detail"])
    self._fresh = True
    if reply["died"] >= 256:
      return Grade(0.0, "crash", f"exit code {reply['died'] - 256}")
    died = signal.Signals(reply["died"])
    return Grade(0.0, _ENDINGS.get(died, "crash"), died.name)

  def _send(self, data: bytes, deadline: float) -> None:
    while data:
      self._wait(self._stdin, select.POLLOUT, deadline)
      try:
        data = data[os.write(self._stdin, data) :]
      except OSError as e:
        raise _Lost(f"worker closed its pipe: {e}") from e

  def _receive(self, deadline: float) -> dict[str, Any]:
    while b"\n" not in self._buffer:
      self._wait(self._stdout, select.POLLIN, deadline)
      data = os.read(self._stdout, 1 << 16)
      if not data:
        raise _Lost("worker ended")
      self._buffer += data
    line, self._buffer = self._buffer.split(b"\n", 1)
    try:
      return json.loads(line)
    except ValueError as e:
      raise _Lost(f"worker said {line[:100]!r}") from e

  def _wait(self, pipe: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
      raise _Lost("worker did not answer in time")


def _kill(process: subprocess.Popen[bytes]) -> None:
  """Kills a worker and its child."""
  if process.poll() is None:
    with contextlib.suppress(ProcessLookupError):  # two threads may be about it at once
      os.killpg(process.pid, signal.SIGKILL)


class GraderPool:
  """Grades in `workers` processes, each with a thread of ours that speaks to it.

  Safe to use from any thread and, through `agrade`, from an event loop, which it never blocks.
  Processes start with the first request. Close it, or use it as a context manager.

  Args:
    grader: Python file with `grade(response, truth) -> (score, reason)` and, if it likes,
      `warm_up()`; it is loaded in the workers only and may import nothing of this package.
    workers: number of processes.
    cpu_seconds: CPU time that one request may take.
    wall_seconds: wall-clock time that one request may take: only for what waits instead of
      computing, so much longer.
    memory_mb: address space of a worker in MiB (enforced on Linux).
    requests: requests after which a worker's child is replaced, which bounds what one could leave
      behind for the next.
  """

  def __init__(
    self,
    grader: Path,
    *,
    workers: int = 2,
    cpu_seconds: float = 2.0,
    wall_seconds: float = 120.0,
    memory_mb: int = 1024,
    requests: int = 256,
  ):
    if workers < 1 or requests < 1 or cpu_seconds <= 0 or wall_seconds <= 0:
      raise UserError(
        f"grader pool: workers = {workers}, requests = {requests}, cpu_seconds = {cpu_seconds}, "
        f"wall_seconds = {wall_seconds}: all must be above 0"
      )
    self._jobs: queue.SimpleQueue = queue.SimpleQueue()
    self._lock = threading.Lock()
    self._counts: collections.Counter[str] = collections.Counter()
    self._closed = False
    self._process = os.getpid()
    self._threads: list[threading.Thread] = []
    self._workers = [
      _Worker(Path(grader), cpu_seconds, wall_seconds, memory_mb, requests) for _ in range(workers)
    ]

  def submit(self, response: str, truth: str) -> concurrent.futures.Future[Grade]:
    """Queues one request. The future raises RunFailed if no worker can be started."""
    future: concurrent.futures.Future[Grade] = concurrent.futures.Future()
    with self._lock:
      if self._closed:
        raise RunFailed("the grader pool is closed")
      if not self._threads:
        for i, worker in enumerate(self._workers):
          thread = threading.Thread(
            target=self._serve, args=(worker,), name=f"grader-{i}", daemon=True
          )
          thread.start()
          self._threads.append(thread)
      self._jobs.put((future, response, truth))
    return future

  def grade(self, response: str, truth: str) -> Grade:
    """Grades one response; blocks. In a coroutine, await `agrade` instead."""
    return self.submit(response, truth).result()

  async def agrade(self, response: str, truth: str) -> Grade:
    """Grades one response without blocking the event loop."""
    return await asyncio.wrap_future(self.submit(response, truth))

  def grade_all(self, pairs: Iterable[tuple[str, str]]) -> list[Grade]:
    """Grades many (response, truth) on all workers; the verdicts in the order of `pairs`."""
    futures = [self.submit(response, truth) for response, truth in pairs]
    return [future.result() for future in futures]

  def counts(self) -> dict[str, int]:
    """Number of verdicts by reason since the pool was made."""
    with self._lock:
      return dict(self._counts)

  def close(self) -> None:
    """Ends the workers; requests still waiting raise RunFailed. Closing twice is fine."""
    with self._lock:
      closed, self._closed = self._closed, True
    if closed or os.getpid() != self._process:  # a fork must not end its parent's workers
      return
    for _ in self._threads:
      self._jobs.put(None)
    for worker in self._workers:
      worker.interrupt()
    for thread in self._threads:
      thread.join(10.0)

  def __enter__(self) -> GraderPool:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _serve(self, worker: _Worker) -> None:
    """A thread's life: takes requests until the pool closes."""
    broken: BaseException | None = None
    while (job := self._jobs.get()) is not None:
      future, response, truth = job
      if not future.set_running_or_notify_cancel():
        continue
      try:
        if self._closed:
          raise RunFailed("the grader pool was closed before it graded this")
        if broken:  # what could not be loaded once will not load for the next request either
          raise broken
        grade = worker.grade(response, truth)
      except BaseException as e:  # whoever waits must hear of it, whatever it is
        broken = broken or e
        future.set_exception(e)
      else:
        with self._lock:
          self._counts[grade.reason] += 1
        future.set_result(grade)
    worker.stop()
