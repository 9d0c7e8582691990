"""What clients do at the wrong moment, at once, or in odd numbers; what answers must look like."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import logging
import socket
import threading
import weakref

import httpx
import numpy as np
import openai
import pytest
from growth import FACTOR, assert_linear

from trinity_jax.errors import RunFailed
from trinity_jax.experience import ExperienceId, StopReason
from trinity_jax.explorer import threads
from trinity_jax.explorer.answer import Answer
from trinity_jax.explorer.dialogue import LONG
from trinity_jax.explorer.workflow import Model, SamplingParams
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.sampler.request import Completion
from trinity_jax.server import openai as api
from trinity_jax.server import protocol
from trinity_jax.server.answers import Writer, token_bytes
from trinity_jax.server.backend import Limits, Plain

CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
WAIT = 60


class Recording:
  """A server that records sessions, whose commits wait for `go`."""

  def __init__(self, served, sampler):
    self.go, self.begun, self.seen = threading.Event(), threading.Semaphore(0), []
    self.models: weakref.WeakSet[Model] = weakref.WeakSet()
    self._served, self._sampler = served, sampler

  def new(self, name):
    id = ExperienceId(0, len(self.models), 0, 0)
    s = self._served
    made = Model(self._sampler, s.tokenizer, id, 0, SamplingParams(1.0, 8), s.max_prompt)
    self.models.add(made)
    return made

  def commit(self, name, experiences):
    self.begun.release()
    assert self.go.wait(WAIT)
    self.seen.append((name, [e.reward for e in experiences]))


@pytest.fixture
def recording(served):
  """(Recording, client, server)"""
  with contextlib.ExitStack() as stack:
    found = []  # the server makes its sampler itself
    sampler, server = stack.enter_context(
      served.server(
        new_session=lambda name: found[0].new(name),
        on_commit=lambda *args: found[0].commit(*args),
      )
    )
    found.append(Recording(served, sampler))
    headers = {"authorization": f"Bearer {server.token}"}
    client = httpx.Client(base_url=server.url, headers=headers, timeout=WAIT)
    yield found[0], stack.enter_context(client), server
    found[0].go.set()


def say(client, name, body=CHAT, path="/v1/chat/completions"):
  return client.post(path, json=body, headers={"x-session-id": name})


def test_what_comes_while_a_session_is_committed_is_not_lost_but_refused(recording):
  r, client, _ = recording
  assert say(client, "s").status_code == 200
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    done = pool.submit(client.post, "/commit", json={"session": "s", "reward": 0.5})
    assert r.begun.acquire(timeout=WAIT)
    for answer in (
      say(client, "s"),
      client.post("/feedback", json={"session": "s", "reward": 1}),
      client.post("/commit", json={"session": "s", "reward": 1}),
    ):
      assert answer.status_code == 409 and "is being committed" in answer.text
    r.go.set()
    assert done.result().status_code == 200
  assert r.seen == [("s", [0.5])]


def test_nothing_is_committed_while_a_prompt_is_being_made(recording, served, monkeypatch):
  """The reply to a long prompt, which is tokenised in a thread, was lost."""
  r, client, _ = recording
  assert say(client, "s").status_code == 200
  go, begun, encode = threading.Event(), threading.Semaphore(0), served.tokenizer.encode

  def slow(text, *args, **kwargs):
    begun.release()
    assert go.wait(WAIT)
    return encode(text[:4], *args, **kwargs)

  monkeypatch.setattr(type(served.tokenizer), "encode", lambda self, *args: slow(*args))
  body = {"prompt": "a" * 2 * LONG, "max_tokens": 2}
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    reply = pool.submit(say, client, "s", body, "/v1/completions")
    assert begun.acquire(timeout=WAIT)
    answer = client.post("/commit", json={"session": "s", "reward": 0.5})
    assert answer.status_code == 409 and "is under way" in answer.text
    go.set()
    assert reply.result().status_code == 200
  monkeypatch.undo()
  r.go.set()
  answer = client.post("/commit", json={"session": "s", "reward": 0.5})
  assert answer.status_code == 200 and r.seen == [("s", [0.5, 0.5])]


def test_the_choices_of_a_prompt_go_to_one_sampler_and_prompts_to_all(served):
  """With an even n half of a pool had nothing to do."""
  seen = []

  class Pool:
    def member(self, order):
      seen.append(order)
      raise RunFailed("far enough")

  plain = Plain(Pool(), served.tokenizer, Limits(100, 10, SamplingParams(1.0, 8)))
  ask = protocol.read_completion({"prompt": ["a", "b"], "n": 4, "max_tokens": 2}, 320)
  for _ in range(2):
    for choice in plain.choices(ask, None):
      with pytest.raises(RunFailed):
        asyncio.run(choice)
  assert len(set(seen)) == 16
  member = [sum(order[:3]) % 2 for order in seen]
  assert member == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4


def test_commits_that_wait_leave_threads_for_others(recording, monkeypatch):
  r, client, server = recording
  monkeypatch.setattr(threads, "MOST", 2)
  monkeypatch.setattr(server._api, "_commits", api.asyncio.Semaphore(1))
  names = [f"s{i}" for i in range(4)]
  for name in names:
    assert say(client, name).status_code == 200
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    commits = [pool.submit(client.post, "/commit", json={"session": n, "reward": 1}) for n in names]
    assert r.begun.acquire(timeout=WAIT)
    long = {**CHAT, "messages": [{"role": "user", "content": "x" * 2 * LONG}]}
    assert client.post("/v1/chat/completions", json=long).status_code == 400  # answered, that is
    assert not any(c.done() for c in commits)
    r.go.set()
    assert [c.result().status_code for c in commits] == [200] * 4


def test_what_was_committed_is_not_kept(recording):
  r, client, _ = recording
  r.go.set()
  assert say(client, "s").status_code == 200 and len(r.models) == 1
  assert client.post("/commit", json={"session": "s", "reward": 1}).status_code == 200
  gc.collect()
  assert not r.models, "its logs stay until it would have expired"


@pytest.mark.parametrize("name, status", [("x" * 256, 200), ("x" * 257, 400), ("a\x85b", 400)])
def test_names_of_sessions(recording, name, status):
  _, client, server = recording
  answer = client.post(
    "/v1/chat/completions", json=CHAT, headers={"x-session-id": name.encode("latin-1")}
  )
  assert answer.status_code == status
  if status != 200:
    assert "256 printable characters" in answer.text and not server._sessions._named


@pytest.mark.parametrize("kind", ["prompt", "tools", "session"])
def test_long_texts_are_tokenised_off_the_event_loop(recording, served, monkeypatch, kind):
  _, client, _ = recording
  where, encode = [], served.tokenizer.encode

  def noted(text, **more):
    where.append(threading.current_thread().name)
    return encode(text, **more)

  monkeypatch.setattr(served.tokenizer, "encode", noted)
  body, path = {"prompt": "x" * 2 * LONG}, "/v1/completions"
  if kind == "tools":
    function = {"name": "f", "description": "x" * 2 * LONG}
    body, path = {**CHAT, "tools": [{"type": "function", "function": function}]}, None
  answer = client.post(
    path or "/v1/chat/completions", json=body,
    headers={"x-session-id": "s"} if kind == "session" else {},
  )  # fmt: skip
  assert answer.status_code == 400 and "exceeds" in answer.text
  assert where and "openai-server" not in where


def test_a_name_with_a_slash_is_found(served):
  with served.server(model="org/model") as (_, server):
    headers = {"authorization": f"Bearer {server.token}"}
    url = server.url + "/v1/models/"
    assert httpx.get(url + "org/model", headers=headers).json()["id"] == "org/model"
    assert httpx.get(url + "org/other", headers=headers).status_code == 404


def test_full_collections_leave_what_was_there_before_alone(served):
  with served.server() as (_, server):
    assert gc.get_freeze_count() > 20 * len(gc.get_objects())
    server.close()
    assert gc.get_freeze_count() == 0


def test_noise_is_not_logged(recording, caplog):
  _, client, server = recording
  with caplog.at_level(logging.DEBUG):
    for _ in range(3):
      with socket.create_connection((server.host, server.port), timeout=60) as raw:
        raw.sendall(b"\x16\x03\x01 noise\r\n\r\n")
        while raw.recv(4096):
          pass
  assert client.get("/v1/models").status_code == 200
  assert not [r for r in caplog.records if r.name.startswith("uvicorn")]


# --- answers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def up(served):
  with served.server() as both:
    yield both


@pytest.fixture
def client(up):
  with openai.OpenAI(base_url=up[1].url + "/v1", api_key=up[1].token, max_retries=0) as client:
    yield client


def test_each_choice_ends_at_its_own_stop_string(client):
  ask = {"model": "m", "messages": CHAT["messages"], "n": 4, "seed": -9}
  whole = [c.message.content for c in client.chat.completions.create(**ask).choices]
  stops = sorted({c for text in whole for c in text if "!" <= c <= "~"})[:4]
  ends = [min([t.index(s) for s in stops if s in t], default=len(t)) for t in whole]
  assert len(set(ends)) > 1
  cut = client.chat.completions.create(**ask, stop=stops).choices
  assert [c.message.content for c in cut] == [t[:end] for t, end in zip(whole, ends)]
  for choice, text, end in zip(cut, whole, ends):
    assert choice.finish_reason == "stop" or end == len(text)


def test_streams_have_the_log_probs_and_the_usage_of_whole_answers(client):
  ask = {"model": "m", "messages": CHAT["messages"], "n": 2, "seed": 4, "logprobs": True}
  whole = client.chat.completions.create(**ask)
  content, usages = {0: [], 1: []}, []
  options = {"include_usage": True}
  for chunk in client.chat.completions.create(**ask, stream=True, stream_options=options):
    assert "usage" in chunk.model_fields_set
    usages.append(chunk.usage)
    for choice in chunk.choices:
      content[choice.index] += choice.logprobs.content if choice.logprobs else []
  assert content == {c.index: c.logprobs.content for c in whole.choices}
  assert usages[-1] == whole.usage and set(usages[:-1]) == {None}
  for chunk in client.chat.completions.create(**ask, stream=True):
    assert "usage" not in chunk.model_fields_set


def test_both_names_of_the_limit(client):
  ask = {"model": "m", "messages": CHAT["messages"]}
  for more in ({"max_completion_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 3}):
    assert client.chat.completions.create(**ask, **more).usage.completion_tokens <= 3
  with pytest.raises(openai.BadRequestError, match="max_tokens = 4, or only one of them"):
    client.chat.completions.create(**ask, max_completion_tokens=3, max_tokens=4)


def written(served, tokens, chat):
  """The log-probs that answer a request, for a reply of `tokens`."""
  n = len(tokens)
  completion = Completion(
    np.array(tokens, np.int32), np.full(n, -0.5, np.float32), np.zeros(n, np.int32),
    np.zeros(n, bool), StopReason.LENGTH,
  )  # fmt: skip
  more = {"max_tokens": 4}
  body = {"messages": [{"role": "user", "content": "a"}], "logprobs": True} if chat else {
    "prompt": "a", "logprobs": 0
  }  # fmt: skip
  read = protocol.read_chat if chat else lambda b: protocol.read_completion(b, 320)
  writer = Writer(read({**body, **more}), served.tokenizer, "policy", 0)
  answer = Answer({"role": "assistant", "content": ""}, [1], completion)
  return writer.whole([answer])["choices"][0]["logprobs"]


@pytest.mark.parametrize(("version", "fingerprint"), [(3, "version-3"), (-1, None)])
def test_fingerprint_is_the_version_of_a_run(served, version, fingerprint):
  ask = protocol.read_chat({"messages": [{"role": "user", "content": "a"}]})
  found = Writer(ask, served.tokenizer, "policy", version).whole([])
  assert found["system_fingerprint"] == fingerprint


def test_parts_of_characters_have_their_bytes_and_their_place(served):
  text = "aé\U0001f600b"
  tokens = served.tokenizer.encode(text)
  found = written(served, tokens, chat=True)["content"]
  assert bytes(b for x in found for b in x["bytes"]) == text.encode()
  assert [x["token"] for x in found][:2] == ["a", "\ufffd"]
  found = written(served, [*tokens, *served.tokenizer.stop_ids[:1]], chat=False)
  assert found["text_offset"] == [0, 1, 1, 2, 2, 2, 2, 3, 4]


def test_long_answers_are_written_in_linear_time(served):
  tokens = served.tokenizer.encode("abcdefgh" * 8_000)
  assert written(served, tokens, chat=False)["text_offset"][-1] == 63_999
  assert_linear(lambda n: written(served, tokens[:n], chat=False), len(tokens) // FACTOR)


def test_tokens_of_other_kinds_of_tokenizers():
  from tokenizers import Tokenizer as Backend
  from tokenizers import decoders, models
  from transformers import PreTrainedTokenizerFast

  names = ["<unk>", "</s>", "\u2581Hi", "<0xC3>", "<0xA9>", "\u2581", "x"]
  backend = Backend(models.BPE({n: i for i, n in enumerate(names)}, [], byte_fallback=True))
  backend.decoder = decoders.Sequence(
    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
     decoders.Strip(" ", 1, 0)]
  )  # fmt: skip
  inner = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
  tokenizer = Tokenizer(inner, (1,))
  found = [token_bytes(tokenizer, i) for i in range(2, 8)]  # the last is beyond the vocabulary
  assert found == [b" Hi", b"\xc3", b"\xa9", b" ", b"x", b""]
