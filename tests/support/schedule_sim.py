"""An explorer, a buffer and a trainer as sets of numbers: whoever may act next is drawn.

Every rule that is not the schedule's own is as simple as it can be: groups arrive in any order,
some never count, processes end and come back. Nothing here looks at a clock.
"""

from __future__ import annotations

import dataclasses
import random as random_module

from trinity_jax.schedule import Schedule

Versions = tuple[int, int]  # of a group's first and last token


class Deadlock(AssertionError):
  """Nobody may act and the run is not over."""


@dataclasses.dataclass(frozen=True)
class World:
  """What may happen beside the schedule's own events.

  Attributes:
    tasks: groups of a batch and of a train step.
    total: trainer steps to do.
    order: "id" (strictly by (batch, task)) or "ready" (any that arrived, smallest id first).
    failing: probability that a group that arrives never counts.
    straggling: probability that the newest group arrives next, and older ones go on waiting.
    stops: probability per event that the explorer or the trainer is killed.
    save: trainer steps between checkpoints.
    eager: (explorer, arrivals, trainer): odds of who acts when several may.
  """

  tasks: int = 1
  total: int = 8
  order: str = "id"
  failing: float = 0.0
  straggling: float = 0.0
  stops: float = 0.0
  save: int = 1
  eager: tuple[float, float, float] = (1.0, 1.0, 1.0)


