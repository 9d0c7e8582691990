"""Timelines, simulated event by event without a model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_jax.schedule import Schedule


def explorer_line(schedule: Schedule, steps: int) -> str:
  out, version = [], 0
  for step in range(1, steps + 1):
    if schedule.version_for(step) != version:
      version = schedule.version_for(step)
      out.append("[sync]")
    out.append(str(step))
  return " ".join(out)


def trainer_line(schedule: Schedule, steps: int) -> str:
  return " ".join(f"{t} [sync]" if schedule.publishes(t) else str(t) for t in range(1, steps + 1))


@pytest.mark.parametrize(
  ("interval", "offset", "explorer", "trainer"),
  [
    # The feature map's own example.
    (2, 1, "1 2 3 [sync] 4 5 [sync] 6", "1 2 [sync] 3 4 [sync] 5 6 [sync]"),
    (1, 0, "1 [sync] 2 [sync] 3 [sync] 4", "1 [sync] 2 [sync] 3 [sync] 4 [sync]"),
    (1, 1, "1 2 [sync] 3 [sync] 4 [sync] 5", "1 [sync] 2 [sync] 3 [sync] 4 [sync] 5 [sync]"),
    (3, 0, "1 2 3 [sync] 4 5 6 [sync] 7", "1 2 3 [sync] 4 5 6 [sync] 7"),
    (2, 3, "1 2 3 4 5 [sync] 6 7 [sync] 8", "1 2 [sync] 3 4 [sync] 5 6 [sync] 7 8 [sync]"),
  ],
)
def test_exact_timelines(interval, offset, explorer, trainer):
  schedule = Schedule(interval, offset)
  assert explorer_line(schedule, int(explorer.split()[-1])) == explorer
  assert trainer_line(schedule, int(trainer.replace("[sync]", "").split()[-1])) == trainer


@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 200))
def test_it_syncs_where_trinitys_explorer_does(interval, offset, steps):
  """need_sync after a step: step > offset and (step - offset) % interval == 0."""
  schedule = Schedule(interval, offset)
  for step in range(1, steps):
    syncs = schedule.version_for(step + 1) != schedule.version_for(step)
    assert syncs == (step > offset and (step - offset) % interval == 0)


class Simulation:
  """Explorer and trainer take their next step whenever they may; who goes first is drawn."""

  def __init__(self, schedule: Schedule, start: int, total: int):
    self.schedule, self.total = schedule, total
    self.explored = self.trained = start
    self.published = {start}
    self.sampled_with: dict[int, int] = {}
    self.lags, self.aheads = [], []

  def may_explore(self) -> bool:
    needed = self.schedule.version_for(self.explored + 1)
    return self.explored < self.total and max(self.published) >= needed

  def may_train(self) -> bool:
    return self.trained < self.explored

  def explore(self) -> None:
    self.explored += 1
    needed = self.schedule.version_for(self.explored)
    # The version meant; after a resume it may be gone, then the newest.
    used = needed if needed in self.published else max(self.published)
    self.sampled_with[self.explored] = used
    self.aheads.append(self.explored - self.trained)

  def train(self) -> None:
    self.trained += 1
    self.lags.append(self.trained - 1 - self.sampled_with[self.trained])
    if self.schedule.publishes(self.trained) or self.trained == self.total:
      self.published.add(self.trained)

  def run(self, choose) -> None:
    while self.trained < self.total:
      able = [f for may, f in ((self.may_explore, self.explore), (self.may_train, self.train))
              if may()]  # fmt: skip
      assert able, f"deadlock: explored {self.explored}, trained {self.trained}"
      choose(able)()


@given(
  st.integers(1, 6), st.integers(0, 6), st.integers(0, 30), st.integers(1, 40),
  st.randoms(use_true_random=False),
)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_no_deadlock_and_bounded_lag_whoever_is_faster(interval, offset, start, steps, random):
  schedule = Schedule(interval, offset)
  sim = Simulation(schedule, start, start + steps)
  sim.run(random.choice)
  assert 0 <= min(sim.lags) and max(sim.lags) <= schedule.max_lag
  assert max(sim.aheads) <= schedule.max_steps_ahead
  if start == 0:  # what is sampled does not depend on who was faster
    assert sim.sampled_with == {s: schedule.version_for(s) for s in range(1, steps + 1)}


@pytest.mark.parametrize("interval", [1, 2, 5])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_the_bounds_are_reached(interval, offset):
  eager = Simulation(Schedule(interval, offset), 0, 60)
  eager.run(lambda able: able[0])  # the explorer first
  assert max(eager.lags) == eager.schedule.max_lag
  assert max(eager.aheads) == eager.schedule.max_steps_ahead


def test_on_policy_has_no_lag():
  sim = Simulation(Schedule(1, 0), 0, 20)
  sim.run(lambda able: able[0])
  assert set(sim.lags) == {0} and set(sim.aheads) == {1}
