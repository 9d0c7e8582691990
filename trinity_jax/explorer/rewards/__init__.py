"""Reward functions: how good is a response, judged outside the model.

A reward function is `fn(response, truth, task, **args) -> float | {component: float}`; configs name
one, several ("math+format"), or a user's ("module:function").
"""

from trinity_jax.explorer.rewards.arithmetic import arithmetic_reward
from trinity_jax.explorer.rewards.boxed import accuracy_reward, boxed_reward
from trinity_jax.explorer.rewards.code import code_reward, code_reward_async
from trinity_jax.explorer.rewards.countdown import countdown_reward
from trinity_jax.explorer.rewards.dapo import dapo_reward, overlong_penalty, response_tokens
from trinity_jax.explorer.rewards.exact import exact_reward
from trinity_jax.explorer.rewards.format import format_reward
from trinity_jax.explorer.rewards.grader_pool import Grade, GraderPool
from trinity_jax.explorer.rewards.judge import Judge, NoVerdict
from trinity_jax.explorer.rewards.math import (
  grading_counts,
  math_reward,
  math_reward_async,
  math_rewards,
)
from trinity_jax.explorer.rewards.reward import (
  GroupRewardFn,
  Reward,
  RewardFn,
  Score,
  combine,
  make_reward,
  resolve,
)
from trinity_jax.explorer.rewards.rubric import rubric_reward
from trinity_jax.explorer.rewards.ruler import ruler_reward

__all__ = [
  "Grade",
  "GraderPool",
  "GroupRewardFn",
  "Judge",
  "NoVerdict",
  "Reward",
  "RewardFn",
  "Score",
  "accuracy_reward",
  "arithmetic_reward",
  "boxed_reward",
  "code_reward",
  "code_reward_async",
  "combine",
  "countdown_reward",
  "dapo_reward",
  "exact_reward",
  "format_reward",
  "grading_counts",
  "make_reward",
  "math_reward",
  "math_reward_async",
  "math_rewards",
  "overlong_penalty",
  "resolve",
  "response_tokens",
  "rubric_reward",
  "ruler_reward",
]
