"""The GSM8K pipeline on a laptop: real rows, a tiny random model, graded by math_verify.

python launch/main.py --config=configs/gsm8k_smoke.py --workdir=runs/gsm8k_smoke \
  --config.taskset.path=train.jsonl

20 steps in about 70 seconds on 2 CPU cores. The model is far too small to solve anything; the
format reward gives it a gradient. It shows that every hop works on real prompts.
"""

from trinity_jax.config import base_config


def get_config():
  c = base_config()
  c.name = "gsm8k_smoke"
  c.model.tiny = dict(
    hidden=128, layers=2, heads=4, kv_heads=2, head_dim=32, intermediate=256, max_positions=2048
  )
  c.taskset.path = "train.jsonl"
  c.taskset.prompt_key = "question"
  c.taskset.truth_key = "answer"
  c.taskset.reward = "math+format"
  c.explorer.batch_size = 8
  c.explorer.group_size = 8
  c.sampler.slots = 64
  c.sampler.prefill_batches = (8,)
  c.sampler.max_prompt_length = 1024
  c.sampler.max_response_length = 32
  c.sampler.prompt_buckets = (512, 1024)
  c.sampler.cache_buckets = (512, 1056)
  c.trainer.row_lengths = (528, 1056)
  c.trainer.rows_per_micro = 8
  c.trainer.total_steps = 20
  c.trainer.save_interval = 10
  c.optimizer.learning_rate = 1e-3
  c.algorithm.kl_coef = 0.001
  return c
