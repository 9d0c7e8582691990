"""A run on a TPU slice of Cloud TPU, as a queued resource, through the gcloud CLI.

  python launch/tpu/queued_resource.py run --name=qwen --zone=us-east5-b --topology=v6e:4x4 \\
    --spot --setup='mount ...' -- --config=configs/gsm8k_grpo.py --workdir=/mnt/runs/qwen

  run       creates the resource unless it is there, waits for it, installs this repository's files
            on all hosts, starts launch/main.py there and follows host 0. When it is preempted:
            deletes and creates it and runs the same command, which goes on from its checkpoint
  create    only asks for the resource
  logs      follows host 0 of a run
  stop      asks a run to save and end, as SIGTERM does
  delete    deletes the resource and its hosts

            A `run` that still follows would start or create it again: end that first (Ctrl-C)

  --name=NAME         of the resource and of its node
  --zone=ZONE         of Cloud TPU
  --project=ID        default: gcloud's own
  --topology=v5e:4x4  the slice
  --spot, --reserved  preemptible capacity, or that of a reservation
  --setup=COMMAND     shell command for each host before the installation: mounts, secrets
  --wait=HOURS        most hours in the queue (default 24)
  --restarts=N        how often a run that fails is started again (default 3); after a preemption
                      it always is
  --delete            delete the resource when the run has ended
  --dry_run           prints the commands, does nothing

Checkpoints must outlive the hosts: --workdir is in storage that every host mounts (--setup). What
runs there goes on when this command is stopped; the same command goes on following. Several hosts
need an ssh-agent with gcloud's key: ssh-add ~/.ssh/google_compute_engine.

The exit code is the run's, see launch/main.py: after 0 and 1 it is not started again.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import commands
import slices
from absl import flags

from trinity_jax.errors import RunFailed, UserError

ROOT = Path(__file__).resolve().parents[2]
POLL = 30.0  # seconds between two looks at a state: Cloud TPU has nothing to wait on
FOLDER = "trinity_jax"  # in the home of each host
WORKER = f"bash {FOLDER}/launch/tpu/worker.sh"
COMING = ("CREATING", "ACCEPTED", "PROVISIONING", "WAITING_FOR_RESOURCES")
GOING = ("SUSPENDING", "DELETING")
GONE = ("SUSPENDED", "FAILED")
LOST = 255  # ssh's code: the host does not answer


class Resource:
  """One queued resource and the run on it.

  Args:
    values: the launcher's flags.
  """

  def __init__(self, values: flags.FlagValues):
    self._flags, self._name = values, values.name
    self._gcloud = commands.Tool(
      "gcloud", "https://cloud.google.com/sdk/docs/install", dry_run=values.dry_run
    )
    self._place = [f"--zone={values.zone}"]
    if values.project:
      self._place.append(f"--project={values.project}")

  def create(self) -> None:
    """Asks for the slice."""
    values, slice_ = self._flags, slices.parse(self._flags.topology)
    capacity = [f"--{name}" for name in ("spot", "reserved") if values[name].value]
    self._do(
      "create", f"--node-id={self._name}", f"--accelerator-type={slice_.accelerator_type}",
      f"--runtime-version={slice_.kind.runtime}", *capacity,
    )  # fmt: skip

  def delete(self) -> None:
    self._do("delete", "--force", "--quiet")

  def state(self) -> str:
    """Cloud TPU's name of its state, "" when there is no such resource.

    Raises:
      RunFailed: gcloud cannot tell.
    """
    args = ["compute", "tpus", "queued-resources", "describe", self._name, *self._place]
    code, out, err = self._gcloud.ask(*args, "--format=value(state.state)")
    if code and "NOT_FOUND" not in err:
      raise RunFailed(f"gcloud describe {self._name} ended with code {code}: {err.strip()}")
    return "" if code else out.strip()

  def make_ready(self) -> None:
    """Waits until it is there, created or created anew as need be.

    Raises:
      RunFailed: it did not come within --wait hours, or it FAILED as often as --restarts allows.
    """
    if self._gcloud.dry_run:
      self.create()
      return
    end, fails, seen = time.monotonic() + self._flags.wait * 3600, 0, None
    while (state := self.state()) != "ACTIVE":
      if state != seen:
        say(f"{self._name}: {state or 'to be created'}")
        seen = state
      if state not in ("", *COMING, *GOING, *GONE):
        raise RunFailed(f"{self._name}: in state {state}, of which this launcher knows nothing")
      if time.monotonic() > end:
        raise RunFailed(
          f"{self._name}: {state} after {self._flags.wait:g} h (--wait); what is queued stays so, "
          "the same command waits on"
        )
      if state in GONE:
        fails += state == "FAILED"
        if fails > self._flags.restarts:
          raise RunFailed(
            f"{self._name}: FAILED {fails} times before it was there; gcloud compute tpus "
            f"queued-resources describe {self._name} {' '.join(self._place)} says why"
          )
        self.delete()
      elif state == "":
        self.create()
      else:
        time.sleep(POLL)  # gcloud can only be asked: nothing tells of a change of state

  def install(self) -> None:
    """This repository's files and their environment, on every host where no run goes on."""
    with tempfile.TemporaryDirectory() as folder:
      archive = Path(folder, f"{FOLDER}.tar.gz")
      if not self._gcloud.dry_run:
        pack(archive)
      self._gcloud.do(
        "compute", "tpus", "tpu-vm", "scp", str(archive), f"{self._name}:", "--worker=all",
        *self._place, deadline=1800,
      )  # fmt: skip
    unpack = f"mkdir -p {FOLDER} && tar -xzf {archive.name} -C {FOLDER}"
    install = f"{WORKER} install {shlex.quote(self._flags.setup)}"
    command = f"{WORKER} running 2>/dev/null || ({unpack} && {install})"
    self._gcloud.do(*self._ssh("all", command), deadline=1800)

  def start(self, run: list[str]) -> None:
    self._gcloud.do(*self._ssh("all", f"{WORKER} start {shlex.join(run)}"))

  def stop(self) -> None:
    """Asks the run on every host to end, and waits for it."""
    command = f"! {WORKER} running 2>/dev/null || {WORKER} stop"
    self._gcloud.do(*self._ssh("all", command), deadline=900)

  def follow(self) -> int:
    """Prints host 0's log until the run ends; returns its code, LOST when the host is."""
    return self._gcloud.follow(*self._ssh("0", f"{WORKER} follow"))

  def run(self, run: list[str]) -> int:
    """See the module's text; returns the run's exit code."""
    fails, code = 0, LOST
    while True:
      self.make_ready()
      problem = None
      try:
        if code != LOST:
          self.stop()  # hosts that have not noticed yet
        self.install()
        self.start(run)
        code = self.follow()
      except RunFailed as error:  # a host that goes away fails whatever speaks to it
        problem, code = error, LOST
      if code in (commands.DONE, commands.MISTAKE):
        break
      what = problem or ("host 0 was lost" if code == LOST else f"the run ended with code {code}")
      if code == commands.PREEMPTED or self.state() != "ACTIVE":
        say(f"{what}: preempted, the same command again")
        continue
      if fails == self._flags.restarts:
        if problem:
          raise problem
        break
      fails += 1
      say(f"{what}; restart {fails} of {self._flags.restarts}")
    if self._flags.delete:
      self.delete()
    return code

  def _do(self, verb: str, *args: str) -> None:
    head = ["compute", "tpus", "queued-resources", verb, self._name, *self._place]
    self._gcloud.do(*head, *args, deadline=1800)

  def _ssh(self, worker: str, command: str) -> list[str]:
    return ["compute", "tpus", "tpu-vm", "ssh", self._name, *self._place, f"--worker={worker}",
            "--ssh-flag=-o ServerAliveInterval=30",  # a host that is gone is noticed
            f"--command={command}"]  # fmt: skip