class Simulation:
  """One random interleaving.

  Attributes:
    started_with: batch -> version it began with.
    lags: of every trained group's last token.
    stale: groups dropped for their age.
    ahead: most groups that were started, not dropped and not trained.
  """

  def __init__(self, schedule: Schedule, world: World, random: random_module.Random):
    self.schedule, self.world, self.random = schedule, world, random
    self.batch = self.trained = self.saved = 0  # explorer steps started, trainer steps done
    self.version = 0  # what the explorer samples from
    self.asked, self.rewound = False, False
    self.published = [0]
    self.flying: dict[tuple[int, int], Versions] = {}
    self.ready: dict[tuple[int, int], Versions] = {}
    self.gone: list[tuple[int, tuple[int, int], Versions, bool]] = []  # step, id, versions, used
    self.failed = 0
    self.started_with: dict[int, int] = {}
    self.lags: list[int] = []
    self.stale = self.ahead = self.events = 0

  @property
  def dropped_batches(self) -> int:
    return -(-(self.failed + self.stale) // self.world.tasks)

  # --- who may act -------------------------------------------------------------------------------

  def may_start(self) -> bool:
    return self.published[-1] >= self.schedule.needs(self.batch + 1, self.dropped_batches)

  def due(self) -> list[tuple[int, int]]:
    """The next step's groups; fewer than it needs when it has to wait."""
    if self.world.order == "ready":
      return sorted(self.ready)[: self.world.tasks]
    first = sorted([*self.ready, *self.flying])[: self.world.tasks]
    return first if all(g in self.ready for g in first) else []

  def run(self) -> Simulation:
    w, limit = self.world, 400 * (self.world.total + 4) * self.world.tasks
    while self.trained < w.total:
      self.events += 1
      assert self.events < limit, f"no end in sight: {self.describe()}"
      self._drop_stale()
      self.asked |= self.schedule.asks(self.batch + 1)
      due = self.due()
      able = (self.may_start(), bool(self.flying), len(due) == w.tasks)
      odds = [e if a else 0.0 for e, a in zip(w.eager, able)]
      if not any(able):
        raise Deadlock(self.describe())
      if w.stops and self.random.random() < w.stops:
        (self.kill_explorer if self.random.random() < 0.5 else self.kill_trainer)()
        continue
      who = self.random.choices((0, 1, 2), odds)[0]
      if who == 0:
        self.start()
      elif who == 1:
        self.arrive()
      else:
        self.train(due)
    return self

  def describe(self) -> str:
    return (
      f"{self.schedule} {self.world}: batch {self.batch}, trained {self.trained}, published "
      f"{self.published[-1]}, flying {sorted(self.flying)}, ready {sorted(self.ready)}, "
      f"dropped {self.failed} + {self.stale}"
    )

  # --- what they do ------------------------------------------------------------------------------

  def _meant(self, batch: int) -> int:
    s = self.schedule
    version = s.version_for(
      batch, self.published[-1], current=self.version, dropped_batches=self.dropped_batches
    )
    # After a resume the version meant may be gone, then the newest.
    return version if version in self.published else self.published[-1]

  def start(self) -> None:
    self.batch += 1
    self.version = self.started_with[self.batch] = self._meant(self.batch)
    for task in range(self.world.tasks):
      self.flying[self.batch, task] = (self.version, self.version)
    self.ahead = max(self.ahead, len(self.flying) + len(self.ready))

  def arrive(self) -> None:
    r = self.random
    names = list(self.flying)
    group = names[-1] if r.random() < self.world.straggling else r.choice(names)
    versions = self.flying.pop(group)
    if r.random() < self.world.failing:
      self.failed += 1
    else:
      self.ready[group] = versions

  def _drop_stale(self) -> None:
    step = self.trained + 1
    for group, versions in list(self.ready.items()):
      if self.schedule.drops(versions[1], step):
        self.gone.append((step, group, self.ready.pop(group), False))
        self.stale += 1

  def train(self, due: list[tuple[int, int]]) -> None:
    self.trained += 1
    for group in due:
      versions = self.ready.pop(group)
      self.lags.append(self.trained - 1 - versions[1])
      self.gone.append((self.trained, group, versions, True))
    if self.schedule.publishes(self.trained, self.asked) or self.trained == self.world.total:
      self.asked = False
      self.published = [*self.published, self.trained][-self.schedule.max_lag - 1 :]
      if self.schedule.swaps_midway:
        self.version = self.trained
        for group, (first, _) in self.flying.items():
          if self.random.random() < 0.5:  # else its last token has been sampled
            self.flying[group] = (first, self.trained)
    if self.trained % self.world.save == 0:
      self.saved = self.trained

  def kill_explorer(self) -> None:
    """Its groups are sampled again, by the newest weights that their batch may have."""
    self.version = self.published[-1]
    for group in self.flying:
      version = self._meant(group[0])
      self.flying[group] = (version, version)

  def kill_trainer(self) -> None:
    """Comes back from its checkpoint: what later steps used or dropped is there again."""
    self.rewound = True
    self.trained, self.published = self.saved, [self.saved]
    for step, group, versions, used in self.gone:
      if step > self.saved:
        self.ready[group] = versions
        self.stale -= not used
    self.gone = [entry for entry in self.gone if entry[0] <= self.saved]


def timeline(schedule: Schedule, explore: float, train: float, steps: int) -> tuple[str, str]:
  """(explorer's, trainer's) line when a step takes them this long, up to trainer step `steps`.

  The explorer's line has [v] where it takes version v; the trainer's has [sync] where it
  publishes and a dot where it waits for a batch. The explorer's batches do not overlap.
  """
  explorer, trainer = [], ["."]
  batch = done = trained = newest = current = 0
  exploring = training = asked = False
  ends: list[tuple[float, str]] = []
  now = 0.0
  while trained < steps:
    if not training and done > trained:
      training = True
      ends.append((now + train, "a trainer"))  # at one instant it comes before the explorer
    asked |= not exploring and schedule.asks(batch + 1)
    if not exploring and newest >= schedule.needs(batch + 1):
      batch, exploring = batch + 1, True
      takes = schedule.version_for(batch, newest, current=current)
      explorer += [f"[{takes}]"] if takes != current else []
      explorer, current = [*explorer, str(batch)], takes
      ends.append((now + explore, "explorer"))
    event = min(ends)
    ends.remove(event)
    now = event[0]
    if event[1] == "explorer":
      exploring, done = False, done + 1
      continue
    training, trained = False, trained + 1
    trainer.append(str(trained))
    if schedule.publishes(trained, asked):
      trainer.append("[sync]")
      newest, asked = trained, False
    if done == trained:
      trainer.append(".")
  return " ".join(explorer), " ".join(trainer).removesuffix(" .")
