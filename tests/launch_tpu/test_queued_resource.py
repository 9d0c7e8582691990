"""Queued resources, against a stand-in of gcloud whose hosts are folders of this machine.

It answers as the real one does: states of the API's QueuedResource, NOT_FOUND for what is not
there, the remote command's exit code, 255 for a host that does not answer.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import launchers
import launching
import pytest
import queued_resource

GCLOUD = """
import shutil, time
verb = next(a for a in args if a in ("create", "delete", "describe", "ssh", "scp"))
hosts = sorted(here.glob("host*"))
env = {k: v for k, v in os.environ.items()}
if verb == "describe":
  state = pop("states", "ACTIVE")
  error = "ERROR: (gcloud.compute.tpus.queued-resources.describe) "
  if state == "FORBIDDEN":
    sys.exit(error + "PERMISSION_DENIED: no tpu.viewer")
  if not state:
    sys.exit(error + "NOT_FOUND: Requested entity was not found.")
  print(state)
elif verb == "create":
  if pop("quota") == "none":
    sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit")
elif verb == "delete":
  for host in hosts:  # new ones are empty
    shutil.rmtree(host)
    host.mkdir()
elif verb == "scp":
  for host in hosts:
    shutil.copy(args[args.index("scp") + 1], host)
elif verb == "ssh":
  command = next(a for a in args if a.startswith("--command=")).partition("=")[2]
  chosen = hosts if "--worker=all" in args else hosts[:1]
  if command.endswith("follow"):
    if pop("lines") == "cut":
      sys.exit(255)
    if tell := pop("tell"):
      with open(tell, "wb") as f:
        f.write(b"..")
  codes = [subprocess.run(["bash", "-c", command], cwd=host, stdin=subprocess.DEVNULL,
           env=env | {"HOME": str(host), "PATH": f"{here}/programs:/usr/bin:/bin"}).returncode
           for host in chosen]
  sys.exit(next((c for c in codes if c), 0))
"""
# On a host: `python3 -m pip`, `python3 -m uv`; writes them down, makes the environment.
PYTHON3 = """#!/bin/bash
echo "$*" >> "$HOME/installed"
case "$*" in *"uv venv"*) mkdir -p .venv/bin; ln -sf {python} .venv/bin/python ;; esac
"""
# In place of launch/main.py: does what the next word of a file of the folder that --workdir names
# says: `wait` tells through a FIFO that it waits for SIGTERM, `after 3` ends with 3 when told.
MAIN = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir=")).partition("=")[2])
file = folder / pathlib.Path(os.environ["HOME"]).name
first, *rest = file.read_text().split(",") if file.exists() else ["0"]
file.write_text(",".join(rest or [first]))
print("args", sys.argv[1:], "on", file.name, flush=True)

def save(*_):
  print("saved", flush=True)
  sys.exit(75)

gate = os.open(folder / "gate", os.O_RDWR)
if first == "wait":
  signal.signal(signal.SIGTERM, save)
  os.write(gate, b".")
  time.sleep(60)
if first.startswith("after"):
  os.read(gate, 1)
sys.exit(int(first.split()[-1]))
"""


