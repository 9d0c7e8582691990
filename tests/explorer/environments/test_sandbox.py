"""Twenty hostile snippets end with a recorded reason within their limits, and leave nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trinity_jax.errors import UserError
from trinity_jax.explorer.environments import sandbox
from trinity_jax.explorer.environments.sandbox import Limits, Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

SYSTEM = "/usr/bin/python3"
LIMITS = Limits(
  cpu_seconds=1, wall_seconds=6, memory_mb=256, processes=8, open_files=32, file_mb=1, disk_mb=4,
  output_kb=16,
)  # fmt: skip
SHORT = {"wall_seconds": 0.5}
# Each of these costs seconds of CPU time, and others of the kind are tested with the fast ones.
COSTLY = (
  "fork bomb that ignores failures", "infinite loop that ignores signals", "a huge power",
  "deep recursion in C",
)  # fmt: skip

# name -> (code, reasons it may end with, what its output must match, limits of its own)
HOSTILE = {
  "fork bomb": (
    "import os\nwhile True:\n  os.fork()", {"error"}, "BlockingIOError|unavailable", {},
  ),
  "fork bomb that ignores failures": (
    "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    {"cpu", "wall", "killed"}, "", SHORT,
  ),
  "threads": (
    "import threading, time\n"
    "while True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    {"error", "memory"}, "start new thread|MemoryError", {},
  ),
  "processes that leave the session": (
    "import os, time\nfor _ in range(3):\n  if os.fork() == 0:\n    os.setsid()\n"
    "    if os.fork() == 0: time.sleep(3600)\n    os._exit(0)\nprint('left')",
    {"ok"}, "left", {},
  ),
  "memory bomb": ("x = bytearray(1 << 40)", {"memory"}, "MemoryError", {}),
  "memory bomb in steps": (
    "x = []\nwhile True: x.append(bytearray(1 << 20))", {"memory"}, "MemoryError", {},
  ),
  "infinite loop": ("while True: pass", {"cpu"}, "", {}),
  "infinite loop that ignores signals": (
    "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
    {"killed"}, "", {},
  ),
  "a huge power": ("x = 9 ** 9 ** 9", {"cpu", "memory"}, "", {}),
  "sleep": ("import time; time.sleep(3600)", {"wall"}, "", SHORT),
  "waits for input": ("print(repr(input()))", {"error"}, "EOFError", {}),
  "output bomb": ("while True: print('x' * 1000)", {"output"}, "xxx", {}),
  "stderr bomb": (
    "import sys\nwhile True: sys.stderr.write('x' * 1000)", {"output"}, "xxx", {},
  ),
  "writes a huge file": (
    "with open('big', 'wb') as f:\n  while True: f.write(bytes(1 << 16))",
    {"error", "files"}, "File too large|^$", {},
  ),
  "opens files without end": (
    "f = []\nwhile True: f.append(open('a', 'w'))", {"error"}, "Too many open files", {},
  ),
  "kills everybody": (
    "import os, signal\nfor p in (os.getppid(), 1, -1):\n"
    "  try: os.kill(p, signal.SIGKILL)\n  except OSError as e: print(type(e).__name__)\n"
    "print('alive')",
    {"ok", "killed", "lost"}, "", {},
  ),
  "deep recursion in C": (
    "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: f()\nf()",
    {"crash", "memory", "cpu", "error"}, "", {},
  ),
  "segmentation fault": (
    "import ctypes; ctypes.string_at(0)", {"crash"}, "", {},
  ),
  "privileges": (
    "import os\n"
    "for f in (lambda: os.setuid(0), lambda: os.chroot('.'), lambda: os.nice(-5)):\n"
    "  try: f(); print('ALLOWED')\n  except OSError as e: print(type(e).__name__)",
    {"ok"}, r"\A(PermissionError\s*)+\Z", {},
  ),
  "reads our environment variables": (
    "import os\nprint(dict(os.environ))\n"
    "for p in range(1, 70000):\n"
    "  try: print(open(f'/proc/{p}/environ').read())\n  except OSError: pass\n",
    {"ok", "output"}, r"HOME", {},
  ),
}  # fmt: skip

# Only namespaces keep these away.
ISOLATED = {
  "socket": (
    "import socket\ntry: socket.create_connection(('192.0.2.1', 80), 2)\n"
    "except OSError as e: print(e.errno, e)",
    "unreachable",
  ),
  "our own servers on loopback": (
    "import socket\ntry: socket.create_connection(('127.0.0.1', PORT), 2); print('IN')\n"
    "except OSError as e: print(e)",
    r"\A(?!IN)",
  ),
  "writes outside its folder": (
    "import glob\nfor path in (MARK, '/usr/lib/mark', '/etc/mark'):\n"
    "  try: open(path, 'w').write('x'); print('WROTE')\n"
    "  except OSError as e: print(type(e).__name__)",
    r"\A(FileNotFoundError|OSError|PermissionError|\s)+\Z",
  ),
  "reads our files": (
    "import os\nprint([p for p in ('/etc', '/home', '/proc', '/sys', '/var', '/work', '/run')"
    " if os.path.exists(p)])",
    r"\A\[\]",
  ),
  "sees our processes": (
    "import os\ndef there(p):\n  try: os.kill(p, 0)\n  except ProcessLookupError: return False\n"
    "  except PermissionError: pass\n  return True\n"
    "print([p for p in range(1, 100000) if there(p)])",
    r"\A\[1, 2\]",
  ),
}


def make(isolation: str, **limits) -> Sandbox:
  python = SYSTEM if isolation == "limits" and os.geteuid() == 0 else ""
  if python and not Path(python).exists():
    pytest.skip("root's snippets need an interpreter that others can read")
  if why := sandbox.available(isolation, python):
    pytest.skip(why)
  return Sandbox(Limits(**{**vars(LIMITS), **limits}), isolation=isolation, python=python)


def started() -> set[int]:
  """Processes of our sandboxes: workers and the snippets' interpreters."""
  found, own = set(), str(os.getpid()).encode()
  for path in Path("/proc").glob("[0-9]*/cmdline"):
    with contextlib.suppress(OSError):
      words = path.read_bytes().split(b"\0")
      worker = len(words) > 4 and words[3].endswith(b"sandbox_worker.py") and words[4] == own
      if worker or b"sandbox=" + own in words:
        found.add(int(path.parent.name))
  return found


