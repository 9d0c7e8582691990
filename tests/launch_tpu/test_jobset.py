"""The manifest for GKE: accepted by Kubernetes' and JobSet's own types, and what it says."""

from __future__ import annotations

import json
import re

import jobset
import launchers
import launching
import manifest
import pytest
import yaml
from kubeflow_trainer_api import models

BASE = ["jobset.py", "--name=qwen", "--image=REG/trinity", "--topology=v5e:4x4", "--claim=runs"]
RUN = ["--", "--config=configs/gsm8k_grpo.py", "--config.name=$(HOSTNAME) it's"]
KINDS = {
  "JobSet": models.JobsetV1alpha2JobSet,
  "PersistentVolumeClaim": models.IoK8sApiCoreV1PersistentVolumeClaim,
  "Secret": models.IoK8sApiCoreV1Secret,
}


def render(capsys, *flags: str, run=RUN) -> list[dict]:
  """The documents of a dry run, each valid."""
  assert jobset.main([*BASE, "--dry_run", *flags, *run]) == 0
  out = capsys.readouterr().out
  assert "&id" not in out  # no YAML anchors: people read it
  documents = list(yaml.safe_load_all(out))
  for document in documents:
    validate(document)
  return documents


def validate(document: dict) -> None:
  """Types and required keys by the published models; no key that they do not know."""
  read = KINDS[document["kind"]].from_dict(document)
  assert read is not None
  _same(document, json.loads(read.to_json()), document["kind"])


def _same(ours, theirs, where: str) -> None:
  if isinstance(ours, dict):
    for key, value in ours.items():
      assert key in theirs, f"{where}.{key} is unknown"
      _same(value, theirs[key], f"{where}.{key}")
    for key, value in theirs.items():  # what must be there has an empty default
      assert key in ours or value != "", f"{where}.{key} is missing"
  elif isinstance(ours, list):
    assert len(ours) == len(theirs), where
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
      _same(a, b, f"{where}[{i}]")
  else:
    assert ours == theirs, where


def jobs(document: dict) -> dict[str, dict]:
  """Name -> spec of its Job."""
  return {j["name"]: j["template"]["spec"] for j in document["spec"]["replicatedJobs"]}


def main_of(job: dict) -> dict:
  return job["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
  ("change", "where"),
  [
    (lambda d: d["spec"].update(succesPolicy={}), "succesPolicy is unknown"),
    (lambda d: d["spec"]["failurePolicy"].update(maxRestarts="3"), "valid integer"),
    (lambda d: jobs(d)["trainer"].update(backofLimit=1), "backofLimit is unknown"),
    (lambda d: main_of(jobs(d)["trainer"]).pop("name"), r"containers\[0\].name is missing"),
    (lambda d: main_of(jobs(d)["trainer"]).update(command="python"), "valid list"),
  ],
)
def test_the_validation_validates(capsys, change, where):
  (document,) = render(capsys)
  change(document)
  with pytest.raises((AssertionError, ValueError), match=where):
    validate(document)


def test_a_slice_alone(capsys):
  (document,) = render(capsys)
  assert document["spec"]["successPolicy"]["targetReplicatedJobs"] == ["trainer"]
  (trainer,) = jobs(document).values()
  assert trainer["parallelism"] == trainer["completions"] == 4  # hosts
  assert trainer["backoffLimit"] == 0 and trainer["completionMode"] == "Indexed"
  pod, container = trainer["template"]["spec"], main_of(trainer)
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "4x4",
  }
  assert container["resources"]["limits"] == {"google.com/tpu": "4"}
  assert container["command"] == [
    "python", "launch/main.py", "--config=configs/gsm8k_grpo.py",
    "--config.name=$$(HOSTNAME) it's", "--workdir=/workdir/qwen", "--mode=both",
    "--distributed=auto",
  ]  # fmt: skip
  assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "runs"
  assert pod["restartPolicy"] == "Never"  # a podFailurePolicy needs it


def test_one_host_is_alone(capsys):
  (document,) = render(capsys, "--topology=v5p:2x2x1")
  (trainer,) = jobs(document).values()
  assert trainer["parallelism"] == 1
  assert main_of(trainer)["command"][-1] == "--mode=both"


