"""Advantages: how much better an action was than expected.

An advantage names the arrays it reads as positional parameters and its hyper-parameters as
keyword-only ones, sees the whole optimizer step before it is split, and returns `(advantages,
stats)`: one number per sequence ([N]), or, from functions that work token by token, one per token
(arrays of two or more axes). `to_tokens` turns both into token advantages.

One file per idea: group.py (GRPO), baselines.py (reward less a baseline), returns.py (token by
token), steps.py (runs of several sequences), distillation.py, entropy_clip.py.
"""

from __future__ import annotations

from trinity_jax.algorithms.advantages.baselines import (
  asymre,
  constant,
  maxrl,
  opmd,
  opo,
  raft,
  rec,
  reinforce,
  remax,
  rloo,
)
from trinity_jax.algorithms.advantages.common import (
  GroupStatistics,
  advantage_stats,
  group_statistics,
  to_tokens,
)
from trinity_jax.algorithms.advantages.distillation import jsd, on_policy_distill
from trinity_jax.algorithms.advantages.entropy_clip import clipb, clipv
from trinity_jax.algorithms.advantages.group import grpo
from trinity_jax.algorithms.advantages.returns import (
  gae,
  reinforce_plus_plus,
  reinforce_plus_plus_baseline,
  value_targets,
)
from trinity_jax.algorithms.advantages.steps import gigpo, step_wise_grpo

__all__ = [
  "ADVANTAGES",
  "GroupStatistics",
  "advantage_stats",
  "asymre",
  "clipb",
  "clipv",
  "constant",
  "gae",
  "gigpo",
  "group_statistics",
  "grpo",
  "jsd",
  "maxrl",
  "on_policy_distill",
  "opmd",
  "opo",
  "raft",
  "rec",
  "reinforce",
  "reinforce_plus_plus",
  "reinforce_plus_plus_baseline",
  "remax",
  "rloo",
  "step_wise_grpo",
  "to_tokens",
  "value_targets",
]

ADVANTAGES = {
  "grpo": grpo,
  "step_wise_grpo": step_wise_grpo,
  "gigpo": gigpo,
  "gae": gae,
  "ppo": gae,
  "reinforce++": reinforce_plus_plus,
  "reinforce++_baseline": reinforce_plus_plus_baseline,
  "reinforceplusplus": reinforce_plus_plus,
  "rloo": rloo,
  "reinforce": reinforce,
  "remax": remax,
  "opmd": opmd,
  "asymre": asymre,
  "rec": rec,
  "on_policy_distill": on_policy_distill,
  "jsd": jsd,
  "clipb": clipb,
  "clipv": clipv,
  "maxrl": maxrl,
  "opo": opo,
  "raft": raft,
  "constant": constant,
}
