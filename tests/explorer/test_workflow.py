"""The Model that a workflow sees: an append-only token log."""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
import pytest

from trinity_jax.errors import UserError
from trinity_jax.experience import ExperienceId, StopReason
from trinity_jax.explorer.rewards import Score
from trinity_jax.explorer.workflow import Model, PromptTooLong, RunEnded, SamplingParams
from trinity_jax.explorer.workflows import find_workflow
from trinity_jax.explorer.workflows.single_turn import single_turn
from trinity_jax.sampler.request import join


def play(world, talk, **kwargs):
  """Runs `talk(model)` as the only participant; returns (its result, the model)."""
  with world.sampler() as sampler:
    model = world.model(sampler, **kwargs)

    async def go():
      sampler.enter()
      try:
        return await talk(model)
      finally:
        sampler.leave()

    return asyncio.run(asyncio.wait_for(go(), 60)), model


def test_a_chat_is_recorded_token_by_token(world):
  text, model = play(world, lambda m: m.chat(world.task(text="abc").messages))
  e = model.experience(Score(0.5, {"accuracy": 1.0, "format": -0.5}), {"task": 3})
  prompt = world.tokenizer.apply_chat_template(
    world.task(text="abc").messages, add_generation_prompt=True
  )
  n = len(prompt)
  assert e.tokens[:n].tolist() == prompt and not e.action_mask[:n].any()
  assert e.action_mask[n:].all() and 1 <= e.num_actions <= world.max_response
  assert (e.versions[:n] == -1).all() and (e.versions[n:] == 0).all()
  assert (e.logprobs[:n] == 0).all() and (e.logprobs[n:] < 0).all()
  assert text == world.tokenizer.decode(e.tokens[n:]) == model.text
  assert e.messages == [
    {"role": "user", "content": "abc"}, {"role": "assistant", "content": text},
  ]  # fmt: skip
  assert e.reward == 0.5 and e.info == {"task": 3} and e.temperature == 1.0
  assert e.metrics == {
    "rewards/accuracy": 1.0, "rewards/format": -0.5, "response_length": e.num_actions,
    "prompt_length": n, "num_turns": 1, "mixed_tokens": 0,
  }  # fmt: skip
  assert e.stop_reason in (StopReason.STOP, StopReason.LENGTH)


def test_turns_extend_one_log(world):
  async def talk(model):
    first = await model.generate([8, 9, 10])
    log = [8, 9, 10, *first]
    second = await model.generate([*log, 11, 12])
    return first, second

  (first, second), model = play(world, talk)
  e = model.experience(Score(0.0, {}), {})
  assert e.tokens.tolist() == [8, 9, 10, *first, 11, 12, *second]
  want = [0] * 3 + [1] * len(first) + [0] * 2 + [1] * len(second)
  assert e.action_mask.astype(int).tolist() == want
  assert e.metrics["num_turns"] == 2 and e.metrics["prompt_length"] == 5


@pytest.mark.parametrize("second", [[8, 9], [9, 8, 10], "drops the response", "edits the response"])
def test_a_prompt_that_rewrites_history_is_refused(world, second):
  async def talk(model):
    first = (await model.generate([8, 9, 10])).tolist()
    prompt = second
    if second == "drops the response":
      prompt = [8, 9, 10, 11]
    elif second == "edits the response":
      prompt = [8, 9, 10, first[0] + 1, *first[1:], 11]
    with pytest.raises(ValueError, match=r"run 1/0/0/0: the prompt of turn 1 .* append"):
      await model.generate(prompt)
    return [8, 9, 10, *first]

  log, model = play(world, talk)
  assert model.experience(Score(0.0, {}), {}).tokens.tolist() == log  # as before the mistake