def test_explorers_and_their_database(capsys):
  disk, document = render(capsys, "--explorers=3", "--spot", "--restarts=9")
  found = jobs(document)
  assert list(found) == ["postgres", "trainer", "explorer"]
  for job in document["spec"]["replicatedJobs"][1:]:
    assert job["dependsOn"] == [{"name": "postgres", "status": "Ready"}]
  trainer, explorer = main_of(found["trainer"]), main_of(found["explorer"])
  url = "--config.buffer.url=postgresql://trinity@qwen-postgres-0-0.qwen:5432/trinity"
  assert trainer["command"][-3:] == ["--mode=train", "--distributed=auto", url]
  assert explorer["command"][-3:] == [
    "--mode=explore", "--config.explorer.name=explorer_$(JOB_COMPLETION_INDEX)", url,
  ]  # fmt: skip
  assert document["spec"]["network"]["subdomain"] == "qwen"  # which the URL's host is in
  secret = {"secretKeyRef": {"name": "qwen-postgres", "key": "password"}}
  assert {"name": "PGPASSWORD", "valueFrom": secret} in trainer["env"]
  assert {"name": "PGPASSWORD", "valueFrom": secret} in explorer["env"]
  postgres = found["postgres"]["template"]["spec"]
  assert {"name": "POSTGRES_PASSWORD", "valueFrom": secret} in main_of(found["postgres"])["env"]
  claim = postgres["volumes"][0]["persistentVolumeClaim"]["claimName"]
  assert claim == disk["metadata"]["name"] == "qwen-postgres"
  assert document["spec"]["failurePolicy"]["maxRestarts"] == 9
  for name in ("trainer", "explorer"):
    selector = found[name]["template"]["spec"]["nodeSelector"]
    assert selector["cloud.google.com/gke-spot"] == "true"
  assert "nodeSelector" not in postgres  # nobody takes its node away
  assert found["explorer"]["parallelism"] == found["explorer"]["completions"] == 3


