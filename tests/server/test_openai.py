"""The OpenAI-compatible server, asked by the official client; nothing of a run's is lost."""

from __future__ import annotations

import asyncio
import gc

import httpx
import numpy as np
import openai
import pytest

from trinity_jax.experience import ExperienceId
from trinity_jax.explorer.replies import Reply, sample
from trinity_jax.explorer.rewards import Score
from trinity_jax.explorer.workflow import Model, SamplingParams
from trinity_jax.server import backend

NONE = Score(0.0, {})
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def up(served):
  with served.server() as both:
    yield both


@pytest.fixture
def client(up):
  with openai.OpenAI(base_url=up[1].url + "/v1", api_key=up[1].token, max_retries=0) as client:
    yield client


def test_an_answer_has_what_the_client_expects(served, client):
  a = client.chat.completions.create(
    model="anything", messages=HELLO, n=3, seed=5, max_tokens=7, logprobs=True, temperature=0.7,
    extra_body={"return_token_ids": True},
  )  # fmt: skip
  prompt = served.tokenizer.apply_chat_template(HELLO, add_generation_prompt=True)
  assert a.model == "policy" and a.object == "chat.completion" and len(a.choices) == 3
  for i, choice in enumerate(a.choices):
    extra = choice.model_extra
    assert choice.index == i and choice.message.role == "assistant"
    assert extra["prompt_token_ids"] == prompt and extra["versions"] == [0] * len(
      extra["token_ids"]
    )
    assert choice.message.content == served.tokenizer.decode(extra["token_ids"])
    assert len(choice.logprobs.content) == len(extra["token_ids"]) <= 7
    assert all(x.logprob < 0 for x in choice.logprobs.content)
    assert choice.finish_reason in ("stop", "length")
  written = sum(len(c.model_extra["token_ids"]) for c in a.choices)
  assert (a.usage.prompt_tokens, a.usage.completion_tokens) == (len(prompt), written)
  assert len({c.message.content for c in a.choices}) == 3


def test_equal_seeds_give_equal_text_and_streams_add_up_to_it(client):
  ask = {"model": "m", "messages": HELLO, "seed": 11, "n": 2}
  whole = client.chat.completions.create(**ask)
  texts, reasons, usage = ["", ""], [None, None], None
  options = {"include_usage": True}
  for chunk in client.chat.completions.create(**ask, stream=True, stream_options=options):
    usage = chunk.usage or usage
    for choice in chunk.choices:
      texts[choice.index] += choice.delta.content or ""
      reasons[choice.index] = choice.finish_reason or reasons[choice.index]
  assert texts == [c.message.content for c in whole.choices]
  assert reasons == [c.finish_reason for c in whole.choices] and usage == whole.usage
  other = client.chat.completions.create(**{**ask, "seed": 12})
  assert other.choices[0].message.content != texts[0]


def test_completions_of_text_and_of_tokens_are_the_same(served, client):
  ask = {"model": "m", "seed": 3, "logprobs": 0}
  text = client.completions.create(prompt="abc", **ask).choices[0]
  ids = client.completions.create(prompt=served.tokenizer.encode("abc"), **ask).choices[0]
  assert text.text == ids.text and text.logprobs == ids.logprobs
  both = client.completions.create(prompt=["abc", "xyz"], **ask)
  assert [c.index for c in both.choices] == [0, 1] and both.choices[0].text == text.text
  streamed = client.completions.create(model="m", prompt="abc", seed=3, stream=True)
  assert "".join(c.choices[0].text for c in streamed) == text.text


def test_a_stop_string_ends_the_text_before_it(client):
  ask = {"model": "m", "messages": HELLO, "seed": 1, "extra_body": {"return_token_ids": True}}
  whole = client.chat.completions.create(**ask).choices[0]
  text = whole.message.content
  stop = next(c for c in text[3:] if "!" <= c <= "~" and text.index(c) > 2)
  cut = client.chat.completions.create(**ask, stop=[stop, "never said"]).choices[0]
  assert cut.message.content == text[: text.index(stop)] and cut.finish_reason == "stop"
  n = len(cut.model_extra["token_ids"])
  assert cut.model_extra["token_ids"] == whole.model_extra["token_ids"][:n]
  assert n < len(whole.model_extra["token_ids"])
  streamed = client.chat.completions.create(**ask, stop=stop, stream=True)
  assert "".join(c.choices[0].delta.content or "" for c in streamed) == cut.message.content


