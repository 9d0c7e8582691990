"""What an agent says over ten turns while weights change: every log-prob is that of its version."""

from __future__ import annotations

import asyncio

import jax
import numpy as np
import pytest

from trinity_jax.explorer.rewards import Score

pytestmark = pytest.mark.slow
TURNS = 10


def policies_of(served):
  return [jax.tree.map(lambda p, i=i: p * (1 + 0.04 * i), served.params) for i in range(TURNS + 1)]


def agent_while_weights_change(served, on_swap, policies):
  """(model, experience) of an agent whose policy becomes the next one in mid-turn, every turn."""
  with served.server(on_swap) as (sampler, server):
    model = served.model(sampler, server)

    async def talk():
      messages = []
      async with model.openai(max_retries=0) as client:
        for turn in range(TURNS):
          messages.append({"role": "user", "content": f"q{turn}"})
          text, ask = "", {"model": "m", "messages": messages, "max_tokens": 24}
          async for chunk in await client.chat.completions.create(**ask, stream=True):
            text += chunk.choices[0].delta.content or ""
            if sampler.version == turn:  # in the middle of this turn
              sampler.set_params(turn + 1, policies[turn + 1])
          messages.append({"role": "assistant", "content": text})

    served.run(sampler, talk)
  (e,) = model.experiences(Score(0.0, {}), {})
  assert model.turns == TURNS and model.forks == 0
  assert set(e.versions[e.action_mask]) >= set(range(TURNS)), "no swap took place"
  return model, e


@pytest.mark.parametrize("on_swap", ["recompute", "drain", "keep"])
def test_log_probs_of_ten_turns_are_those_of_a_forward_pass(served, on_swap):
  policies = policies_of(served)
  _, e = agent_while_weights_change(served, on_swap, policies)
  written, mixed = e.action_mask, np.zeros(len(e.tokens), bool) if e.mixed is None else e.mixed
  off = np.zeros(len(e.tokens))
  for version in set(e.versions[written]):
    mine = written & (e.versions == version)
    off[mine] = np.abs(served.score(policies[version], e.tokens) - e.logprobs)[mine]
  assert off[written & ~mixed].max() <= 5e-5  # the bound of training itself
  if on_swap == "keep":
    assert mixed[written].any() and off[mixed].max() > 1e-3  # flagged for a reason
  else:
    assert not mixed.any()


class Replay:
  """Samples the replies of a recorded run again, token in and token out.

  One decode step a dispatch, and each change of version comes at the token where it came then.
  """

  def __init__(self, sampler, policies, e):
    self._sampler, self._policies, self._e = sampler, policies, e

  async def generate(self, request):
    start, loop = len(request.tokens), asyncio.get_running_loop()
    versions, done = self._e.versions[start : start + request.limit], 0
    assert np.array_equal(request.tokens, self._e.tokens[:start])

    def swap(at):
      if at < len(versions) and versions[at] > self._sampler.version:
        self._sampler.set_params(int(versions[at]), self._policies[versions[at]])

    def sink(chunk):  # on the sampler's thread, between two dispatches
      nonlocal done
      done += len(chunk.tokens)
      swap(done)

    swap(0)
    future = self._sampler.submit(request, sink=sink)
    return await asyncio.wrap_future(future, loop=loop)

  def __getattr__(self, name):
    return getattr(self._sampler, name)


def test_flagged_tokens_are_those_of_a_replay_that_swaps_at_the_same_token(served):
  policies = policies_of(served)
  asked, e = agent_while_weights_change(served, "keep", policies)
  ends = [turn.tokens for turn in asked.logs[0].turns]
  starts = [int(np.flatnonzero(e.action_mask[a:])[0]) + a for a in [0, *ends[:-1]]]
  with served.sampler("keep", steps=1) as sampler:
    model = served.model(Replay(sampler, policies, e), None, limit=24)

    async def tokens_only():
      for start in starts:
        await model.generate(e.tokens[:start].tolist())

    served.run(sampler, tokens_only)
  again = model.experience(Score(0.0, {}), {})
  assert e.mixed is not None and again.mixed is not None and e.mixed.sum() > TURNS
  for name in ("tokens", "action_mask", "versions", "mixed"):
    assert np.array_equal(getattr(e, name), getattr(again, name)), name
  np.testing.assert_allclose(again.logprobs, e.logprobs, atol=2e-5)