def pack(archive: Path) -> None:
  """The files that git tracks or would track, as they are now, in a tar.gz.

  Raises:
    UserError: this is not a git checkout.
  """
  found = subprocess.run(
    ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  if found.returncode:
    raise UserError(f"{ROOT} is no git checkout, whose files would be copied: clone it with git")
  with tarfile.open(archive, "w:gz") as tar:
    for name in found.stdout.split("\0"):
      if name and (ROOT / name).is_file():  # neither deleted nor a submodule
        tar.add(ROOT / name, arcname=name)


def say(text: str) -> None:
  print(f"queued_resource: {text}", file=sys.stderr, flush=True)


def define(values: flags.FlagValues) -> None:
  for name in ("name", "zone", "project", "topology", "setup"):
    flags.DEFINE_string(name, "", name, flag_values=values)
  for name in ("spot", "reserved", "delete"):
    flags.DEFINE_bool(name, False, name, flag_values=values)
  flags.DEFINE_float("wait", 24.0, "Hours.", lower_bound=0, flag_values=values)
  flags.DEFINE_integer("restarts", 3, "Restarts.", lower_bound=0, flag_values=values)


def launch(values: flags.FlagValues, words: list[str], run: list[str]) -> int:
  verbs = ("run", "create", "logs", "stop", "delete")
  if len(words) != 1 or words[0] not in verbs:
    raise UserError(f"expected one of {', '.join(verbs)}, got {' '.join(words) or 'nothing'}")
  commands.require(values, name="qwen", zone="us-east5-b")
  if values.spot and values.reserved:
    raise UserError("--spot and --reserved: give one of them")
  resource, verb = Resource(values), words[0]
  if verb in ("run", "create"):
    commands.require(values, topology="v5e:4x4")
    slices.parse(values.topology)  # before anything is asked for
  try:
    if verb == "run":
      check_run(run)
      return resource.run([*run, *commands.pod(slices.parse(values.topology).hosts, run)])
    if verb == "logs":
      return resource.follow()
  except KeyboardInterrupt:
    say("what runs there goes on: `logs` follows it, `stop` saves and ends it")
    return 128 + signal.SIGINT
  {"create": resource.create, "stop": resource.stop, "delete": resource.delete}[verb]()
  return 0


def check_run(run: list[str]) -> None:
  """Raises UserError for flags of a run that cannot work on a slice."""
  commands.check_run(run)
  workdir = str(commands.flag(run, "workdir"))
  if not workdir.startswith("/"):
    raise UserError(
      f"--workdir={workdir}: expected a folder of storage that every host mounts and that outlives "
      "them, such as --workdir=/mnt/runs/qwen"
    )


def main(argv: list[str]) -> int:
  return commands.start(__doc__, define, launch, argv)


if __name__ == "__main__":
  sys.exit(main(sys.argv))