@pytest.fixture(params=["namespaces", pytest.param("limits", marks=pytest.mark.slow)])
def isolation(request):
  return request.param


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=pytest.mark.slow) if n in COSTLY else n for n in HOSTILE]
)
def test_hostile(name, isolation, monkeypatch):
  code, reasons, pattern, limits = HOSTILE[name]
  monkeypatch.setenv("OUR_SECRET", "hunter2")
  box, before, start = make(isolation, **limits), started(), time.monotonic()
  outcome = box.run_blocking(code)
  assert time.monotonic() - start < box.limits.wall_seconds + 5
  text = outcome.stdout + outcome.stderr
  assert outcome.reason in reasons, outcome
  assert re.search(pattern, text), outcome
  assert "hunter2" not in text and "OUR_SECRET" not in text
  assert len(text) <= 2 * (box.limits.output_kb << 10)
  assert started() <= before


def test_there_are_twenty():
  assert len(HOSTILE) == 20


@pytest.mark.parametrize("name", ISOLATED)
def test_isolated(name, tmp_path):
  import socket

  code, pattern = ISOLATED[name]
  mark = tmp_path / "mark"
  with socket.create_server(("127.0.0.1", 0)) as server:
    code = code.replace("PORT", str(server.getsockname()[1])).replace("MARK", repr(str(mark)))
    outcome = make("namespaces").run_blocking(code)
  assert outcome.reason == "ok", outcome
  assert re.search(pattern, outcome.stdout), outcome
  assert not mark.exists()


