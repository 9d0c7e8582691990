"""Killed processes, cut connections, a crashed server, a full disk: nothing lost, nothing twice."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from groups import group, keys

from trinity_jax.buffer.replay import ReplayBuffer
from trinity_jax.buffer.store import open_store
from trinity_jax.errors import RunFailed, UserError

WAIT = 60
SUPPORT = Path(__file__).parents[1] / "support"

# Prints what it has done, a line each, until it is killed.
PROGRAM = """if True:
  import asyncio, resource, sys
  sys.path.insert(0, sys.argv[1])
  from groups import group, keys
  from trinity_jax.buffer.replay import ReplayBuffer
  from trinity_jax.buffer.store import open_store

  role, url, folder, namespace, argument = sys.argv[2:]
  argument = int(argument)
  store = open_store(url, folder, namespace=namespace)
  buffer = ReplayBuffer(store, capacity=10**6, order="ready", tasks_per_step=2)
  say = lambda *words: print(*words, flush=True)

  async def one(batch, task):
    outcome = await buffer.put(group(batch, task, 3, versions=range(200)))
    say(outcome, batch, task)

  async def explore():
    me = f"explorer {argument}"
    buffer.release(me)
    while True:
      claims = [buffer.claim(me, 3600) for _ in range(4)]
      await asyncio.gather(*(one(c.batch, t) for c in claims for t in c.tasks))

  def train():
    buffer.restore(argument)
    step = argument
    while True:
      step += 1
      found = keys(buffer.sample(2, step, 60))
      say("used", step, *(f"{b},{t}" for b, t in found))
      if step % 3 == 0:
        say("committed", step)  # the checkpoint is there first
        buffer.commit(step)

  def fill():
    from trinity_jax.errors import RunFailed
    asyncio.run(one(1, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (argument, argument))
    try:
      for batch in range(2, 10**6):
        asyncio.run(one(batch, 0))
    except RunFailed as e:
      say("failed", e)

  {"explore": lambda: asyncio.run(explore()), "train": train, "fill": fill}[role]()
"""


class Process:
  """A process that is killed after it has said so many lines; `lines` are those that came."""

  def __init__(self, role, place, argument=0):
    command = [sys.executable, "-c", PROGRAM, str(SUPPORT), role, place.url, str(place.directory),
               place.namespace, str(argument)]  # fmt: skip
    self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    self.lines = []

  def read(self, n):
    assert self._process.stdout
    for _ in range(n):
      line = self._process.stdout.readline()
      assert line, "it ended by itself"
      self.lines.append(line.split())

  def kill(self):
    self._process.kill()
    with self._process as p:
      assert p.stdout
      rest = p.stdout.read()
    # The last line may be cut off: then its end is not known.
    self.lines += [line.split() for line in rest.splitlines(keepends=True) if line[-1] == "\n"]


def check_counts(store):
  """The counts that are kept are those of the rows; payloads are whole."""
  from trinity_jax.buffer.schema import EXPERIENCES, GROUPS

  def read(connection):
    import sqlalchemy as sa

    statuses = collections.Counter(connection.execute(sa.select(GROUPS.c.status)).scalars())
    count = sa.select(sa.func.count()).select_from(EXPERIENCES)
    sizes = sa.select(sa.func.sum(GROUPS.c.size)).where(GROUPS.c.payload)
    return statuses, connection.execute(count).scalar_one(), connection.execute(sizes).scalar_one()

  statuses, experiences, sizes = store.database.read(read)
  stats = store.stats()
  assert [statuses[i] for i in range(4)] == [stats.ready, stats.waiting, stats.used, stats.dropped]
  assert experiences == (sizes or 0)


def held(store):
  """Keys of all groups that were ever stored."""
  from trinity_jax.buffer.schema import GROUPS

  return set(store.database.read(
    lambda connection: [(r.batch, r.task) for r in connection.execute(GROUPS.select())]
  ))  # fmt: skip


def life_and_death(place, rounds, seed):
  """Explorers and a trainer, each killed at a random moment and started again."""
  rng = random.Random(seed)
  acknowledged, uses, committed = set(), {}, 0
  for _ in range(rounds):
    running = [Process("explore", place, 1), Process("explore", place, 2),
               Process("train", place, committed)]  # fmt: skip
    rng.choice(running).read(rng.randint(1, 60))
    rng.shuffle(running)
    for process in running:
      process.kill()
    uses = {step: found for step, found in uses.items() if step <= committed}
    for line in (line for p in running for line in p.lines):
      if line[0] == "used":
        uses[int(line[1])] = [tuple(map(int, k.split(","))) for k in line[2:]]
      elif line[0] == "committed":
        committed = max(committed, int(line[1]))
      else:
        assert line[0] in ("stored", "same")  # a dead explorer's last commit may come late
        acknowledged.add((int(line[1]), int(line[2])))
  store = place.open()
  buffer = ReplayBuffer(store, capacity=10**6, order="ready", tasks_per_step=2)
  buffer.restore(committed)  # waits for what a server still does for the dead
  check_counts(store)
  stored = held(store)
  assert acknowledged <= stored and acknowledged
  uses = {step: found for step, found in uses.items() if step <= committed}
  rest = buffer.stats()["ready"]
  found = keys(buffer.sample(rest, committed + 1, WAIT)) if rest else []
  trained = [k for taken in uses.values() for k in taken]
  assert sorted(uses) == list(range(1, committed + 1))
  assert sorted(trained + found) == sorted(stored)  # each exactly once


@pytest.mark.slow
def test_killed_processes(sqlite):
  life_and_death(sqlite, 1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 3))
def test_killed_processes_again_and_again(shared, seed):
  life_and_death(shared, 8, seed)


def test_a_resume_waits_for_what_the_server_does_for_the_dead(server, tmp_path, monkeypatch):
  """A trainer that is killed while its use of a group is committed: the use is forgotten."""
  dead, alive = (open_store(server.url, tmp_path, namespace="dead") for _ in range(2))
  rules = {"capacity": 100, "order": "ready", "tasks_per_step": 1}
  buffer = ReplayBuffer(alive, **rules)
  asyncio.run(buffer.put(group(1, 0)))
  asked, may_commit, add = threading.Event(), threading.Event(), dead._add

  def slow(connection, counts):
    add(connection, counts)
    asked.set()
    assert may_commit.wait(WAIT)

  monkeypatch.setattr(dead, "_add", slow)
  take = threading.Thread(target=lambda: ReplayBuffer(dead, **rules).sample(1, 1, WAIT))
  restore = threading.Thread(target=lambda: buffer.restore(0))
  take.start()
  assert asked.wait(WAIT)
  restore.start()
  restore.join(0.5)
  waited = restore.is_alive()
  may_commit.set()
  for thread in (take, restore):
    thread.join(WAIT)
  assert waited
  assert buffer.stats()["ready"] == 1 and keys(buffer.sample(1, 1, 0)) == [(1, 0)]
  for store in (dead, alive):
    store.close()


@contextlib.contextmanager
def trouble(cause):
  """Calls cause() again and again from another thread."""
  done = threading.Event()

  def work():
    while not done.wait(0.1):
      cause()

  thread = threading.Thread(target=work)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join(WAIT)


def put_and_sample(buffer, n):
  """n groups in and out at once; returns the groups in the order they came."""
  outcomes = []

  async def fill():
    for first in range(1, n + 1, 8):
      puts = (buffer.put(group(b, 0)) for b in range(first, first + 8))
      outcomes.extend(await asyncio.gather(*puts))

  thread = threading.Thread(target=lambda: asyncio.run(fill()))
  thread.start()
  taken = [k for step in range(1, n // 4 + 1) for k in keys(buffer.sample(4, step, WAIT))]
  thread.join(WAIT)
  assert outcomes == ["stored"] * n
  return taken


@pytest.mark.slow
def test_connections_that_are_cut(server, tmp_path):
  store = open_store(server.url, tmp_path, namespace="cut")
  buffer = ReplayBuffer(store, capacity=32, order="id", tasks_per_step=1)
  claims = []
  with trouble(server.cut_connections):
    claims += [buffer.claim("a", 60).batch for _ in range(5)]
    taken = put_and_sample(buffer, 80)
  assert taken == [(b, 0) for b in range(1, 81)]
  assert claims == [1, 2, 3, 4, 5]
  check_counts(store)
  store.close()


def test_a_server_that_crashes(server, tmp_path):
  store = open_store(server.url, tmp_path, namespace="crash")
  buffer = ReplayBuffer(store, capacity=100, order="id", tasks_per_step=1)
  taken = []
  sampler = threading.Thread(target=lambda: taken.extend(keys(buffer.sample(2, 1, WAIT))))
  asyncio.run(buffer.put(group(1, 0)))
  sampler.start()
  server.stop("immediate")
  put = threading.Thread(target=lambda: asyncio.run(buffer.put(group(2, 0))))
  put.start()
  server.start()
  for thread in (put, sampler):
    thread.join(WAIT)
  assert taken == [(1, 0), (2, 0)]
  store.close()


def test_a_server_that_stays_away(server, tmp_path):
  store = open_store(server.url, tmp_path, namespace="away", patience=0.5)
  buffer = ReplayBuffer(store, capacity=100, order="id", tasks_per_step=1)
  server.stop()
  try:
    with pytest.raises(RunFailed, match=r"postgresql://tester@.*\(away\): not reached for 0 s"):
      asyncio.run(buffer.put(group(1, 0)))
  finally:
    server.start()
  assert asyncio.run(buffer.put(group(1, 0))) == "stored"
  store.close()


def lose_answers(database, monkeypatch):
  """Every transaction that writes is committed, and its answer lost, at its first attempt."""
  attempt = database._run

  def run(function, writes):
    if not writes:
      return attempt(function, writes)
    attempt(lambda connection, _: function(connection, 0), True)
    return attempt(lambda connection, _: function(connection, 1), True)

  monkeypatch.setattr(database, "_run", run)


def test_answers_that_are_lost(shared, monkeypatch):
  """A connection that is cut during COMMIT: the transaction is tried again and changes nothing."""
  from trinity_jax.experience import ExperienceId

  buffer = shared.buffer(tasks_per_step=1, max_staleness=1)
  lose_answers(buffer.store.database, monkeypatch)
  assert [buffer.claim("a", 60).batch for _ in range(3)] == [1, 2, 3]
  put = lambda g: asyncio.run(buffer.put(g))
  assert put(group(1, 0, versions=(0, 5))) == "stored"
  assert put(group(2, 0, versions=(0,))) == put(group(3, 0, versions=(5,), late=True)) == "stored"
  for run in range(2):
    buffer.give_reward(ExperienceId(3, 0, run, 0), 1.0)
  assert keys(buffer.sample(2, 5, 0)) == [(1, 0), (3, 0)]
  assert (buffer.stats()["dropped"], buffer.stats()["masked_tokens"]) == (1, 2)
  check_counts(buffer.store)
  buffer.restore(4)
  assert buffer.stats()["ready"] == 3
  assert len(keys(buffer.sample(2, 5, 0))) == 2
  buffer.commit(5)
  check_counts(buffer.store)


def test_a_disk_that_is_full(tmp_path):
  class Place:
    url, directory, namespace = "sqlite", tmp_path, ""

  process = Process("fill", Place, 3_000_000)
  while not process.lines or process.lines[-1][0] != "failed":
    process.read(1)
  process.kill()
  stored = [(int(b), int(t)) for word, b, t in process.lines[:-1]]
  assert len(stored) > 5
  message = " ".join(process.lines[-1])
  assert f"{tmp_path}/buffer.sqlite: cannot be written" in message and "is the disk full" in message
  store = open_store("sqlite", tmp_path)
  check_counts(store)
  buffer = ReplayBuffer(store, capacity=1, order="id", tasks_per_step=1)
  assert keys(buffer.sample(len(stored), 1, 0)) == stored
  store.close()


def test_what_the_writer_cannot_store_goes_to_who_put_it(tmp_path):
  store = open_store("sqlite", tmp_path)
  buffer = ReplayBuffer(store, capacity=9, order="id", tasks_per_step=1)
  bad = group(1, 0)
  bad[0].info["x"] = object()
  with pytest.raises(TypeError):
    asyncio.run(buffer.put(bad))
  assert asyncio.run(buffer.put(group(1, 0))) == "stored"
  store.close()
  os.remove(tmp_path / "buffer.sqlite")
  (tmp_path / "buffer.sqlite").mkdir()
  with pytest.raises((RunFailed, UserError), match=r"buffer\.sqlite"):
    open_store("sqlite", tmp_path, patience=0.2)
