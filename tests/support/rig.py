"""Explorer and friends around one sampler, for the explorer's tests: the test is the trainer."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from trinity_jax.buffer.replay import ReplayBuffer
from trinity_jax.buffer.storage_memory import MemoryStore
from trinity_jax.config import TasksetConfig, base_config, resolve
from trinity_jax.experience import Experience
from trinity_jax.explorer.explorer import Explorer, tasks_per_batch
from trinity_jax.explorer.rewards import Score
from trinity_jax.explorer.workflows import WORKFLOWS
from trinity_jax.schedule import make_schedule
from trinity_jax.synchronizer import Synchronizer
from trinity_jax.tasks import Taskset

WAIT = 60


def config_of(world, tasks=3, runs=2, interval=1, offset=0, every=0, **more):
  c = base_config()
  c.model.path = "unused"
  c.taskset.path = "unused"
  c.taskset.workflow = "tested"
  c.explorer.batch_size, c.explorer.group_size = tasks, runs
  c.explorer.max_retries = 0
  c.sampler.max_prompt_length = world.max_prompt
  c.sampler.max_response_length = world.max_response
  c.sync.interval, c.sync.offset, c.sync.timeout = interval, offset, WAIT
  c.eval.interval = every
  c.update_from_flattened_dict(more)
  return resolve(c)


async def speaks(task, model):
  await model.chat(task.messages)


async def grade(response, task):
  return Score(len(response) % 3 / 2, {"accuracy": len(response) % 3 / 2})


class Rig:
  """Explorer and friends around one sampler; the test is the trainer."""

  def __init__(self, world, sampler, config, held_out=(), evaluated=(), keep=0, start=0):
    self.world, self.sampler, self.config = world, sampler, config
    self.schedule = make_schedule(config.sync)
    store = MemoryStore()
    bell = store.bell
    self.sync = Synchronizer(
      world.layout, jnp.float32, world.launch, keep=keep or self.schedule.max_lag + 1, timeout=WAIT,
      bell=bell,
    )  # fmt: skip
    per_step = tasks_per_batch(config) * config.explorer.group_size
    capacity = config.buffer.capacity or per_step * (self.schedule.max_steps_ahead + 1)
    self.buffer = ReplayBuffer(
      store, capacity=capacity, order="id" if config.explorer.deterministic else "ready",
      tasks_per_step=tasks_per_batch(config), max_staleness=self.schedule.max_lag,
      first_batch=start + 1, min_runs=config.explorer.min_runs,
    )  # fmt: skip
    self.evals: list[tuple[int, dict, list]] = []
    self.explorer = Explorer(
      config, engine=sampler, tokenizer=world.tokenizer, schedule=self.schedule,
      versions=self.sync, buffer=self.buffer, bell=self.buffer.bell,
      taskset=Taskset([world.task(i, text=chr(97 + i)) for i in range(7)], seed=1),
      held_out=held_out, grade=grade, span=lambda _: contextlib.nullcontext(),
      on_eval=lambda *a: self.evals.append(a), evaluated=evaluated,
    )  # fmt: skip
    self.errors, self.published = [], []

  def publish(self, version):
    """A different policy each time."""
    if version <= self.sync.version:
      return
    self.published.append(version)
    change = lambda x: x * (1 + 0.2 * version)
    self.sync.publish(version, jax.tree.map(change, self.world.params))

  @contextlib.contextmanager
  def exploring(self, coroutine):
    def run():
      try:
        asyncio.run(coroutine)
      except BaseException as e:
        self.errors.append(e)
        self.buffer.close(e)

    thread = threading.Thread(target=run)
    thread.start()
    try:
      yield
    except BaseException as e:
      self.sync.close(e)
      self.buffer.close(e)
      raise
    finally:
      thread.join(WAIT)
      assert not thread.is_alive()

  def train(self, first, last, publish=True) -> list[list[Experience]]:
    """Takes each step's experiences and publishes as the schedule says."""
    out = []
    for step in range(first, last + 1):
      groups = self.config.explorer.batch_size
      out.append(self.buffer.sample(groups, step, WAIT, self.explorer.describe))
      asked = self.sync.take_request()
      if publish and (self.schedule.publishes(step, asked) or step == last):
        self.publish(step)
    return out

  def until(self, ready) -> bool:
    """Waits for rings of the bell until `ready`."""
    end, bell = time.monotonic() + WAIT, self.buffer.bell
    while not ready() and time.monotonic() < end:
      bell.wait(bell.count, 0.05)
    return ready()

  def go(self, first, last):
    self.publish(first - 1)
    with self.exploring(self.explorer.explore(last)):
      steps = self.train(first, last)
      self.buffer.finish()
    assert not self.errors
    return steps


@pytest.fixture
def workflow(monkeypatch):
  """Names a workflow `tested` for the time of a test."""

  def use(function):
    monkeypatch.setitem(WORKFLOWS, "tested", function)

  use(speaks)
  return use


def versions(experiences) -> set[int]:
  return {int(v) for e in experiences for v in e.versions[e.action_mask]}


def held_out(world, name="sums", n=5):
  tasks = [world.task(i, text=chr(103 + i), truth=str(i)) for i in range(n)]

  async def right(response, task):
    return Score(0.5 * (int(task.truth) % 2), {"accuracy": float(int(task.truth) % 2)})

  return TasksetConfig(name=name, workflow="tested"), tasks, right
