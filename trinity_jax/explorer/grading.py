"""How responses are graded: one by one as runs end, or all of a task's at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from trinity_jax.experience import Task
from trinity_jax.explorer.rewards import Reward, Score

Grade = Callable[[str, Task], Awaitable[Score]]


class GroupGrade(NamedTuple):
  """Grades a group when its last run has ended: `scores(responses, task, tokens)`.

  `responses` are those of the runs that ended well, `tokens` how many the policy wrote for each.
  """

  scores: Callable[[Sequence[str], Task, Sequence[int]], Awaitable[Sequence[Score]]]


def grading(reward: Reward) -> Grade | GroupGrade:
  """How a reward grades runs: as a group where one of its functions compares them."""
  if reward.needs_group:
    return GroupGrade(
      lambda responses, task, tokens: reward.grade_group(responses, task.truth, task, tokens)
    )
  return lambda response, task: reward.grade(response, task.truth, task)
