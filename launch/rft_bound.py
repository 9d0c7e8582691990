"""The least time that rollouts and training can need: a discrete-event bound without overhead.

The model. A trace says how long each group's rollout takes. Groups start in the order of the
trace (nobody knows beforehand who will take long), at most `slots` at once, each once. Train step
t takes `train` seconds and as many finished groups as a batch has; version t exists the moment it
ends. No group may start before its batch is admitted: batch e not before version e - 1 - S, for S
the declared staleness (what Schedule.needs says at interval 1). Putting, sampling, publishing,
taking weights and generating cost nothing.

  in order      step t trains exactly batch t. S = 0 is on-policy, S = 1 one-step-off. No token is
                ever older than S.
  in any order  step t trains any finished groups; stragglers are carried over. Weights are taken in
                the middle of rollouts, so a group's last token is as new as its end, and trained
                oldest first it is never older than S; a straggler's first tokens may be, and do
                not count (`Bound.masked`).

Nothing that keeps to this can be faster, and doing everything as soon as it may be done reaches
it: earlier starts make earlier ends, of groups, hence of steps, hence of versions, hence again of
starts. The tests compare with every possible schedule of small cases.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Bound:
  """An ideal run.

  Attributes:
    starts, ends: seconds at which each group's rollout starts and ends; [groups started].
    steps: seconds at which each train step ends; [steps].
    taken: for each step, the groups (indices in the order of the trace) that it trains.
    train: seconds of a train step.
    staleness: S.
  """

  starts: list[float]
  ends: list[float]
  steps: list[float]
  taken: list[list[int]]
  train: float
  staleness: int

  @property
  def seconds(self) -> float:
    return self.steps[-1]

  @property
  def trainer_idle(self) -> float:
    """Share of the time in which the trainer waits."""
    return 1 - len(self.steps) * self.train / self.seconds

  def masked(self, turns: int) -> float:
    """Share of tokens that are too old when trained, if a group writes one at each of its turns.

    Args:
      turns: of a group, at equal distances; the last is its end.
    """
    late = 0
    for step, groups in enumerate(self.taken, 1):
      oldest = step - 1 - self.staleness
      since = self.steps[oldest - 1] if oldest > 0 else 0.0
      for start, end in ((self.starts[i], self.ends[i]) for i in groups):
        late += sum(start + (end - start) * k / turns < since for k in range(1, turns + 1))
    return late / (turns * sum(map(len, self.taken)))

  @property
  def lag(self) -> float:
    """Mean over trained groups of the trainer steps between their first token and training."""
    versions = lambda at: bisect.bisect_right(self.steps, at)
    lags = [t - 1 - versions(self.starts[i]) for t, g in enumerate(self.taken, 1) for i in g]
    return sum(lags) / len(lags)


def bound(
  trace: Sequence[Sequence[float]],
  train: float,
  steps: int,
  staleness: int,
  *,
  in_order: bool,
  slots: int | None = None,
) -> Bound:
  """Returns the fastest run.

  Args:
    trace: seconds of each group, [batches][tasks]; at least `steps` batches.
    train: seconds of a train step.
    steps: train steps.
    staleness: S.
    in_order: whether step t trains batch t; else any finished groups.
    slots: most groups under way at once; None: any number.
  """
  tasks = len(trace[0])
  seconds = [s for batch in trace for s in batch]
  if len(trace) < steps:
    raise ValueError(f"a trace of {len(trace)} batches cannot feed {steps} steps")
  versions = [0.0]  # when each exists
  starts: list[float] = []
  ends: list[float] = []
  ready: list[tuple[float, int]] = []  # by end, in any order: not yet trained
  busy = [0.0] * slots if slots else []  # when each slot is free
  taken = []
  for step in range(1, steps + 1):
    for i in range(len(starts), min(tasks * (step + staleness), len(seconds))):
      start = versions[max(0, i // tasks - staleness)]
      if slots:
        start = max(start, busy[0])
        heapq.heapreplace(busy, start + seconds[i])
      starts.append(start)
      ends.append(start + seconds[i])
      bisect.insort(ready, (ends[i], i))
    last = (step - 1) * tasks
    if in_order:
      groups = list(range(last, last + tasks))
      begin = max(versions[-1], *(ends[i] for i in groups))
    else:
      begin = max(versions[-1], ready[tasks - 1][0])
      groups = sorted(i for end, i in ready if end <= begin)[:tasks]
    mine = set(groups)
    ready = [entry for entry in ready if entry[1] not in mine]
    taken.append(groups)
    versions.append(begin + train)
  return Bound(starts, ends, versions[1:], taken, train, staleness)
