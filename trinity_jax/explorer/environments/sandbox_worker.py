"""The process that confines one snippet: started by `sandbox` as a script, standard library only.

It reads one request (a JSON line) from stdin, runs the snippet in a child with the limits of the
request, and writes one reply (a JSON line) to stdout. End of stdin means that nobody wants the
reply: everything is killed. Linux only: namespaces, rlimits, pidfd.

  -> {"files": {name: text}, "stdin", "python", "prefix", "owner", "isolation", "limits": {...}}
  <- {"reason", "detail", "stdout", "stderr", "code", "cpu", "seconds"} | {"refused": why}
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time

_libc = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWUTS, _NEWIPC = 0x00020000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41}
_SYS_MOUNT_SETATTR = 442  # the same on every architecture
_INSIDE = 1000  # uid and gid in a user namespace
_FIRST_UID = 2_000_000_000  # as root, a snippet is a user of its own: this plus our pid
_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64")
_DEVICES = ("null", "zero", "full", "random", "urandom")
_ROOT = "/proc"  # mount point of the new root: always there, and nothing of it is needed after
_BOX = "/box"
_SIGNALS = {signal.SIGXCPU: "cpu", signal.SIGKILL: "killed", signal.SIGXFSZ: "files"}


class Refused(Exception):
  """The kernel does not allow the isolation that was asked for."""


def check(result: int, what: str) -> None:
  if result < 0:
    error = ctypes.get_errno()
    raise Refused(f"{what}: {os.strerror(error)}")


def prctl(option: int, value: int) -> None:
  check(_libc.prctl(option, value, 0, 0, 0), f"prctl {option}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
  texts = [None if x is None else os.fsencode(x) for x in (source, target, kind)]
  result = _libc.mount(*texts, ctypes.c_ulong(flags), data and data.encode())
  check(result, f"mount {target}")


def read_only(target: str) -> None:
  """Makes a mount and those below it read-only, without set-user-id programs."""
  attributes = (ctypes.c_uint64 * 4)(1 | 2, 0, 0, 0)
  result = _libc.syscall(
    ctypes.c_long(_SYS_MOUNT_SETATTR), -100, target.encode(), 0x8000, ctypes.byref(attributes), 32
  )
  check(result, f"mount_setattr {target}")


def unshare() -> None:
  """Namespaces of processes, network, mounts, ... for who is forked next; of users unless root."""
  flags = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
  user, group = os.geteuid(), os.getegid()
  check(_libc.unshare(flags if user == 0 else flags | _NEWUSER), "unshare")
  if user:
    try:
      for name, text in (
        ("setgroups", "deny"), ("uid_map", f"{_INSIDE} {user} 1"),
        ("gid_map", f"{_INSIDE} {group} 1"),
      ):  # fmt: skip
        with open(f"/proc/self/{name}", "w") as file:
          file.write(text)
    except OSError as e:
      raise Refused(f"user namespace: {e}") from e


def new_root(prefix: str, size_mb: int) -> None:
  """A root that holds the interpreter, the system's libraries, five devices and an empty box."""
  mount("none", "/", None, _MS_REC | _MS_PRIVATE)
  options = f"size={size_mb}m,nr_inodes=4096,mode=755"
  mount("tmpfs", _ROOT, "tmpfs", _MS_NOSUID | _MS_NODEV, options)
  for folder in dict.fromkeys((prefix, *_LIBRARIES)):
    target = _ROOT + folder
    if os.path.islink(folder):
      os.symlink(os.readlink(folder), target)
    elif os.path.isdir(folder) and not os.path.exists(target):
      os.makedirs(target)
      mount(folder, target, None, _MS_BIND | _MS_REC)
      read_only(target)
  os.mkdir(f"{_ROOT}/dev")
  for name in _DEVICES:
    with open(f"{_ROOT}/dev/{name}", "w"):
      pass
    mount(f"/dev/{name}", f"{_ROOT}/dev/{name}", None, _MS_BIND)
  for folder in (_BOX, "/tmp"):
    os.mkdir(_ROOT + folder)
    os.chmod(_ROOT + folder, 0o777)
  os.chdir(_ROOT)
  number = _SYS_PIVOT_ROOT.get(os.uname().machine)
  if number is None:
    raise Refused(f"pivot_root: not known for {os.uname().machine}")
  check(_libc.syscall(ctypes.c_long(number), b".", b"."), "pivot_root")
  check(_libc.umount2(b".", _MNT_DETACH), "umount")
  os.chdir("/")


