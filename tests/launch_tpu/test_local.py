"""Processes of one run on one machine: found by each other, named, ended together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import launchers
import launching
import local
import pytest
from commands import flag

from trinity_jax.errors import RunFailed

# In place of launch/main.py: does what --config says for its number, as "0=exit 3 2;1=wait". That
# exit is when two others have told through a FIFO that they are ready, as `wait gate` does.
STUB = """
import os, signal, subprocess, sys, time
flags = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:])
me = os.environ.get("TRINITY_JAX_PROCESS_ID", flags.get("config.explorer.name", "0"))
print("process", me, "of", os.environ.get("TRINITY_JAX_PROCESSES"), "at",
      os.environ.get("TRINITY_JAX_COORDINATOR"), flags.get("mode"), flush=True)
todo = dict(x.split("=") for x in flags["config"].split(";"))[me].split()

def save(*_):
  print("saved", flush=True)
  sys.exit(75)

def first(*_):
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  print("asked", flush=True)

if todo[0] == "wait":  # for SIGTERM
  signal.signal(signal.SIGTERM, save)
if todo[0] == "wait_twice":
  signal.signal(signal.SIGTERM, first)
if todo[0] == "stubborn":
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
if todo[0] == "parent":  # of one that holds our output, and is killed itself
  child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
  print("child", child.pid, flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
if todo[0] == "bytes":
  os.write(1, b"\\xff" + b"x" * 100_000)
if todo[0] == "later":
  time.sleep(0.5)
print("ready", flush=True)
gate = os.open(flags["workdir"], os.O_RDWR)
if todo[1:] == ["gate"]:
  os.write(gate, b".")
if todo[0] == "exit":
  for _ in range(int(todo[2])):
    os.read(gate, 1)
  sys.exit(int(todo[1]))
if todo[0] in ("wait", "wait_twice", "stubborn"):
  time.sleep(60)
"""


@pytest.fixture
def start(tmp_path):
  """Starts the launcher in a process of its own, over the stub."""
  stub = tmp_path / "main.py"
  stub.write_text(STUB)
  gate = tmp_path / "gate"
  os.mkfifo(gate)
  code = (
    f"import sys; sys.path.insert(0, {str(launchers.FOLDER)!r}); import local; "
    f"local.MAIN = {str(stub)!r}; sys.exit(local.main(sys.argv))"
  )
  started = []

  def go(todo: str, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *flags, "--", f"--config={todo}", f"--workdir={gate}"]
    process = subprocess.Popen(
      command, cwd=launching.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      errors="replace",
    )  # fmt: skip
    started.append(process)
    return process

  yield go
  for process in started:
    if process.poll() is None:
      process.kill()
    process.wait()


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


def test_processes_find_each_other_and_their_lines_say_whose_they_are(start):
  code, out, err = end(start("0=go;1=go;2=go", "--processes=3"))
  assert (code, err) == (0, "")
  places = set()
  for i in range(3):
    assert f"[process {i}] ready" in out
    line = next(x for x in out.splitlines() if x.startswith(f"[process {i}] process {i} of 3 at "))
    places.add(line.split()[7])
  (place,) = places  # one coordinator
  host, _, port = place.partition(":")
  assert host == "127.0.0.1" and int(port) > 1023


def test_one_process_needs_no_coordinator(start):
  code, out, _ = end(start("0=go", "--processes=1"))
  assert code == 0 and "[process 0] process 0 of None at None None" in out


@pytest.mark.parametrize("code", [1, 3, 75])
def test_the_first_failure_is_named_and_ends_all(start, code):
  todo = f"0=wait gate;1=exit {code} 2;2=wait gate"
  returned, out, err = end(start(todo, "--processes=3"))
  assert returned == code and out.count("saved") == 2
  assert err == f"local: process 1 ended with code {code}\n"  # and nothing of who was asked to


def test_a_process_that_ends_well_ends_no_other(start):
  code, out, err = end(start("0=go;1=later", "--processes=2"))
  assert (code, err) == (0, "") and out.count("ready") == 2


def test_who_does_not_end_is_killed_and_named(start):
  code, _, err = end(start("0=stubborn gate;1=exit 3 1", "--processes=2", "--grace=1"))
  assert code == 3
  assert err.splitlines() == [
    "local: process 1 ended with code 3",
    "local: process 0: did not end within 1 s (--grace), killed",
  ]


def test_a_killed_process_is_named_by_its_signal_and_leaves_nothing(start):
  code, out, err = end(start("0=wait;1=parent", "--processes=2"))
  assert code == 128 + signal.SIGKILL
  assert "local: process 1 ended with signal 9 (SIGKILL)" in err
  child = int(out.split("child ")[1].split()[0])
  with pytest.raises(ProcessLookupError):
    _until_gone(child)


def _until_gone(pid: int) -> None:
  """Raises ProcessLookupError once there is no such process but one that waits for its parent."""
  deadline = time.monotonic() + 300
  while time.monotonic() < deadline:
    os.kill(pid, 0)
    with open(f"/proc/{pid}/stat") as f:
      if f.read().rpartition(")")[2].split()[0] == "Z":
        raise ProcessLookupError
    time.sleep(0.01)  # another process's end: nothing to wait on
  os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_being_asked_to_end_goes_to_all(start, number):
  process = start("0=wait;1=wait", "--processes=2")
  _wait_for(process, "ready", 2)
  process.send_signal(number)
  code, out, err = end(process)
  assert code == 75 and out.count("saved") == 2
  assert "ended with code 75" in err and "killed" not in err


def test_asked_a_second_time(start):
  """The second SIGTERM reaches them too: launch/main.py ends at once on it."""
  process = start("0=wait_twice", "--processes=1")
  _wait_for(process, "ready", 1)
  process.terminate()
  _wait_for(process, "asked", 1)
  process.terminate()
  code, _, err = end(process)
  assert code == 128 + signal.SIGTERM and "ended with signal 15 (SIGTERM)" in err


def test_asked_in_vain(start):
  process = start("0=stubborn;1=stubborn", "--processes=2", "--grace=1")
  _wait_for(process, "ready", 2)
  process.terminate()
  code, _, err = end(process)
  assert code == 128 + signal.SIGKILL
  assert "process 0, process 1: did not end within 1 s (--grace), killed" in err


def _wait_for(process: subprocess.Popen[str], word: str, count: int) -> None:
  assert process.stdout is not None
  while count:
    line = process.stdout.readline()
    assert line, "ended too early"
    count -= word in line


def test_output_without_line_ends_or_readers(start):
  code, out, _ = end(start("0=bytes;1=go", "--processes=2"))
  assert code == 0 and out.count("x") > 100_000 - 1 and "ready" in out
  process = start("0=bytes;1=bytes", "--processes=2")
  assert process.stdout is not None
  process.stdout.close()  # as `| head` does
  assert process.wait(300) == 0


def test_explorers_beside_trainers(start):
  todo = "0=go;1=go;explorer_0=go;explorer_1=go"
  code, out, _ = end(start(todo, "--processes=2", "--explorers=2"))
  assert code == 0
  for i in range(2):
    assert f"[explorer {i}] process explorer_{i} of None at None explore" in out
    assert f"[process {i}]  process {i} of 2 at 127.0.0.1:" in out
  assert out.count(" train\n") == 2


def test_dry_run_starts_nothing(capsys, monkeypatch):
  monkeypatch.setattr(local.subprocess, "Popen", None)
  run = ["--config=a b.py", "--workdir=w"]
  assert local.main(["local.py", "--processes=2", "--explorers=1", "--dry_run", "--", *run]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 3
  for i in range(2):
    assert "TRINITY_JAX_COORDINATOR=127.0.0.1:" in lines[i] and f"PROCESS_ID={i} " in lines[i]
    assert lines[i].endswith("launch/main.py '--config=a b.py' --workdir=w --mode=train")
  assert lines[2].endswith("--workdir=w --mode=explore --config.explorer.name=explorer_0")
  assert "TRINITY_JAX" not in lines[2]


@pytest.mark.parametrize(
  ("args", "expected"),
  [
    (["--"], "nothing to run: put the flags of launch/main.py after `--`"),
    (["--", "--workdir=w"], "--config is missing after `--`"),
    (["--", "--config=c"], "--workdir is missing after `--`"),
    (["--config=c"], "Unknown command line flag 'config'"),
    (["run", "--", "--config=c", "--workdir=w"], "unexpected argument 'run'"),
    (["--processes=0", "--"], "--processes=0"),
    (["--explorers=1", "--", "--config=c", "--workdir=w", "--mode=both"], "--mode after `--`"),
  ],
)
def test_wrong_flags(capsys, args, expected):
  assert local.main(["local.py", *args]) == 1
  out, err = capsys.readouterr()
  assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and expected in err


def test_help(capsys):
  assert local.main(["local.py", "--help"]) == 0
  assert capsys.readouterr().out.startswith("Starts the processes of one run")


def test_flags_of_a_run():
  assert flag(["--config=a", "--config", "b"], "config") == "b"
  assert flag(["--config"], "config") == "" and flag(["config=a", "x"], "config") is None
  assert flag(["-config=a"], "config") == "a"


def test_programs_that_launchers_call():
  slow, bytes_ = (commands.Tool(n, "nowhere", dry_run=False) for n in ("sleep", "printf"))
  with pytest.raises(RunFailed, match="sleep 100 did not end within 0 s"):
    slow.do("100", deadline=0.1)
  assert bytes_.do(r"\377") == "\ufffd"  # what is no text is no crash


def test_the_launcher_knows_these_flags(tmp_path):
  """What is added to a run's flags is what launch/main.py takes."""
  recipe = launching.write_recipe(tmp_path / "recipe.py", "model")
  launch = launching.launcher()
  for member in local.members(2, 1, [f"--config={recipe}", "--workdir=w"], "127.0.0.1:1"):
    own, values = launch.parse(list(member.command[1:]))
    assert own["mode"].value == ("explore" if "explorer" in member.name else "train")
    assert "explorer" not in member.name or values.explorer.name == "explorer_0"


# --- real runs ------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
  """Starts two trainers and an explorer of a tiny model, which continue the run of before."""
  from trinity_jax.models.hf import write_tiny_checkpoint

  model = write_tiny_checkpoint(
    tmp_path / "model", hidden=32, layers=1, heads=2, kv_heads=2, head_dim=16, intermediate=32
  )
  recipe = launching.write_recipe(tmp_path / "recipe.py", model)
  started = []

  def go(steps: int) -> subprocess.Popen[str]:
    command = [
      sys.executable, str(launchers.FOLDER / "local.py"), "--processes=2", "--explorers=1", "--",
      f"--config={recipe}", f"--workdir={tmp_path}/run", "--config.explorer.deterministic=False",
      "--config.monitor.progress=plain", "--config.mesh.cpu_devices=2",
      f"--config.trainer.total_steps={steps}", "--config.trainer.save_interval=5",
    ]  # fmt: skip
    process = subprocess.Popen(
      command, cwd=launching.ROOT, env=launching.environment(), stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    started.append(process)
    return process

  yield go
  for process in started:
    if process.poll() is None:
      process.terminate()
      process.communicate(timeout=100)


@pytest.mark.slow
def test_a_whole_run(run, tmp_path):
  process = run(2)
  out, _ = process.communicate(timeout=500)
  assert process.returncode == 0, out
  assert "[process 0]  step 2/2" in out and "[explorer 0] explorer explorer_0: ready" in out
  assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.nightly
def test_a_run_that_is_asked_to_end_saves_and_continues(run):
  process = run(30)
  _wait_for(process, "step 3/30", 1)
  process.terminate()
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 75 and "is saved, the same command continues the run" in out
  process = run(30)
  out, _ = process.communicate(timeout=500)
  assert process.returncode == 0 and "step 30/30" in out and "step 3/30" not in out, out


@pytest.mark.nightly
def test_a_run_of_which_one_process_is_killed(run):
  process = run(30)
  _wait_for(process, "step 7/30", 1)
  children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
  os.kill(int(children[1]), signal.SIGKILL)
  begin = time.monotonic()
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 128 + signal.SIGKILL and time.monotonic() - begin < 70
  assert "local: process 1 ended with signal 9 (SIGKILL)" in out
