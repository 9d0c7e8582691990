"""A real PostgreSQL server for tests and measurements, on a socket in a temporary folder."""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


def find_binaries() -> Path | None:
  """The folder with initdb and postgres: on PATH or where Debian's packages have it."""
  candidates = [shutil.which("initdb"), *sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))]
  for found in candidates:
    if found:
      folder = Path(found).resolve().parent
      if (folder / "postgres").exists():
        return folder
  return None


def missing() -> str:
  """Why no server can be started; empty when one can."""
  if find_binaries() is None:
    return "no PostgreSQL server binaries (initdb, postgres) on PATH or in /usr/lib/postgresql"
  if os.geteuid() == 0 and _account() is None:
    return "PostgreSQL does not run as root and there is no account postgres or nobody"
  return ""


def _account() -> pwd.struct_passwd | None:
  for name in ("postgres", "nobody"):
    with contextlib.suppress(KeyError):
      return pwd.getpwnam(name)
  return None


class Server:
  """A running server; `url` is what open_store takes."""

  def __init__(self, folder: Path):
    binaries = find_binaries()
    assert binaries is not None, missing()
    self._binaries, self._folder, self._data = binaries, folder, folder / "data"
    self._account = _account() if os.geteuid() == 0 else None
    if self._account is not None:
      os.chown(folder, self._account.pw_uid, self._account.pw_gid)
    self._run("initdb", "-D", str(self._data), "-U", "tester", "-A", "trust", "-E", "UTF8",
              "--no-sync")  # fmt: skip
    self.start()

  @property
  def url(self) -> str:
    return f"postgresql://tester@/postgres?host={self._folder}"

  def _run(self, program: str, *args: str) -> None:
    as_account = {}
    if self._account is not None:
      as_account = {"user": self._account.pw_uid, "group": self._account.pw_gid,
                    "extra_groups": []}  # fmt: skip
    done = subprocess.run(
      [str(self._binaries / program), *args],
      cwd=self._folder, capture_output=True, text=True, timeout=120, **as_account,
    )  # fmt: skip
    if done.returncode:
      raise RuntimeError(f"{program}: {done.stdout}{done.stderr}")

  def start(self) -> None:
    options = f"-k {self._folder} -c listen_addresses='' -c max_connections=60"
    # Its log goes to a file: it would keep a pipe open for as long as it runs.
    self._run("pg_ctl", "start", "-w", "-D", str(self._data), "-l", str(self._folder / "log"),
              "-o", options)  # fmt: skip

  def stop(self, mode: str = "fast") -> None:
    """mode "immediate" is what a crash leaves: the next start recovers."""
    self._run("pg_ctl", "stop", "-w", "-D", str(self._data), "-m", mode)

  def cut_connections(self) -> int:
    """Ends every connection but its own, as a network or a restart would; returns how many."""
    import psycopg

    with psycopg.connect(self.url, autocommit=True) as connection:
      rows = connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
      ).fetchall()
    return len(rows)


@contextlib.contextmanager
def server() -> Iterator[Server]:
  """Starts a server and removes it with all its data."""
  # The path of a socket is short: no folder of pytest's.
  with tempfile.TemporaryDirectory(prefix="pg", ignore_cleanup_errors=True) as folder:
    running = Server(Path(folder))
    try:
      yield running
    finally:
      running.stop("immediate")