def set_limits(limits: dict, others: int) -> None:
  """rlimits of the snippet and of each process that it starts.

  Args:
    others: processes that count already.
  """
  memory, cpu = limits["memory_mb"] << 20, max(1, round(limits["cpu_seconds"]))
  for name, soft, hard in (
    (resource.RLIMIT_CPU, cpu, cpu + 1),
    (resource.RLIMIT_AS, memory, memory),
    (resource.RLIMIT_NPROC, limits["processes"] + others, limits["processes"] + others),
    (resource.RLIMIT_NOFILE, limits["open_files"], limits["open_files"]),
    (resource.RLIMIT_FSIZE, limits["file_mb"] << 20, limits["file_mb"] << 20),
    (resource.RLIMIT_CORE, 0, 0),
    (resource.RLIMIT_MEMLOCK, 0, 0),
    (resource.RLIMIT_MSGQUEUE, 0, 0),
  ):
    resource.setrlimit(name, (soft, hard))


def become(request: dict, box: str, out: int, err: int, others: int) -> None:
  """Turns this process into the snippet's interpreter; returns only by raising."""
  prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  os.setsid()
  for name, text in request["files"].items():
    with open(os.path.join(box, name), "w", encoding="utf-8", errors="replace") as file:
      file.write(text)
  with open(os.path.join(box, ".stdin"), "w", encoding="utf-8", errors="replace") as file:
    file.write(request["stdin"])
  source = os.open(os.path.join(box, ".stdin"), os.O_RDONLY)
  os.unlink(os.path.join(box, ".stdin"))
  if os.geteuid() == 0:
    user = request["user"]
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user clears it
  prctl(_PR_SET_NO_NEW_PRIVS, 1)
  os.umask(0o077)
  os.chdir(box)
  for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    with contextlib.suppress(OSError):  # glibc keeps two for itself
      signal.signal(number, signal.SIG_DFL)
  signal.pthread_sigmask(signal.SIG_SETMASK, ())
  for given, number in ((source, 0), (out, 1), (err, 2)):
    os.dup2(given, number)
  os.closerange(3, 1 << 16)
  set_limits(request["limits"], others)
  environment = {
    "HOME": box, "TMPDIR": box, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1",
  }  # fmt: skip
  python = request["python"]
  owner = f"sandbox={request['owner']}"  # for people who look at a list of processes
  os.execve(python, [python, "-P", "-s", "-X", owner, "main.py"], environment)


def start(request: dict, box: str, out: int, err: int, others: int) -> int:
  """Forks the snippet's process; what fails before its interpreter runs is told on stderr."""
  pid = os.fork()
  if pid:
    return pid
  try:
    become(request, box, out, err, others)
  except BaseException as e:  # this process must end here, whatever happened
    text = f"sandbox: {e}".encode()
    try:
      os.write(err, text)
    except OSError:  # it is 2 already
      os.write(2, text)
  os._exit(127)


def init(request: dict, out: int, err: int, status: int) -> None:
  """Life of a namespace's first process; when it ends, the kernel ends all others."""
  prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  try:
    new_root(request["prefix"], request["limits"]["disk_mb"])
  except (Refused, OSError) as e:
    os.write(status, json.dumps({"refused": str(e)}).encode())
    return
  others = 0 if os.geteuid() == 0 else 2  # this process and its parent have the snippet's user
  child = start(request, _BOX, out, err, others)
  os.close(out)
  os.close(err)
  while True:
    pid, how, usage = os.wait4(-1, 0)
    if pid == child:
      os.write(status, json.dumps(ending(how, usage)).encode())
      return


def ending(how: int, usage: resource.struct_rusage) -> dict:
  return {"code": os.waitstatus_to_exitcode(how), "cpu": usage.ru_utime + usage.ru_stime}


def descendants() -> set[int]:
  """Children of this process, and theirs."""
  found, todo = set(), [os.getpid()]
  while todo:
    parent = todo.pop()
    with contextlib.suppress(OSError):  # it is gone
      for task in os.listdir(f"/proc/{parent}/task"):
        with open(f"/proc/{parent}/task/{task}/children") as file:
          new = {int(x) for x in file.read().split()} - found
        found |= new
        todo += new
  return found


def kill_all(child: int) -> dict | None:
  """Kills and reaps whoever is left below this process; returns how `child` ended, if it did now.

  Orphans become our children (a subreaper), so rounds of killing come to an end: the process limit
  bounds how many can be born meanwhile.
  """
  told = None
  while True:
    for pid in descendants():
      with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
    try:
      pid, how, usage = os.wait4(-1, 0)
    except ChildProcessError:
      return told
    if pid == child:
      told = ending(how, usage)


