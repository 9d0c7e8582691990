"""Mixed training: right demonstrations beside the rollouts of a policy that never finds the answer.

python launch/main.py --config=configs/mixed.py --workdir=runs/mixed

SFT on demonstrations that all forget the carry, then MIX: GRPO on the rollouts of 64 tasks and
maximum likelihood on 128 demonstrations in each step. About 2 minutes on 2 CPU cores. Held-out
accuracy 0.56 -> 0.875 in 60 steps. The rollouts alone (configs/mixed.py:grpo) hold no right answer
where there is a carry: 0.56 -> 0.595, after a dip to 0.36.
"""

import runpy
from pathlib import Path

QUICKSTART = Path(__file__).with_name("quickstart.py")
SUMS = "trinity_jax.tasks.arithmetic:generate"


def get_config(name="mix"):
  c = runpy.run_path(str(QUICKSTART))["get_config"]()
  sft, grpo = c.stages
  sft = {**sft, "taskset.generate_args": dict(split="sft", wrong_fraction=1.0)}
  mixed = {
    **grpo,
    "name": name,
    "algorithm": dict(name=name),
    "explorer": dict(batch_size=64, group_size=8),
    "trainer": dict(total_steps=60, rows_per_micro=128, save_interval=20),
    "optimizer": {**grpo["optimizer"], "learning_rate": 1e-3},
    "eval.interval": 10,
  }
  if name != "grpo":
    demonstrations = dict(split="sft", wrong_fraction=0.0, rows=4096)
    mixed["experts"] = dict(
      taskset=dict(generate=SUMS, generate_args=demonstrations), batch_size=128
    )
  c.stages = (sft, mixed)
  c.name = f"mixed-{name}"
  return c
