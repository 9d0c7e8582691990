"""GRPO on GSM8K with Qwen2.5-1.5B-Instruct, the settings of Trinity-RFT's grpo_gsm8k example.

python launch/main.py --config=configs/gsm8k_grpo.py --workdir=runs/gsm8k \
  --config.model.path=MODEL_FOLDER --config.taskset.path=train.jsonl

MODEL_FOLDER is a downloaded Qwen/Qwen2.5-1.5B-Instruct, train.jsonl the rows of openai/gsm8k
(fields question, answer). One epoch is 78 steps of 96 tasks x 8 runs. Never run so far: it needs
accelerators, so there is no run time and no curve to compare with yet.
"""

from trinity_jax.config import base_config

SYSTEM = (
  "You are a helpful assistant that solves math problems. Think step by step, then give the final "
  "answer inside \\boxed{}."
)


def get_config():
  c = base_config()
  c.name = "gsm8k_grpo"
  c.model.path = "Qwen2.5-1.5B-Instruct"
  c.model.dtype = "bfloat16"
  c.model.remat = "full"
  c.model.unroll = 1
  c.mesh.fsdp = -1
  c.mesh.data = 1
  c.taskset.path = "train.jsonl"
  c.taskset.prompt_key = "question"
  c.taskset.truth_key = "answer"
  c.taskset.system_prompt = SYSTEM
  c.taskset.reward = "math+format"
  c.taskset.reward_args = dict(format=0.1)
  c.explorer.batch_size = 96
  c.explorer.group_size = 8
  c.sampler.slots = 256
  c.sampler.max_prompt_length = 512
  c.sampler.max_response_length = 1024
  c.algorithm.name = "grpo"
  c.algorithm.kl_coef = 0.001
  c.optimizer.learning_rate = 1e-5
  c.trainer.total_steps = 78
  c.trainer.rows_per_micro = 16
  c.trainer.save_interval = 20
  return c