class Watch:
  """Reads what a child writes until it ends, says too much, takes too long or nobody wants it."""

  def __init__(self, child: int, pipes: tuple[int, int], limits: dict):
    self.text = {fd: b"" for fd in pipes}
    self._child, self._most = os.pidfd_open(child), limits["output_kb"] << 10
    self._deadline = time.monotonic() + limits["wall_seconds"]

  def wait(self) -> str:
    """Returns ended, output, wall or gone."""
    poll = select.poll()
    for fd in (0, self._child, *self.text):
      poll.register(fd, select.POLLIN)
    while True:
      left = self._deadline - time.monotonic()
      ready = dict(poll.poll(max(0.0, left) * 1000)) if left > 0 else {}
      if not ready:
        return "wall"
      if 0 in ready and not os.read(0, 4096):
        return "gone"
      for fd in self.text:
        if fd in ready and not self.take(fd):
          poll.unregister(fd)
      if sum(map(len, self.text.values())) > self._most:
        return "output"
      if self._child in ready:
        return "ended"

  def take(self, fd: int) -> bool:
    """Reads once; False at the end."""
    try:
      data = os.read(fd, 1 << 16)
    except BlockingIOError:
      return False
    self.text[fd] += data
    return bool(data)

  def drain(self) -> None:
    """Reads what is left in the pipes, up to the limit."""
    for fd in self.text:
      os.set_blocking(fd, False)
      while len(self.text[fd]) <= self._most and self.take(fd):
        pass


def run(request: dict) -> dict | None:
  """Runs one snippet; None when nobody wants to know."""
  limits, spaces = request["limits"], request["isolation"] == "namespaces"
  request["user"] = _FIRST_UID + os.getpid()
  box, started = "", time.monotonic()
  if spaces:
    unshare()
  else:
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    box = tempfile.mkdtemp(prefix="sandbox-")
    if os.geteuid() == 0:
      os.chown(box, request["user"], request["user"])
  pipes = [os.pipe() for _ in range(3)]
  (out, to_out), (err, to_err), (status, to_status) = pipes
  try:
    if spaces:
      child = os.fork()
      if child == 0:
        try:
          init(request, to_out, to_err, to_status)
        finally:
          os._exit(0)
    else:
      child = start(request, box, to_out, to_err, _processes_of_user())
    for fd in (to_out, to_err, to_status):
      os.close(fd)
    watch = Watch(child, (out, err), limits)
    why = watch.wait()
    if spaces:
      os.kill(child, signal.SIGKILL)  # ended or not; not reaped yet, so the number is still its
    told = kill_all(child)
    if spaces:
      text = os.read(status, 4096)
      told = json.loads(text) if text else {"code": -signal.SIGKILL, "cpu": 0.0}
    watch.drain()
  finally:
    if box:
      shutil.rmtree(box, ignore_errors=True)
  if why == "gone":
    return None
  assert told is not None
  texts = [watch.text[fd][: limits["output_kb"] << 10].decode(errors="replace")
           for fd in (out, err)]  # fmt: skip
  return reply(told, why, *texts) | {"seconds": time.monotonic() - started}


def _processes_of_user() -> int:
  """How many processes and threads our user has already: RLIMIT_NPROC counts those too."""
  count, user = 0, os.geteuid()
  if user == 0:
    return 0  # the snippet gets a user of its own
  for name in filter(str.isdigit, os.listdir("/proc")):
    with contextlib.suppress(OSError):
      if os.stat(f"/proc/{name}").st_uid == user:
        count += len(os.listdir(f"/proc/{name}/task"))
  return count


def reply(told: dict, why: str, stdout: str, stderr: str) -> dict:
  if "refused" in told:
    return told
  code, last = told["code"], stderr.rstrip().rpartition("\n")[2]
  if code == 127 and stderr.startswith("sandbox: "):
    return {"refused": stderr[9:]}
  if why in ("output", "wall"):
    reason = why
  elif code < 0:
    reason = _SIGNALS.get(signal.Signals(-code), "crash")
  elif code == 0:
    reason = "ok"
  else:
    reason = "memory" if last.startswith("MemoryError") else "error"
  detail = signal.Signals(-code).name if code < 0 else last[:200] if code else ""
  return {"reason": reason, "detail": detail, "stdout": stdout, "stderr": stderr} | told


def main() -> None:
  line = b""
  while not line.endswith(b"\n"):
    data = os.read(0, 1 << 16)
    if not data:
      return
    line += data
  try:
    answer = run(json.loads(line))
  except (Refused, OSError) as e:
    answer = {"refused": str(e)}
  if answer is not None:
    data = json.dumps(answer).encode() + b"\n"
    while data:
      data = data[os.write(1, data) :]


if __name__ == "__main__":
  signal.signal(signal.SIGPIPE, signal.SIG_IGN)
  sys.exit(main())
