"""Order, capacity, deadlines and closing of the replay buffer."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_jax.buffer.replay import ReplayBuffer
from trinity_jax.errors import RunFailed
from trinity_jax.experience import Experience, ExperienceId, StopReason

WAIT = 30


def group(step, task, size=2):
  return [
    Experience.failed(ExperienceId(step, task, run, 0), StopReason.ERROR, {}) for run in range(size)
  ]


def ids(experiences):
  return [tuple(e.id)[:3] for e in experiences]


def due(first, steps, tasks, size):
  return [(s, t, r) for s in range(first, first + steps) for t in range(tasks) for r in range(size)]


@contextlib.contextmanager
def producer(coroutine):
  """Runs a coroutine on a loop of its own thread, as the explorer does; yields its error box."""
  errors: list[BaseException] = []

  def run():
    try:
      asyncio.run(coroutine)
    except BaseException as e:
      errors.append(e)

  thread = threading.Thread(target=run)
  thread.start()
  try:
    yield errors
  finally:
    thread.join(WAIT)
    assert not thread.is_alive()


shapes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))  # steps, tasks, size


@given(shapes, st.integers(1, 5), st.randoms(use_true_random=False))
def test_id_order_whatever_the_order_of_arrival(shape, first, random):
  steps, tasks, size = shape
  buffer = ReplayBuffer(1000, tasks, first)
  names = [(s, t) for s in range(first, first + steps) for t in range(tasks)]
  random.shuffle(names)

  async def fill():
    for s, t in names:
      await buffer.put(group(s, t, size))

  asyncio.run(fill())
  assert len(buffer) == steps * tasks * size
  got = [e for _ in range(steps) for e in buffer.sample(tasks * size, 0)]
  assert ids(got) == due(first, steps, tasks, size)
  assert len(buffer) == 0


@given(shapes, st.integers(0, 12), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_no_deadlock_at_any_capacity_and_arrival(shape, capacity, random):
  """Even a capacity below one group: the group that is due is always taken."""
  steps, tasks, size = shape
  buffer = ReplayBuffer(capacity, tasks)
  names = [(s, t) for s in range(1, steps + 1) for t in range(tasks)]
  random.shuffle(names)
  pauses = {name: random.randrange(4) for name in names}
  most = [0]

  async def one(name):
    for _ in range(pauses[name]):
      await asyncio.sleep(0)
    await buffer.put(group(*name, size))
    most[0] = max(most[0], len(buffer))

  async def fill():
    await asyncio.gather(*map(one, names))

  with producer(fill()) as errors:
    got = [e for _ in range(steps) for e in buffer.sample(tasks * size, WAIT)]
  assert not errors and ids(got) == due(1, steps, tasks, size)
  assert most[0] <= max(capacity, 0) + size  # the due group may come on top


def test_a_full_buffer_holds_the_producer_and_not_its_loop():
  buffer = ReplayBuffer(4, 2)
  ticks = []

  async def go():
    await buffer.put(group(1, 1))
    await buffer.put(group(2, 0))
    held = asyncio.create_task(buffer.put(group(2, 1)))
    for _ in range(5):
      await asyncio.sleep(0)
      ticks.append(held.done())
    assert len(buffer) == 4
    await asyncio.wait_for(buffer.put(group(1, 0)), WAIT)  # due: taken although full
    assert len(buffer) == 6 and not held.done()
    first = await asyncio.to_thread(buffer.sample, 4, WAIT)
    await asyncio.wait_for(held, WAIT)
    return ids(first)

  assert asyncio.run(go()) == due(1, 1, 2, 2)
  assert ticks == [False] * 5
  assert ids(buffer.sample(4, 0)) == due(2, 1, 2, 2)


def test_sample_gives_whole_groups_and_waits_for_the_rest():
  buffer = ReplayBuffer(100, 3)
  seen = threading.Event()

  async def fill():
    await buffer.put(group(1, 0))
    await buffer.put(group(1, 2))
    seen.set()
    await asyncio.to_thread(taking.wait, WAIT)
    await buffer.put(group(1, 1))

  taking = threading.Event()
  with producer(fill()) as errors:
    assert seen.wait(WAIT)
    assert ids(buffer.sample(2, WAIT)) == [(1, 0, 0), (1, 0, 1)]
    taking.set()
    assert ids(buffer.sample(4, WAIT)) == [(1, 1, 0), (1, 1, 1), (1, 2, 0), (1, 2, 1)]
  assert not errors


@pytest.mark.parametrize("when", ["held", "taken", "waiting"])
def test_a_group_put_twice_is_an_error(when):
  buffer = ReplayBuffer(2, 2)

  async def go():
    if when == "waiting":
      await buffer.put(group(1, 1))  # full
      twins = [asyncio.create_task(buffer.put(group(2, 0))) for _ in range(2)]
      await asyncio.sleep(0)
      await buffer.put(group(1, 0))
      buffer.sample(4, 0)
      results = await asyncio.wait_for(asyncio.gather(*twins, return_exceptions=True), WAIT)
      assert results[0] is None
      raise results[1]
    await buffer.put(group(1, 0))
    if when == "taken":
      buffer.sample(2, 0)
    await buffer.put(group(1, 0))

  with pytest.raises(ValueError, match=r"group \(\d, 0\) was put twice"):
    asyncio.run(go())


def test_an_expired_wait_names_the_missing_group_and_what_producers_do():
  buffer = ReplayBuffer(100, 2)

  async def fill():
    for name in ((1, 0), (2, 0), (2, 1)):
      await buffer.put(group(*name))

  asyncio.run(fill())
  message = (
    r"waited 0 s \(sync\.timeout\) for 4 experiences and has 2: group \(1, 1\) .* is missing, "
    r"4 later ones are here\. run 1/1/0/0 is open"
  )
  with pytest.raises(RunFailed, match=message):
    buffer.sample(4, 0.01, lambda: "run 1/1/0/0 is open")


def test_close_wakes_producer_and_consumer_and_refuses_newcomers():
  buffer = ReplayBuffer(2, 2)
  cause = KeyboardInterrupt()
  full = threading.Event()
  outcome = []

  async def fill():
    await buffer.put(group(1, 1))
    held = asyncio.create_task(buffer.put(group(2, 0)))
    await asyncio.sleep(0)
    full.set()
    with pytest.raises(RunFailed, match="closed") as e:
      await held
    outcome.append(e.value.__cause__)
    with pytest.raises(RunFailed, match="closed"):
      await buffer.put(group(1, 0))

  def consume():
    with pytest.raises(RunFailed, match="closed while the trainer waited") as e:
      buffer.sample(4, WAIT)
    outcome.append(e.value.__cause__)

  with producer(fill()) as errors:
    assert full.wait(WAIT)
    consumer = threading.Thread(target=consume)
    consumer.start()
    buffer.close(cause)
    consumer.join(WAIT)
    assert not consumer.is_alive()
  assert not errors and outcome == [cause, cause]


def test_what_is_complete_can_still_be_taken_after_close():
  buffer = ReplayBuffer(10, 1)
  asyncio.run(buffer.put(group(1, 0)))
  buffer.close(RuntimeError("the explorer has died"))
  assert ids(buffer.sample(2, 0)) == due(1, 1, 1, 2)
  with pytest.raises(RunFailed, match="closed"):
    buffer.sample(2, WAIT)


@pytest.mark.parametrize("wake", ["close", "sample"])
def test_a_producer_whose_loop_has_gone_does_not_keep_others_from_being_woken(wake):
  """An explorer that dies while it is held back: its loop is closed when the buffer is."""
  buffer = ReplayBuffer(2, 2)

  async def dies():
    await buffer.put(group(1, 1))
    held = asyncio.create_task(buffer.put(group(2, 0)))
    await asyncio.sleep(0)
    assert not held.done()
    raise RuntimeError("the explorer has died")

  with pytest.raises(RuntimeError, match="has died"):
    asyncio.run(dies())
  if wake == "close":
    buffer.close(RuntimeError("the explorer has died"))
    with pytest.raises(RunFailed):
      buffer.sample(4, WAIT)
  else:
    asyncio.run(buffer.put(group(1, 0)))
    assert len(buffer.sample(4, WAIT)) == 4


def test_experiences_arrive_as_they_were_put():
  buffer = ReplayBuffer(10, 1)
  sent = Experience(
    np.arange(3), np.array([0, 1, 1], bool), np.zeros(3), np.zeros(3), ExperienceId(1, 0, 0, 0), 0.5
  )
  asyncio.run(buffer.put([sent]))
  assert buffer.sample(1, 0)[0] is sent
