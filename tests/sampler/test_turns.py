"""Dialogues: the next turn computes its new tokens only, wherever that is exact."""

from __future__ import annotations

import numpy as np
import pytest

from trinity_jax.sampler.request import Request
from trinity_jax.sampler.sampling import request_key
from trinity_jax.sampler.scheduler import SWAPS, Sampler

NEW = 5  # tokens of the user per turn


@pytest.fixture
def make(fakes):
  def make(slots=2, shards=1, **kw):
    return fakes.FakePrograms(
      slots=slots, max_prompt=240, max_response=10, counts=(1, 4), lengths=(16, 128),
      lives=(40, 120, 250), shards=shards, **kw,
    )  # fmt: skip

  return make


def say(sampler, fakes, r):
  """One turn: (completion, prompt tokens computed for it)."""
  before = sampler.stats["prompt_tokens"]
  got = fakes.ask(sampler, r).result(fakes.WAIT)
  sampler.leave()
  fakes.check(got, r)
  return got, int(sampler.stats["prompt_tokens"] - before)


def after(r, got, i, **kw) -> Request:
  """The next turn's request."""
  tokens = np.concatenate([r.tokens, got.tokens, (i,) * NEW]).astype(np.int32)
  return Request(tokens, request_key(i, len(tokens)), (0, i), r.limit, r.stop_ids, **kw)


def slots_used(programs):
  return [slot for e in programs.of("start") for slot, _ in e[2]]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_turn_continues_in_its_slot(fakes, make, shards):
  programs = make(shards=shards)
  with fakes.sampler_on(programs) as sampler:
    talks = [fakes.request(i, (i,) * 20, limit=7 + i) for i in (1, 2)]
    homes = [set(), set()]
    for turn in range(8):
      for i, r in enumerate(talks):
        got, computed = say(sampler, fakes, r)
        # The response's last token was never run through the model.
        assert computed == (20 if turn == 0 else NEW + 1)
        homes[i].add(slots_used(programs)[-1])
        talks[i] = after(r, got, i)
    assert len(homes[0]) == len(homes[1]) == 1 and homes[0] != homes[1]
    assert not programs.of("copy")
    assert sampler.stats["reused_tokens"] == sum(
      20 + turn * (7 + i + NEW) + 7 + i - 1 for turn in range(7) for i in (1, 2)
    )


def test_two_branches_of_one_dialogue_share_its_prefix_by_a_copy(fakes, make):
  programs = make(slots=4)
  with fakes.sampler_on(programs, version=None) as sampler:
    sampler.set_params(0, "params 0")
    r = fakes.request(1, tuple(range(90)))
    got, _ = say(sampler, fakes, r)
    sampler.pause()
    branches = [after(r, got, i) for i in (3, 4, 5)]
    before = sampler.stats["prompt_tokens"]
    futures = [fakes.ask(sampler, b) for b in branches]
    sampler.resume()
    for future, b in zip(futures, branches):
      fakes.check(future.result(fakes.WAIT), b)
    assert sampler.stats["prompt_tokens"] - before == (NEW + 1) + 2 * NEW
    (copy,) = programs.of("copy")
    assert {a for a, _ in copy[1]} == {slots_used(programs)[0]} and len(copy[1]) == 2


def test_a_prefix_is_copied_from_a_slot_that_decodes(fakes, make):
  programs = make(slots=2)
  with fakes.sampler_on(programs, steps=1) as sampler:
    programs.gate.clear()
    first = fakes.request(1, (*range(100), 7), limit=10)
    one = fakes.ask(sampler, first)
    assert programs.reached.acquire(timeout=fakes.WAIT)
    second = fakes.request(2, (*range(100), 8, 9), limit=10)
    two = fakes.ask(sampler, second)
    programs.gate.set()
    fakes.check(one.result(fakes.WAIT), first)
    fakes.check(two.result(fakes.WAIT), second)
    assert sampler.stats["prompt_tokens"] == 101 + 2
    assert [e[1] for e in programs.of("copy")] == [((0, 1),)]


def test_a_short_prefix_is_not_worth_a_copy(fakes, make):
  programs = make(slots=2)
  with fakes.sampler_on(programs, version=None) as sampler:
    requests = [fakes.request(i, (*range(40), i)) for i in (1, 2)]
    futures = [fakes.ask(sampler, r) for r in requests]
    sampler.set_params(0, "params 0")
    for future, r in zip(futures, requests):
      fakes.check(future.result(fakes.WAIT), r)
    assert sampler.stats["prompt_tokens"] == 82 and not programs.of("copy")


@pytest.mark.parametrize("on_swap", SWAPS)
def test_nothing_is_reused_across_versions(fakes, make, on_swap):
  programs = make()
  with fakes.sampler_on(programs, on_swap=on_swap) as sampler:
    r = fakes.request(1, (1,) * 30)
    for version in range(1, 5):
      got, computed = say(sampler, fakes, r)
      assert computed == len(r.tokens)  # the fake engine would not have let stale entries pass
      r = after(r, got, version)
      sampler.set_params(version, f"params {version}")
    assert sampler.stats["reused_tokens"] == 0


