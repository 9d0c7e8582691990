"""What the launchers share: flags before `--`, the run's own after it, and programs of the PATH."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence

from absl import flags

from trinity_jax.errors import RunFailed, UserError

# Exit codes of launch/main.py that a launcher does not start again after.
DONE, MISTAKE = 0, 1
PREEMPTED = 75


def start(
  doc: str | None,
  define: Callable[[flags.FlagValues], None],
  do: Callable[[flags.FlagValues, list[str], list[str]], int],
  argv: Sequence[str],
) -> int:
  """A launcher's main function; returns the exit code: as launch/main.py's, see there.

  Args:
    doc: printed by --help.
    define: defines the launcher's flags.
    do: is given the flags, the words beside them and what follows `--`.
    argv: with the program's name.
  """
  own = list(argv)
  cut = own.index("--") if "--" in own else len(own)
  values = flags.FlagValues()
  define(values)
  flags.DEFINE_bool("dry_run", False, "Print, do nothing.", flag_values=values)
  flags.DEFINE_bool("help", False, "Print the usage.", short_name="h", flag_values=values)
  values.set_gnu_getopt(True)
  try:
    words = values(own[:cut])[1:]
    if values.help:
      print(doc)
      return DONE
    return do(values, words, own[cut + 1 :])
  except (flags.Error, UserError, RunFailed) as error:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return 3 if isinstance(error, RunFailed) else MISTAKE


def require(values: flags.FlagValues, **examples: str) -> None:
  """Raises UserError for the first of the named flags that was not given."""
  for name, example in examples.items():
    if not values[name].value:
      raise UserError(f"--{name} is missing: give one such as --{name}={example}")


def flag(run: Sequence[str], name: str) -> str | None:
  """The value of `--name=VALUE` or `--name VALUE` in a run's flags, the last one; None without."""
  found = None
  for i, arg in enumerate(run):
    key, equals, value = arg.lstrip("-").partition("=")
    if arg.startswith("-") and key == name:
      found = value if equals else next(iter(run[i + 1 : i + 2]), "")
  return found


def check_run(run: Sequence[str]) -> None:
  """Raises UserError unless `run` holds the flags that every run needs."""
  if not run:
    raise UserError("nothing to run: put the flags of launch/main.py after `--`")
  for name, example in (("config", "configs/quickstart.py"), ("workdir", "runs/quickstart")):
    if not flag(run, name):
      raise UserError(f"--{name} is missing after `--`: launch/main.py needs --{name}={example}")


def pod(hosts: int, run: Sequence[str]) -> tuple[str, ...]:
  """The flag with which a slice's hosts find each other, where there are several."""
  return ("--distributed=auto",) if hosts > 1 and flag(run, "distributed") is None else ()


class Tool:
  """A program of the PATH.

  Args:
    name: of the program.
    source: where to get it.
    dry_run: `do` and `follow` print what they would run; `ask` must not be called.
  """

  def __init__(self, name: str, source: str, *, dry_run: bool):
    self.name, self.dry_run = name, dry_run
    self._source = source

  def ask(self, *args: str, deadline: float = 300, stdin: str = "") -> tuple[int, str, str]:
    """Runs it. Returns exit code, stdout, stderr.

    Raises:
      UserError: the program is not there.
      RunFailed: it did not end within `deadline` seconds.
    """
    assert not self.dry_run
    try:
      done = subprocess.run(
        [self.name, *args], input=stdin, capture_output=True, text=True, errors="replace",
        timeout=deadline,
      )  # fmt: skip
    except FileNotFoundError:
      raise self._missing() from None
    except subprocess.TimeoutExpired:
      raise RunFailed(f"{self._say(args)} did not end within {deadline:.0f} s") from None
    return done.returncode, done.stdout, done.stderr

  def do(self, *args: str, deadline: float = 300, stdin: str = "") -> str:
    """Runs it for its effect; returns its stdout.

    Raises:
      UserError, RunFailed: as `ask`; RunFailed too when its exit code is not 0.
    """
    if self.dry_run:
      print(shlex.join([self.name, *args]))
      return ""
    code, out, err = self.ask(*args, deadline=deadline, stdin=stdin)
    if code:
      last = " ".join((err or out).strip().splitlines()[-3:])
      raise RunFailed(f"{self._say(args)} ended with code {code}: {last}")
    return out

  def follow(self, *args: str) -> int:
    """Runs it on this terminal for as long as it takes; returns its exit code.

    Raises:
      UserError: the program is not there.
    """
    if self.dry_run:
      print(shlex.join([self.name, *args]))
      return 0
    sys.stdout.flush()
    try:
      return subprocess.run([self.name, *args], stdin=subprocess.DEVNULL).returncode
    except FileNotFoundError:
      raise self._missing() from None

  def _say(self, args: Sequence[str]) -> str:
    verb = [a for a in args if not a.startswith("-")]
    return " ".join([self.name, *verb[:5]])

  def _missing(self) -> UserError:
    return UserError(f"{self.name} is not on the PATH: get it from {self._source}")
