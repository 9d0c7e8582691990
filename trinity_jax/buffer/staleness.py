"""Tokens whose policy is too old to train on: pure functions of experiences.

The lag of a token in trainer step t is t - 1 - version: step t trains policy t - 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from trinity_jax.experience import Experience, Source

NEVER = 2**31 - 1  # a version that no bound reaches
SHORT = -(2**31)  # below every bound: of a group that is dropped when its turn comes


def policy_version(group: Sequence[Experience]) -> int:
  """The newest version that wrote an action token of the group; -1 without any."""
  return max((_newest(e) for e in group), default=-1)


def newest_version(group: Sequence[Experience]) -> int:
  """The bound `oldest` above which nothing of the group is left to train on.

  NEVER for a group that cannot become stale: one with a demonstration, or one whose runs all
  failed (it had no action token from the start and still completes its step).
  """
  acting = [e for e in group if e.num_actions]
  if not acting or any(e.source is not Source.ROLLOUT for e in acting):
    return NEVER
  return policy_version(acting)


def _newest(experience: Experience) -> int:
  return int(experience.versions[experience.action_mask].max(initial=-1))


def mask_stale(experience: Experience, oldest: int | None) -> tuple[Experience, int]:
  """Takes action tokens of versions before `oldest` out of training.

  Returns:
    The experience (the same object when nothing is stale) with action_mask False, log-prob 0 and
    version -1 at those tokens, and how many there were. Demonstrations are never stale.
  """
  if oldest is None or experience.source is not Source.ROLLOUT:
    return experience, 0
  stale = experience.action_mask & (experience.versions < oldest)
  count = int(stale.sum())
  if not count:
    return experience, 0
  masked = dataclasses.replace(
    experience,
    action_mask=experience.action_mask & ~stale,
    logprobs=np.where(stale, np.float32(0), experience.logprobs),
    versions=np.where(stale, np.int32(-1), experience.versions),
  )
  return masked, count


def mask_group(group: Sequence[Experience], oldest: int | None) -> tuple[list[Experience], int]:
  """`mask_stale` of each, and the tokens masked in all."""
  pairs = [mask_stale(e, oldest) for e in group]
  return [e for e, _ in pairs], sum(n for _, n in pairs)
