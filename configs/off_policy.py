"""What rollouts of older policies do to learning, on the quickstart's task.

python launch/main.py --config=configs/off_policy.py --workdir=runs/tis8 \
  --config.model.path=runs/quickstart/sft/hf

runs TIS at a staleness of 8, configs/off_policy.py:ppo,16 the loss and staleness named so. The
whole study, with a plot:

python launch/study.py staleness --workdir=runs/study

40 steps of 32 tasks x 8 runs, each in 2 updates; every batch was sampled by the policy that was the
newest one `staleness` steps earlier. All losses see equally many samples. Advantages are GRPO's, so
that the losses differ in nothing but what they do about the age of the data.

Predicted before it was run: without staleness all four learn alike. The plain gradient gets worse
with staleness and falls below where it began at 16. PPO's clip stays stable at any staleness, but
learns less at 16, for what has moved out of the clip range teaches nothing. TIS and decoupled PPO
lose little up to 8; at 16 decoupled PPO is the better of the two, as it does not cut weights and
steps with one and the same ratio.
"""

from trinity_jax.config import base_config
from trinity_jax.errors import UserError

SUMS = "trinity_jax.tasks.arithmetic:generate"
LOSSES = {
  "plain": dict(policy_loss="reinforce"),
  "ppo": dict(policy_loss="ppo"),
  "tis": dict(policy_loss="reinforce", correction="token_tis"),
  "decoupled": dict(policy_loss="ppo", correction="token_tis", proximal="recompute"),
}
STALENESS = (0, 2, 8, 16)


def get_config(which="tis,8"):
  loss, _, lag = which.partition(",")
  if loss not in LOSSES or not lag.isdigit():
    raise UserError(f"off_policy.py:{which}: expected LOSS,STALENESS with {', '.join(LOSSES)}")
  c = base_config()
  c.name = f"off-policy-{loss}-{lag}"
  c.algorithm.name = "grpo"
  c.algorithm.kl_coef = 0.0
  c.algorithm.update(LOSSES[loss])
  c.sync.offset, c.sync.allow_uncorrected = int(lag), True
  c.taskset.generate, c.taskset.generate_args = SUMS, dict(split="rl")
  c.taskset.reward = "arithmetic"
  c.explorer.batch_size, c.explorer.group_size = 32, 8
  c.sampler.max_prompt_length, c.sampler.max_response_length = 9, 4
  c.sampler.slots = 256
  c.sampler.prefill_batches, c.sampler.prompt_buckets = (32,), (9,)
  c.sampler.cache_buckets = (13,)
  c.trainer.row_lengths, c.trainer.rows_per_micro = (13,), 128
  c.trainer.total_steps, c.trainer.minibatches, c.trainer.save_interval = 40, 2, 40
  c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.beta2 = 4e-4, 3, 0.98
  c.eval.on_start = False
  c.eval.tasksets = (
    dict(name="held_out", generate=SUMS, generate_args=dict(split="eval"), reward="arithmetic"),
  )
  return c
