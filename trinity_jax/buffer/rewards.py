"""Rewards that come after their group: one experience at a time."""

from __future__ import annotations

import dataclasses
import math

from trinity_jax.buffer.record import awaits_reward
from trinity_jax.errors import UserError
from trinity_jax.experience import Experience


def rewarded(experience: Experience, reward: float) -> Experience | None:
  """The experience with its reward; None when it has that very reward already.

  Raises:
    UserError: it does not wait for a reward, has another one, or the reward is not finite.
  """
  reward = float(reward)
  if not math.isfinite(reward):
    raise UserError(f"reward for experience {experience.id}: {reward} is not a finite number")
  if not awaits_reward(experience):
    if experience.reward == reward and "awaits_reward" in experience.info:
      return None
    raise UserError(
      f"reward {reward} for experience {experience.id}: it does not wait for one (its reward is "
      f'{experience.reward}); set info["awaits_reward"] = True on experiences whose reward is late'
    )
  return dataclasses.replace(
    experience, reward=reward, info={**experience.info, "awaits_reward": False}
  )
