"""The process that grades: started by `grader_pool` as a script, standard library only.

It loads a grader file once (a function `grade(response, truth) -> (score, reason)`), then forks a
child that answers requests until it dies or has done its share; forking again costs
milliseconds where importing a computer algebra system costs a second. The kernel ends a child that
exceeds its limits (SIGPROF: CPU time, SIGALRM: wall clock), so neither a busy C loop nor a blocked
call can hold it up, and the parent only reports who died of what.

Requests and replies are JSON lines on the pipes that were stdin and stdout:

  -> {"response", "truth", "cpu", "wall"}   seconds of CPU time and of wall clock for this request
  <- {"ready": true} | {"failed": traceback}                            once, after loading
  <- {"score", "reason", "detail", "last"}  `last`: this child answers no more, the next is fresh
  <- {"died": signal number, or 256 + exit code}            instead of a reply, and after a last one
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import math
import os
import resource
import signal
import sys
import time
import traceback

END_OF_INPUT = 78  # a child's exit code when the pool is gone
_PR_SET_PDEATHSIG = 1


def load(path: str):
  """Returns `grade` of the grader file, warmed up."""
  spec = importlib.util.spec_from_file_location("grader", path)
  if spec is None or spec.loader is None:
    raise ImportError(f"{path} is not a Python file")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if hasattr(module, "warm_up"):
    module.warm_up()
  return module.grade


def confine(memory_mb: int, parent: int) -> None:
  """Limits of a child for good: address space, no files, no core dumps, nothing on stderr."""
  if sys.platform == "linux":  # elsewhere the kernel does not enforce it
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with its parent
    if os.getppid() != parent:
      os._exit(END_OF_INPUT)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  os.dup2(os.open(os.devnull, os.O_RDWR), 2)


def arm(cpu: float, wall: float) -> None:
  """From now on, `cpu` seconds of CPU time or `wall` seconds kill this process; 0 disarms."""
  signal.setitimer(signal.ITIMER_PROF, cpu)
  signal.setitimer(signal.ITIMER_REAL, wall)
  # In whole seconds and a little later: holds even where a grader meddles with its timers.
  soft = math.ceil(time.process_time() + cpu) + 1 if cpu else resource.RLIM_INFINITY
  resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def attempt(grade, response: str, truth: str) -> tuple[float, str, str]:
  """Calls the grader; what it raises becomes a reason: memory or error."""
  try:
    score, reason = grade(response, truth)
    score = float(score)
    if not math.isfinite(score):
      raise ValueError(f"score {score} is not finite")
    return score, str(reason), ""
  except MemoryError:
    return 0.0, "memory", ""
  except BaseException as e:  # a verdict on the request, reported and counted by the pool
    return 0.0, "error", type(e).__name__


def serve(grade, source: int, sink: int, requests: int, memory_mb: int, parent: int) -> int:
  """A child's life: answers up to `requests` requests, returns its exit code."""
  confine(memory_mb, parent)
  for left in reversed(range(requests)):
    line = receive(source)
    if not line:
      return END_OF_INPUT
    request = json.loads(line)
    arm(request["cpu"], request["wall"])
    score, reason, detail = attempt(grade, request["response"], request["truth"])
    arm(0, 0)
    last = left == 0 or reason in ("memory", "error")
    send(sink, {"score": score, "reason": reason, "detail": detail, "last": last})
    if last:
      break
  return 0


def receive(source: int) -> bytes:
  """Reads one line. The pool never sends two, so nothing is read that the next child needs."""
  chunks = []
  while not (chunks and chunks[-1].endswith(b"\n")):
    chunk = os.read(source, 1 << 16)
    if not chunk:
      return b""
    chunks.append(chunk)
  return b"".join(chunks)


def send(sink: int, message: dict) -> None:
  # One short write is atomic on a pipe: a dying child leaves a whole line or none.
  os.write(sink, json.dumps(message).encode() + b"\n")


def main(path: str, requests: int, memory_mb: int) -> None:
  source, sink = os.dup(0), os.dup(1)
  null = os.open(os.devnull, os.O_RDWR)
  os.dup2(null, 0)
  os.dup2(null, 1)  # a grader that prints does not speak to the pool
  # Whatever the pool's process ignores or blocks, limits end a child.
  for number in (signal.SIGPROF, signal.SIGALRM, signal.SIGXCPU):
    signal.signal(number, signal.SIG_DFL)
  signal.pthread_sigmask(signal.SIG_SETMASK, ())
  try:
    grade = load(path)
  except BaseException:  # told to the parent, which raises it
    send(sink, {"failed": traceback.format_exc()[-3000:]})
    return
  gc.collect()
  gc.freeze()  # keeps collections in children from copying every page
  send(sink, {"ready": True})
  parent = os.getpid()
  while True:
    child = os.fork()
    if child == 0:
      code = 1
      try:
        code = serve(grade, source, sink, requests, memory_mb, parent)
      finally:
        os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == END_OF_INPUT:
      return
    send(sink, {"died": -code if code < 0 else 256 + code})


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
