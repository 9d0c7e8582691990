"""Random operations against a model that says in a few lines what the buffer means."""

from __future__ import annotations

import tempfile

import pytest
from groups import group, keys
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
  RuleBasedStateMachine,
  initialize,
  invariant,
  precondition,
  rule,
  run_state_machine_as_test,
)

from trinity_jax.buffer.record import describe_group
from trinity_jax.buffer.replay import ReplayBuffer
from trinity_jax.buffer.store import open_store
from trinity_jax.errors import RunFailed
from trinity_jax.experience import ExperienceId

TASKS, SIZE, CAPACITY = 2, 2, 8


class Machine(RuleBasedStateMachine):
  """`groups`: what was stored, per key (newest version, late, {step: was it dropped})."""

  url = "memory"

  @initialize(order=st.sampled_from(["id", "ready", "priority"]), uses=st.integers(1, 2),
              cool_down=st.integers(0, 2), staleness=st.none() | st.integers(0, 2))  # fmt: skip
  def start(self, order, uses, cool_down, staleness):
    self.folder = tempfile.TemporaryDirectory()
    self.order, self.uses = order, 1 if order == "id" else uses
    self.cool_down, self.staleness = cool_down, staleness
    self.store = self.opened()
    self.buffer = self.made()
    self.groups, self.ready, self.step, self.committed = {}, set(), 1, 0
    self.open = {}  # claimed step -> owner, None when released

  def opened(self):
    return open_store(self.url, self.folder.name)

  def made(self):
    return ReplayBuffer(
      self.store, capacity=CAPACITY, order=self.order, tasks_per_step=TASKS, max_uses=self.uses,
      cool_down=self.cool_down, max_staleness=self.staleness,
    )  # fmt: skip

  def teardown(self):
    self.store.close()
    self.folder.cleanup()

  # --- the model ---

  def used(self, key):
    return [s for s, dropped in self.groups[key][2].items() if not dropped]

  def status(self, key):
    _, late, uses, _ = self.groups[key]
    if late:
      return "waiting"
    return "dropped" if any(uses.values()) else "used" if len(uses) >= self.uses else "ready"

  def of(self, status):
    return sorted(k for k in self.groups if self.status(k) == status)

  def fresh(self):
    return SIZE * sum(not self.groups[k][2] for k in self.of("ready"))

  def due(self):
    batch, task = max([*self.of("used"), *self.of("dropped"), (0, TASKS - 1)])
    return (batch, task + 1) if task + 1 < TASKS else (batch + 1, 0)

  def stale(self, key):
    return self.staleness is not None and self.groups[key][0] < self.step - 1 - self.staleness

  def choose(self, n):
    """The groups a step takes; drops stale ones."""
    if self.order == "id":
      chosen, due = [], self.due()
      for key in self.of("ready"):
        if len(chosen) == n or key > due:
          break
        due = max(due, (key[0], key[1] + 1) if key[1] + 1 < TASKS else (key[0] + 1, 0))
        if self.stale(key):
          self.groups[key][2][self.step] = True
        else:
          chosen.append(key)
      return chosen
    for key in self.of("ready"):
      if self.stale(key):
        self.groups[key][2][self.step] = True
    free = [k for k in self.of("ready")
            if self.step >= max(self.used(k), default=-9) + max(1, self.cool_down)]  # fmt: skip
    if self.order == "priority":
      free.sort(key=lambda k: (2 * len(self.used(k)) - self.groups[k][0], k))
    return free[:n]

  # --- the operations ---

  @rule(batch=st.integers(1, 4), task=st.integers(0, TASKS - 1), version=st.integers(0, 3),
        late=st.sampled_from([False, False, True]))  # fmt: skip
  def put(self, batch, task, version, late):
    key = (batch, task)
    sent = group(batch, task, SIZE, versions=(version,), late=late)
    (outcome,) = self.store.put([describe_group(sent)], self.buffer.rules)
    if key in self.groups:
      same = self.groups[key][0] == version and self.groups[key][3] == late
      assert outcome == ("same" if same else "different")
    elif self.fresh() < CAPACITY or (self.order == "id" and key <= self.due()):
      assert outcome == "stored"
      self.groups[key] = [version, SIZE * late, {}, late]
      if batch in self.open and len([k for k in self.groups if k[0] == batch]) == TASKS:
        del self.open[batch]
      else:
        self.open.setdefault(batch, None)
        if len([k for k in self.groups if k[0] == batch]) == TASKS:
          del self.open[batch]
    else:
      assert outcome is None

  @rule(data=st.data())
  def reward(self, data):
    late = self.of("waiting")
    if late:
      key = data.draw(st.sampled_from(late))
      self.buffer.give_reward(ExperienceId(*key, self.groups[key][1] - 1, 0), 1.0)
      self.groups[key][1] -= 1

  @rule(n=st.integers(1, 2))
  def sample(self, n):
    chosen = self.choose(n)
    if len(chosen) < n:
      with pytest.raises(RunFailed, match="the trainer waited"):
        self.buffer.sample(n, self.step, 0)
    else:
      got = keys(self.buffer.sample(n, self.step, 0))
      assert got == sorted(chosen)
      for key in chosen:
        self.groups[key][2][self.step] = False
      self.step += 1

  @rule()
  def commit(self):
    self.committed = self.step - 1
    self.buffer.commit(self.committed)

  @rule()
  def restart(self):
    """The trainer is killed and goes on from its checkpoint."""
    if self.url != "memory":
      self.store.close()
      self.store = self.opened()
    self.buffer = self.made()
    self.buffer.restore(self.committed)
    self.step = self.committed + 1
    for entry in self.groups.values():
      entry[2] = {s: d for s, d in entry[2].items() if s <= self.committed}

  @precondition(lambda self: len(self.open) < 4)
  @rule(owner=st.sampled_from("ab"))
  def claim(self, owner):
    got = self.buffer.claim(owner, 1000)
    free = [b for b, o in self.open.items() if o is None]
    seen = [*(k[0] for k in self.groups), *self.open, 0]
    want = min(free) if free else max(seen) + 1
    stored = {k[1] for k in self.groups if k[0] == want}
    assert got == (want, tuple(t for t in range(TASKS) if t not in stored))
    self.open[want] = owner

  @rule(owner=st.sampled_from("ab"))
  def release(self, owner):
    self.buffer.release(owner)
    self.open = {b: None if o == owner else o for b, o in self.open.items()}

  @invariant()
  def counts(self):
    if not hasattr(self, "groups"):
      return
    stats = self.buffer.stats()
    for status in ("ready", "waiting", "used", "dropped"):
      assert stats[status] == len(self.of(status)), status
    assert stats["experiences"] == self.fresh()
    stored = lambda b: sum(k[0] == b for k in self.groups)
    assert stats["claimed"] == sum(TASKS - stored(b) for b, o in self.open.items() if o)


def run(url, examples, steps):
  machine = type("Machine", (Machine,), {"url": url})
  run_state_machine_as_test(
    machine,
    settings=settings(
      max_examples=examples, stateful_step_count=steps, deadline=None,
      suppress_health_check=list(HealthCheck),
    ),
  )  # fmt: skip


def test_memory():
  run("memory", 60, 30)


def test_sqlite():
  run("sqlite", 8, 25)


@pytest.mark.slow
@pytest.mark.parametrize("url", ["memory", "sqlite"])
def test_longer(url):
  run(url, 300, 40)


@pytest.mark.slow
def test_postgresql(server):
  import itertools

  count = itertools.count()

  class OnServer(Machine):
    url = server.url

    def opened(self):
      if not hasattr(self, "namespace"):
        self.namespace = f"model{next(count)}"
      return open_store(self.url, self.folder.name, namespace=self.namespace)

  run_state_machine_as_test(
    OnServer,
    settings=settings(
      max_examples=60, stateful_step_count=30, deadline=None,
      suppress_health_check=list(HealthCheck),
    ),
  )  # fmt: skip