def test_two_calls_at_once_are_refused_and_the_first_goes_on(world):
  async def talk(model):
    both = [model.generate([8, 9, 10]), model.generate([8, 9, 10])]
    return await asyncio.gather(*both, return_exceptions=True)

  (first, second), model = play(world, talk)
  assert isinstance(second, ValueError) and "a second call to the model" in str(second)
  assert model.experience(Score(0.0, {}), {}).tokens.tolist() == [8, 9, 10, *first]


def test_a_prompt_beyond_the_limit_names_the_key(world):
  async def talk(model):
    with pytest.raises(PromptTooLong, match=r"of 25 tokens .* sampler\.max_prompt_length = 24"):
      await model.generate([8] * 25)
    return await model.generate([8] * 24)

  tokens, _ = play(world, talk)
  assert len(tokens) >= 1


def test_randomness_is_that_of_seed_id_and_turn(world):
  async def twice(model):
    first = await model.generate([8, 9])
    second = await model.generate([8, 9, *first, 7])
    return first.tolist(), second.tolist()

  one, _ = play(world, twice)
  assert play(world, twice)[0] == one
  assert play(world, twice, seed=1)[0] != one
  assert play(world, twice, id=ExperienceId(1, 0, 1, 0))[0] != one
  greedy = [play(world, twice, temperature=0.0, seed=s) for s in (0, 1)]
  assert greedy[0][0] == greedy[1][0]
  assert greedy[0][1].experience(Score(0.0, {}), {}).temperature == 1.0


def test_find_workflow():
  assert find_workflow("single_turn") is single_turn
  assert find_workflow("trinity_jax.explorer.workflows.single_turn:single_turn") is single_turn
  with pytest.raises(UserError, match="did you mean 'single_turn'"):
    find_workflow("single_trun")
  with pytest.raises(UserError, match="there is no module 'no_such_module'"):
    find_workflow("no_such_module:f")
  with pytest.raises(UserError, match="has no function 'single'; did you mean 'single_turn'"):
    find_workflow("trinity_jax.explorer.workflows.single_turn:single")
  for reference in (":f", ".workflows:f"):
    with pytest.raises(UserError, match="expected 'module:function'"):
      find_workflow(reference)


def test_log_probs_survive_as_float32(world):
  _, model = play(world, lambda m: m.generate([8, 9, 10]))
  e = model.experience(Score(0.0, {}), {})
  assert e.logprobs.dtype == np.float32 and e.tokens.dtype == e.versions.dtype == np.int32


def test_a_request_says_how_urgent_it_is_and_what_its_cache_may_be_shared_with(world):
  asked = []

  class Member:
    async def generate(self, request):
      asked.append(request)
      return join([], StopReason.STOP)

    def enter(self): ...

    def leave(self): ...

  params = SamplingParams(1.0, world.max_response)
  model = Model(
    Member(), world.tokenizer, ExperienceId(7, 0, 0, 0), 0, params, world.max_prompt, stream=2,
    priority=-1,
  )  # fmt: skip
  asyncio.run(model.generate([1, 2, 3]))
  assert asked[0].priority == -1
  assert asked[0].salt == (2, 7)  # the stream and its step: a resume finds the same there


def said(content, role="user"):
  return {"role": role, "content": content}


def test_chats_that_extend_continue_the_log_and_match_a_token_run(world):
  async def talk(model):
    first = await model.chat([said("a")])
    log = [said("a"), said(first, "assistant"), said("b")]
    await model.chat(log)
    return [d.columns() for d in model._logs.all]

  (log,), model = play(world, talk)
  mask = log["action_mask"]
  starts = [i for i in range(1, len(mask)) if mask[i] and not mask[i - 1]]
  assert len(starts) == 2 and model.turns == 2 and model.forks == 0

  async def tokens_only(model):
    await model.generate(log["tokens"][: starts[0]].tolist())
    await model.generate(log["tokens"][: starts[1]].tolist())

  _, bare = play(world, tokens_only)
  pure = bare.experience(Score(0.0, {}), {})
  for name, value in log.items():
    if name != "mixed":
      assert np.array_equal(value, getattr(pure, name)), name