def test_explorers_on_gpus_with_a_database_of_ones_own(capsys):
  run = [*RUN, "--config.buffer.url=postgresql://me@db/x"]
  (document,) = render(capsys, "--explorers=1", "--explorer_gpu=nvidia-l4", run=run)
  found = jobs(document)
  assert list(found) == ["trainer", "explorer"]
  explorer = found["explorer"]["template"]["spec"]
  assert explorer["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
  container = main_of(found["explorer"])
  assert container["resources"]["limits"] == {"nvidia.com/gpu": "1"}
  assert {"name": "JAX_PLATFORMS", "value": "cuda,cpu"} in container["env"]
  assert not any(e["name"] == "PGPASSWORD" for e in container["env"])
  assert sum("buffer.url" in arg for arg in container["command"]) == 1


def decide(document: dict, job: str, *, code: int | None = None, disrupted: bool = False) -> str:
  """What becomes of a JobSet when a pod fails so, by the documented rules of Job and JobSet."""
  spec = jobs(document)[job]
  for index, rule in enumerate(spec["podFailurePolicy"]["rules"]):
    on_code = rule.get("onExitCodes", {}).get("values", [])
    if code in on_code:
      message = f"Container main for pod default/p failed with exit code {code} matching "
    elif disrupted and "onPodConditions" in rule:
      message = "Pod default/p has condition DisruptionTarget matching "
    else:
      continue
    if rule["action"] == "Ignore":
      return "another pod"
    message += f"{rule['action']} rule at index {index}"
    for failure in document["spec"]["failurePolicy"]["rules"]:
      assert failure["onJobFailureReasons"] == ["PodFailurePolicy"]
      if any(re.search(p, message) for p in failure["onJobFailureMessagePatterns"]):
        return failure["action"]
    return "RestartJobSet"
  return "RestartJobSet" if spec["backoffLimit"] == 0 else "another pod"


def test_who_is_started_again(capsys):
  _, document = render(capsys, "--explorers=1")
  for how, trainer, explorer in (
    ({"code": 1}, "FailJobSet", "FailJobSet"),
    ({"code": 3}, "RestartJobSet", "another pod"),
    ({"code": 137}, "RestartJobSet", "another pod"),
    ({"code": 175}, "RestartJobSet", "another pod"),  # not 75, not 1
    ({"code": 75}, "RestartJobSetAndIgnoreMaxRestarts", "another pod"),
    ({"code": 143, "disrupted": True}, "RestartJobSetAndIgnoreMaxRestarts", "another pod"),
  ):
    assert decide(document, "trainer", **how) == trainer, how
    assert decide(document, "explorer", **how) == explorer, how


def test_the_launcher_knows_these_flags(capsys, tmp_path):
  recipe = launching.write_recipe(tmp_path / "recipe.py", "model")
  _, document = render(capsys, "--explorers=1", run=["--", f"--config={recipe}"])
  launch = launching.launcher()
  for name, mode in (("trainer", "train"), ("explorer", "explore")):
    own, values = launch.parse(main_of(jobs(document)[name])["command"][1:])
    assert own["mode"].value == mode and own["workdir"].value == "/workdir/qwen"
    assert values.buffer.url.startswith("postgresql://")


KUBECTL = """
if args[:2] == ["get", "secret"]:
  state = pop("secret", "absent")
  if state == "absent":
    sys.exit(f'Error from server (NotFound): secrets "{args[2]}" not found')
  if state == "down":
    sys.exit("The connection to the server localhost:8080 was refused")
if args[:2] == ["get", "jobset"]:
  state = pop("jobset", "absent")
  if state == "absent":
    sys.exit(f'Error from server (NotFound): jobsets.jobset.x-k8s.io "{args[2]}" not found')
  print(state, end="")
  sys.exit()
if args[0] == "apply" and pop("apply") == "no":
  sys.exit('error: unable to recognize "STDIN": no matches for kind "JobSet" in version')
print(args[0] + "ed")
"""


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
  program = launchers.StandIn(tmp_path / "kubectl", "kubectl", KUBECTL)
  program.put_on(monkeypatch)
  return program


def test_applied_with_a_password_that_nobody_sees(kubectl, capsys):
  assert jobset.main([*BASE, "--explorers=2", *RUN]) == 0
  state = ["get", "jobset", "qwen", "--output=jsonpath={.status.terminalState}"]
  assert kubectl.calls() == [
    state, ["get", "secret", "qwen-postgres"], ["create", "-f", "-"], ["apply", "-f", "-"],
  ]  # fmt: skip
  secret = yaml.safe_load(kubectl.inputs()[2])
  validate(secret)
  password = secret["stringData"]["password"]
  applied, out = kubectl.inputs()[3], capsys.readouterr()
  assert len(password) >= 32 and password not in applied + out.out + out.err
  assert [d["kind"] for d in yaml.safe_load_all(applied)] == ["PersistentVolumeClaim", "JobSet"]
  assert "kubectl logs --follow --prefix --max-log-requests=4 -l jobset.sigs" in out.out
  assert "kubectl delete jobset/qwen pvc/qwen-postgres secret/qwen-postgres" in out.out


def test_a_password_is_kept(kubectl):
  kubectl.will(secret="there")
  assert jobset.main([*BASE, "--explorers=2", *RUN]) == 0
  assert [c[0] for c in kubectl.calls()] == ["get", "get", "apply"]


@pytest.mark.parametrize(
  ("state", "verbs"),
  [("Failed", ["get", "delete", "apply"]), ("Completed", ["get", "delete", "apply"]),
   ("", ["get", "apply"])],
)  # fmt: skip
def test_the_same_command_continues_a_run_that_ended(kubectl, state, verbs):
  kubectl.will(jobset=state)
  assert jobset.main([*BASE, *RUN]) == 0
  assert [c[0] for c in kubectl.calls()] == verbs
  if "delete" in verbs:
    assert kubectl.calls()[1][1:] == ["jobset", "qwen", "--wait"]


@pytest.mark.parametrize(
  ("will", "expected"),
  [
    ({"secret": "down"}, "connection to the server localhost:8080 was refused"),
    ({"apply": "no"}, "kubectl apply ended with code 1: error: unable to recognize"),
  ],
)
def test_what_kubectl_refuses(kubectl, capsys, will, expected):
  kubectl.will(**will)
  assert jobset.main([*BASE, "--explorers=2", *RUN]) == 3
  assert expected in capsys.readouterr().err


def test_dry_run_calls_nothing(kubectl, capsys):
  render(capsys, "--explorers=2")
  assert kubectl.calls() == []


@pytest.mark.parametrize(
  ("args", "expected"),
  [
    (BASE[:1] + RUN, "--name is missing"),
    (BASE[:4] + RUN, "--claim is missing: give one such as --claim=runs"),
    ([*BASE, "--name=Qwen_3", *RUN], "--name=Qwen_3: expected at most 40 of a-z"),
    ([*BASE, "--name=" + "q" * 41, *RUN], "expected at most 40"),
    ([*BASE, "--topology=h100x8", *RUN], "expected GENERATION:SHAPE"),
    (BASE, "nothing to run"),
    ([*BASE, "apply", *RUN], "unexpected argument 'apply'"),
    ([*BASE, *RUN, "--workdir=w"], "--workdir after `--`: this launcher sets it"),
    ([*BASE, *RUN, "--mode", "train"], "--mode after `--`"),
    ([*BASE, "--", "--config.seed=1"], "--config is missing after `--`"),
  ],
)
def test_wrong_flags(capsys, args, expected):
  assert jobset.main(args) == 1
  out, err = capsys.readouterr()
  assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and expected in err


def test_names_fit_kubernetes():
  """The longest name of a pod is a DNS label."""
  assert len("q" * 40 + "-explorer-0-1000-abcde") <= 63
  assert manifest.MOUNT.startswith("/")
