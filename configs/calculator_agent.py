"""An agent written for OpenAI's API learns to use its calculator.

python launch/main.py --config=configs/calculator_agent.py --workdir=runs/calculator_agent

The agent (trinity_jax/explorer/workflows/calculator_agent.py) knows nothing but the openai package:
it streams, calls a tool, reads the result and answers, over the server that runs beside the
sampler. The demonstrations of the SFT stage ask for a sum in 6 of 10 questions for a difference, so
that imitation gets little more than the sums right. GRPO sees only whether the answer was right.
Held-out accuracy with seed 0: 0.57 after SFT, 0.98 after GRPO (0.83 at step 5), in 5 min 30 s of
CPU time. The tool's schema and the frame of a call are tokens of the tiny model's vocabulary.
"""

from trinity_jax.config import base_config
from trinity_jax.tasks.tool_sums import words

SUMS = "trinity_jax.tasks.tool_sums:generate"


def get_config():
  c = base_config()
  c.name = "calculator_agent"
  c.model.tiny = dict(
    hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=192, words=words()
  )
  c.taskset.generate = SUMS
  c.taskset.workflow = "calculator_agent"
  c.sampler.max_prompt_length = 56  # of the third turn
  c.sampler.max_response_length = 8  # a call and the end of the message
  c.sampler.slots = 256
  c.sampler.prefill_batches = (64,)
  c.sampler.prompt_buckets = (16, 56)
  c.sampler.cache_buckets = (32, 64)
  c.eval.tasksets = (
    dict(
      name="held_out", generate=SUMS, generate_args=dict(split="eval"), workflow="calculator_agent"
    ),
  )
  c.trainer.row_lengths = (64,)
  c.stages = (
    {
      "name": "sft",
      "algorithm.name": "sft",
      "taskset.generate_args": dict(split="sft", wrong_fraction=0.6),
      "taskset.messages_key": "messages",
      "trainer": dict(total_steps=600, batch_size=64, rows_per_micro=24, save_interval=200),
      "optimizer": dict(
        learning_rate=2e-3, schedule="cosine", warmup_steps=20, min_ratio=0.1, beta2=0.98
      ),
      "eval.interval": 200,
    },
    {
      "name": "grpo",
      "algorithm": dict(name="grpo", kl_coef=0.02),
      "taskset.generate_args": dict(split="rl"),
      "explorer": dict(batch_size=32, group_size=8),
      "trainer": dict(total_steps=20, rows_per_micro=32, save_interval=10),
      "optimizer": dict(
        learning_rate=4e-4, schedule="linear", warmup_steps=3, min_ratio=0.1, beta2=0.98
      ),
      "eval.interval": 5,
    },
  )
  return c