class Cloud:
  """The stand-in, its two hosts, and a repository to be installed there."""

  def __init__(self, folder: Path, monkeypatch):
    self.gcloud = launchers.StandIn(folder / "gcloud", "gcloud", GCLOUD)
    self.gcloud.put_on(monkeypatch)
    self.hosts = [self.gcloud.folder / f"host{i}" for i in range(2)]
    for host in self.hosts:
      host.mkdir()
    bin_ = self.gcloud.folder / "programs"
    bin_.mkdir()
    (bin_ / "python3").write_text(PYTHON3.format(python=sys.executable))
    (bin_ / "python3").chmod(0o755)
    self.runs = folder / "runs"
    self.runs.mkdir()
    os.mkfifo(self.runs / "gate")
    self.gate = os.open(self.runs / "gate", os.O_RDWR)  # what is told is kept while this is open
    repository = folder / "repository"
    (repository / "launch" / "tpu").mkdir(parents=True)
    shutil.copy(launchers.FOLDER / "worker.sh", repository / "launch" / "tpu")
    (repository / "launch" / "main.py").write_text(MAIN)
    (repository / ".gitignore").write_text("ignored\n")
    (repository / "ignored").write_text("not to be copied")
    subprocess.run(["git", "init", "-q", str(repository)], check=True)
    monkeypatch.setattr(queued_resource, "ROOT", repository)
    monkeypatch.setattr(queued_resource, "POLL", 0.0)

  def launch(self, verb: str, *flags: str) -> int:
    place = ["--name=qwen", "--zone=z", "--topology=v5e:2x4"]
    run = ["--", "--config=a b.py", f"--workdir={self.runs}"]
    return queued_resource.main(["q", verb, *place, *flags, *(run if verb == "run" else [])])

  def will_end(self, *codes: str) -> None:
    for host in self.hosts:
      (self.runs / host.name).write_text(",".join(codes))

  def verbs(self) -> list[str]:
    """What gcloud was asked to do, in short."""
    found = []
    for args in self.gcloud.calls():
      assert args[:2] == ["compute", "tpus"] and "--zone=z" in args
      command = next((a for a in args if a.startswith("--command=")), "")
      last = command.split("worker.sh ")[-1].split()[0] if command else ""
      found.append(last or args[3])
    return found


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  cloud = Cloud(tmp_path, monkeypatch)
  yield cloud
  os.close(cloud.gate)
  for host in cloud.hosts:  # what a failing test left running
    pid = host / "trinity_jax" / ".launch" / "pid"
    if pid.exists():
      subprocess.run(["kill", "-KILL", "--", f"-{pid.read_text().strip()}"], capture_output=True)


RUN = ["scp", "install", "start", "follow"]


