"""A tiny model, tokenizer and sampler, and runs over them."""

from __future__ import annotations

import asyncio
import contextlib
import time

import jax
import jax.numpy as jnp
import pytest

from trinity_jax.experience import ExperienceId, Task
from trinity_jax.explorer.rewards import Score
from trinity_jax.explorer.runner import Runner
from trinity_jax.explorer.workflow import Model, SamplingParams
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import hf, sharding
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.sampler.engine import EngineSpec
from trinity_jax.sampler.programs import Programs
from trinity_jax.sampler.scheduler import Sampler

PROMPT, RESPONSE = 24, 6
WAIT = 60
FIRST = ExperienceId(1, 0, 0, 0)


class World:
  """What the explorer's tests share."""

  max_prompt, max_response = PROMPT, RESPONSE

  def __init__(self, folder):
    path = hf.write_tiny_checkpoint(
      folder / "model", hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, intermediate=32
    )
    self.mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    self.launch = LaunchOrder(self.mesh)
    self.layout = sharding.param_shardings(hf.load_config(path), self.mesh)
    self.params, model = hf.load(path, dtype=jnp.float32, shardings=self.layout)
    self.tokenizer = Tokenizer.load(path)
    spec = EngineSpec(model, 4, live_lengths=(PROMPT + RESPONSE,), max_response=RESPONSE)
    self.programs = Programs(
      spec, self.mesh, self.layout, self.launch,
      prompt_lengths=(PROMPT,), prompt_counts=(4,), scores=True,
    )  # fmt: skip
    self.programs.warmup(self.params)

  @contextlib.contextmanager
  def sampler(self, *, deterministic=True, version=0, check=True):
    """A running sampler; afterwards nothing may have leaked."""
    sampler = Sampler(
      self.programs, steps_per_dispatch=2, refill_fraction=0.2, deterministic=deterministic
    )
    sampler.start()
    if version is not None:
      sampler.set_params(version, self.params)
    try:
      yield sampler
      if check:
        assert sampler.error is None
        for _ in range(500):  # what was given up is dropped at the next dispatch boundary
          if not sampler._waiting and not sampler._driver.occupied:
            break
          sampler.wake()
          time.sleep(0.01)
        assert sampler._busy == 0 and not sampler._waiting
        assert not any(slot.open for slot in sampler._driver.slots)
    finally:
      sampler.close()

  def task(self, index=0, text="hi", truth="") -> Task:
    return Task(index, ({"role": "user", "content": text},), truth)

  def model(self, sampler, id=FIRST, temperature=1.0, seed=0) -> Model:
    params = SamplingParams(temperature, RESPONSE)
    return Model(sampler, self.tokenizer, id, seed, params, PROMPT)

  def run(self, sampler, workflow, tasks, *, grade=None, timeout=WAIT, retries=0, retry_on=()):
    """One run per task, all at once; returns the last experience of each."""

    async def ones(response, task):
      return Score(1.0, {"accuracy": 1.0})

    runner = Runner(
      workflow, grade or ones, lambda id: self.model(sampler, id), lambda _: sampler.leave(),
      lambda _: contextlib.nullcontext(), timeout=timeout, retries=retries,
      retry_on=retry_on,
    )  # fmt: skip

    async def main():
      for _ in tasks:
        sampler.enter()
      runs = (runner.run(t, ExperienceId(1, i, 0, 0)) for i, t in enumerate(tasks))
      out = [ran.experiences()[-1] for ran in await asyncio.gather(*runs)]
      for _ in range(2):  # whoever gave up is out of the sampler when it has served another
        sampler.enter()
        try:
          await self.model(sampler, ExperienceId(9, 9, 9, 9)).chat(self.task().messages)
        finally:
          sampler.leave()
      return out

    return asyncio.run(asyncio.wait_for(main(), WAIT))


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
  return World(tmp_path_factory.mktemp("tiny"))
