"""Every style: timelines, bounds, and 10,000 interleavings in which nobody waits for ever."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_sim import Deadlock, Simulation, World, timeline

from trinity_jax.errors import UserError
from trinity_jax.schedule import STYLES, Schedule, make_schedule

LEAVES = 50  # interleavings of each example


@pytest.mark.parametrize(
  ("schedule", "explore", "train", "explorer", "trainer"),
  [
    # The feature map's: on-policy, k-step, one-step off-policy, interval 2 with offset 1.
    (Schedule(1, 0), 1, 1, "1 [1] 2 [2] 3 [3] 4", ". 1 [sync] . 2 [sync] . 3 [sync] . 4 [sync]"),
    (Schedule(3, 0), 1, 1, "1 2 3 [3] 4 5 6", ". 1 . 2 . 3 [sync] . 4 . 5 . 6 [sync]"),
    (Schedule(1, 1), 1, 1, "1 2 [1] 3 [2] 4 [3] 5", ". 1 [sync] . 2 [sync] . 3 [sync] . 4 [sync]"),
    (Schedule(2, 1), 1, 1, "1 2 3 [2] 4 5 [4] 6 7", ". 1 . 2 [sync] . 3 . 4 [sync] . 5"),
    # A slow trainer never waits; its weights are taken by the next batch that starts.
    (Schedule(1, 0, "trainer_driven"), 1, 2, "1 2 [1] 3 [2] 4 [3] 5",
     ". 1 [sync] 2 [sync] 3 [sync] 4 [sync]"),
    (Schedule(2, 0, "trainer_driven"), 1, 2, "1 2 3 [2] 4 5", ". 1 2 [sync] 3 4 [sync]"),
    # A slow explorer: what is older than needed is never waited for.
    (Schedule(1, 2, "trainer_driven"), 2, 1, "1 2 [1] 3 [2] 4 [3] 5",
     ". 1 [sync] . 2 [sync] . 3 [sync] . 4 [sync]"),
    (Schedule(2, 1, "explorer_driven"), 1, 2, "1 2 3 [2] 4 5 [3] 6 7",
     ". 1 2 [sync] 3 [sync] 4 [sync]"),
    (Schedule(1, 0, "fully_async", 3), 1, 2, "1 2 3 [1] 4 5 [2] 6 [3] 7 [4] 8",
     ". 1 [sync] 2 [sync] 3 [sync] 4 [sync]"),
    (Schedule(2, 0, "fully_async", 3), 1, 2, "1 2 3 4 [2] 5 6 [4] 7 8",
     ". 1 2 [sync] 3 4 [sync]"),
  ],
)  # fmt: skip
def test_timelines(schedule, explore, train, explorer, trainer):
  steps = sum(word.isdigit() for word in trainer.split())
  lines = timeline(schedule, explore, train, steps + 2)
  assert (lines[0] + " ").startswith(explorer + " ")
  assert (lines[1] + " ").startswith(trainer + " ")


@st.composite
def schedules(draw, styles=STYLES):
  style = draw(st.sampled_from(styles))
  interval, offset = draw(st.integers(1, 4)), draw(st.integers(0, 3))
  least = interval - 1 + (offset if style in ("fixed", "explorer_driven") else 0)
  staleness = draw(st.none() | st.integers(least, least + 4))
  return Schedule(interval, offset, style, staleness)


odds = st.sampled_from([(1.0, 1.0, 1.0), (9.0, 3.0, 1.0), (1.0, 9.0, 9.0), (1.0, 3.0, 0.3)])


@given(
  schedules(), st.integers(1, 4), st.integers(1, 9), st.sampled_from(["id", "ready"]),
  st.sampled_from([0.0, 0.2, 0.5]), st.sampled_from([0.0, 0.7, 0.95]),
  st.sampled_from([0.0, 0.03]), st.integers(1, 3), odds, st.integers(0, 2**32),
)  # fmt: skip
@settings(deadline=None, max_examples=10_000 // LEAVES)
def test_no_deadlock_and_bounded_staleness(
  schedule, tasks, total, order, failing, straggling, stops, save, eager, seed
):
  """10,000 interleavings of arrivals, groups that never count, stragglers, killed processes."""
  world = World(tasks, total, order, failing, straggling, stops, save, eager)
  for leaf in range(LEAVES):
    sim = Simulation(schedule, world, random.Random(seed * LEAVES + leaf)).run()
    assert sim.trained == total and max(sim.lags) <= schedule.max_lag
    if not sim.rewound:
      # A killed trainer's groups are there again, and some have versions of steps it forgot.
      assert min(sim.lags) >= 0
      assert sim.ahead < (schedule.max_steps_ahead + 1) * tasks


@given(schedules(), st.integers(1, 4), st.sampled_from([0.0, 0.9]), odds, st.integers(0, 2**32))
@settings(deadline=None, max_examples=200)
def test_in_order_the_admission_alone_keeps_the_bound(schedule, tasks, straggling, eager, seed):
  """Nothing is dropped for its age, however long a straggler holds everybody up."""
  world = World(tasks, 12, "id", straggling=straggling, eager=eager)
  sim = Simulation(schedule, world, random.Random(seed)).run()
  assert sim.stale == 0 and sim.ahead <= schedule.max_steps_ahead * tasks
  if schedule.style == "fixed":  # what is sampled does not depend on who was faster
    assert all(v == schedule.version_for(e) for e, v in sim.started_with.items())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("offset", [0, 2])
def test_the_bounds_are_reached(style, interval, offset):
  """An explorer that always goes first gets as far ahead as it may."""
  schedule = Schedule(interval, offset, style)
  eager = Simulation(schedule, World(1, 40, eager=(1.0, 1e-9, 1e-12)), random.Random(0)).run()
  assert eager.ahead == schedule.max_steps_ahead
  if style != "fully_async":  # there the last tokens are younger
    assert max(eager.lags) == schedule.max_lag


def test_stragglers_are_dropped_when_they_are_too_old():
  world = World(2, 60, "ready", straggling=0.97)
  sim = Simulation(Schedule(1, 0, "trainer_driven", 1), world, random.Random(0)).run()
  assert sim.stale > 0 and max(sim.lags) == 1


def test_dropped_groups_are_counted_in_steps_rounded_up():
  """Rounded down, on-policy stops at the first group that does not count."""
  schedule, tasks = Schedule(1, 0), 4
  assert schedule.needs(2, dropped_batches=0) == 1 and schedule.needs(2, dropped_batches=1) == 0

  class RoundsDown(Simulation):
    dropped_batches = property(lambda self: (self.failed + self.stale) // tasks)

  world = World(tasks, 20, failing=0.2)
  Simulation(schedule, world, random.Random(1)).run()
  with pytest.raises(Deadlock):
    RoundsDown(schedule, world, random.Random(1)).run()


@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 300))
def test_the_bound_and_the_timeline_of_fixed_are_one_formula(interval, offset, batch):
  expected = max(0, batch - 1 - offset) // interval * interval
  assert Schedule(interval, offset).needs(batch) == expected
  assert Schedule(interval, offset, "fixed", interval + offset + 5).needs(batch) == expected


@given(schedules(["explorer_driven"]), st.integers(1, 200), st.integers(0, 300))
def test_explorer_driven_keeps_its_weights_between_asks(schedule, batch, newest):
  current = schedule.needs(batch)
  takes = schedule.version_for(batch + 1, max(newest, current), current=current)
  assert takes == (max(newest, current) if schedule.asks(batch + 1) else current)
  if not schedule.asks(batch + 1):
    assert schedule.needs(batch + 1) == schedule.needs(batch)


def test_drops_is_per_token():
  schedule = Schedule(style="fully_async", max_staleness=2)
  versions = np.array([3, 4, 5, 6])
  assert schedule.drops(versions, 7).tolist() == [True, False, False, False]
  assert schedule.drops(3, 7) is True and schedule.swaps_midway


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    (dict(style="async"), "config.sync.style = 'async': no such style; .*fully_async"),
    (dict(interval=0), "config.sync.interval = 0: expected at least 1"),
    (dict(offset=-1), "config.sync.offset = -1: expected at least 0"),
    (dict(interval=2, offset=1, max_staleness=1), "config.sync.max_staleness = 1: .* up to 2 "),
    (dict(style="fully_async", interval=3, max_staleness=1), "max_staleness = 1: .* up to 2 "),
  ],
)
def test_wrong_values(keys, message):
  with pytest.raises(UserError, match=message):
    Schedule(**keys)


def test_dynamic_styles_must_know_the_newest_version():
  with pytest.raises(ValueError, match="newest"):
    Schedule(style="trainer_driven").version_for(3)


def test_schedule_of_a_config():
  sync = SimpleNamespace(interval=2, offset=1, style="fully_async", max_staleness=-1)
  assert make_schedule(sync) == Schedule(2, 1, "fully_async")
  sync.max_staleness = 0
  sync.interval = 1
  assert make_schedule(sync).max_lag == 0
