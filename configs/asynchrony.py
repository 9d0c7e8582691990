"""What a schedule costs in learning: the same number of samples, trained on as they come.

python launch/main.py --config=configs/asynchrony.py --workdir=runs/async \
  --config.model.path=runs/quickstart/sft/hf

runs fully asynchronously, configs/asynchrony.py:one_step_off the schedule named so. All of them, on
three seeds:

python launch/study.py schedules --workdir=runs/study

GRPO with truncated importance sampling, the settings of configs/algorithms.py. What the schedules
gain in time is measured by `launch/perf.py rft`, what they cost in accuracy by this; both stand in
launch/RESULTS.md.
"""

import runpy
from pathlib import Path

from trinity_jax.errors import UserError

ALGORITHMS = Path(__file__).with_name("algorithms.py")
SCHEDULES = {
  "on_policy": {},
  "one_step_off_exact": {"sync.offset": 1},
  "one_step_off": {"sync.offset": 1, "explorer.deterministic": False},
  "fully_async": {
    "sync.style": "fully_async",
    "sync.max_staleness": 8,
    "explorer.deterministic": False,
  },
}


def get_config(schedule="fully_async"):
  if schedule not in SCHEDULES:
    raise UserError(f"asynchrony.py:{schedule}: expected one of {', '.join(SCHEDULES)}")
  c = runpy.run_path(str(ALGORITHMS))["get_config"]("grpo")
  c.name = f"asynchrony-{schedule}"
  c.algorithm.correction = "token_tis"
  c.eval.on_start = False
  c.update_from_flattened_dict(SCHEDULES[schedule])
  return c
