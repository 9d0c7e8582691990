"""A tiny model learns to look things up instead of guessing.

python launch/main.py --config=configs/retrieval.py --workdir=runs/retrieval

Questions about made-up people (trinity_jax/tasks/facts.py) that only a search of their documents
answers, through the tool `search`. The demonstrations of the SFT stage guess 6 times out of 10,
always the same town. GRPO sees only whether the answer was right. Accuracy about people that nobody
asked for in training, with seed 0: 0.05 after SFT, 0.91 after GRPO (0.95 at step 5), in 2 min 30 s
of CPU time. The schema of the tool and the frame of a call are tokens of the tiny model's
vocabulary; for a model of your own raise sampler.max_prompt_length. Documents of your own: rows
with "corpus", a JSONL file with a "text" a line.
"""

from trinity_jax.config import base_config
from trinity_jax.tasks.facts import words

FACTS = "trinity_jax.tasks.facts:generate"


def get_config():
  c = base_config()
  c.name = "retrieval"
  c.model.tiny = dict(
    hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=192, words=words()
  )
  c.taskset.generate = FACTS
  c.taskset.workflow = "tool_use"
  c.taskset.reward = "exact"
  c.sampler.max_prompt_length = 112  # of the third turn
  c.sampler.max_response_length = 16  # a call and the end of the message
  c.sampler.slots = 256
  c.sampler.prefill_batches = (64,)
  c.sampler.prompt_buckets = (16, 32, 112)
  c.sampler.cache_buckets = (64, 128)
  c.eval.tasksets = (
    dict(
      name="held_out",
      generate=FACTS,
      generate_args=dict(split="eval"),
      workflow="tool_use",
      reward="exact",
    ),
  )
  c.trainer.row_lengths = (128,)
  c.stages = (
    {
      "name": "sft",
      "algorithm.name": "sft",
      "taskset.generate_args": dict(split="sft", guess_fraction=0.6),
      "taskset.messages_key": "messages",
      "trainer": dict(total_steps=600, batch_size=64, rows_per_micro=16, save_interval=100),
      "optimizer": dict(
        learning_rate=3e-3, schedule="cosine", warmup_steps=20, min_ratio=0.1, beta2=0.98
      ),
    },
    {
      "name": "grpo",
      "algorithm": dict(name="grpo", kl_coef=0.02),
      "taskset.generate_args": dict(split="rl"),
      "explorer": dict(batch_size=32, group_size=8),
      "trainer": dict(total_steps=20, rows_per_micro=16, save_interval=10),
      "optimizer": dict(learning_rate=5e-4, warmup_steps=3, beta2=0.98),
      "eval.interval": 5,
    },
  )
  return c
