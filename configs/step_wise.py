"""Rewards step by step: which way a tiny model walks.

python launch/main.py --config=configs/step_wise.py --workdir=runs/step_wise

The environment (trinity_jax/tasks/walk.py) is a user's own and says after every step what that was
worth; with --config=configs/step_wise.py:processes each one lives in a process of its own, which is
killed when it hangs and replaced when it dies. REINFORCE++ credits each turn with the rewards from
there on; GRPO would see their sum only. The demonstrations of the SFT stage walk at random. Shows
the wiring: at this size the greedy policy does not learn the way in 30 steps (mean return of 20
held-out pairs with seed 0: 0.23 after SFT, -0.03 after REINFORCE++; 1.4 is the best), though what
it samples gets better (reward/mean from -0.04 to 0.35). 1 min 50 s of CPU time.
"""

from trinity_jax.config import base_config

WALKS = "trinity_jax.tasks.walk:generate"


def get_config(where="here"):
  c = base_config()
  c.name = "step_wise"
  c.model.tiny = dict(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=192)
  c.taskset.generate = WALKS
  c.taskset.workflow = "environment"
  c.sampler.max_prompt_length = 96  # of the twelfth turn
  c.sampler.max_response_length = 2  # a sign and the end of the message
  c.sampler.slots = 256
  c.sampler.prefill_batches = (64,)
  c.sampler.prompt_buckets = (8, 96)
  c.sampler.cache_buckets = (98,)
  c.eval.tasksets = (
    dict(name="held_out", generate=WALKS, generate_args=dict(split="eval"), workflow="environment"),
  )
  c.trainer.row_lengths = (98,)
  c.stages = (
    {
      "name": "sft",
      "algorithm.name": "sft",
      "taskset.generate_args": dict(split="sft"),
      "taskset.messages_key": "messages",
      "trainer": dict(total_steps=100, batch_size=64, rows_per_micro=32, save_interval=100),
      "optimizer": dict(
        learning_rate=2e-3, schedule="cosine", warmup_steps=10, min_ratio=0.1, beta2=0.98
      ),
    },
    {
      "name": "reinforce",
      "algorithm": dict(name="reinforceplusplus", advantage_args=dict(gamma=0.9), kl_coef=0.01),
      "taskset.generate_args": dict(split="rl", own_process=where == "processes"),
      "explorer": dict(batch_size=128, group_size=1),
      "trainer": dict(total_steps=30, rows_per_micro=32, save_interval=10),
      "optimizer": dict(learning_rate=1e-3, warmup_steps=3, beta2=0.98),
      "eval.interval": 10,
    },
  )
  return c
