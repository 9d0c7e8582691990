"""The discrete-event bound: against every schedule of small cases, and on the committed traces."""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

LAUNCH = Path(__file__).parents[1] / "launch"
sys.path.insert(0, str(LAUNCH))

import latency_traces  # noqa: E402
from rft_bound import bound  # noqa: E402

BATCHES = {"lognormal-4": 4, "lognormal-32": 32, "bimodal-4": 4, "bimodal-32": 32}


def least(trace, train, steps, staleness, in_order, slots) -> int:
  """The least seconds of any schedule, by trying all of them second by second.

  Whole seconds suffice: every time at which something can happen is a sum of them. In any order, a
  group must not be older than allowed at its end either.
  """
  tasks = len(trace[0])
  seconds = [s for batch in trace for s in batch]

  def moves(state):
    """Every way to start groups and a train step at this instant."""
    started, flying, ready, trained, training = state
    most = len(seconds)
    most = min(most, tasks * (trained + staleness + 1), started + (slots or most) - len(flying))
    for count in range(max(0, most - started) + 1):
      new = tuple((i, seconds[i]) for i in range(started, started + count))
      chosen: list[tuple[int, ...]] = [()]
      if not training and trained < steps:
        young = [i for i, version in ready if trained - version <= staleness]
        if in_order:
          young = [i for i in young if i // tasks == trained]
        chosen += itertools.combinations(young, tasks)
      for batch in chosen:
        left = tuple(r for r in ready if r[0] not in batch)
        yield (started + count, flying + new, left, trained, train if batch else training)

  def tick(state):
    started, flying, ready, trained, training = state
    done = training == 1
    flying = tuple((i, left - 1) for i, left in flying)
    ended = tuple((i, trained + done) for i, left in flying if not left)
    flying = tuple((i, left) for i, left in flying if left)
    return started, flying, tuple(sorted(ready + ended)), trained + done, max(0, training - 1)

  states, now = {(0, (), (), 0, 0)}, 0
  while all(s[3] < steps for s in states):
    states = {tick(m) for s in states for m in moves(s)}
    now += 1
  return now


cases = st.tuples(
  st.integers(1, 2), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.booleans(),
  st.none() | st.integers(1, 3), st.data(),
)  # fmt: skip


@given(cases)
@settings(deadline=None, max_examples=300)
def test_no_schedule_is_faster_and_one_is_as_fast(case):
  tasks, steps, staleness, train, in_order, slots, data = case
  batches = steps + data.draw(st.integers(0, 1))
  row = st.lists(st.integers(1, 4), min_size=tasks, max_size=tasks)
  trace = data.draw(st.lists(row, min_size=batches, max_size=batches))
  found = bound(trace, train, steps, staleness, in_order=in_order, slots=slots)
  assert found.seconds == least(trace, train, steps, staleness, in_order, slots)


def test_by_hand():
  trace = [[1, 3], [1, 1], [2, 1]]
  sync = bound(trace, 2, 3, 0, in_order=True)
  assert sync.steps == [5, 8, 12] and sync.trainer_idle == 0.5 and sync.lag == 0
  ahead = bound(trace, 2, 3, 1, in_order=True)
  assert ahead.steps == [5, 7, 9] and ahead.masked(4) == 0
  # 0, 2 and 3 have ended after a second; the straggler of three seconds comes along later.
  free = bound(trace, 2, 3, 1, in_order=False)
  assert free.taken == [[0, 2], [1, 3], [4, 5]] and free.steps == [3, 5, 7]
  assert bound(trace, 2, 3, 1, in_order=False, slots=1).starts == [0, 1, 4, 5, 6, 8]


def test_tokens_that_are_too_old_are_counted():
  """Step 5 trains a group of nine seconds, with tokens after 3, 6 and 9: version 3 came after 6."""
  trace = [[9.0, 1.0], *[[1.0, 1.0]] * 12]
  found = bound(trace, 1, 10, 1, in_order=False)
  step = next(t for t, groups in enumerate(found.taken, 1) if 0 in groups)
  assert (step, found.steps[2]) == (5, 6.0)
  assert found.masked(3) == pytest.approx(1 / (10 * 2 * 3))
  assert found.masked(1) == bound(trace, 1, 10, 1, in_order=True).masked(3) == 0


@pytest.mark.parametrize("name", BATCHES)
def test_traces(name):
  trace = latency_traces.read()[name]
  assert len(trace) >= 40 and {len(row) for row in trace} == {BATCHES[name]}
  flat = [s for row in trace for s in row]
  assert statistics.fmean(flat) == pytest.approx(1, abs=1e-3)
  assert max(flat) > 3.5
  made = latency_traces.make()[name]
  assert [s for row in made for s in row] == pytest.approx(flat, abs=2e-4)
  assert json.loads(latency_traces.FILE.read_text())["unit"] == "mean"


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("train", [0.25, 1.0])
def test_more_staleness_is_never_slower(name, train):
  trace = latency_traces.read()[name]
  run = functools.partial(bound, trace, train, 40)
  for in_order in (True, False):
    seconds = [run(s, in_order=in_order).seconds for s in range(6)]
    assert seconds == sorted(seconds, reverse=True)
  assert run(2, in_order=False).seconds < run(2, in_order=True).seconds
  assert run(4, in_order=False, slots=4).seconds > run(4, in_order=False).seconds
  assert run(0, in_order=False).seconds == run(0, in_order=True).seconds
