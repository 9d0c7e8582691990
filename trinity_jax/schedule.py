"""Who may go on: a pure object without clocks, tested without a model.

Steps count from 1. Version v is the policy after v trainer steps; version 0 is the start. Trainer
step t trains version t - 1 on as many groups as one explorer step (a batch) starts, so when groups
are trained in order, batch e is trained by step e. The lag of a token is t - 1 - its version.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from trinity_jax.config_schema import SyncConfig
from trinity_jax.errors import UserError, suggestion

STYLES = ("fixed", "trainer_driven", "explorer_driven", "fully_async")


@dataclasses.dataclass(frozen=True)
class Schedule:
  """When rollouts start, which weights they sample from, and what is too old to train on.

  One rule admits a batch in every style: its tokens must not be older than `max_lag` when its turn
  to be trained comes. (AReaL's bound, arXiv 2505.24298, section 5.1, per batch.) Groups that
  arrive after their turn (stragglers are carried over, nothing is drained) may be older by then;
  `drops` says which of their tokens no longer count.

  fixed: the timelines of Trinity-RFT (arXiv 2505.17826, section 2.1). The explorer runs `offset`
    steps before it first needs new weights, then takes them every `interval` steps: interval 2,
    offset 1 is explorer `1 2 3 [sync] 4 5 [sync]` and trainer `. 1 2 [sync] 3 4 [sync]`. interval
    1, offset 0 is on-policy; interval 1, offset 1 one-step-off. What a batch samples from does not
    depend on who is faster.
  trainer_driven: the trainer publishes every `interval` steps; each batch takes the newest.
  explorer_driven: the explorer asks every `interval` of its steps (`asks`), takes the newest and
    keeps it until it asks again; the trainer publishes when somebody asked. Who asks does not wait
    for the answer unless what there is would be too old for the steps until the next time.
  fully_async: as trainer_driven, and weights are taken the moment they exist, in the middle of
    rollouts too; one response then has tokens of several versions.

  Attributes:
    interval: trainer steps (explorer_driven: explorer steps) between weights.
    offset: explorer steps that are run ahead.
    style: one of STYLES.
    max_staleness: most lag of a token that is trained on; None is the least that the style can
      keep up without waiting for the trainer more than `interval` and `offset` say:
      interval + offset - 1 for fixed, whose batches wait for exactly the version they are meant to
      have. The others take what there is when a batch starts, while the trainer is still busy with
      a step: one more, or a batch could never start beside a train step at offset 0. Where it is
      given, it is the bound of the styles other than fixed, whatever the offset.

  Raises:
    UserError: a value out of range, or a max_staleness under which nothing could be trained.
  """

  interval: int = 1
  offset: int = 0
  style: str = "fixed"
  max_staleness: int | None = None

  def __post_init__(self):
    if self.style not in STYLES:
      raise UserError(
        f"config.sync.style = {self.style!r}: no such style{suggestion(self.style, STYLES)}"
      )
    for name, low in (("interval", 1), ("offset", 0)):
      if getattr(self, name) < low:
        raise UserError(
          f"config.sync.{name} = {getattr(self, name)}: expected at least {low}; raise it"
        )
    ahead = self.offset if self.style in ("fixed", "explorer_driven") else 0
    least = self.interval - 1 + ahead
    if self.max_staleness is not None and self.max_staleness < least:
      raise UserError(
        f"config.sync.max_staleness = {self.max_staleness}: sync.style {self.style} with interval "
        f"{self.interval} and offset {self.offset} gives tokens up to {least} versions old; "
        f"expected at least {least}; raise it, or lower the interval or the offset"
      )

  @property
  def _natural(self) -> int:
    return self.interval + self.offset - (self.style == "fixed")

  @property
  def max_lag(self) -> int:
    """Most trainer steps between a trained token's version and the policy that is trained."""
    return self._natural if self.max_staleness is None else self.max_staleness

  @property
  def max_steps_ahead(self) -> int:
    """Most explorer steps that are started and not yet trained.

    In groups: this many times tasks per step, plus less than one step while groups were dropped.
    """
    return (self._natural if self.style == "fixed" else self.max_lag) + 1

  @property
  def swaps_midway(self) -> bool:
    """True when new weights go to the sampler while rollouts are under way."""
    return self.style == "fully_async"

  # --- the explorer ------------------------------------------------------------------------------

  def needs(self, batch: int, dropped_batches: int = 0) -> int:
    """The lowest version that must exist before explorer step `batch` may start.

    Args:
      batch: explorer step.
      dropped_batches: groups that will never be trained (too old, filtered), in steps, rounded
        up: later batches take their turns. Rounded down, the trainer could wait for the rest of
        a step and the explorer for the trainer.
    """
    if self.style == "explorer_driven":  # what it takes lasts until it asks again
      periods = max(0, batch - 1 - self.offset) // self.interval
      last = self.offset + (periods + 1) * self.interval
      return max(0, last - dropped_batches - self.max_steps_ahead)
    least = batch - dropped_batches - self.max_steps_ahead
    # Only multiples of the interval are published.
    return max(0, -(-least // self.interval) * self.interval)

  def asks(self, batch: int) -> bool:
    """True when the explorer looks for newer weights before explorer step `batch`.

    explorer_driven: as soon as it comes to that step, whether it may start or not.
    """
    if self.style in ("trainer_driven", "fully_async"):
      return True
    done = batch - 1
    return done > self.offset and (done - self.offset) % self.interval == 0

  def version_for(
    self,
    batch: int,
    newest: int | None = None,
    *,
    current: int | None = None,
    dropped_batches: int = 0,
  ) -> int:
    """The version that an explorer step's rollouts begin with.

    Args:
      newest: the newest published version; `fixed` does not look at it.
      current: what the explorer samples from; explorer_driven keeps it between asks.
    """
    needed = self.needs(batch, dropped_batches)
    if self.style == "fixed":
      return needed
    if newest is None:
      raise ValueError(f"{self.style}: the version of a batch depends on the newest one")
    if self.style == "explorer_driven" and current is not None and not self.asks(batch):
      return current if current >= needed else newest
    return newest

  # --- the trainer -------------------------------------------------------------------------------

  def publishes(self, trainer_step: int, asked: bool = False) -> bool:
    """True when the trainer publishes its weights after this step.

    Args:
      asked: an explorer has asked since the last publication (explorer_driven only). Unasked, it
        still publishes often enough that no batch it waits for lacks weights: an explorer that
        came to ask while the trainer waits for its batch would have no answer.
    """
    if self.style == "explorer_driven":
      return asked or trainer_step % (self.max_lag - self.interval + 2) == 0
    return trainer_step % self.interval == 0

  def drops(self, version: Any, trainer_step: int) -> Any:
    """True when a token of this version is too old for this trainer step.

    Args:
      version: int or array of ints; the result is a bool or an array of them.
    """
    return trainer_step - 1 - version > self.max_lag


def make_schedule(sync: SyncConfig) -> Schedule:
  """The schedule of config.sync."""
  staleness = None if sync.max_staleness < 0 else sync.max_staleness
  return Schedule(sync.interval, sync.offset, sync.style, staleness)