def test_an_agent_with_the_official_client_is_recorded_token_for_token(served, up):
  sampler, server = up

  async def agent(client):
    """Ten turns, every other one streamed, and nothing that knows of us."""
    messages = [{"role": "system", "content": "s"}]
    for turn in range(10):
      messages.append({"role": "user", "content": f"q{turn}"})
      ask = {"model": "gpt-4o", "messages": messages, "max_tokens": 12, "temperature": 0.3}
      if turn % 2:
        text = ""
        async for chunk in await client.chat.completions.create(**ask, stream=True):
          text += chunk.choices[0].delta.content or ""
        messages.append({"role": "assistant", "content": text})
      else:
        answer = await client.chat.completions.create(**ask)
        messages.append(answer.choices[0].message)

  model = served.model(sampler, server)

  async def talk():
    async with model.openai(max_retries=0) as client:
      await agent(client)
    model.close()

  served.run(sampler, talk)
  (e,) = model.experiences(NONE, {})
  mask = e.action_mask
  starts = [i for i in range(1, len(mask)) if mask[i] and not mask[i - 1]]
  assert len(starts) == model.turns == 10 and model.forks == 0 and len(e.messages) == 21

  bare = Model(sampler, served.tokenizer, ExperienceId(1, 0, 0, 0), 0, SamplingParams(1.0, 12), 480)

  async def tokens_only():
    for start in starts:
      await bare.generate(e.tokens[:start].tolist())

  served.run(sampler, tokens_only)
  pure = bare.experience(NONE, {})
  for name in ("tokens", "action_mask", "versions"):
    assert np.array_equal(getattr(e, name), getattr(pure, name)), name
  np.testing.assert_allclose(e.logprobs, pure.logprobs, atol=1e-4)


def test_tools_are_offered_and_calls_parsed_recorded_and_continued(served, up, monkeypatch):
  """The tiny policy writes noise: what it says is replaced where its text is read."""
  sampler, server = up
  model = served.model(sampler, server)
  said = ['<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', "<tool_call>{", "ok"]
  tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
  turn = model._turn

  async def fixed(*args, **kwargs):
    reply = await turn(*args, **kwargs)
    return type(reply)(reply.completion, said[model.turns - 1])

  monkeypatch.setattr(model, "_turn", fixed)

  async def talk():
    async with model.openai(max_retries=0) as client:
      messages = list(HELLO)
      create = client.chat.completions.create
      a = await create(model="m", messages=messages, tools=tools, max_tokens=4)
      assert a.choices[0].finish_reason == "tool_calls"
      (call,) = a.choices[0].message.tool_calls
      assert call.function.name == "add" and call.function.arguments == '{"a": 1}'
      messages += [
        a.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "1"}
      ]  # fmt: skip
      text = ""
      stream = await create(model="m", messages=messages, tools=tools, max_tokens=4, stream=True)
      async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
      assert text == said[1]  # malformed: text
      messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "go on"}]
      await create(model="m", messages=messages, tools=tools, max_tokens=4)

  served.run(sampler, talk)
  (e,) = model.experiences(NONE, {})
  assert model.forks == 0 and e.metrics["num_turns"] == 3
  assert e.info["tool_errors"] == ["ValueError: <tool_call> without </tool_call>"]


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_comes_beside_the_answer(client, monkeypatch, stream):
  """The tiny policy does not think: its text is replaced where it is read."""
  said = "<think>\nhm, 1 < 2\n</think>\n\nyes"

  async def thinks(member, request, tokenizer, *, stop, on_text):
    reply = await sample(member, request, tokenizer)
    for i in range(0, len(said), 3):
      if on_text:
        on_text(said[i : i + 3])
    return Reply(reply.completion, said)

  monkeypatch.setattr(backend, "sample", thinks)
  ask = {"model": "m", "messages": HELLO, "max_tokens": 2}
  if stream:
    got = {"reasoning_content": "", "content": ""}
    for chunk in client.chat.completions.create(**ask, stream=True):
      delta = chunk.choices[0].delta.model_dump(exclude_none=True)
      for key in got:
        got[key] += delta.get(key, "")
  else:
    got = client.chat.completions.create(**ask).choices[0].message.model_dump()
  assert (got["reasoning_content"], got["content"]) == ("hm, 1 < 2", "yes")
  text = client.completions.create(model="m", prompt="a", max_tokens=2).choices[0].text
  assert text == said  # a completion is text