def test_answers_errors_and_files(isolation):
  box = make(isolation)
  done = box.run_blocking(
    "import sys; print(int(input()) + 1, open('data').read(), sys.argv)", stdin="41\n",
    files={"data": "é"},
  )  # fmt: skip
  assert (done.reason, done.stdout, done.code) == ("ok", "42 é ['main.py']\n", 0)
  done = box.run_blocking("1 / 0")
  assert done.reason == "error" and done.detail.startswith("ZeroDivisionError") and done.code == 1
  assert box.run_blocking("import sys; sys.exit(3)").code == 3
  # Nothing of a run is left for the next.
  box.run_blocking("open('left', 'w').write('x')")
  assert "left" not in box.run_blocking("import os; print(os.listdir())").stdout
  for name in ("../x", "main.py", ""):
    with pytest.raises(UserError, match="plain name"):
      box.run_blocking("", files={name: ""})


def test_cancelling_kills(isolation):
  """Cancellation really stops the work."""
  box, before = make(isolation), started()

  async def main():
    run = asyncio.create_task(
      box.run("import os, time\nos.fork()\nprint(1)\nwhile True: time.sleep(1)")
    )
    async with asyncio.timeout(20):
      while len(started() - before) < 3:  # the worker, the snippet and its child
        await asyncio.sleep(0.02)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
      await run

  asyncio.run(main())
  assert started() <= before


def test_several_at_once_stay_off_the_event_loop():
  box = make("namespaces")

  async def main():
    many = asyncio.gather(*(box.run(f"print({i})") for i in range(8)))
    lag, then = 0.0, time.monotonic()
    while not many.done():
      await asyncio.sleep(0.005)
      lag, then = max(lag, time.monotonic() - then - 0.005), time.monotonic()
    return [o.stdout for o in await many], lag

  outs, lag = asyncio.run(main())
  assert outs == [f"{i}\n" for i in range(8)]
  assert lag < 1.0


def test_an_ordinary_user_has_namespaces_too(tmp_path):
  """The way through a user namespace, also where the tests run as root."""
  make("namespaces")
  if not Path(SYSTEM).exists():
    pytest.skip(f"needs {SYSTEM}")
  worker = tmp_path / "worker.py"
  worker.write_text(sandbox._WORKER.read_text())
  request = Sandbox(LIMITS, python=SYSTEM)._request(
    "import os\nprint(os.getuid())\nfor f in (lambda: os.chroot('.'), lambda: os.setuid(0)):\n"
    "  try: f(); print('ALLOWED')\n  except OSError as e: print(type(e).__name__)\n"
    "print(os.listdir('/dev'), flush=True)\nfor _ in range(99): os.fork()",
    "",
    {},
  )
  drop = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups"]
  command = [SYSTEM, "-I", "-S", "-c", worker.read_text()]
  if os.geteuid() == 0:
    command = [*drop, *command]
  with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}) as p:
    assert p.stdin and p.stdout
    p.stdin.write(request)
    p.stdin.flush()
    reply = json.loads(p.stdout.readline())
    p.stdin.close()
  if "refused" in reply:
    pytest.skip(reply["refused"])
  assert reply["reason"] == "error" and "BlockingIOError" in reply["stderr"]
  assert reply["stdout"].splitlines()[:3] == ["1000", "PermissionError", "OSError"]  # no such user
  assert "urandom" in reply["stdout"] and "sda" not in reply["stdout"]


def test_what_cannot_be_is_said():
  with pytest.raises(UserError, match="isolation 'jail': expected one of namespaces, limits"):
    Sandbox(isolation="jail")
  with pytest.raises(UserError, match="cpu_seconds = 0"):
    Limits(cpu_seconds=0)
  with pytest.raises(UserError, match="/nowhere/bin/python"):
    Sandbox(python="/nowhere/bin/python").run_blocking("pass")