def test_a_rewritten_history_forks_and_every_log_is_an_experience(world):
  async def talk(model):
    await model.chat([said("a")])
    model.reward(0.5)
    await model.chat([said("a"), said("no!", "assistant"), said("b")])

  async def choices(model):
    await asyncio.gather(*(model.chat([said("a")]) for _ in range(3)))

  _, model = play(world, talk, id=ExperienceId(1, 2, 3, 0))
  first, second = model.experiences(Score(1.0, {}), {})
  assert (first.id, second.id) == (ExperienceId(1, 2, 3, 0), ExperienceId(1, 2, 3, 1))
  assert model.forks == 1 and first.info["forks"] == 1
  assert first.reward == second.reward == 1.5, "both have the run's return"
  assert second.token_rewards is None
  assert first.token_rewards is not None and first.token_rewards.sum() == 1.5
  assert model.experience(Score(1.0, {}), {}).id == model.id

  _, model = play(world, choices)
  logs = model.experiences(Score(0.0, {}), {})
  assert len(logs) == 3 and len({tuple(e.tokens) for e in logs}) == 3


def test_a_cancelled_chat_leaves_no_trace_and_a_closed_model_answers_no_more(world):
  async def talk(model):
    call = asyncio.create_task(model.chat([said("a")]))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
      await call
    assert not model._logs.all
    text = await model.chat([said("a")])
    model.close()
    with pytest.raises(ValueError, match="run 1/0/0/0 has ended"):
      await model.chat([said("a")])
    return text

  text, model = play(world, talk)
  assert text == play(world, lambda m: m.chat([said("a")]))[0]
  assert len(model.experiences(Score(0.0, {}), {})) == 1


# --- log-probs of given tokens --------------------------------------------------------------------


def test_logprobs_of_what_was_said_are_those_it_was_said_with(world):
  async def talk(model):
    await model.generate([8, 9, 10])
    e = model.experience(0.0)
    return await model.logprobs(e.tokens.tolist()), e, model.turns, len(model.logs)

  (scored, e, turns, logs), _ = play(world, talk, temperature=0.7)
  assert scored.shape == e.tokens.shape and scored[0] == 0
  np.testing.assert_allclose(scored[3:], e.logprobs[3:], atol=2e-5)
  assert (turns, logs) == (1, 1)  # scoring is no turn
  assert (scored[1:3] < 0).all()


def test_logprobs_beside_calls_of_the_same_run(world):
  """Samples wait for a run that may still ask: it counts once, whatever it asks at a time."""

  async def talk(model):
    asks = [model.chat([said("a")]), model.logprobs([1, 2]), model.chat([said("b")])]
    first = await asyncio.gather(*asks, *(model.logprobs([1, 2, n]) for n in range(5)))
    return first, await model.chat([said("c")])

  (found, _), model = play(world, talk)
  assert len(found[1]) == 2 and [len(x) for x in found[3:]] == [3] * 5 and model.turns == 3


def test_the_runs_clock_stands_still_while_its_tokens_are_scored(world):
  inside = []

  @contextlib.contextmanager
  def stopped():
    inside.append("in")
    yield
    inside.append("out")

  async def talk(model):
    model.in_sampler = stopped
    await asyncio.gather(model.logprobs([1, 2]), model.chat([said("a")]))
    await model.logprobs([1, 2])

  play(world, talk)
  assert inside == ["in", "out"] * 2


def test_logprobs_after_the_end_of_a_run_are_refused(world):
  async def talk(model):
    await model.chat([said("a")])
    model.close()
    with pytest.raises(RunEnded, match="has ended"):
      await model.logprobs([1, 2])

  play(world, talk)


def test_a_greedy_run_scores_at_temperature_one(world):
  async def talk(model):
    return await model.logprobs([1, 2, 3]), await model.logprobs([1, 2, 3], 1.0)

  (own, one), _ = play(world, talk, temperature=0.0)
  assert own.tobytes() == one.tobytes()
