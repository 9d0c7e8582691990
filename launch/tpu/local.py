"""Starts the processes of one run on this machine, and ends them together.

  python launch/tpu/local.py --processes=2 -- --config=configs/quickstart.py --workdir=runs/a

  --processes=N   processes that are one run through jax.distributed (default 2)
  --explorers=N   processes of --mode=explore beside them (default 0); the others then only train
  --grace=S       seconds that processes have to end in, once one has failed or SIGTERM has come;
                  then they are killed (default 60)
  --dry_run       prints the commands, starts nothing

What follows `--` goes to launch/main.py. Lines of output begin with the name of their process. The
first process that ends with another code than 0 is named, the others get SIGTERM, and its code is
the launcher's: 0, 1, 3, 75 as in launch/main.py, 128 + n for one that signal n ended. SIGTERM and
SIGINT go to all processes as SIGTERM: they save and end with 75; a second one ends them at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import commands
from absl import flags

MAIN = Path(__file__).resolve().parents[1] / "main.py"
CHUNK = 1 << 16  # a line longer than this is printed in parts
DRAIN = 5.0  # seconds for the last lines of output of processes that ended


@dataclasses.dataclass(frozen=True)
class Member:
  """A process to start: its name in messages, its command, what it has in the environment."""

  name: str
  command: tuple[str, ...]
  env: dict[str, str] = dataclasses.field(default_factory=dict)

  def render(self) -> str:
    env = [f"{k}={shlex.quote(v)}" for k, v in self.env.items()]
    return " ".join([*env, shlex.join(self.command)])


def free_port() -> int:
  """A port of this machine that nobody listens on now."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def members(processes: int, explorers: int, run: Sequence[str], coordinator: str) -> list[Member]:
  """The processes of a run; `coordinator` is the HOST:PORT at which the first one listens."""
  main = (sys.executable, str(MAIN), *run)
  mode = ("--mode=train",) if explorers else ()
  distributed = {"TRINITY_JAX_COORDINATOR": coordinator, "TRINITY_JAX_PROCESSES": str(processes)}
  trainers = [
    Member(
      f"process {i}",
      (*main, *mode),
      {**distributed, "TRINITY_JAX_PROCESS_ID": str(i)} if processes > 1 else {},
    )
    for i in range(processes)
  ]
  return trainers + [
    Member(f"explorer {i}", (*main, "--mode=explore", f"--config.explorer.name=explorer_{i}"))
    for i in range(explorers)
  ]


class Group:
  """Processes that end together.

  Args:
    grace: seconds between being asked to end and SIGKILL.
  """

  def __init__(self, grace: float):
    self._grace = grace
    self._events: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # None: SIGTERM came
    self._started: list[subprocess.Popen[bytes]] = []
    self._running: dict[str, subprocess.Popen[bytes]] = {}
    self._readers: list[threading.Thread] = []
    self._printing = threading.Lock()

  def run(self, group: Sequence[Member]) -> int:
    """Starts them and waits for the end of all; returns the exit code. Main thread only."""
    with contextlib.ExitStack() as stack:
      for number in (signal.SIGTERM, signal.SIGINT):
        stack.callback(signal.signal, number, signal.getsignal(number))
        signal.signal(number, lambda *_: self._events.put(None))
      try:
        for member in group:
          self._start(member, max(len(m.name) for m in group))
        return self._wait()
      finally:
        self._kill()
        for reader in self._readers:
          reader.join(DRAIN)

  def _wait(self) -> int:
    code, deadline = 0, None
    while self._running:
      try:
        name = self._events.get(timeout=None if deadline is None else deadline - time.monotonic())
      except (queue.Empty, ValueError):  # ValueError: the deadline has passed already
        late = ", ".join(self._running)
        self._say(f"{late}: did not end within {self._grace:.0f} s (--grace), killed")
        return code or 128 + signal.SIGKILL
      if name is None:
        self._ask()
      else:
        returned = self._running.pop(name).returncode
        if not returned:
          continue
        if not code:
          code = returned if returned > 0 else 128 - returned
          self._say(f"{name} ended with {describe(returned)}")
          if deadline is None:
            self._ask()
      deadline = deadline or time.monotonic() + self._grace
    return code

  def _start(self, member: Member, width: int) -> None:
    process = subprocess.Popen(
      member.command, env=os.environ | member.env, stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    self._started.append(process)
    self._running[member.name] = process
    prefix = f"[{member.name}]".ljust(width + 3).encode()
    reader = threading.Thread(target=self._copy, args=(process, prefix), daemon=True)
    reader.start()
    self._readers.append(reader)

    def tell():
      process.wait()
      self._events.put(member.name)

    threading.Thread(target=tell, daemon=True).start()

  def _copy(self, process: subprocess.Popen[bytes], prefix: bytes) -> None:
    """Prints its output to the end, even when nobody reads ours: it must not block."""
    assert process.stdout is not None
    out = getattr(sys.stdout, "buffer", sys.stdout)
    while line := process.stdout.readline(CHUNK):
      with self._printing, contextlib.suppress(BrokenPipeError, ValueError):
        out.write(prefix + line.rstrip(b"\n") + b"\n")
        out.flush()

  def _ask(self) -> None:
    for process in self._running.values():
      with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)

  def _kill(self) -> None:
    """SIGKILL to those left, and to what any of them started and left behind."""
    for process in self._started:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()

  def _say(self, text: str) -> None:
    with self._printing:
      print(f"local: {text}", file=sys.stderr, flush=True)


def describe(returned: int) -> str:
  """What a return code of subprocess says."""
  if returned >= 0:
    return f"code {returned}"
  return f"signal {-returned} ({signal.Signals(-returned).name})"


def define(values: flags.FlagValues) -> None:
  flags.DEFINE_integer("processes", 2, "Processes.", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("explorers", 0, "Explorers.", lower_bound=0, flag_values=values)
  flags.DEFINE_float("grace", 60.0, "Seconds to end in.", lower_bound=0, flag_values=values)


def launch(values: flags.FlagValues, words: list[str], run: list[str]) -> int:
  if words:
    raise commands.UserError(f"unexpected argument {words[0]!r}; flags of the run follow `--`")
  commands.check_run(run)
  if values.explorers and commands.flag(run, "mode"):
    raise commands.UserError("--mode after `--`: --explorers decides each process's mode")
  group = members(values.processes, values.explorers, run, f"127.0.0.1:{free_port()}")
  if values.dry_run:
    print("\n".join(m.render() for m in group))
    return 0
  return Group(values.grace).run(group)


def main(argv: list[str]) -> int:
  return commands.start(__doc__, define, launch, argv)


if __name__ == "__main__":
  sys.exit(main(sys.argv))
