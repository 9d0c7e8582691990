"""A tiny model learns to use its tool instead of guessing.

python launch/main.py --config=configs/tool_use.py --workdir=runs/tool_use

Products of two numbers (trinity_jax/tasks/products.py), with a calculator; with
--config=configs/tool_use.py:python it writes programs, which run in the sandbox. The demonstrations
of the SFT stage answer from memory, wrongly, 6 times out of 10. GRPO sees only whether the answer
was right.
"""

from trinity_jax.config import base_config

PRODUCTS = "trinity_jax.tasks.products:generate"


def get_config(tool="calculator"):
  c = base_config()
  c.name = "tool_use"
  c.model.tiny = dict(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=192)
  c.taskset.generate = PRODUCTS
  c.taskset.workflow = "tool_use"
  c.taskset.reward = "exact"
  c.sampler.max_prompt_length = 448  # of the third turn; the tool's schema alone takes 280 tokens
  c.sampler.max_response_length = 64  # a call and the end of the message
  c.sampler.slots = 128
  c.sampler.prefill_batches = (32,)
  c.sampler.prompt_buckets = (48, 304, 448)
  c.sampler.cache_buckets = (376, 512)
  c.eval.tasksets = (
    dict(
      name="held_out",
      generate=PRODUCTS,
      generate_args=dict(split="eval", tool=tool),
      workflow="tool_use",
      reward="exact",
    ),
  )
  c.trainer.row_lengths = (512,)
  c.stages = (
    {
      "name": "sft",
      "algorithm.name": "sft",
      "taskset.generate_args": dict(split="sft", tool=tool, guess_fraction=0.6),
      "taskset.messages_key": "messages",
      "trainer": dict(total_steps=400, batch_size=48, rows_per_micro=16, save_interval=100),
      "optimizer": dict(
        learning_rate=3e-3, schedule="cosine", warmup_steps=20, min_ratio=0.1, beta2=0.98
      ),
    },
    {
      "name": "grpo",
      "algorithm": dict(name="grpo", kl_coef=0.02),
      "taskset.generate_args": dict(split="rl", tool=tool),
      "explorer": dict(batch_size=16, group_size=8),
      "trainer": dict(total_steps=30, rows_per_micro=16, save_interval=10),
      "optimizer": dict(learning_rate=5e-4, warmup_steps=3, beta2=0.98),
      "eval.interval": 10,
    },
  )
  return c
