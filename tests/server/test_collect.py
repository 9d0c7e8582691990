"""Sessions that clients begin: they expire, and what is committed becomes training data."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import time
import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import httpx
import numpy as np
import pytest

from trinity_jax.buffer.replay import ReplayBuffer
from trinity_jax.buffer.storage_memory import MemoryStore
from trinity_jax.config import base_config, resolve
from trinity_jax.errors import RunFailed
from trinity_jax.experience import Experience, ExperienceId, StopReason
from trinity_jax.explorer.workflow import Model, SamplingParams
from trinity_jax.server.collect import Collector
from trinity_jax.server.sessions import Sessions
from trinity_jax.serving import make_server
from trinity_jax.traffic import buffer_of_sessions

CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
WAIT, FIRST = 60, ExperienceId(1, 0, 0, 0)


def config_of(served, **more):
  c = base_config()
  c.model.path = c.taskset.path = "unused"
  c.explorer.deterministic, c.explorer.max_logs = False, 2
  c.sampler.max_prompt_length, c.sampler.max_response_length = served.max_prompt, 4
  c.update_from_flattened_dict(more)
  return resolve(c)


@contextlib.contextmanager
def collecting(served, capacity=100, more: Mapping[str, Any] = MappingProxyType({})):
  """(client of a server that records, its buffer, its sampler)."""
  config = config_of(served, **more)
  buffer = ReplayBuffer(MemoryStore(), capacity=capacity, order="ready", tasks_per_step=2)
  with served.sampler() as sampler:
    collector = Collector(config, buffer, sampler, served.tokenizer)
    server = make_server(config, sampler, served.tokenizer, None, collector).start()
    headers = {"authorization": f"Bearer {server.token}"}
    try:
      with httpx.Client(base_url=server.url, headers=headers, timeout=WAIT) as client:
        yield client, buffer, sampler
      served.wait_until_free(sampler)
    finally:
      server.close()
      buffer.close()


def say(client, name, text="a"):
  ask = {**CHAT, "messages": [{"role": "user", "content": text}]}
  answer = client.post("/v1/chat/completions", json=ask, headers={"x-session-id": name})
  assert answer.status_code == 200, answer.text
  return answer.json()["choices"][0]["message"]["content"]


def commit(client, name, **reward):
  return client.post("/commit", json={"session": name, **reward})


def totals(client) -> dict[str, float]:
  lines = client.get("/metrics").text.splitlines()
  return {k: float(v) for k, v in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}


def test_committed_sessions_are_sampled_by_the_trainer(served):
  with collecting(served) as (client, buffer, _):
    texts = {name: say(client, name) for name in ("one", "two", "three")}
    for i, name in enumerate(texts):
      assert commit(client, name, reward=i / 2).json()["turns"] == 1
    found = buffer.sample(3, 1, WAIT)
  assert [e.id[:2] for e in found] == [(1, 0), (1, 1), (2, 0)]
  assert [e.reward for e in found] == [0, 0.5, 1]
  for e in found:
    mine = e.tokens[e.action_mask]
    assert served.tokenizer.decode(mine) == texts[e.info["session"]]
    assert (e.versions[e.action_mask] == 0).all() and (e.logprobs[e.action_mask] < 0).all()


def test_a_session_is_a_whole_group_whatever_a_group_needs(served, tmp_path):
  """With min_runs above 1 each was accepted, and dropped where the trainer looked for it."""
  more = {"explorer.min_runs": 2, "explorer.batch_size": 1, "mode": "train"}
  with contextlib.closing(buffer_of_sessions(config_of(served, **more), tmp_path)) as buffer:
    experience = Experience.failed(FIRST, StopReason.ERROR, {})
    good = dataclasses.replace(experience, stop_reason=StopReason.STOP, reward=1.0)
    assert asyncio.run(buffer.put([good])) == "stored"
    assert [e.id for e in buffer.sample(1, 1, WAIT)] == [FIRST]
    assert buffer.dropped == 0
  buffer.store.close()


def test_a_row_without_a_reward_is_ready_when_that_comes(served):
  with collecting(served) as (client, buffer, _):
    for text in ("a", "another dialogue"):
      say(client, "late", text)
    assert commit(client, "late").json() == {"object": "commit", "turns": 2, "dropped_logs": 0}
    assert buffer.stats()["waiting"] == 1 and buffer.stats()["ready"] == 0
    refused = client.post("/v1/chat/completions", json=CHAT, headers={"x-session-id": "late"})
    assert refused.status_code == 409 and "waits for its reward" in refused.text
    assert commit(client, "late").status_code == 404
    assert client.post("/feedback", json={"session": "late", "reward": 0.25}).status_code == 200
    assert buffer.stats()["waiting"] == 0
    again = client.post("/feedback", json={"session": "late", "reward": 0.25})
    assert again.status_code == 404
    found = buffer.sample(1, 1, WAIT)
    assert [(e.id.step, e.reward) for e in found] == [(0, 0.25), (1, 0.25)]
    say(client, "late")  # the name is free again


def test_logs_beyond_the_limit_are_dropped_and_said_so(served):
  with collecting(served) as (client, buffer, _):
    texts = [say(client, "many", text) for text in ("first", "second", "third")]
    done = commit(client, "many", reward=1).json()
    assert done == {"object": "commit", "turns": 2, "dropped_logs": 1}
    found = buffer.sample(1, 1, WAIT)
    written = [served.tokenizer.decode(e.tokens[e.action_mask]) for e in found]
    assert written == texts[1:]
    assert totals(client)["trinity_dropped_logs_total"] == 1


def test_a_full_buffer_refuses_in_time_and_keeps_the_session(served):
  with collecting(served, 1, {"server.deadline": 4.0}) as (client, buffer, _):
    for name in ("a", "b"):
      say(client, name)
    assert commit(client, "a", reward=1).status_code == 200
    full = commit(client, "b", reward=1)
    assert full.status_code == 503 and "stayed full for 4 s" in full.text
    buffer.sample(1, 1, WAIT)
    assert commit(client, "b", reward=1).status_code == 200
    (e,) = buffer.sample(1, 2, WAIT)
    assert e.info["session"] == "b" and e.id.group == (1, 1)


def test_what_cannot_be_committed_is_refused(served):
  with collecting(served, more={"server.max_sessions": 1}) as (client, buffer, _):
    assert commit(client, "nobody", reward=1).status_code == 404
    assert client.post("/feedback", json={"session": "nobody", "reward": 1}).status_code == 404
    say(client, "one")
    second = client.post("/v1/chat/completions", json=CHAT, headers={"x-session-id": "two"})
    assert second.status_code == 429
    assert commit(client, "one").status_code == 200
    say(client, "two")
    waiting = commit(client, "two")
    assert waiting.status_code == 429 and "wait for their reward" in waiting.text
    buffer.finish()
    assert commit(client, "two", reward=1).status_code == 200  # its place was claimed before
    say(client, "three")
    over = commit(client, "three", reward=1)
    assert over.status_code == 409 and "the trainer has finished" in over.text


def test_sessions_that_nobody_uses_are_dropped(served):
  with collecting(served, more={"server.session_timeout": 0.3}) as (client, *_):
    say(client, "left")
    deadline = time.monotonic() + WAIT
    while totals(client)["trinity_expired_sessions_total"] < 1:
      assert time.monotonic() < deadline
      time.sleep(0.05)
    assert totals(client)["trinity_sessions"] == 0
    assert commit(client, "left", reward=1).status_code == 404


def test_a_session_lives_while_a_request_of_it_is_under_way(served):
  model = weakref.WeakSet()

  async def talk():
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def new(name):
      made = Model(cast(Any, None), served.tokenizer, FIRST, 0, SamplingParams(1.0, 4), 9)
      model.add(made)
      return made

    sessions = Sessions(new, timeout=0.02)
    session = sessions.named("a", begin=True)
    with session.in_use():
      loop.call_later(0.1, ended.set)
      await ended.wait()
      assert sessions.named("a", begin=False) is session and not sessions.expired
    assert await asyncio.wrap_future(session.feedback) is None  # it has expired
    assert sessions.expired == 1 and not len(sessions._named)

  asyncio.run(talk())
  gc.collect()
  assert not model, "the logs are still there"


def test_two_sessions_of_the_same_words_are_sampled_apart(served):
  with collecting(served) as (client, *_):
    assert len({say(client, f"s{i}") for i in range(6)}) > 1


def test_a_claim_that_went_to_somebody_else_costs_only_another_place(served):
  buffer = ReplayBuffer(MemoryStore(), capacity=9, order="ready", tasks_per_step=2)
  config = config_of(served)
  with served.sampler() as sampler:
    collector = Collector(config, buffer, sampler, served.tokenizer)
    models = [collector.begin(str(i)) for i in range(2)]

    async def talk():
      for model in models:
        await model.chat(CHAT["messages"])

    served.run(sampler, talk)
    first, second = (m.experiences(1.0) for m in models)
    collector.commit("0", first)
    other = Collector(config, buffer, sampler, served.tokenizer)
    other._free = [(1, 0)]  # what a lease that ran out looks like
    other.commit("1", second)
    assert len(buffer) == 2
    found = buffer.sample(2, 1, WAIT)
    assert [e.id.group for e in found] == [(1, 0), (2, 0)]
    assert np.array_equal(found[1].tokens, second[0].tokens)
    buffer.close()
    with pytest.raises(RunFailed):
      collector.commit("2", first)
