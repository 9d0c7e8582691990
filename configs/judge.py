"""A judge gives the rewards: any model behind an OpenAI-compatible server.

python launch/main.py --config=configs/judge.py --workdir=runs/judge \
  --config.taskset.reward_args.base_url=http://127.0.0.1:8000/v1 \
  --config.taskset.reward_args.model=JUDGE

compares the attempts of each group with each other (RULER); configs/judge.py:rubric has each one
checked against a list of criteria instead. The judge's key, if it wants one, is read from the
environment variable that reward_args.api_key_env names. A judge that cannot be reached or gives no
verdict is an error of that run, never a score. The tasks are the quickstart's sums, on a tiny model
(--config.model.path: the quickstart's after SFT, say); take your own with taskset.path. Held-out
sums are still verified.
"""

from trinity_jax.config import base_config

SUMS = "trinity_jax.tasks.arithmetic:generate"
CRITERIA = (
  "The response is one number and nothing else.",
  {"criterion": "The number is the sum that the task asks for.", "weight": 3.0},
)


def get_config(kind="ruler"):
  c = base_config()
  c.name = "judge"
  c.model.tiny = dict(hidden=128, layers=3, heads=4, kv_heads=2, head_dim=32, intermediate=384)
  c.taskset.generate = SUMS
  c.taskset.generate_args = dict(split="rl")
  c.taskset.reward = kind
  c.taskset.reward_args = dict(base_url="http://127.0.0.1:8000/v1", model="judge")
  if kind == "rubric":
    c.taskset.reward_args.rubric = CRITERIA
  c.algorithm.name = "grpo"
  c.algorithm.kl_coef = 0.02
  c.explorer.batch_size = 16
  c.explorer.group_size = 8
  c.sampler.max_prompt_length = 9
  c.sampler.max_response_length = 4
  c.sampler.slots = 128
  c.sampler.prefill_batches = (16,)
  c.sampler.prompt_buckets = (9,)
  c.sampler.cache_buckets = (13,)
  c.eval.tasksets = (
    dict(name="held_out", generate=SUMS, generate_args=dict(split="eval"), reward="arithmetic"),
  )
  c.eval.interval = 20
  c.trainer.row_lengths = (13,)
  c.trainer.rows_per_micro = 64
  c.trainer.total_steps = 100
  c.optimizer.learning_rate = 1e-4
  return c