def test_reasoning_that_clients_send_back_or_drop_continues_the_log(served, up, monkeypatch):
  sampler, server = up
  model = served.model(sampler, server)
  turn = model._turn

  async def fixed(*args, **kwargs):
    reply = await turn(*args, **kwargs)
    return Reply(reply.completion, f"<think>\nso\n</think>\n\nanswer {model.turns}")

  monkeypatch.setattr(model, "_turn", fixed)

  async def talk():
    messages = list(HELLO)
    async with model.openai(max_retries=0) as client:
      for i in range(4):
        a = await client.chat.completions.create(model="m", messages=messages, max_tokens=3)
        message = a.choices[0].message
        assert message.content == f"answer {i + 1}"
        assert message.model_dump()["reasoning_content"] == "so"
        plain = {"role": "assistant", "content": message.content}
        whole = {"role": "assistant", "content": f"<think>\nso\n</think>\n\n{message.content}"}
        messages += [(message, plain, whole)[i % 3], {"role": "user", "content": "and"}]

  served.run(sampler, talk)
  assert model.turns == 4 and model.forks == 0 and len(model.logs) == 1


def test_what_rewrites_history_forks(served, up):
  sampler, server = up
  model = served.model(sampler, server)

  async def talk():
    async with model.openai(max_retries=0) as client:
      ask = {"model": "m", "max_tokens": 3}
      a = await client.chat.completions.create(messages=HELLO, **ask)
      said = {"role": "assistant", "content": a.choices[0].message.content + "!"}
      again = [*HELLO, said, {"role": "user", "content": "x"}]
      raw = await client.chat.completions.with_raw_response.create(
        messages=again, temperature=0.2, **ask
      )
      assert raw.headers["x-trinity-ignored"] == "temperature"  # a run has one distribution

  served.run(sampler, talk)
  assert model.forks == 1 and [e.id.step for e in model.experiences(NONE, {})] == [0, 1]


def test_a_prompt_that_does_not_fit_is_named_and_streams_fail_like_answers(client):
  long = [{"role": "user", "content": "x" * 600}]
  for stream in (False, True):
    with pytest.raises(openai.BadRequestError, match="exceeds") as e:
      client.chat.completions.create(model="m", messages=long, stream=stream)
    assert e.value.code == "context_length_exceeded" and e.value.param == "messages"
  for text in ("x" * 600, "x" * 100_000):
    with pytest.raises(openai.BadRequestError, match="exceeds") as e:
      client.completions.create(model="m", prompt=text)
    assert e.value.code == "context_length_exceeded" and e.value.param == "prompt"
  very = [{"role": "user", "content": "x" * 100_000}]
  with pytest.raises(openai.BadRequestError, match="of 1000.. tokens exceeds"):
    client.chat.completions.create(model="m", messages=very)
  with pytest.raises(openai.BadRequestError, match="max_tokens = 33: at most 32"):
    client.chat.completions.create(model="m", messages=HELLO, max_tokens=33)
  with pytest.raises(openai.BadRequestError, match="max_completion_tokens = 33: at most 32") as e:
    client.chat.completions.create(model="m", messages=HELLO, max_completion_tokens=33)
  assert e.value.param == "max_completion_tokens"
  with pytest.raises(openai.BadRequestError, match="frequency_penalty"):
    client.chat.completions.create(model="m", messages=HELLO, frequency_penalty=0.5)


def test_a_client_that_leaves_frees_its_slot(served, up):
  sampler, server = up
  headers = {"authorization": f"Bearer {server.token}"}
  body = {"messages": HELLO, "n": 8, "stream": True}

  async def leave():
    async with httpx.AsyncClient(base_url=server.url, headers=headers) as client:
      for stream in (True, False) * 5:
        with pytest.raises(httpx.ReadTimeout):
          await client.post(
            "/v1/chat/completions", json={**body, "stream": stream},
            timeout=httpx.Timeout(5, read=0.0005),
          )  # fmt: skip
      async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for _ in answer.aiter_lines():
          break

  asyncio.run(leave())
  served.wait_until_free(sampler)


def test_a_run_that_ends_ends_its_session(served, up):
  sampler, server = up

  async def talk():
    model = served.model(sampler, server)
    client = model.openai(max_retries=0)
    await client.chat.completions.create(model="m", messages=HELLO, max_tokens=2)
    assert server._sessions.of(client.api_key) is not None
    model.close()
    with pytest.raises(openai.APIStatusError, match="has ended") as e:
      await client.chat.completions.create(model="m", messages=HELLO)
    assert e.value.status_code == 410
    await client.close()
    return client.api_key

  token = served.run(sampler, talk)
  gc.collect()  # the traceback of `raises` holds the handle
  assert server._sessions.of(token) is None  # it went with the run's handle


def test_closing_a_run_ends_what_its_agent_still_asks(served, up):
  sampler, server = up

  async def talk():
    model = served.model(sampler, server)
    async with model.openai(max_retries=0) as client:
      stream = await client.chat.completions.create(model="m", messages=HELLO, n=16, stream=True)
      await anext(aiter(stream))
      model.close()
      with pytest.raises(openai.APIError, match="has ended"):
        async for _ in stream:
          pass

  served.run(sampler, talk)
