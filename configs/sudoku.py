"""Sudokus of 4 x 4, a cell a turn, for a tiny model.

python launch/main.py --config=configs/sudoku.py --workdir=runs/sudoku

Boards with five empty cells and one solution (trinity_jax/tasks/sudoku.py), 200 of them held out.
The demonstrations of the SFT stage look at the row only 6 times out of 10, which solves 0.28 of the
held-out boards where it is done always. GRPO sees only whether the board was solved. Shows the
wiring: in this size it learns next to nothing (0.17 of the held-out boards after SFT, 0.195 after
GRPO, seed 0, 341 s of CPU).
"""

from trinity_jax.config import base_config

BOARDS = "trinity_jax.tasks.sudoku:generate"


def get_config():
  c = base_config()
  c.name = "sudoku"
  c.model.tiny = dict(hidden=64, layers=3, heads=4, kv_heads=2, head_dim=16, intermediate=192)
  c.taskset.generate = BOARDS
  c.taskset.workflow = "environment"
  c.sampler.max_prompt_length = 112  # of the fifth turn
  c.sampler.max_response_length = 4  # a move and the end of the message
  c.sampler.slots = 512
  c.sampler.prefill_batches = (128,)
  c.sampler.prompt_buckets = (20, 112)
  c.sampler.cache_buckets = (56, 116)
  c.eval.tasksets = (
    dict(
      name="held_out",
      generate=BOARDS,
      generate_args=dict(split="eval", blanks=5),
      workflow="environment",
    ),
  )
  c.trainer.row_lengths = (116,)
  c.stages = (
    {
      "name": "sft",
      "algorithm.name": "sft",
      "taskset.generate_args": dict(split="sft", blanks=5, careless_fraction=0.6),
      "taskset.messages_key": "messages",
      "trainer": dict(total_steps=600, batch_size=64, rows_per_micro=32, save_interval=200),
      "optimizer": dict(
        learning_rate=3e-3, schedule="cosine", warmup_steps=20, min_ratio=0.1, beta2=0.98
      ),
      "eval.interval": 200,
    },
    {
      "name": "grpo",
      "algorithm": dict(name="grpo", kl_coef=0.02),
      "taskset.generate_args": dict(split="rl", blanks=5),
      "explorer": dict(batch_size=64, group_size=8),
      "trainer": dict(total_steps=30, rows_per_micro=48, save_interval=10),
      "optimizer": dict(
        learning_rate=4e-4, schedule="linear", warmup_steps=5, min_ratio=0.1, beta2=0.98
      ),
      "eval.interval": 10,
    },
  )
  return c
