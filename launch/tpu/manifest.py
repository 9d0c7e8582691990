"""The Kubernetes objects of a run: a JobSet of a TPU slice, explorers and PostgreSQL.

Who ends how, by the exit codes of launch/main.py: 1 (a mistake) in trainer or explorer fails the
JobSet; a preempted trainer (75, or a node taken away) starts the JobSet again, uncounted; any other
failure of a trainer's process counts to maxRestarts. Explorers and PostgreSQL are started again by
their own Jobs, beside the trainer. Its success is the JobSet's, which then ends the others.

Needs a JobSet controller that knows onJobFailureMessagePatterns. Fields: jobset.sigs.k8s.io, and
kubernetes.io/docs/concepts/workloads/controllers/job ("Pod failure policy", whose messages
the patterns match); labels: cloud.google.com/kubernetes-engine/docs/concepts/tpus.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import commands
import slices

MOUNT = "/workdir"  # where the claim is in every pod
PORT = 5432
IMAGE_OF_POSTGRES = "postgres:17"
FOREVER = 1_000_000  # starts of a pod that may be started again
Object = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Spec:
  """What a manifest is made from.

  name: of the JobSet; the others begin with it.
  image: holds this repository as its working directory.
  slice: of the trainer.
  claim: PersistentVolumeClaim, ReadWriteMany, for the run's folder.
  run: flags of launch/main.py, without --workdir and --mode.
  explorers: pods of --mode=explore; 0 means that the slice samples too.
  explorer_gpu: GKE's name of their accelerator, one each; "" means CPU.
  explorer_cpus: that each asks for.
  spot: preemptible nodes for slice and explorers.
  restarts: of the JobSet.
  """

  name: str
  image: str
  slice: slices.Slice
  claim: str
  run: tuple[str, ...]
  explorers: int = 0
  explorer_gpu: str = ""
  explorer_cpus: int = 8
  spot: bool = False
  restarts: int = 3

  @property
  def postgres(self) -> bool:
    """Whether the run needs a database of its own."""
    return self.explorers > 0 and commands.flag(self.run, "config.buffer.url") is None

  @property
  def secret(self) -> str:
    """Name of the Secret that holds PostgreSQL's `password`."""
    return f"{self.name}-postgres"


def make(spec: Spec) -> list[Object]:
  """The objects, in the order in which to apply them; the Secret is not among them."""
  jobs = [_trainer(spec)]
  if spec.explorers:
    jobs.append(_explorers(spec))
  if spec.postgres:
    ready = {"name": "postgres", "status": "Ready"}
    jobs = [_postgres(spec), *({**j, "dependsOn": [ready]} for j in jobs)]
  jobset = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": spec.name},
    "spec": {
      "successPolicy": {"operator": "All", "targetReplicatedJobs": ["trainer"]},
      "failurePolicy": {"maxRestarts": spec.restarts, "rules": _rules()},
      "network": {"enableDNSHostnames": True, "subdomain": spec.name},
      "replicatedJobs": jobs,
    },
  }
  return [_disk(spec), jobset] if spec.postgres else [jobset]


def _rules() -> list[Object]:
  """First match wins; without one the JobSet starts again and counts it."""
  failed = {"onJobFailureReasons": ["PodFailurePolicy"]}
  return [
    {"name": "mistake", "action": "FailJobSet", **failed,
     "onJobFailureMessagePatterns": [rf"failed with exit code {commands.MISTAKE} "]},
    {"name": "preempted", "action": "RestartJobSetAndIgnoreMaxRestarts", **failed,
     "onJobFailureMessagePatterns": [
       rf"failed with exit code {commands.PREEMPTED} ", "has condition DisruptionTarget "]},
  ]  # fmt: skip


def _on_code(action: str, code: int) -> Object:
  return {
    "action": action,
    "onExitCodes": {"containerName": "main", "operator": "In", "values": [code]},
  }


