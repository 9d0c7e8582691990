"""The control experiment of a run: the same rewards, at random (algorithm.shuffle_rewards)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from trinity_jax.experience import Experience


def shuffled_rewards(experiences: Sequence[Experience], seed: int, step: int) -> list[Experience]:
  """The control experiment: the step's rewards, dealt out at random to its graded runs.

  All token logs of a run get the one that its last had; rewards of tokens and turns are left out.
  """
  rewards = {e.id[:3]: e.reward for e in experiences if e.reward is not None}  # the last one's
  runs = list(rewards)
  dealt = np.random.default_rng((seed, step)).permutation(len(runs))
  to = {run: rewards[runs[j]] for run, j in zip(runs, dealt)}
  return [_rewarded(e, to[e.id[:3]]) if e.reward is not None else e for e in experiences]


def _rewarded(e: Experience, reward: float) -> Experience:
  info = {k: v for k, v in e.info.items() if k != "step_reward"}
  return dataclasses.replace(e, reward=reward, token_rewards=None, info=info)