def test_a_run_from_nothing(cloud, capfd):
  cloud.gcloud.will(states=["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
  assert cloud.launch("run", "--spot", "--project=p", "--setup=echo it\\'s > mounted") == 0
  assert cloud.verbs() == ["describe", "create", *["describe"] * 3, *RUN]
  create = cloud.gcloud.calls()[1]
  assert create == [
    "compute", "tpus", "queued-resources", "create", "qwen", "--zone=z", "--project=p",
    "--node-id=qwen", "--accelerator-type=v5litepod-8", "--runtime-version=v2-alpha-tpuv5-lite",
    "--spot",
  ]  # fmt: skip
  out, err = capfd.readouterr()
  assert f"args ['--config=a b.py', '--workdir={cloud.runs}'] on host0" in out
  assert "host1" not in out.replace(f"started on {os.uname().nodename}", "")  # only host 0's log
  assert "qwen: to be created" in err and "qwen: WAITING_FOR_RESOURCES" in err
  for host in cloud.hosts:
    there = host / "trinity_jax"
    assert (there / "mounted").read_text() == "it's\n" and not (there / "ignored").exists()
    log = (there / ".launch" / "log").read_text()
    assert log.startswith("args ") and f"on {host.name}" in log
    assert (host / "installed").read_text().splitlines()[-1].endswith("--editable .[tpu,postgres]")


@pytest.mark.slow
def test_when_done_it_is_deleted_if_asked_to(cloud):
  assert cloud.launch("run", "--delete", "--reserved") == 0
  assert cloud.verbs() == ["describe", *RUN, "delete"]
  assert cloud.gcloud.calls()[-1][3:] == ["delete", "qwen", "--zone=z", "--force", "--quiet"]


def test_a_preempted_slice_is_created_again_and_goes_on(cloud, capfd):
  cloud.will_end("75", "0")
  cloud.gcloud.will(states=["ACTIVE", "SUSPENDING", "SUSPENDED", "", "ACCEPTED", "ACTIVE"])
  assert cloud.launch("run", "--restarts=0") == 0  # preemptions do not count
  assert cloud.verbs() == [
    "describe", *RUN, *["describe"] * 2, "delete", "describe", "create", *["describe"] * 2, "stop",
    *RUN,
  ]  # fmt: skip
  assert "the run ended with code 75: preempted" in capfd.readouterr().err


@pytest.mark.slow
def test_a_slice_that_vanishes_while_it_is_spoken_to(cloud, capfd):
  """The connection breaks, and the state tells why."""
  cloud.gcloud.will(lines=["cut", ""], states=["ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE"])
  assert cloud.launch("run", "--restarts=0") == 0
  assert cloud.verbs()[5:9] == ["describe", "describe", "delete", "describe"]
  assert "host 0 was lost: preempted" in capfd.readouterr().err


def test_a_broken_connection_leaves_the_run_alone(cloud, capfd):
  cloud.will_end("after 0")
  cloud.gcloud.will(lines=["cut", ""], tell=str(cloud.runs / "gate"))
  assert cloud.launch("run") == 0
  assert cloud.verbs() == ["describe", *RUN, "describe", "describe", *RUN]
  out, err = capfd.readouterr()
  assert "host 0 was lost; restart 1 of 3" in err
  assert out.count("args ") == 1  # one run, found again
  for host in cloud.hosts:
    assert (host / "installed").read_text().count("uv venv") == 1


@pytest.mark.slow
def test_failures_are_started_again_a_number_of_times(cloud, capfd):
  cloud.will_end("3")
  assert cloud.launch("run", "--restarts=1") == 3
  assert cloud.verbs() == ["describe", *RUN, "describe", "describe", "stop", *RUN, "describe"]
  assert "ended with code 3; restart 1 of 1" in capfd.readouterr().err


def test_a_mistake_is_not_started_again(cloud):
  cloud.will_end("1")
  assert cloud.launch("run") == 1
  assert cloud.verbs() == ["describe", *RUN]


@pytest.mark.slow
def test_hosts_that_have_not_noticed_are_ended_before_the_next_start(cloud):
  (cloud.runs / "host0").write_text("after 3,0")
  (cloud.runs / "host1").write_text("wait,0")
  assert cloud.launch("run", "--restarts=1") == 0
  log = (cloud.hosts[1] / "trinity_jax" / ".launch" / "log").read_text()
  assert log.count("args ") == 2 and "saved" in log.partition("args ")[2].partition("args ")[0]


def test_an_installation_that_fails_is_said(cloud, capfd):
  assert cloud.launch("run", "--setup=echo no disk >&2; exit 7", "--restarts=0") == 3
  err = capfd.readouterr().err
  assert err == "error: gcloud compute tpus tpu-vm ssh qwen ended with code 7: no disk no disk\n"
  assert cloud.verbs() == ["describe", "scp", "install", "describe"]


def test_a_slice_that_never_comes(cloud, capfd):
  cloud.gcloud.will(states="WAITING_FOR_RESOURCES")
  assert cloud.launch("run", "--wait=0.0001") == 3
  assert "qwen: WAITING_FOR_RESOURCES after 0.0001 h (--wait)" in capfd.readouterr().err


def test_a_request_that_fails_again_and_again(cloud, capfd):
  cloud.gcloud.will(states=["FAILED", "", "FAILED", "", "FAILED"])
  assert cloud.launch("run", "--restarts=1") == 3
  assert cloud.verbs() == ["describe", "delete", "describe", "create", "describe"]
  assert "qwen: FAILED 2 times before it was there" in capfd.readouterr().err


@pytest.mark.parametrize(
  ("will", "expected"),
  [
    ({"states": "FORBIDDEN"}, "PERMISSION_DENIED: no tpu.viewer"),
    ({"states": "", "quota": "none"}, "RESOURCE_EXHAUSTED: Quota limit"),
    ({"states": "TIRED"}, "in state TIRED, of which this launcher knows nothing"),
  ],
)
def test_what_gcloud_refuses(cloud, capfd, will, expected):
  cloud.gcloud.will(**will)
  assert cloud.launch("run") == 3
  err = capfd.readouterr().err.strip().splitlines()[-1]
  assert err.startswith("error: ") and expected in err


@pytest.mark.slow
def test_other_verbs(cloud, capfd):
  assert cloud.launch("create") == 0 and cloud.launch("delete") == 0
  assert cloud.verbs() == ["create", "delete"]
  assert cloud.launch("stop") == 0  # nothing is there
  assert cloud.launch("run") == 0
  assert cloud.launch("logs") == 0
  assert capfd.readouterr().out.count("on host0") == 2  # followed twice


@pytest.mark.parametrize(
  ("flags", "last"),
  [((), []), (("--topology=v5e:4x4",), ["--distributed=auto"]), (("--topology=v5e:1x1",), [])],
)
def test_several_hosts_find_each_other(cloud, capfd, flags, last):
  assert cloud.launch("run", "--dry_run", *flags) == 0
  start = shlex.split(capfd.readouterr().out.splitlines()[3])
  inner = shlex.split(start[-1].partition("=")[2])
  assert inner[3:] == ["--config=a b.py", f"--workdir={cloud.runs}", *last]


def test_without_gcloud(cloud, monkeypatch, capfd):
  monkeypatch.setenv("PATH", "/nowhere")
  assert cloud.launch("create") == 1
  assert "gcloud is not on the PATH: get it from https://" in capfd.readouterr().err


def test_dry_run_prints_commands_and_calls_nothing(cloud, capfd):
  assert cloud.launch("run", "--dry_run", "--delete", "--setup=mount it") == 0
  lines = [shlex.split(line) for line in capfd.readouterr().out.splitlines()]
  assert cloud.gcloud.calls() == [] and all(
    line[:3] == ["gcloud", "compute", "tpus"] for line in lines
  )
  assert [line[4] for line in lines] == ["create", "scp", "ssh", "ssh", "ssh", "delete"]
  inner = shlex.split(lines[3][-1].partition("=")[2])
  assert inner == ["bash", "trinity_jax/launch/tpu/worker.sh", "start", "--config=a b.py",
                   f"--workdir={cloud.runs}"]  # fmt: skip


@pytest.mark.parametrize(
  ("args", "expected"),
  [
    ([], "expected one of run, create, logs, stop, delete, got nothing"),
    (["start"], "got start"),
    (["run"], "--name is missing: give one such as --name=qwen"),
    (["run", "--name=a"], "--zone is missing"),
    (["create", "--name=a", "--zone=z"], "--topology is missing"),
    (["create", "--name=a", "--zone=z", "--topology=v5e:3x3"], "v5e slices are 1x1"),
    (["run", "--name=a", "--zone=z", "--topology=v5e:4x4"], "nothing to run"),
    (["logs", "--name=a", "--zone=z", "--spot", "--reserved"], "give one of them"),
    (["run", "--name=a", "--zone=z", "--topology=v5e:4x4", "--", "--config=c", "--workdir=w"],
     "--workdir=w: expected a folder of storage that every host mounts"),
  ],
)  # fmt: skip
def test_wrong_flags(capsys, args, expected):
  assert queued_resource.main(["q", *args]) == 1
  out, err = capsys.readouterr()
  assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and expected in err


def test_a_folder_that_is_no_checkout(cloud, tmp_path, monkeypatch, capfd):
  (tmp_path / "plain").mkdir()
  monkeypatch.setattr(queued_resource, "ROOT", tmp_path / "plain")
  monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
  assert cloud.launch("run") == 1
  assert "is no git checkout" in capfd.readouterr().err


def test_this_repository_is_packed(tmp_path):
  queued_resource.pack(tmp_path / "a.tar.gz")
  listing = subprocess.run(
    ["tar", "-tzf", str(tmp_path / "a.tar.gz")], capture_output=True, text=True, check=True
  ).stdout.splitlines()
  assert {"launch/main.py", "launch/tpu/worker.sh", "pyproject.toml"} <= set(listing)
  assert not any(name.startswith((".venv", "runs/")) for name in listing)
  assert launching.ROOT == queued_resource.ROOT
