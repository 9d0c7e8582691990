"""An agent that knows nothing but the openai package, trained through the explorer."""

from __future__ import annotations

import asyncio
import threading

import pytest
from rig import Rig, config_of, workflow

from trinity_jax.experience import StopReason

__all__ = ["workflow"]  # a fixture


@pytest.mark.parametrize("deterministic", [True, False])
def test_calls_of_an_agent_are_the_turns_of_its_run(world, workflow, deterministic):
  held = []

  async def agent(task, model):
    client = model.openai(max_retries=0)
    held.append((model, client))
    messages = [dict(m) for m in task.messages]
    for _ in range(2):
      found = await client.chat.completions.create(model="policy", messages=messages)
      messages += [found.choices[0].message.model_dump(exclude_none=True)]
      messages += [{"role": "user", "content": "."}]
    return 1.0

  workflow(agent)
  settings = {"explorer.deterministic": deterministic}
  with world.sampler(version=None, deterministic=deterministic) as sampler:
    rig = Rig(world, sampler, config_of(world, **settings))
    steps = rig.go(1, 2)
    asyncio.run(rig.explorer.aclose())
  found = [e for step in steps for e in step]
  assert len(found) == 12 and all(not e.stop_reason.failed for e in found), found[0].info
  for e in found:
    assert e.metrics["num_turns"] == 2 and e.reward == 1.0
    edges = (e.action_mask[1:] != e.action_mask[:-1]).sum()
    assert edges == 3, "prompt, reply, what the agent added, reply"
  assert len({m.id for m, _ in held}) == 12
  assert not any("openai-server" in t.name for t in threading.enumerate())


def test_an_agent_that_never_asks_costs_no_server(world, workflow):
  async def speaks(task, model):
    await model.chat(task.messages)

  workflow(speaks)
  with world.sampler(version=None) as sampler:
    rig = Rig(world, sampler, config_of(world))
    assert all(e.stop_reason is not StopReason.ERROR for e in rig.go(1, 1)[0])
  assert not any("openai-server" in t.name for t in threading.enumerate())
