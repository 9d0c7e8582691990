"""A run on a Slurm cluster: one process on each node, in one job that Slurm starts again.

  python launch/tpu/slurm.py --name=qwen --nodes=4 --gpus_per_node=8 --time=24:00:00 -- \\
    --config=configs/gsm8k_grpo.py --workdir=/shared/runs/qwen

  --name=NAME         of the job; its output is NAME-JOB.log in the folder this is called from
  --nodes=N           nodes, and processes (default 1)
  --gpus_per_node=N   default 0: what the partition gives
  --cpus_per_node=N   likewise; where nodes are shared that may be one
  --time=D-HH:MM:SS   limit of one job; a longer run goes on in the next one by itself
  --option=ARG        further options of sbatch, such as --option=--partition=a100; any number
  --restarts=N        how often a run that fails is started again (default 3); after a preemption
                      or at the time limit it always is
  --dry_run           prints the script, submits nothing

Explorers are jobs of their own: the same command with --mode=explore after `--`, whose --nodes are
so many explorers (buffer.url=postgresql://...). --workdir is in storage that all nodes share, and
this repository with its .venv too. `scancel JOB` ends a run; with --signal=TERM it saves, and goes
on when Slurm has room again.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import commands
from absl import flags

from trinity_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PORT = 8476  # of the coordinator, on the job's first node
SAVE = 300  # seconds before the time limit at which a run is asked to end
END = 120  # seconds for the other processes once one has ended: they notice within 60

SCRIPT = """\
#!/bin/bash
{options}
set -uo pipefail
cd {root} || exit 1
{processes}
cpus="${{SLURM_CPUS_PER_TASK:-${{SLURM_CPUS_ON_NODE:-}}}}" # srun does not inherit it from sbatch
if [[ -n $cpus ]]; then export SRUN_CPUS_PER_TASK="$cpus"; fi
# Nothing is killed when one process ends: the others notice, and name it.
# shellcheck disable=SC2016  # each task expands it
srun --label --kill-on-bad-exit=0 --wait={end} bash -c {inner} run {command}
code=$?
case $code in
  {done} | {mistake}) ;;
  {preempted}) scontrol requeue "$SLURM_JOB_ID" ;;
  *)
    failures="$SLURM_SUBMIT_DIR/{name}-$SLURM_JOB_ID.failures" # a line each
    echo "$code" >> "$failures"
    if (($(wc -l < "$failures") <= {restarts})); then scontrol requeue "$SLURM_JOB_ID"; fi
    ;;
esac
exit "$code"
"""
ONE_RUN = """\
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) || exit 1
export TRINITY_JAX_COORDINATOR="$first:{port}" TRINITY_JAX_PROCESSES="$SLURM_NNODES"
"""


def render(values: flags.FlagValues, run: list[str]) -> str:
  """The script that sbatch is given.

  Args:
    values: the launcher's flags.
    run: those of launch/main.py.
  """
  options = [
    f"--job-name={values.name}",
    f"--output={values.name}-%j.log",
    "--open-mode=append",  # a job that starts again goes on with its log
    f"--nodes={values.nodes}",
    "--ntasks-per-node=1",
    "--requeue",
    f"--signal=TERM@{SAVE}",
  ]
  if values.gpus_per_node:
    options.append(f"--gpus-per-node={values.gpus_per_node}")
  if values.cpus_per_node:
    options.append(f"--cpus-per-task={values.cpus_per_node}")
  if values.time:
    options.append(f"--time={values.time}")
  explores = commands.flag(run, "mode") == "explore"
  main = ".venv/bin/python", "launch/main.py", *run
  inner, processes = 'exec "$@"', ""
  if explores:
    inner = 'exec "$@" --config.explorer.name="explorer_${SLURM_JOB_ID}_$SLURM_PROCID"'
  elif values.nodes > 1:
    inner = 'export TRINITY_JAX_PROCESS_ID="$SLURM_PROCID"; exec "$@"'
    processes = ONE_RUN.format(port=PORT).rstrip()
  return SCRIPT.format(
    options="\n".join(f"#SBATCH {o}" for o in [*options, *values.option]),
    root=shlex.quote(str(ROOT)), processes=processes, inner=f"'{inner}'",
    command=shlex.join(main), end=END, restarts=values.restarts, done=commands.DONE,
    mistake=commands.MISTAKE, name=values.name, preempted=commands.PREEMPTED,
  )  # fmt: skip


def define(values: flags.FlagValues) -> None:
  flags.DEFINE_string("name", "", "Of the job.", flag_values=values)
  flags.DEFINE_string("time", "", "Time limit.", flag_values=values)
  flags.DEFINE_integer("nodes", 1, "Nodes.", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("gpus_per_node", 0, "GPUs.", lower_bound=0, flag_values=values)
  flags.DEFINE_integer("cpus_per_node", 0, "CPUs.", lower_bound=0, flag_values=values)
  flags.DEFINE_integer("restarts", 3, "Restarts.", lower_bound=0, flag_values=values)
  flags.DEFINE_multi_string("option", [], "Options of sbatch.", flag_values=values)


def launch(values: flags.FlagValues, words: list[str], run: list[str]) -> int:
  if words:
    raise UserError(f"unexpected argument {words[0]!r}; flags of the run follow `--`")
  commands.require(values, name="qwen")
  if not re.fullmatch(r"[\w.-]+", values.name):
    raise UserError(f"--name={values.name}: expected letters, digits, `.`, `_` and `-`")
  for option in (values.time, *values.option):
    if any(c.isspace() for c in option):  # would end its line of the script, or its argument
      raise UserError(f"{option!r}: blanks are not possible here; give one option each --option")
  commands.check_run(run)
  script = render(values, run)
  if values.dry_run:
    print(script, end="")
    return 0
  sbatch = commands.Tool("sbatch", "a login node of the cluster", dry_run=False)
  print(sbatch.do(stdin=script), end="")
  return 0


def main(argv: list[str]) -> int:
  return commands.start(__doc__, define, launch, argv)


if __name__ == "__main__":
  sys.exit(main(sys.argv))
