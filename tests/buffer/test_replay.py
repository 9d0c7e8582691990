"""Order, capacity, deadlines and closing of the replay buffer, over every store."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading

import numpy as np
import pytest
from groups import content, experience, failed_group, group, ids, keys

from trinity_jax.buffer.record import describe_group
from trinity_jax.buffer.replay import ReplayBuffer
from trinity_jax.buffer.storage_memory import MemoryStore
from trinity_jax.errors import RunFailed, UserError
from trinity_jax.experience import Experience, ExperienceId, StopReason

WAIT = 30


def put(buffer, *groups):
  async def go():
    return [await buffer.put(g) for g in groups]

  return asyncio.run(go())


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


def due(first, steps, tasks, size):
  return [(s, t, r) for s in range(first, first + steps) for t in range(tasks) for r in range(size)]


@pytest.mark.parametrize("seed", range(3))
def test_id_order_whatever_the_order_of_arrival(place, seed):
  rng = random.Random(seed)
  steps, tasks, size, first = rng.randint(1, 4), rng.randint(1, 4), rng.randint(1, 3), 1 + seed
  buffer = place.buffer(tasks_per_step=tasks, first_batch=first)
  names = [(s, t) for s in range(first, first + steps) for t in range(tasks)]
  rng.shuffle(names)

  async def fill():
    return await asyncio.gather(*(buffer.put(group(s, t, size)) for s, t in names))

  assert set(asyncio.run(fill())) == {"stored"}
  assert len(buffer) == steps * tasks * size
  got = [e for s in range(steps) for e in buffer.sample(tasks, s + 1, 0)]
  assert ids(got) == due(first, steps, tasks, size)
  assert len(buffer) == 0 and buffer.stats()["used"] == steps * tasks


@pytest.mark.parametrize("capacity", [0, 1, 3, 8])
def test_no_deadlock_at_any_capacity_and_arrival(place, capacity):
  """Even a capacity below one group: the group that is due is always taken."""
  rng = random.Random(capacity)
  steps, tasks, size = 3, 3, 2
  buffer = place.buffer(tasks_per_step=tasks, capacity=capacity)
  names = [(s, t) for s in range(1, steps + 1) for t in range(tasks)]
  rng.shuffle(names)
  most = [0]

  async def one(name):
    await buffer.put(group(*name, size))
    most[0] = max(most[0], len(buffer))

  async def fill():
    await asyncio.gather(*map(one, names))

  with producer(fill()) as errors:
    got = [e for s in range(steps) for e in buffer.sample(tasks, s + 1, WAIT)]
  assert not errors and ids(got) == due(1, steps, tasks, size)
  assert most[0] < capacity + 2 * size  # the group that reaches it, and the due one on top


def test_a_full_buffer_holds_the_producer_and_not_its_loop(place):
  buffer = place.buffer(capacity=4)

  async def go():
    await buffer.put(group(1, 1))
    await buffer.put(group(2, 0))
    held = asyncio.create_task(buffer.put(group(2, 1)))
    await asyncio.wait_for(buffer.put(group(1, 0)), WAIT)  # due: taken although full
    assert len(buffer) == 6 and not held.done()
    first = await asyncio.to_thread(buffer.sample, 2, 1, WAIT)
    await asyncio.wait_for(held, WAIT)
    return ids(first)

  assert asyncio.run(go()) == due(1, 1, 2, 2)
  assert ids(buffer.sample(2, 2, 0)) == due(2, 1, 2, 2)


def test_a_finished_run_holds_nobody(place):
  buffer = place.buffer(capacity=2)

  async def go():
    await buffer.put(group(1, 1))
    held = asyncio.create_task(buffer.put(group(2, 1)))
    await asyncio.sleep(0)
    assert buffer.claim("a", 60) is not None
    buffer.finish()
    return await asyncio.wait_for(held, WAIT)

  assert asyncio.run(go()) == "stored"
  assert buffer.finished and buffer.claim("a", 60) is None
  buffer.restore(0)
  assert not buffer.finished


@pytest.mark.parametrize("order", ["ready", "priority"])
def test_a_full_buffer_with_too_few_groups_is_taken_as_it_comes(place, order):
  """Producers wait for room and the trainer for groups: the trainer takes what there is."""
  buffer = place.buffer(capacity=2, order=order, tasks_per_step=3)

  async def fill():
    await asyncio.gather(*(buffer.put(group(1, t)) for t in range(3)))

  with producer(fill()) as errors:
    assert ids(buffer.sample(3, 1, WAIT)) == due(1, 1, 3, 2)
  assert not errors


def test_a_cancelled_producer_stores_nothing(place):
  buffer = place.buffer(capacity=2)

  async def go():
    await buffer.put(group(1, 1))
    held = asyncio.create_task(buffer.put(group(2, 0)))
    await asyncio.sleep(0.01)
    held.cancel()
    with pytest.raises(asyncio.CancelledError):
      await held
    await buffer.put(group(1, 0))

  asyncio.run(go())
  buffer.sample(2, 1, WAIT)
  assert put(buffer, group(2, 0, versions=(1, 1))) == ["stored"]


def test_a_producer_whose_loop_has_gone_does_not_keep_others_from_being_woken(place):
  buffer = place.buffer(capacity=2)

  async def dies():
    await buffer.put(group(1, 1))
    held = asyncio.create_task(buffer.put(group(2, 0)))
    await asyncio.sleep(0)
    assert not held.done()
    raise RuntimeError("the explorer has died")

  with pytest.raises(RuntimeError, match="has died"):
    asyncio.run(dies())
  put(buffer, group(1, 0))
  assert len(buffer.sample(2, 1, WAIT)) == 4


def test_a_group_that_comes_twice_is_compared(place):
  buffer = place.buffer()
  first, other = group(1, 0), group(1, 0, reward=0.25)
  assert put(buffer, first, group(1, 0), other, [*reversed(first)]) == [
    "stored", "same", "different", "same"]  # fmt: skip
  assert [e.reward for e in buffer.sample(1, 1, 0)] == [0.5, 0.5]
  buffer.commit(1)
  assert put(buffer, first, other) == ["same", "different"]  # also when it is used and deleted
  assert buffer.held(1) == {0} and len(buffer) == 0


@pytest.mark.parametrize("change", ["tokens", "versions", "logprobs", "reward"])
def test_what_is_compared(change):
  buffer = ReplayBuffer(MemoryStore(), capacity=9, order="id", tasks_per_step=1)
  other = experience((1, 0, 0, 0))
  put(buffer, [experience((1, 0, 0, 0))])
  if change == "reward":
    other.reward = 0.75
  else:
    getattr(other, change)[-1] += 1
  assert put(buffer, [other]) == ["different"]


@pytest.mark.parametrize(
  ("experiences", "message"),
  [([], "at least one"), (group(1, 0) + group(1, 1), "one group"), (group(1, 0) * 2, "distinct")],
)
def test_what_is_no_group(experiences, message):
  buffer = ReplayBuffer(MemoryStore(), capacity=9, order="id", tasks_per_step=1)
  with pytest.raises(ValueError, match=message):
    put(buffer, experiences)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"order": "oldest"}, "order 'oldest': expected one of id, ready, priority"),
    ({"max_uses": 2}, "uses each group once, max_uses is 2"),
    ({"priority": "linear_decay"}, "needs order 'priority', the order is 'id'"),
    ({"order": "priority", "priority": "linear"}, "did you mean 'linear_decay'"),
    ({"order": "ready", "max_uses": 0}, "max_uses = 0: expected at least 1"),
    ({"cool_down": -1}, "cool_down = -1"),
  ],
)
def test_arguments_that_do_not_fit(arguments, message):
  with pytest.raises(UserError, match=message):
    ReplayBuffer(MemoryStore(), **{"capacity": 1, "order": "id", "tasks_per_step": 1} | arguments)


def test_experiences_arrive_as_they_were_put(place):
  buffer = place.buffer()
  sent = group(1, 0, 3, versions=(0, 1, 2))
  put(buffer, sent)
  got = buffer.sample(1, 1, 0)
  assert list(map(content, got)) == list(map(content, sent))


def test_an_expired_wait_names_the_missing_group_and_what_producers_do(place):
  buffer = place.buffer()
  put(buffer, *(group(*k) for k in ((1, 0), (2, 0), (2, 1))), group(1, 1, late=True))
  message = (
    r"waited 0 s \(sync\.timeout\) for 2 groups and has 1: group \(1, 1\) .* is missing, "
    r"2 ready ones are here, 1 wait for a reward\. run 1/1/0/0 is open"
  )
  with pytest.raises(RunFailed, match=message):
    buffer.sample(2, 1, 0.01, lambda: "run 1/1/0/0 is open")
  assert buffer.stats()["ready"] == 3  # what it had taken is given back


def test_close_wakes_producer_and_consumer_and_refuses_newcomers(place):
  buffer = place.buffer(capacity=2)
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
      buffer.sample(2, 1, WAIT)
    outcome.append(e.value.__cause__)

  with producer(fill()) as errors:
    assert full.wait(WAIT)
    consumer = threading.Thread(target=consume)
    consumer.start()
    buffer.close(cause)
    consumer.join(WAIT)
    assert not consumer.is_alive()
  assert not errors and outcome == [cause, cause]


def test_what_is_complete_can_still_be_taken_after_close(place):
  buffer = place.buffer(tasks_per_step=1)
  put(buffer, group(1, 0))
  buffer.close(RuntimeError("the explorer has died"))
  assert ids(buffer.sample(1, 1, 0)) == due(1, 1, 1, 2)
  with pytest.raises(RunFailed, match="closed"):
    buffer.sample(1, 2, WAIT)


def test_stale_tokens_are_masked_and_stale_groups_dropped(place):
  buffer = place.buffer(max_staleness=1, tasks_per_step=4)
  put(buffer, group(1, 0, versions=(0, 1)), group(1, 1, versions=(0, 0)), failed_group(1, 2),
      group(1, 3, versions=(1, 3)))  # fmt: skip
  got = buffer.sample(3, 3, 0)  # trains policy 2: version 1 is the oldest
  assert keys(got) == [(1, 0), (1, 2), (1, 3)]
  assert [e.action_mask[2:].tolist() for e in got if e.num_actions] == [[False, True]] * 2 + [
    [True, True]] * 2  # fmt: skip
  assert got[0].versions.tolist() == [-1, -1, -1, 1] and got[0].logprobs[2] == 0
  stats = buffer.stats()
  assert (stats["dropped"], stats["masked_tokens"], buffer.dropped) == (1, 2, 1)
  buffer.restore(2)
  stats = buffer.stats()
  assert (stats["ready"], stats["dropped"], stats["masked_tokens"]) == (4, 0, 0)


@pytest.mark.parametrize("order", ["ready", "priority"])
def test_uses_and_cool_down(place, order):
  buffer = place.buffer(order=order, max_uses=2, cool_down=3, tasks_per_step=1)
  put(buffer, group(1, 0), group(2, 0))
  assert keys(buffer.sample(1, 1, 0)) == [(1, 0)]
  assert keys(buffer.sample(1, 2, 0)) == [(2, 0)]
  with pytest.raises(RunFailed, match="max_uses 2, cool_down 3"):
    buffer.sample(1, 3, 0)
  assert keys(buffer.sample(1, 4, 0)) == [(1, 0)]
  assert keys(buffer.sample(1, 5, 0)) == [(2, 0)]
  stats = buffer.stats()
  assert (stats["used"], stats["ready"], stats["experiences"]) == (2, 0, 0)


def test_priorities(place):
  buffer = place.buffer(order="priority", priority="linear_decay", max_uses=3, tasks_per_step=1)
  put(buffer, *(group(b, 0, versions=(v,)) for b, v in ((1, 0), (2, 5), (3, 4))))
  taken = [keys(buffer.sample(1, step, 0))[0][0] for step in range(1, 7)]
  assert taken == [2, 3, 2, 3, 2, 1]  # 5, 4, then 3 and 2, then 1 and 0: ties by id; (3, 0) has 0


def test_a_step_waits_until_it_can_choose(place):
  """One group is there, of the lowest priority; two better ones come while the trainer waits."""
  buffer = place.buffer(order="priority", tasks_per_step=1)
  put(buffer, group(1, 0, versions=(0,)))
  waiting = threading.Event()
  taken = []

  def sample():
    watched = buffer.bell.wait
    buffer.bell.wait = lambda *args: waiting.set() or watched(*args)
    taken.extend(keys(buffer.sample(2, 1, WAIT)))

  thread = threading.Thread(target=sample)
  thread.start()
  assert waiting.wait(WAIT)
  better = [describe_group(group(b, 0, versions=(b,))) for b in (2, 3)]
  assert buffer.store.put(better, buffer.rules) == ["stored", "stored"]  # in one transaction
  thread.join(WAIT)
  assert taken == [(2, 0), (3, 0)]


def test_uses_that_are_forgotten_can_be_had_again(place):
  buffer = place.buffer(order="priority", tasks_per_step=1, max_uses=2)
  put(buffer, group(1, 0, versions=(3,)), group(2, 0, versions=(2,)))
  want = [(1, 0), (2, 0), (1, 0), (2, 0)]  # priorities 3, 2, 1, 0
  for _ in range(2):
    assert [keys(buffer.sample(1, step, 0))[0] for step in range(1, 5)] == want
    assert buffer.stats()["used"] == 2
    buffer.restore(0)
    assert (buffer.stats()["ready"], len(buffer)) == (2, 4)


def test_a_function_as_priority(place):
  buffer = place.buffer(
    order="priority", tasks_per_step=1, priority=lambda version, uses, rng: -version
  )
  put(buffer, *(group(b, 0, versions=(v,)) for b, v in ((1, 3), (2, 1), (3, 2))))
  assert [keys(buffer.sample(1, s, 0)) for s in (1, 2, 3)] == [[(2, 0)], [(3, 0)], [(1, 0)]]


def test_checkpoints_fix_what_counts(place):
  buffer = place.buffer(tasks_per_step=1)
  put(buffer, *(group(b, 0) for b in range(1, 5)))
  for step in (1, 2, 3):
    buffer.sample(1, step, 0)
  buffer.commit(1)
  assert buffer.stats()["used"] == 3
  again = place.buffer(tasks_per_step=1)  # another process
  again.restore(1)
  assert again.stats()["ready"] == 3 and len(again) == 6
  assert keys(again.sample(2, 2, 0)) == [(2, 0), (3, 0)]
  again.commit(2)
  with pytest.raises(UserError, match=r"committed up to step 2 .* resume from the checkpoint of"):
    again.restore(1)


def test_a_run_that_is_kept_can_be_replayed(place):
  buffer = place.buffer(tasks_per_step=1, keep=True)
  put(buffer, group(1, 0), group(2, 0))
  first = list(map(content, buffer.sample(2, 1, 0)))
  buffer.commit(1)
  buffer.restore(0)
  assert list(map(content, buffer.sample(2, 1, 0))) == first


def test_delayed_rewards(place):
  buffer = place.buffer(tasks_per_step=1)
  late = [experience((1, 0, run, 0), late=run < 2) for run in range(3)]
  put(buffer, late)
  assert (buffer.stats()["waiting"], len(buffer)) == (1, 0)
  with producer(asyncio.to_thread(buffer.give_reward, ExperienceId(1, 0, 0, 0), 1.0)):
    pass
  buffer.give_reward(ExperienceId(1, 0, 0, 0), 1.0)  # the same again
  with pytest.raises(UserError, match=r"1/0/0/0: it does not wait for one \(its reward is 1\.0\)"):
    buffer.give_reward(ExperienceId(1, 0, 0, 0), 2.0)
  with pytest.raises(UserError, match="1/0/2/0: it does not wait for one"):
    buffer.give_reward(ExperienceId(1, 0, 2, 0), 2.0)
  with pytest.raises(UserError, match="9/0/0/0: .* does not hold it"):
    buffer.give_reward(ExperienceId(9, 0, 0, 0), 2.0)
  with pytest.raises(UserError, match="not a finite number"):
    buffer.give_reward(ExperienceId(1, 0, 1, 0), float("nan"))
  waker = threading.Timer(0.05, buffer.give_reward, (ExperienceId(1, 0, 1, 0), 2.0))
  waker.start()
  got = buffer.sample(1, 1, WAIT)
  assert [e.reward for e in got] == [1.0, 2.0, 0.5]
  assert put(buffer, late) == ["same"]  # compared without the late rewards
  waker.join()


def test_a_late_reward_of_a_group_that_is_to_be_dropped(place):
  """In memory its group waited for ever, and all that came after it."""
  buffer = place.buffer(tasks_per_step=1, max_staleness=9, min_runs=2)
  failed = Experience.failed(ExperienceId(1, 0, 0, 0), StopReason.ERROR, {})
  good = [experience((2, 0, run, 0)) for run in range(2)]
  put(buffer, [failed, experience((1, 0, 1, 0), late=True)], good)
  buffer.give_reward(ExperienceId(1, 0, 1, 0), 1.0)
  assert ids(buffer.sample(1, 1, WAIT)) == [(2, 0, 0), (2, 0, 1)]
  assert buffer.stats()["dropped"] == 1 and buffer.stats()["waiting"] == 0


def test_claims(place):
  buffer = place.buffer(tasks_per_step=3, first_batch=5)
  assert buffer.claim("a", 60) == (5, (0, 1, 2))
  assert buffer.claim("b", 60) == (6, (0, 1, 2))
  assert buffer.claim("a", 60, new=False) is None
  put(buffer, group(5, 1), *(group(6, t) for t in range(3)))
  assert buffer.stats()["claimed"] == 2 and buffer.held(5) == {1} and buffer.held(9) == set()
  buffer.release("b")  # nothing of its step is missing
  assert buffer.claim("b", 60) == (7, (0, 1, 2))
  buffer.release("a")
  assert buffer.stats()["claimed"] == 3
  assert buffer.claim("b", 60, new=False) == (5, (0, 2))
  buffer.heartbeat("b", -1)  # both leases run out
  assert buffer.claim("c", 60) == (5, (0, 2))
  assert buffer.claim("c", 60) == (7, (0, 1, 2))
  buffer.heartbeat("b", 60)  # has nothing any more
  assert buffer.claim("b", 60) == (8, (0, 1, 2))


def test_two_samplers_and_two_claimers_never_get_the_same(place):
  n, threads = 40, 4
  buffers = [place.buffer(order="ready", tasks_per_step=1) for _ in range(threads)]
  put(buffers[0], *(group(b, 0, 1) for b in range(1, n + 1)))
  taken, claimed = [], []

  def work(i):
    for step in range(1, n // threads + 1):
      taken.extend(keys(buffers[i].sample(1, step, WAIT)))
      claimed.append(buffers[i].claim(f"explorer {i}", 60).batch)

  pool = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
  for t in pool:
    t.start()
  for t in pool:
    t.join(WAIT)
  assert sorted(taken) == [(b, 0) for b in range(1, n + 1)]
  assert sorted(claimed) == list(range(n + 1, 2 * n + 1))
  assert buffers[0].stats()["used"] == n


def test_ids_of_numpy_numbers(shared):
  buffer = shared.buffer(tasks_per_step=1)
  put(buffer, [experience(tuple(map(np.int64, (1, 0, 0, 0))))])
  assert ids(buffer.sample(1, 1, 0)) == [(1, 0, 0)]
