"""A run on Google Kubernetes Engine: a TPU slice that trains, explorers and PostgreSQL beside it.

  python launch/tpu/jobset.py --name=qwen --image=REGISTRY/trinity_jax --topology=v5e:4x4 \\
    --claim=runs --explorers=4 -- --config=configs/gsm8k_grpo.py

  --name=NAME          of the JobSet; the run's folder is /workdir/NAME
  --image=IMAGE        has this repository as its working directory and its `python` installed
  --topology=v5e:4x4   the slice, of a node pool that exists or can be made automatically
  --claim=NAME         PersistentVolumeClaim, ReadWriteMany, for the run's folder
  --explorers=N        pods that only sample (default 0: the slice samples too); with them comes
                       PostgreSQL, unless --config.buffer.url names a server
  --explorer_gpu=NAME  such as nvidia-l4: one for each explorer; default: CPU
  --explorer_cpus=N    that each explorer asks for (default 8)
  --spot               preemptible nodes
  --restarts=N         how often a run that fails is started again (default 3); after a preemption
                       it always is
  --dry_run            prints the manifest as YAML, applies nothing

It is applied with kubectl to its current context, a cluster with JobSet's controller. The commands
to follow and to delete it are printed. Given again after the run's end, it goes on from the last
checkpoint. PostgreSQL's password is made up once and kept in a Secret, NAME-postgres.
"""

from __future__ import annotations

import re
import secrets
import sys

import commands
import manifest
import slices
from absl import flags

from trinity_jax.errors import RunFailed, UserError


def find(kubectl: commands.Tool, *what: str) -> str | None:
  """What `kubectl get` prints, None when there is no such object.

  Raises:
    RunFailed: kubectl cannot tell.
  """
  code, out, err = kubectl.ask("get", *what)
  if code and "NotFound" not in err:
    raise RunFailed(f"kubectl get {' '.join(what[:2])} ended with code {code}: {err.strip()}")
  return None if code else out


def clear(kubectl: commands.Tool, name: str) -> None:
  """Deletes the run's JobSet if it has ended, which applying would leave as it is."""
  if find(kubectl, "jobset", name, "--output=jsonpath={.status.terminalState}"):
    kubectl.do("delete", "jobset", name, "--wait", deadline=900)


def make_secret(kubectl: commands.Tool, name: str) -> None:
  """A Secret with a random password, unless there is one: the data on the disk are bound to it."""
  if find(kubectl, "secret", name) is not None:
    return
  secret = {
    "apiVersion": "v1",
    "kind": "Secret",
    "metadata": {"name": name},
    "stringData": {"password": secrets.token_urlsafe(24)},
  }
  kubectl.do("create", "-f", "-", stdin=render([secret]))  # not an argument, which others can see


def render(objects: list[manifest.Object]) -> str:
  """YAML documents."""
  import yaml

  class Plain(yaml.SafeDumper):
    def ignore_aliases(self, data):
      return True

  return yaml.dump_all(objects, Dumper=Plain, sort_keys=False, width=100)


def make_spec(values: flags.FlagValues, run: list[str]) -> manifest.Spec:
  """What the flags ask for.

  Raises:
    UserError: a flag that is missing, or that Kubernetes or the run would refuse.
  """
  commands.require(
    values, name="qwen", image="REGISTRY/trinity_jax", topology="v5e:4x4", claim="runs"
  )
  # A pod is NAME-trainer-0-0 and a DNS label of at most 63 characters.
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", values.name):
    raise UserError(
      f"--name={values.name}: expected at most 40 of a-z, 0-9 and -, beginning with a letter"
    )
  for flag in ("workdir", "mode"):
    if commands.flag(run, flag) is not None:
      raise UserError(f"--{flag} after `--`: this launcher sets it; leave it out")
  folder = f"{manifest.MOUNT}/{values.name}"
  commands.check_run([*run, f"--workdir={folder}"] if run else run)
  return manifest.Spec(
    name=values.name, image=values.image, slice=slices.parse(values.topology), claim=values.claim,
    run=tuple(run), explorers=values.explorers, explorer_gpu=values.explorer_gpu,
    explorer_cpus=values.explorer_cpus, spot=values.spot, restarts=values.restarts,
  )  # fmt: skip


def define(values: flags.FlagValues) -> None:
  for name in ("name", "image", "topology", "claim", "explorer_gpu"):
    flags.DEFINE_string(name, "", name, flag_values=values)
  flags.DEFINE_bool("spot", False, "Preemptible.", flag_values=values)
  flags.DEFINE_integer("explorers", 0, "Explorers.", lower_bound=0, flag_values=values)
  flags.DEFINE_integer("explorer_cpus", 8, "CPUs.", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("restarts", 3, "Restarts.", lower_bound=0, flag_values=values)


def launch(values: flags.FlagValues, words: list[str], run: list[str]) -> int:
  if words:
    raise UserError(f"unexpected argument {words[0]!r}; flags of the run follow `--`")
  spec = make_spec(values, run)
  text = render(manifest.make(spec))
  if values.dry_run:
    print(text, end="")
    return 0
  kubectl = commands.Tool("kubectl", "https://kubernetes.io/docs/tasks/tools", dry_run=False)
  clear(kubectl, spec.name)
  if spec.postgres:
    make_secret(kubectl, spec.secret)
  print(kubectl.do("apply", "-f", "-", stdin=text), end="")
  pods = f"jobset.sigs.k8s.io/jobset-name={spec.name},jobset.sigs.k8s.io/replicatedjob-name=trainer"
  print(f"follow:  kubectl logs --follow --prefix --max-log-requests={spec.slice.hosts} -l {pods}")
  print(f"state:   kubectl get jobset {spec.name}")
  data = f" pvc/{spec.name}-postgres secret/{spec.secret}" if spec.postgres else ""
  print(f"delete:  kubectl delete jobset/{spec.name}{data}")
  return 0


def main(argv: list[str]) -> int:
  return commands.start(__doc__, define, launch, argv)


if __name__ == "__main__":
  sys.exit(main(sys.argv))
