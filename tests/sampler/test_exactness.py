"""Token by token: what is sampled is what a full forward pass says, wherever it is sampled.

The rule: equal, except where the top-2 margin of the (perturbed) logits is below 1e-4; counted, at
most one token in 10,000. See Agreement in conftest.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from trinity_jax.models.presets import ModelConfig, RopeScaling
from trinity_jax.sampler.engine import EngineSpec

_SIZES = (96, 32, 2, 4, 2, 16, 48)
FAMILIES = {
  "qwen2": ModelConfig("qwen2", *_SIZES, qkv_bias=True, tie_word_embeddings=True),
  "qwen3": ModelConfig("qwen3", *_SIZES, qk_norm=True, tie_word_embeddings=True),
  "llama": ModelConfig("llama", *_SIZES, rope_scaling=RopeScaling("llama3", 8.0, 16, 1.0, 4.0)),
  "mistral": ModelConfig("mistral", *_SIZES, sliding_window=9),
}
SLOTS, LIMIT = 64, 32


@pytest.fixture(scope="module", params=FAMILIES)
def family(tools, request):
  """An engine of 64 slots."""
  model = FAMILIES[request.param]
  spec = EngineSpec(model, SLOTS, live_lengths=(24, 48), max_response=LIMIT)
  return tools.engine(tools.jitted(spec, (SLOTS,), (8,)), tools.draw(model))


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_2000_tokens_of_every_family(tools, family, temperature):
  spec = family.programs.spec
  rng = np.random.default_rng(5)
  asks = {
    s: tools.ask(tuple(rng.integers(0, 96, 1 + s % 15).tolist()), s, LIMIT, temperature)
    for s in range(SLOTS)
  }
  drive = tools.drive(family)
  drive.admit(asks, split=(5,))
  while drive.active():
    longest = int(np.asarray(drive.state.length).max()) + 1
    live = next(n for n in spec.live_lengths if n >= longest)
    drive.decode(steps=live - longest + 1, live=live)
  agreement = tools.agreement()
  answers = [drive.answer(s).tokens for s in range(SLOTS)]
  scores = tools.perturbed(spec.model, family.params, [asks[s] for s in range(SLOTS)], answers, 48)
  for tokens, own in zip(answers, scores):
    agreement.chosen(own, tokens)
  agreement.check(at_least=2000)
  assert len({t for tokens in answers for t in tokens}) > 60, "a model that says little"


# --- one request, anywhere ----------------------------------------------------------------------

ROUNDS = 6


@pytest.fixture(scope="module")
def sampled(tools, params, engine):
  """48 requests, their tokens as sampled eight at a time, and the scores they are the argmax of."""
  rng = np.random.default_rng(3)
  asks = [
    tools.ask(
      tuple(rng.integers(0, 64, 1 + i % tools.prompt).tolist()), key=i, limit=5 + i % 8,
      temperature=(1.0, 0.7, 1.5)[i % 3],
    )
    for i in range(ROUNDS * tools.spec.slots)
  ]  # fmt: skip
  answers = play(tools, engine, asks)
  scores = tools.perturbed(tools.model, params, asks, answers, tools.spec.cache_length)
  return asks, answers, scores


def play(tools, engine, asks, order=None, together=4, **kwargs):
  """Tokens of every request; slots are taken in `order`, prompts come `together` at a time."""
  S = tools.spec.slots
  order = np.arange(len(asks)) if order is None else order
  answers = {}
  for first in range(0, len(asks), S):
    slots = dict(enumerate(order[first : first + S].tolist()))
    drive = tools.drive(engine)
    for at in range(0, S, together):
      drive.admit({s: asks[i] for s, i in slots.items() if at <= s < at + together}, **kwargs)
      if together < S:
        drive.decode(2)  # those that are here already go on
    drive.decode()
    answers.update({i: drive.answer(s).tokens for s, i in slots.items()})
  return [answers[i] for i in range(len(asks))]


def compare(tools, sampled, got):
  _, answers, scores = sampled
  agreement = tools.agreement()
  for first, second, own in zip(answers, got, scores, strict=True):
    agreement.same(first, second, own)
  agreement.check(at_least=400)


def test_sampled_tokens_are_those_of_the_full_forward(tools, sampled):
  _, answers, scores = sampled
  agreement = tools.agreement()
  for tokens, own in zip(answers, scores):
    agreement.chosen(own, tokens)
  agreement.check(at_least=400)


@pytest.mark.parametrize("seed", [1, 2])
def test_another_slot_among_other_neighbours(tools, engine, sampled, seed):
  order = np.random.default_rng(seed).permutation(len(sampled[0]))
  compare(tools, sampled, play(tools, engine, sampled[0], order))


@pytest.mark.parametrize(("together", "split"), [(1, ()), (2, (1, 1, 1)), (4, (3, 2)), (4, (7,))])
def test_another_split_of_the_prefill(tools, engine, sampled, together, split):
  compare(tools, sampled, play(tools, engine, sampled[0], together=together, split=split))


SLOW = [
  pytest.param(sizes, marks=pytest.mark.slow)
  for sizes in [(8, 1, 1, 1), (4, 1, 2, 1), (1, 4, 2, 1)]
] + [pytest.param((2, 2, 1, 2), marks=pytest.mark.nightly)]


@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), *SLOW], ids=str)
def test_eight_devices_give_the_tokens_of_one(tools, params, meshed, sampled, sizes):
  other = meshed(sizes)
  compare(tools, sampled, play(tools, other, sampled[0], together=8, split=(3,)))
  # One row for all of a shard, given to the others by a copy.
  twins = {s: tools.ask(sampled[0][1].prompt, key=s) for s in range(tools.spec.slots)}
  tokens = [a.tokens for a in tools.run(other, twins).values()]
  agreement = tools.agreement()
  for own, chosen in zip(
    tools.perturbed(tools.model, params, list(twins.values()), tokens, tools.spec.cache_length),
    tokens,
  ):
    agreement.chosen(own, chosen)
  agreement.check(at_least=96)