def _on_disruption(action: str) -> Object:
  """The node is taken away: preempted, drained, or out of order."""
  return {"action": action, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def _trainer(spec: Spec) -> Object:
  """One pod a host of the slice; the first that fails ends the Job."""
  chips, hosts = str(spec.slice.chips_per_host), spec.slice.hosts
  mode = "train" if spec.explorers else "both"
  container = _main(spec, "tpu,cpu", mode, *commands.pod(hosts, spec.run))
  container["resources"] = {"requests": {"google.com/tpu": chips},
                            "limits": {"google.com/tpu": chips}}  # fmt: skip
  nodes = {
    "cloud.google.com/gke-tpu-accelerator": spec.slice.kind.node,
    "cloud.google.com/gke-tpu-topology": spec.slice.shape,
  }
  policy = [
    _on_code("FailJob", commands.MISTAKE),
    _on_code("FailJob", commands.PREEMPTED),
    _on_disruption("FailJob"),
  ]
  job = _job("trainer", hosts, _pod(spec, container, nodes), policy, backoff=0)
  # All hosts from one node pool, which is one slice.
  pool = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
  job["template"]["metadata"] = {"annotations": pool}
  return job


def _explorers(spec: Spec) -> Object:
  """Pods that come and go: work that one held is taken over by the others."""
  platforms = "cuda,cpu" if spec.explorer_gpu else "cpu"
  name = "--config.explorer.name=explorer_$(JOB_COMPLETION_INDEX)"
  container = _main(spec, platforms, "explore", name)
  resources: Object = {"requests": {"cpu": str(spec.explorer_cpus)}}
  nodes = {}
  if spec.explorer_gpu:
    nodes["cloud.google.com/gke-accelerator"] = spec.explorer_gpu
    resources["limits"] = {"nvidia.com/gpu": "1"}
  container["resources"] = resources
  policy = [
    _on_code("FailJob", commands.MISTAKE),
    _on_code("Ignore", commands.PREEMPTED),
    _on_disruption("Ignore"),
  ]
  pod = _pod(spec, container, nodes)
  return _job("explorer", spec.explorers, pod, policy, backoff=FOREVER)


def _postgres(spec: Spec) -> Object:
  """The buffer's server: lives as long as the JobSet, its data as long as the claim."""
  container = {
    "name": "main",
    "image": IMAGE_OF_POSTGRES,
    "env": [
      {"name": "POSTGRES_USER", "value": "trinity"},
      {"name": "POSTGRES_DB", "value": "trinity"},
      {"name": "PGDATA", "value": "/data/pgdata"},  # a disk's root holds lost+found
      _password(spec, "POSTGRES_PASSWORD"),
    ],
    "ports": [{"containerPort": PORT}],
    "readinessProbe": {
      # Over TCP: the server that sets the database up listens on a socket file only.
      "exec": {"command": ["pg_isready", "-h", "127.0.0.1", "-U", "trinity"]},
      "periodSeconds": 5,
    },
    "volumeMounts": [{"name": "data", "mountPath": "/data"}],
  }
  volume = {"name": "data", "persistentVolumeClaim": {"claimName": f"{spec.name}-postgres"}}
  pod = {"restartPolicy": "OnFailure", "containers": [container], "volumes": [volume]}
  return _job("postgres", 1, pod, [], backoff=FOREVER)


def _disk(spec: Spec) -> Object:
  return {
    "apiVersion": "v1",
    "kind": "PersistentVolumeClaim",
    "metadata": {"name": f"{spec.name}-postgres"},
    "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "50Gi"}}},
  }


def _main(spec: Spec, platforms: str, mode: str, *more: str) -> Object:
  """The container that runs launch/main.py; without the first of `platforms` it fails."""
  run = [arg.replace("$(", "$$(") for arg in spec.run]  # Kubernetes would expand it
  args = ["launch/main.py", *run, f"--workdir={MOUNT}/{spec.name}", f"--mode={mode}", *more]
  env: list[Object] = [
    {"name": "JAX_PLATFORMS", "value": platforms},
    {"name": "PYTHONUNBUFFERED", "value": "1"},
  ]
  if spec.postgres:
    host = f"{spec.name}-postgres-0-0.{spec.name}"  # JobSet's name of the pod
    args.append(f"--config.buffer.url=postgresql://trinity@{host}:{PORT}/trinity")
    env.append(_password(spec, "PGPASSWORD"))
  return {
    "name": "main",
    "image": spec.image,
    "command": ["python", *args],
    "env": env,
    "volumeMounts": [{"name": "workdir", "mountPath": MOUNT}],
  }


def _password(spec: Spec, name: str) -> Object:
  key = {"name": spec.secret, "key": "password"}
  return {"name": name, "valueFrom": {"secretKeyRef": key}}


def _pod(spec: Spec, container: Object, nodes: dict[str, str]) -> Object:
  pod = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": 600,  # a step and a checkpoint
    "containers": [container],
    "volumes": [{"name": "workdir", "persistentVolumeClaim": {"claimName": spec.claim}}],
  }
  selector = {**nodes, "cloud.google.com/gke-spot": "true"} if spec.spot else nodes
  return {**pod, "nodeSelector": selector} if selector else pod


def _job(name: str, pods: int, pod: Object, policy: Sequence[Object], *, backoff: int) -> Object:
  spec: Object = {
    "parallelism": pods,
    "completions": pods,
    "completionMode": "Indexed",
    "backoffLimit": backoff,
    "template": {"spec": pod},
  }
  if policy:
    spec["podFailurePolicy"] = {"rules": list(policy)}
  return {"name": name, "replicas": 1, "template": {"spec": spec}}
