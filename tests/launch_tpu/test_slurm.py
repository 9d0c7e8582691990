"""The batch script: what sbatch is given, and what it does with every end of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import launchers
import launching
import pytest
import slurm

BASE = ["slurm.py", "--name=qwen"]
RUN = ["--", "--config=a b.py", "--workdir=/shared/it's $HOME"]
SHELLCHECK = Path(sys.executable).with_name("shellcheck")

# On a node: srun starts as many tasks as the job has nodes, one after another, and ends with their
# highest code; scontrol expands the list of nodes and notes who is to start again.
SRUN = """
while args[0] != "bash":
  args.pop(0)
codes = [subprocess.run(args, env=os.environ | {"SLURM_PROCID": str(i)}).returncode
         for i in range(int(os.environ["SLURM_NNODES"]))]
sys.exit(max(codes))
"""
SCONTROL = """
if args[:2] == ["show", "hostnames"]:
  print("node007\\nnode008")
elif args[0] != "requeue":
  sys.exit("invalid entity")
"""
MAIN = """
import json, os, sys
keys = ("COORDINATOR", "PROCESSES", "PROCESS_ID")
found = {k: os.environ.get("TRINITY_JAX_" + k) for k in keys}
print(json.dumps([sys.argv[1:], found]))
sys.exit(int(os.environ["CODE"]))
"""


def render(capsys, *flags: str, run=RUN) -> str:
  assert slurm.main([*BASE, "--dry_run", *flags, *run]) == 0
  return capsys.readouterr().out


@pytest.fixture
def job(tmp_path, monkeypatch):
  """Runs a script as Slurm would; returns its code, what each task saw, what is started again."""
  repository, submitted = tmp_path / "repository", tmp_path / "submitted"
  for folder in (repository / ".venv" / "bin", repository / "launch", submitted):
    folder.mkdir(parents=True)
  (repository / ".venv" / "bin" / "python").symlink_to(sys.executable)
  (repository / "launch" / "main.py").write_text(MAIN)
  monkeypatch.setattr(slurm, "ROOT", repository)
  launchers.StandIn(tmp_path / "srun", "srun", SRUN).put_on(monkeypatch)
  scontrol = launchers.StandIn(tmp_path / "scontrol", "scontrol", SCONTROL)
  scontrol.put_on(monkeypatch)

  def go(script: str, *, code: int = 0, nodes: int = 2):
    done = subprocess.run(
      ["bash", "-c", script], cwd=submitted, capture_output=True, text=True, timeout=300,
      env=os.environ | {
        "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[007-008]", "SLURM_NNODES": str(nodes),
        "SLURM_SUBMIT_DIR": str(submitted), "CODE": str(code),
      },
    )  # fmt: skip
    assert done.stderr == ""
    tasks = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, tasks, [c for c in scontrol.calls() if c[0] == "requeue"]

  return go


def test_what_is_asked_of_slurm(capsys):
  script = render(capsys, "--nodes=4", "--gpus_per_node=8", "--cpus_per_node=64",
                  "--time=1-00:00:00", "--option=--partition=a100",
                  "--option=--account=x")  # fmt: skip
  lines = script.splitlines()
  assert lines[0] == "#!/bin/bash"
  end = lines.index("set -uo pipefail")  # sbatch reads options up to the first command
  assert set(lines[1:end]) == {
    f"#SBATCH {option}" for option in (
      "--job-name=qwen", "--output=qwen-%j.log", "--open-mode=append", "--nodes=4",
      "--ntasks-per-node=1", "--requeue", "--signal=TERM@300", "--gpus-per-node=8",
      "--cpus-per-task=64", "--time=1-00:00:00", "--partition=a100", "--account=x",
    )
  }  # fmt: skip


@pytest.mark.parametrize("run", [RUN, [*RUN, "--mode=explore"]])
@pytest.mark.parametrize("nodes", [1, 4])
def test_scripts_are_checked(capsys, run, nodes):
  script = render(capsys, f"--nodes={nodes}", run=run)
  done = subprocess.run([SHELLCHECK, "-"], input=script, text=True, capture_output=True)
  assert done.returncode == 0, done.stdout


def test_every_script_of_launch_is_checked():
  scripts = sorted((launching.ROOT / "launch").rglob("*.sh"))
  assert launchers.FOLDER / "worker.sh" in scripts
  done = subprocess.run([SHELLCHECK, *scripts], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_processes_of_one_run(capsys, job):
  code, tasks, again = job(render(capsys, "--nodes=2"))
  assert code == 0 and again == []
  assert tasks == [
    [RUN[1:], {"COORDINATOR": "node007:8476", "PROCESSES": "2", "PROCESS_ID": str(i)}]
    for i in range(2)
  ]


def test_one_node_needs_no_coordinator(capsys, job):
  _, tasks, _ = job(render(capsys), nodes=1)
  assert tasks == [[RUN[1:], {"COORDINATOR": None, "PROCESSES": None, "PROCESS_ID": None}]]


def test_explorers_have_names_of_their_own(capsys, job):
  _, tasks, _ = job(render(capsys, "--nodes=2", run=[*RUN, "--mode=explore"]))
  for i, (args, found) in enumerate(tasks):
    assert args == [*RUN[1:], "--mode=explore", f"--config.explorer.name=explorer_42_{i}"]
    assert found["COORDINATOR"] is None


@pytest.mark.parametrize(("code", "times"), [(1, 0), (75, 3), (137, 2)])
def test_who_is_started_again(capsys, job, code, times):
  """The same script three times over: what Slurm does after `scontrol requeue`."""
  script = render(capsys, "--restarts=2")
  for _ in range(3):
    returned, _, again = job(script, code=code, nodes=1)
    assert returned == code
  assert again == [["requeue", "42"]] * times


def test_submitted(tmp_path, monkeypatch, capsys):
  body = 'print("Submitted batch job 42") if pop("mood") != "bad" else sys.exit("sbatch: error: '
  body += 'invalid partition specified: x")'
  sbatch = launchers.StandIn(tmp_path / "sbatch", "sbatch", body)
  sbatch.put_on(monkeypatch)
  script = render(capsys)
  assert sbatch.calls() == []
  assert slurm.main([*BASE, *RUN]) == 0
  assert capsys.readouterr().out == "Submitted batch job 42\n"
  assert sbatch.calls() == [[]] and sbatch.inputs() == [script]
  sbatch.will(mood="bad")
  assert slurm.main([*BASE, *RUN]) == 3
  assert "sbatch ended with code 1: sbatch: error: invalid partition" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("args", "expected"),
  [
    (BASE[:1] + RUN, "--name is missing"),
    ([*BASE, "--name=a b", *RUN], "--name=a b: expected letters"),
    ([*BASE, "--option=--partition=x\nrm -rf /", *RUN], "blanks are not possible here"),
    ([*BASE, "--time=1 day", *RUN], "'1 day': blanks are not possible here"),
    ([*BASE, "submit", *RUN], "unexpected argument 'submit'"),
    (BASE, "nothing to run"),
    ([*BASE, "--nodes=0", *RUN], "--nodes=0"),
  ],
)
def test_wrong_flags(capsys, args, expected):
  assert slurm.main(args) == 1
  out, err = capsys.readouterr()
  assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and expected in err


def test_without_slurm(monkeypatch, capsys):
  monkeypatch.setenv("PATH", "/nowhere")
  assert slurm.main([*BASE, *RUN]) == 1
  assert "sbatch is not on the PATH: get it from a login node" in capsys.readouterr().err
