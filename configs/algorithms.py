"""Every algorithm of the table on the quickstart's task, from one SFT checkpoint.

python launch/main.py --config=configs/algorithms.py --workdir=runs/grpo \
  --config.model.path=runs/quickstart/sft/hf

runs GRPO, configs/algorithms.py:gspo the algorithm named so, and all of them, on three seeds:

python launch/study.py algorithms --workdir=runs/study

Reinforcement: 30 steps of 32 tasks x 8 runs, each in 4 updates, so that ratios move. Supervised
learning: 30 steps of 256 texts without mistakes. SETTINGS holds what an algorithm needs besides its
name (distillation: --config.algorithm.teacher=FOLDER); launch/RESULTS.md what came of it.
"""

from trinity_jax.config import base_config

SUMS = "trinity_jax.tasks.arithmetic:generate"
RATE = 2e-4
EXPERTS = {
  "taskset": dict(
    generate=SUMS, generate_args=dict(split="sft", wrong_fraction=0.0, rows=4096)
  ),
  "batch_size": 32,
}

# Name -> keys of the config. A loss that is larger or smaller than GRPO's by a factor needs none:
# AdamW does not see the factor.
SETTINGS = {
  "ppo": {"critic.learning_rate": 1e-3, "critic.warmup": 2},
  "mix": {"experts": EXPERTS},
  "mix_chord": {"experts": EXPERTS},
  "sft": {"data": "sft"},
  "sft_is": {"data": "sft"},
  "sft_phi": {"data": "sft"},
  "cpt": {"data": "text"},
  "dpo": {"data": "preferences"},
}


def get_config(name="grpo"):
  c = base_config()
  c.name = f"algorithms-{name}"
  c.algorithm.name = name
  c.taskset.generate, c.taskset.generate_args = SUMS, dict(split="rl")
  c.taskset.reward = "arithmetic"
  c.explorer.batch_size, c.explorer.group_size = 32, 8
  c.sampler.max_prompt_length, c.sampler.max_response_length = 9, 4
  c.sampler.slots = 256
  c.sampler.prefill_batches, c.sampler.prompt_buckets = (32,), (9,)
  c.sampler.cache_buckets = (13,)
  c.trainer.row_lengths, c.trainer.rows_per_micro = (13,), 64
  c.trainer.total_steps, c.trainer.minibatches, c.trainer.save_interval = 30, 4, 30
  c.optimizer.learning_rate, c.optimizer.warmup_steps = RATE, 3
  c.optimizer.beta2 = 0.98
  c.eval.tasksets = (
    dict(name="held_out", generate=SUMS, generate_args=dict(split="eval"), reward="arithmetic"),
  )
  settings = dict(SETTINGS.get(name, {}))
  data = settings.pop("data", None)
  if data:
    _supervised(c, data)
  with c.unlocked():
    c.update_from_flattened_dict(settings)
  return c


def _supervised(c, split):
  """The right answers, in the form that the algorithm learns from; others are held out."""
  rows = dict(split=split, rows=4096, **({"wrong_fraction": 0.0} if split == "sft" else {}))
  c.taskset.generate_args = rows
  c.taskset.text_key = "text" if split == "text" else ""
  c.trainer.batch_size, c.trainer.minibatches = 256, 1
  c.eval.interval = 30  # and before the first step
  if split == "preferences":
    c.trainer.row_lengths = (26,)
  held_out = {**rows, "seed": 1000, "rows": 256}
  c.eval.texts = dict(generate=SUMS, generate_args=held_out, text_key=c.taskset.text_key)
