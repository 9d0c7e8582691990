"""Who gets in, how much and how often; rewards; metrics; TLS; malformed requests."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess

import httpx
import pytest

from trinity_jax.errors import RunFailed, UserError
from trinity_jax.experience import ExperienceId
from trinity_jax.explorer.workflow import Model, SamplingParams
from trinity_jax.server.gate import Buckets
from trinity_jax.server.serve import serve

CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
ENDPOINTS = [
  ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/v1/models"), ("GET", "/v1/models/x"),
  ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/feedback"),
  ("POST", "/commit"), ("GET", "/nothing"), ("GET", "/health/"), ("GET", "/docs"),
]  # fmt: skip


@pytest.fixture(scope="module")
def up(served):
  committed = []

  def new_session(name: str) -> Model:
    params = SamplingParams(1.0, served.max_response)
    id = ExperienceId(0, 0, len(committed), 0)
    return Model(up[0], served.tokenizer, id, 0, params, served.max_prompt)

  def on_commit(name, experiences):
    if experiences[0].reward == -1:
      raise OSError("disk full")
    committed.append((name, experiences))

  with served.server(new_session=new_session, on_commit=on_commit, max_body=20_000) as up:
    yield *up, committed


@pytest.fixture
def client(up):
  headers = {"authorization": f"Bearer {up[1].token}"}
  with httpx.Client(base_url=up[1].url, headers=headers, timeout=60) as client:
    yield client


def error_of(answer, status):
  assert answer.status_code == status, answer.text
  error = answer.json()["error"]
  assert set(error) == {"message", "type", "param", "code"} and error["message"]
  return error


@pytest.mark.parametrize("method, path", ENDPOINTS)
@pytest.mark.parametrize("auth", [None, "Bearer", "Bearer wrong", "Basic {}", "Bearer é"])
def test_without_a_token_nothing_answers(up, method, path, auth):
  headers = {} if auth is None else {"authorization": auth.format(up[1].token).encode()}
  answer = httpx.request(method, up[1].url + path, headers=headers)
  assert error_of(answer, 401)["code"] == "invalid_api_key"
  assert answer.headers["www-authenticate"] == "Bearer"


def test_health_answers_anybody_and_says_nothing_else(up):
  answer = httpx.get(up[1].url + "/health")
  assert answer.status_code == 200 and answer.json() == {"status": "ok"}
  assert "server" not in answer.headers


def test_small_answers_are_sent_at_once(up, client):
  """Not when the client has acknowledged their first segment, 40 ms later."""
  assert client.get("/v1/models").status_code == 200
  connections = list(up[1]._server.server_state.connections)
  assert connections
  for connection in connections:
    raw = connection.transport.get_extra_info("socket")
    assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_unknown_paths_and_methods(client):
  error_of(client.get("/nothing"), 404)
  error_of(client.get("/v1/models/other"), 404)
  error_of(client.get("/v1/chat/completions"), 405)
  assert client.get("/v1/models").json()["data"][0]["id"] == "policy"


@pytest.mark.parametrize(
  "body, says",
  [
    (b"", "not JSON"), (b"{", "not JSON"), (b"[]", "JSON list"), (b"\xff\xfe{}", "not JSON"),
    (b"[" * 9000, "not JSON"), (b'{"messages": NaN}', "not JSON"), (b'{"a": 1e999}', "not JSON"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "not JSON"),
    ({}, "messages"), ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"),
    ({"messages": [3]}, "messages[0]"), ({"messages": [{"role": "boss", "content": ""}]}, "role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content[0]"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "tool_calls"),
    ({**CHAT, "n": 0}, "n = 0"), ({**CHAT, "n": True}, "n = True"), ({**CHAT, "n": 1e9}, "n = "),
    ({**CHAT, "temperature": -1}, "temperature"), ({**CHAT, "temperature": "1"}, "temperature"),
    ({**CHAT, "top_p": 0}, "top_p"), ({**CHAT, "max_tokens": 0}, "max_tokens"),
    ({**CHAT, "max_tokens": 2**80}, "max_tokens"), ({**CHAT, "seed": 2**63}, "seed"),
    ({**CHAT, "stop": [""]}, "stop"), ({**CHAT, "stop": ["a"] * 17}, "stop"),
    ({**CHAT, "stream": 1}, "stream"), ({**CHAT, "stream_options": {"x": 1}}, "x: this server"),
    ({**CHAT, "tools": [{"type": "function"}]}, "tools[0]"),
    ({**CHAT, "tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
    ({**CHAT, "tool_choice": "required"}, "tool_choice"), ({**CHAT, "top_logprobs": 3}, "top_log"),
    ({**CHAT, "response_format": {"type": "json_object"}}, "response_format"),
    ({**CHAT, "presence_penalty": False}, "presence_penalty"), ({**CHAT, "what": 1}, "what: this"),
  ],
)  # fmt: skip
def test_malformed_chats_are_refused_by_name(client, body, says):
  content = body if isinstance(body, bytes) else json.dumps(body)
  assert says in error_of(client.post("/v1/chat/completions", content=content), 400)["message"]


@pytest.mark.parametrize(
  "prompt", [None, "", [], [[]], [-1], [10**6], [1.5], [True], ["a", 3], [["a"]], {"a": 1}]
)
def test_malformed_prompts_are_refused(client, prompt):
  answer = client.post("/v1/completions", json={"prompt": prompt})
  assert error_of(answer, 400)["param"] == "prompt"


def test_deep_and_long_requests_are_answered(client):
  for deep in range(900, 1000, 7):  # wherever along the way the stack ends
    parameters = json.loads('{"a":' * deep + "1" + "}" * deep) if deep < 940 else {}
    arguments = '{"a":' * deep + "1" + "}" * deep
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    said = [*CHAT["messages"], {"role": "assistant", "content": "", "tool_calls": [call]}]
    body = {**CHAT, "messages": said, "tools": [tool]}
    assert client.post("/v1/chat/completions", json=body).status_code in (200, 400, 413)


def test_requests_of_no_value_but_null_are_those_that_left_them_out(client):
  nothing = dict.fromkeys(("n", "stop", "tools", "seed", "logit_bias", "tool_choice", "top_p"))
  assert client.post("/v1/chat/completions", json={**CHAT, **nothing}).status_code == 200


def test_bodies_beyond_the_limit_are_refused_before_they_are_read(client):
  big = json.dumps({"messages": [{"role": "user", "content": "x" * 20_000}]}).encode()

  def chunks():
    for i in range(0, len(big), 1000):
      yield big[i : i + 1000]

  for content in (big, chunks()):
    error_of(client.post("/v1/chat/completions", content=content), 413)
  assert client.get("/v1/models").status_code == 200


def test_bytes_that_are_not_http_harm_nobody(up, client):
  for garbage in (b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 100):
    with socket.create_connection((up[1].host, up[1].port), timeout=60) as raw:
      raw.sendall(garbage)
      raw.shutdown(socket.SHUT_WR)
      while raw.recv(4096):
        pass
  assert client.get("/v1/models").status_code == 200


def test_a_header_begins_a_session_feedback_rewards_it_and_commit_hands_it_on(client, up):
  headers = {"x-session-id": "alice"}
  say = client.post("/v1/chat/completions", json=CHAT, headers=headers).json()["choices"][0]
  more = [*CHAT["messages"], say["message"], {"role": "user", "content": "b"}]
  client.post("/v1/chat/completions", json={**CHAT, "messages": more}, headers=headers)
  client.post("/v1/chat/completions", json=CHAT)  # nobody's: not recorded
  assert (
    "no reward came" in error_of(client.post("/commit", headers=headers, json={}), 400)["message"]
  )
  assert client.post("/feedback", json={"session": "alice", "reward": 0.5}).status_code == 200
  lost = client.post("/commit", json={"session": "alice", "reward": -1})
  assert "disk full" not in error_of(lost, 500)["message"]  # and the session is still there
  done = client.post("/commit", json={"session": "alice", "reward": 0.5})
  assert done.json() == {"object": "commit", "turns": 2, "dropped_logs": 0}
  ((name, (e,)),) = up[2]
  assert name == "alice" and e.reward == 0.5 and e.info == {"session": "alice"}
  assert e.metrics["num_turns"] == 2 and 2 <= e.num_actions <= 4
  error_of(client.post("/feedback", json={"session": "alice", "reward": 1}), 404)
  error_of(client.post("/feedback", json={"reward": 1}), 400)
  error_of(client.post("/feedback", json={"session": "alice"}), 400)
  error_of(client.post("/feedback", json={"session": "alice", "reward": "much"}), 400)


def test_the_agents_side_rewards_a_run_through_its_token(served, up):
  sampler, server, _ = up

  async def talk():
    model = served.model(sampler, server)
    agent = model.openai()
    headers = {"authorization": f"Bearer {agent.api_key}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers) as client:
      await client.post("/v1/chat/completions", json=CHAT)
      assert (await client.post("/feedback", json={"reward": 0.75})).status_code == 200
      stranger = await client.post(
        "/v1/chat/completions", json=CHAT, headers={"x-session-id": "alice"}
      )
      error_of(stranger, 403)
      assert await model.feedback() == 0.75
      done = await client.post("/commit", json={})
      assert done.json() == {"object": "commit", "turns": 1}
      error_of(await client.post("/v1/chat/completions", json=CHAT), 410)
    await agent.close()

  served.run(sampler, talk)


def test_a_session_that_ends_without_a_reward_says_so_to_who_waits(served, up):
  sampler, server, _ = up

  async def talk():
    model = served.model(sampler, server)
    with pytest.raises(UserError, match="no session"):
      await model.feedback()
    agent = model.openai()
    waiting = asyncio.create_task(model.feedback())
    headers = {"authorization": f"Bearer {agent.api_key}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers) as client:
      assert (await client.post("/commit", json={})).json()["turns"] == 0
    assert await waiting is None
    await agent.close()

  served.run(sampler, talk)


def test_metrics_are_prometheus_text(client):
  client.post("/v1/chat/completions", json=CHAT)
  answer = client.get("/metrics")
  assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
  values = {}
  for line in answer.text.splitlines():
    if not line.startswith("#"):
      name, value = line.rsplit(" ", 1)
      values[name] = float(value)
  done = 'trinity_http_requests_total{path="/v1/chat/completions",status="200"}'
  assert values[done] >= 1 and values["trinity_policy_version"] == 0
  assert values["trinity_completion_tokens_total"] >= 1
  assert values["trinity_http_open_requests"] == 1
  seconds = 'trinity_http_request_seconds_{}{{path="/v1/chat/completions"{}}}'
  whole = values[seconds.format("count", "")]
  assert values[seconds.format("bucket", ',le="+Inf"')] == whole
  assert any(name.startswith("trinity_sampler_") for name in values)


def test_buckets_refill():
  now = 0.0
  buckets = Buckets(2.0, 3, lambda: now)
  assert [buckets.wait("a") for _ in range(4)] == [0, 0, 0, 0.5] and buckets.wait("b") == 0
  now = 0.5
  assert buckets.wait("a") == 0 and buckets.wait("a") == 0.5
  assert Buckets(0.0, 1).wait("a") == 0
  many = Buckets(1.0, 1, lambda: now)
  for i in range(20_000):
    many.wait(str(i))
  assert len(many._level) <= 10_001


def test_limits_of_rate_open_requests_and_time(served):
  with served.server(rate=0.01, burst=2) as (_, server):
    headers = {"authorization": f"Bearer {server.token}"}
    answers = [httpx.get(server.url + "/v1/models", headers=headers) for _ in range(3)]
    assert [a.status_code for a in answers] == [200, 200, 429]
    assert error_of(answers[-1], 429)["code"] == "rate_limit_exceeded"
    assert int(answers[-1].headers["retry-after"]) >= 90
    assert httpx.get(server.url + "/health").status_code == 200
  with served.server(deadline=1e-4) as (_, server):
    headers = {"authorization": f"Bearer {server.token}"}
    answer = httpx.post(server.url + "/v1/chat/completions", json=CHAT, headers=headers)
    error_of(answer, 504)


def test_a_dead_sampler_is_an_answer(served):
  with served.sampler() as sampler:
    server = serve(sampler, served.tokenizer, max_prompt=64, max_response=8).start()
    sampler.close()
    sampler.error = RuntimeError("no memory")
    headers = {"authorization": f"Bearer {server.token}"}
    answer = httpx.post(server.url + "/v1/chat/completions", json=CHAT, headers=headers)
    assert "no memory" in error_of(answer, 503)["message"]
    assert httpx.get(server.url + "/health").json() == {"status": "failed"}
    server.close()
    server.close()
    sampler.error = None


@pytest.mark.parametrize(
  "kwargs, says",
  [
    ({"host": "203.0.113.1"}, "choose an address of this machine"), ({"port": 70000}, "free port"),
    ({"token": "short"}, "shorter than 16"), ({"certificate": "x.pem"}, "both"),
    ({"certificate": "x.pem", "private_key": "y.pem"}, "no such file"),
    ({"max_body": 0}, "max_body = 0"), ({"rate": -1}, "rate = -1"),
  ],
)  # fmt: skip
def test_what_cannot_be_served_is_said(served, kwargs, says):
  with served.sampler() as sampler, pytest.raises(UserError, match=says):
    serve(sampler, served.tokenizer, max_prompt=64, max_response=8, **kwargs)


def test_tls(served, tmp_path):
  if shutil.which("openssl") is None:
    pytest.skip("no openssl to make a certificate with")
  certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
  subprocess.run(
    ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj",
     "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out",
     certificate], check=True, capture_output=True, timeout=60,
  )  # fmt: skip
  with served.server(certificate=certificate, private_key=key) as (_, server):
    assert server.url.startswith("https://")
    import ssl

    trusted = ssl.create_default_context(cafile=str(certificate))
    assert httpx.get(server.url + "/health", verify=trusted).status_code == 200
    with pytest.raises(httpx.HTTPError):
      httpx.get(server.url.replace("https", "http") + "/health")
  key.write_text("no key")
  with served.sampler() as sampler:
    server = serve(
      sampler, served.tokenizer, max_prompt=64, max_response=8, certificate=certificate,
      private_key=key,
    )  # fmt: skip
    with pytest.raises(RunFailed, match="did not start"):
      server.start()
    server.close()
