"""Groups of experiences for tests of the buffer."""

from __future__ import annotations

import dataclasses

import numpy as np

from trinity_jax.experience import Experience, ExperienceId, Source, StopReason


def experience(id, versions=(0, 0), reward=0.5, source=Source.ROLLOUT, late=False):
  """Two prompt tokens, then one action token per version; tokens tell ids apart."""
  id, n = ExperienceId(*id), len(versions)
  mask = np.array([False, False] + [True] * n)
  return Experience(
    tokens=np.array([id.batch, id.task, *range(id.run, id.run + n)]),
    action_mask=mask,
    logprobs=np.where(mask, -0.5 - id.step, 0),
    versions=np.array([-1, -1, *versions]),
    id=id,
    reward=None if late else reward,
    source=source,
    info={"awaits_reward": True} if late else {},
  )


def group(batch, task, size=2, versions=(0, 0), **kwargs):
  return [experience((batch, task, run, 0), versions, **kwargs) for run in range(size)]


def failed_group(batch, task, size=2):
  ids = [ExperienceId(batch, task, run, 0) for run in range(size)]
  return [Experience.failed(i, StopReason.ERROR, {}) for i in ids]


def content(experience):
  """All of it, comparable."""
  fields = dataclasses.asdict(experience)
  return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in fields.items()}


def ids(experiences):
  return [tuple(e.id)[:3] for e in experiences]


def keys(experiences):
  """The groups of experiences, in order."""
  return list(dict.fromkeys(e.id.group for e in experiences))