def test_nothing_is_reused_across_weights_of_one_version(fakes, make):
  """A stage may publish its weights under the number that an evaluation had."""
  programs = make()
  with fakes.sampler_on(programs) as sampler:
    r = fakes.request(1, (1,) * 30)
    got, _ = say(sampler, fakes, r)
    sampler.set_params(0, "params 0")
    r = after(r, got, 2)
    assert say(sampler, fakes, r)[1] == len(r.tokens)


def test_nothing_is_reused_from_a_context_of_two_versions(fakes, make):
  programs = make()
  with fakes.sampler_on(programs, on_swap="keep", steps=1) as sampler:
    programs.gate.clear()
    r = fakes.request(1, (1,) * 30)
    future = fakes.ask(sampler, r)
    assert programs.reached.acquire(timeout=fakes.WAIT)
    sampler.set_params(1, "params 1")
    programs.gate.set()
    got = future.result(fakes.WAIT)
    sampler.leave()
    assert got.mixed.any()
    r = after(r, got, 2)
    assert say(sampler, fakes, r)[1] == len(r.tokens)


def test_nothing_is_reused_across_salts(fakes, make):
  programs = make(slots=4)
  with fakes.sampler_on(programs) as sampler:
    prompt = (3,) * 50
    for salt in ((), (1,), (1, 2)):
      assert say(sampler, fakes, fakes.request(1, prompt, salt=salt))[1] == 50
    for salt in ((1, 2), (1,), ()):
      assert say(sampler, fakes, fakes.request(2, prompt, salt=salt))[1] == 1
    sampler.pause()
    twins = [fakes.request(i, (4,) * 50, salt=(i % 2,)) for i in range(4)]
    futures = [fakes.ask(sampler, r) for r in twins]
    before = sampler.stats["prompt_tokens"]
    sampler.resume()
    for future, r in zip(futures, twins):
      fakes.check(future.result(fakes.WAIT), r)
    assert sampler.stats["prompt_tokens"] - before == 100, "one prefill per salt"


def test_a_dialogue_whose_slot_was_taken_starts_again(fakes, make):
  programs = make(slots=1)
  with fakes.sampler_on(programs) as sampler:
    talks = [fakes.request(i, (i,) * 20) for i in (1, 2)]
    for _ in range(3):
      for i, r in enumerate(talks):
        got, computed = say(sampler, fakes, r)
        assert computed == len(r.tokens)
        talks[i] = after(r, got, i)


def test_an_edited_history_is_reused_up_to_the_edit(fakes, make):
  programs = make()
  with fakes.sampler_on(programs) as sampler:
    r = fakes.request(1, tuple(range(100)))
    got, _ = say(sampler, fakes, r)
    edited = after(r, got, 2)
    edited.tokens[70] = 0
    assert say(sampler, fakes, edited)[1] == len(edited.tokens) - 70


def test_what_was_given_up_is_not_reused_half_written(fakes, make):
  programs = make(slots=1)
  with fakes.sampler_on(programs, steps=1) as sampler:
    programs.gate.clear()
    r = fakes.request(1, tuple(range(60)))
    future = fakes.ask(sampler, r)
    assert programs.reached.acquire(timeout=fakes.WAIT)
    sampler.abort(future)
    programs.gate.set()
    fakes.check_part(future.result(fakes.WAIT), r)
    sampler.leave()
    say(sampler, fakes, r)


def test_turns_on_the_real_engine(tiny):
  """Same tokens as without a cache; log-probs of a forward pass; two branches at the end."""
  new = lambda: Sampler(
    tiny.programs, steps_per_dispatch=4, refill_fraction=0.5, deterministic=False
  )
  sampler = new()
  sampler.start()
  sampler.set_params(0, tiny.params[0])
  rng, asked = np.random.default_rng(0), []

  def ask(requests):
    futures = [(sampler.enter(), sampler.submit(r))[1] for r in requests]
    asked.extend((r, f.result(60)) for r, f in zip(requests, futures))
    return asked[-1][1]

  tokens = rng.integers(0, 64, 30)
  for turn in range(5):
    if turn:
      before = sampler.stats["prompt_tokens"]
    r = Request(tokens.astype(np.int32), request_key(turn), (turn,), 8, ())
    got = ask([r])
    if turn:
      assert sampler.stats["prompt_tokens"] - before == NEW + 1
    tokens = np.concatenate([tokens, got.tokens, rng.integers(0, 64, NEW)])
  sampler.pause()
  before = sampler.stats["prompt_tokens"]
  branch = lambda i: Request(
    np.append(tokens, [i, i]).astype(np.int32), request_key(9, i), (9, i), 8, ()
  )
  futures = [(sampler.enter(), sampler.submit(branch(i)))[1] for i in range(3)]
  sampler.resume()
  asked += [(branch(i), f.result(60)) for i, f in enumerate(futures)]
  assert sampler.stats["prompt_tokens"] - before == (NEW + 1 + 2) + 2 + 2
  sampler.close()
  for r, got in asked:
    np.testing.assert_allclose(
      got.logprobs, tiny.score(tiny.params[0], r.tokens, got.tokens), atol=2e-5
    )
    sampler = new()
    sampler.start()
    sampler.set_params(0, tiny.params[0])
    sampler.enter()
    np.testing.assert_array_equal(got.tokens, sampler.submit(r).result(60).tokens)
    sampler.close()
