"""What an agent says over ten turns while weights change: every log-prob is that of its version."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from trinity_jax.explorer.rewards import Score

pytestmark = pytest.mark.slow
TURNS = 10


@pytest.mark.parametrize("on_swap", ["recompute", "drain", "keep"])
def test_log_probs_of_ten_turns_are_those_of_a_forward_pass(served, on_swap):
  policies = [
    jax.tree.map(lambda p, i=i: p * (1 + 0.04 * i), served.params) for i in range(TURNS + 1)
  ]
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
  written, mixed = e.action_mask, np.zeros(len(e.tokens), bool) if e.mixed is None else e.mixed
  assert set(e.versions[written]) >= set(range(TURNS)), "no swap took place"
  off = np.zeros(len(e.tokens))
  for version in set(e.versions[written]):
    mine = written & (e.versions == version)
    off[mine] = np.abs(served.score(policies[version], e.tokens) - e.logprobs)[mine]
  assert off[written & ~mixed].max() < 2e-4
  if on_swap == "keep":
    assert mixed[written].any() and off[mixed].max() > 1e-3  # flagged for a reason
  else:
    assert not mixed.any()
