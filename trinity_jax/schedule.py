"""Who may go on: a pure object, tested without a model.

Steps count from 1. Version v is the policy after v trainer steps; version 0 is the start.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The `fixed` timelines of Trinity-RFT (arXiv 2505.17826, section 2.1).

  The explorer runs `offset` steps before it first needs new weights, then pulls them every
  `interval` steps: interval 2, offset 1 is explorer `1 2 3 [sync] 4 5 [sync]` and trainer
  `. 1 2 [sync] 3 4 [sync]`. interval 1, offset 0 is on-policy; interval 1, offset 1 one-step-off.
  """

  interval: int = 1
  offset: int = 0

  def version_for(self, explorer_step: int) -> int:
    """The version that explorer step's rollouts sample from (they wait until it exists)."""
    done = explorer_step - 1  # steps explored before this one
    return max(0, done - self.offset) // self.interval * self.interval

  def publishes(self, trainer_step: int) -> bool:
    """True when the trainer publishes its weights after this step."""
    return trainer_step % self.interval == 0

  @property
  def max_lag(self) -> int:
    """Most trainer steps between a rollout's version and the step that trains on it."""
    return self.offset + self.interval - 1

  @property
  def max_steps_ahead(self) -> int:
    """Most explorer steps whose experiences exist before the trainer has taken them."""
    return self.offset + self.interval
