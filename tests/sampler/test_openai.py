"""OpenAIEngine against stubs of a vLLM-like and an SGLang-like server on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.server
import json
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from trinity_jax.errors import RunFailed, UserError
from trinity_jax.experience import StopReason
from trinity_jax.models import params as params_lib
from trinity_jax.models.presets import ModelConfig
from trinity_jax.sampler.openai import OpenAIEngine
from trinity_jax.sampler.openai_wire import seed_of
from trinity_jax.sampler.request import Request
from trinity_jax.sampler.rollout_engine import RolloutEngine

MODEL = ModelConfig("qwen3", 64, 8, 1, 2, 1, 4, 16, qk_norm=True, tie_word_embeddings=True)
STOP = 7
NOTHING = {"sampler/running": 0, "sampler/waiting": 0}  # is going on
REQUEST = Request(
  tokens=np.array([3, 4, 5], np.int32),
  key=np.array([0xFFFFFFFF, 2], np.uint32),
  order=(0, 1),
  limit=4,
  stop_ids=(STOP, 9),
)


def vllm(tokens=(10, 11, STOP), logprobs=(-1.0, -0.5, -0.25), finish="stop", **more):
  choice = {"token_ids": tokens, "logprobs": {"token_logprobs": logprobs}, "finish_reason": finish}
  return {"choices": [{**choice, **more}]}


def sglang(tokens=(10, 11, STOP), logprobs=(-1.0, -0.5, -0.25), finish="stop", **more):
  rows = [[p, t, None] for p, t in zip(logprobs, tokens, strict=True)]
  meta = {"output_token_logprobs": rows, "finish_reason": {"type": finish, "matched": STOP}}
  return {"text": "", "meta_info": {**meta, **more}}


class Stub:
  """An HTTP server: `reply(path, body)` gives (status, JSON or text); "drop" hangs up."""

  def __init__(self, reply: Callable[[str, Any], Any]):
    self.reply, self.seen, self.active, self.most = reply, [], 0, 0
    self.gate = threading.Event()  # requests wait for it
    self.gate.set()
    self.arrived = threading.Semaphore(0)
    self.left = threading.Semaphore(0)  # a client hung up while it waited
    self._lock = threading.Lock()
    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
    self.url = f"http://127.0.0.1:{self._server.server_port}"
    threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

  def close(self):
    self.gate.set()
    self._server.shutdown()
    self._server.server_close()

  def paths(self):
    return [path for path, _, _ in self.seen]

  def _handler(stub):
    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def log_message(self, *_):
        pass

      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stub._lock:
          stub.seen.append((self.path, dict(self.headers), body))
          stub.active += 1
          stub.most = max(stub.most, stub.active)
        stub.arrived.release()
        present = self._wait()
        with stub._lock:
          stub.active -= 1
        if not present:
          stub.left.release()
          self.close_connection = True
          return
        answer = stub.reply(self.path, body)
        if answer == "drop":
          self.close_connection = True
          return
        status, content = answer
        data = content if isinstance(content, str) else json.dumps(content)
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data.encode())

      def _wait(self) -> bool:
        """Waits for the gate; False when the client has gone."""
        while not stub.gate.wait(0.01):
          ready, _, _ = select.select([self.connection], [], [], 0)
          if ready and not self.connection.recv(1, socket.MSG_PEEK):
            return False
        return True

    return Handler


@pytest.fixture
def serve(monkeypatch):
  monkeypatch.setenv("NO_PROXY", "*")
  with contextlib.ExitStack() as stack:

    def start(reply) -> Stub:
      stub = Stub(reply if callable(reply) else lambda path, body: (200, reply))
      stack.callback(stub.close)
      return stub

    yield start


def engine_for(url: str, version: int | None = 0, **more) -> OpenAIEngine:
  args = {"model": "tiny", "vocab_size": 64, "max_prompt": 8, "max_response": 6, "retries": 2}
  engine = OpenAIEngine(url, **{**args, "backoff": 0.01, "timeout": 10.0, **more})
  if version is not None:
    engine.set_params(version, None)
  return engine


def run(engine: OpenAIEngine, *requests: Request):
  async def all_of():
    return await asyncio.gather(*map(engine.generate, requests))

  out = asyncio.run(asyncio.wait_for(all_of(), 20))
  return out[0] if len(out) == 1 else out


async def until(semaphore: threading.Semaphore) -> None:
  assert await asyncio.to_thread(semaphore.acquire, timeout=60)


def test_vllm_request_and_completion(serve):
  stub = serve(vllm(prompt_token_ids=[3, 4, 5]))
  engine: RolloutEngine = engine_for(stub.url + "/v1", 5, api_key="secret")
  assert isinstance(engine, RolloutEngine)
  engine.start()
  out = run(engine, REQUEST)
  assert out.tokens.tolist() == [10, 11, STOP] and out.tokens.dtype == np.int32
  assert out.logprobs.tolist() == [-1.0, -0.5, -0.25] and out.logprobs.dtype == np.float32
  assert out.versions.tolist() == [5, 5, 5] and out.mixed.tolist() == [False] * 3
  assert out.stop_reason is StopReason.STOP
  [(path, headers, body)] = stub.seen
  assert path == "/v1/completions" and headers["Authorization"] == "Bearer secret"
  assert "secret" not in engine.describe()
  want = {"model": "tiny", "prompt": [3, 4, 5], "max_tokens": 4, "temperature": 1.0, "top_p": 1.0,
          "top_k": -1, "min_p": 0.0, "seed": 0x7FFFFFFF00000002, "logprobs": 0,
          "stop_token_ids": [7, 9], "ignore_eos": True, "return_token_ids": True,
          "add_special_tokens": False, "skip_special_tokens": False, "repetition_penalty": 1.0,
          "presence_penalty": 0.0, "frequency_penalty": 0.0}  # fmt: skip
  assert body == want


def test_sglang_request_and_completion(serve):
  stub = serve(sglang())
  out = run(engine_for(stub.url, 2, dialect="sglang"), REQUEST)
  assert out.tokens.tolist() == [10, 11, STOP] and out.logprobs.tolist() == [-1.0, -0.5, -0.25]
  assert out.versions.tolist() == [2, 2, 2] and out.stop_reason is StopReason.STOP
  [(path, headers, body)] = stub.seen
  assert path == "/generate" and "Authorization" not in headers
  sampling = {"max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0,
              "sampling_seed": 0x7FFFFFFF00000002, "stop_token_ids": [7, 9],
              "skip_special_tokens": False, "repetition_penalty": 1.0, "presence_penalty": 0.0,
              "frequency_penalty": 0.0}  # fmt: skip
  assert body == {"input_ids": [3, 4, 5], "return_logprob": True, "sampling_params": sampling}


def test_seeds_are_63_bit_and_differ():
  keys = [np.array(k, np.uint32) for k in ([0, 1], [1, 0], [0, 2], [2**32 - 1, 2**32 - 1])]
  assert [seed_of(k) for k in keys] == [1, 2**32, 2, 2**63 - 1]


@pytest.mark.parametrize("make, dialect", [(vllm, "vllm"), (sglang, "sglang")])
@pytest.mark.parametrize(
  "tokens, finish, reason",
  [
    ((10, 11, 12, 13), "length", StopReason.LENGTH),
    ((10, 11, 12, STOP), "length", StopReason.STOP),  # SGLang looks at the limit first
    ((9,), "stop", StopReason.STOP),
    ((10, 11), "abort", StopReason.ABORTED),
    ((), "abort", StopReason.ABORTED),
  ],
)
def test_stop_reason(serve, make, dialect, tokens, finish, reason):
  stub = serve(make(tokens, [-0.5] * len(tokens), finish))
  out = run(engine_for(stub.url, dialect=dialect), REQUEST)
  assert out.stop_reason is reason and out.tokens.tolist() == list(tokens)


BROKEN = {
  "no ids": (vllm(tokens=None), "token ids None; expected a list"),
  "no log-probs": (vllm(logprobs=None), "log-probs None; expected a list"),
  "no choices": ({"error": "x"}, "token ids None"),
  "not an object": ([1], "token ids None"),
  "lengths": (vllm(logprobs=(-1.0,)), "3 token ids and 1 log-probs"),
  "nan": (vllm(logprobs=(-1.0, float("nan"), -1.0)), "log-prob nan"),
  "null": (vllm(logprobs=(-1.0, None, -1.0)), "log-prob None"),
  "positive": (vllm(logprobs=(-1.0, 0.5, -1.0)), "log-prob 0.5"),
  "impossible": (vllm(logprobs=(-1.0, -9999.0, -1.0)), "-9999.0; expected the log-prob of a token"),
  "id": (vllm(tokens=(10, 64, STOP)), "token id 64; expected 0 to 63"),
  "negative id": (vllm(tokens=(10, -1, STOP)), "token id -1"),
  "text": (vllm(tokens=("a", "b", "c")), "token id 'a'"),
  "another prompt": (vllm(prompt_token_ids=[4, 5]), "another prompt"),
  "stop dropped": (vllm((10, 11), (-1.0, -1.0)), "'stop' after token 11; .* stop token .7, 9"),
  "stop at nothing": (vllm((), ()), "'stop' after no token"),
  "ran past stop": (vllm((STOP, 10), (-1.0, -1.0), "length"), "more tokens after stop token 7"),
  "too many": (vllm([10] * 5, [-1.0] * 5, "length"), "5 tokens; expected at most 4"),
  "too few": (vllm((10,), (-1.0,), "length"), "'length' after 1 tokens.*--max-model-len"),
  "finish": (vllm(finish="content_filter"), "finish reason 'content_filter'"),
  "no finish": (vllm(finish=None), "finish reason None"),
  "html": ("<html>", "<html>.*expected JSON"),
}
BROKEN_SGLANG = {
  "no log-probs": ({"text": "hi", "meta_info": {}}, "token ids None"),
  "rows": ({"meta_info": {"output_token_logprobs": [3, 4]}}, "token id None"),
  "nan logits": (
    {"meta_info": {**sglang()["meta_info"],
                   "finish_reason": {"type": "stop", "matched": "NaN happened"}}},
    "NaN happened",
  ),
}  # fmt: skip


@pytest.mark.parametrize(
  "dialect, name",
  [*(("vllm", n) for n in BROKEN), *(("sglang", n) for n in BROKEN_SGLANG)],
)
def test_an_answer_that_cannot_be_trained_on_is_an_error(serve, dialect, name):
  answer, message = (BROKEN if dialect == "vllm" else BROKEN_SGLANG)[name]
  stub = serve(answer)
  with pytest.raises(RunFailed, match=message) as e:
    run(engine_for(stub.url, dialect=dialect), REQUEST)
  assert stub.url in str(e.value) and len(stub.seen) == 1


@pytest.mark.parametrize(
  "dialect, logprobs, sampling, message",
  [
    ("vllm", "raw", {"temperature": 0.7}, "--logprobs-mode processed_logprobs .*'processed'"),
    ("vllm", "raw", {"top_p": 0.9}, "--logprobs-mode processed_logprobs"),
    ("vllm", "raw", {"top_k": 5}, "--logprobs-mode processed_logprobs"),
    ("vllm", "raw", {"min_p": 0.1}, "--logprobs-mode processed_logprobs"),
    ("vllm", "processed", {"temperature": 0.0, "top_p": 0.9}, "greedy"),
    ("vllm", "processed", {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1}, None),
    ("vllm", "raw", {"temperature": 0.0}, None),
    ("sglang", "raw", {"temperature": 0.7}, "SGLANG_RETURN_ORIGINAL_LOGPROB .*'processed'"),
    ("sglang", "processed", {"temperature": 0.7}, None),
    ("sglang", "processed", {"top_p": 0.9}, "without truncation"),
    ("sglang", "processed", {"top_k": 5}, "without truncation"),
    ("sglang", "raw", {"temperature": 0.0}, None),
  ],
)
def test_sampling_whose_logprobs_could_be_wrong_is_refused(
  serve, dialect, logprobs, sampling, message
):
  stub = serve(vllm() if dialect == "vllm" else sglang())
  engine = engine_for(stub.url, dialect=dialect, logprobs=logprobs)
  request = dataclasses.replace(REQUEST, **sampling)
  if message is None:
    assert run(engine, request).stop_reason is StopReason.STOP
    sent = stub.seen[0][2].get("sampling_params", stub.seen[0][2])
    assert {k: sent[k] for k in sampling} == sampling
    return
  with pytest.raises(UserError, match=message):
    run(engine, request)
  assert not stub.seen


def test_lengths_beyond_the_engine_are_refused(serve):
  stub = serve(vllm())
  for change in {"tokens": np.zeros(9, np.int32)}, {"tokens": np.zeros(0, np.int32)}, {"limit": 7}:
    with pytest.raises(UserError, match="tokens: the engine serves 1 to 8|limit 7: must be 1 to 6"):
      run(engine_for(stub.url), dataclasses.replace(REQUEST, **change))
  assert not stub.seen


@pytest.mark.parametrize("trouble", [(503, "busy"), (429, "slow down"), (500, "oops"), "drop"])
def test_passing_trouble_is_tried_again(serve, trouble):
  replies = [trouble, trouble, (200, vllm())]
  stub = serve(lambda path, body: replies.pop(0))
  engine = engine_for(stub.url)
  assert run(engine, REQUEST).stop_reason is StopReason.STOP
  assert len(stub.seen) == 3 and stub.seen[0][2] == stub.seen[2][2]
  assert engine.stats["retries"] == 2


def test_lasting_trouble_is_an_error(serve):
  stub = serve(lambda path, body: (503, "overloaded"))
  with pytest.raises(RunFailed, match="after 3 attempts, the last: HTTP 503: overloaded; is the"):
    run(engine_for(stub.url), REQUEST)
  assert len(stub.seen) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_a_refusal_is_not_tried_again(serve, status):
  stub = serve(lambda path, body: (status, "no such model"))
  with pytest.raises(RunFailed, match=f"HTTP {status}: no such model; .*model = 'tiny'") as e:
    run(engine_for(stub.url, api_key="secret"), REQUEST)
  assert len(stub.seen) == 1 and "secret" not in str(e.value)


def test_a_server_that_is_down_is_named(serve):
  stub = serve(vllm())
  stub.close()
  with pytest.raises(RunFailed, match=f"{stub.url}.*3 attempts.*ConnectError.*is the server up"):
    run(engine_for(stub.url), REQUEST)


def test_no_answer_in_time_is_not_tried_again(serve):
  stub = serve(vllm())
  stub.gate.clear()
  with pytest.raises(RunFailed, match="no answer within timeout = 0.2 s"):
    run(engine_for(stub.url, timeout=0.2), REQUEST)
  assert stub.left.acquire(timeout=60) and len(stub.seen) == 1


def numbered(n: int) -> list[Request]:
  return [dataclasses.replace(REQUEST, order=(0, i)) for i in range(n)]


def test_concurrency_is_bounded(serve):
  stub = serve(vllm())
  stub.gate.clear()
  engine = engine_for(stub.url, concurrency=3)

  async def go():
    tasks = [asyncio.create_task(engine.generate(r)) for r in numbered(8)]
    for _ in range(3):
      await until(stub.arrived)
    await asyncio.sleep(0.05)
    assert engine.metrics() == {"sampler/running": 3, "sampler/waiting": 5}
    assert "3 requests in flight [(0, 0), (0, 1), (0, 2)], 5 waiting" in engine.describe()
    stub.gate.set()
    await asyncio.gather(*tasks)

  asyncio.run(asyncio.wait_for(go(), 20))
  assert stub.most == 3 and len(stub.seen) == 8 and engine.metrics() == NOTHING
  counted = {"requests": 8, "sampled_tokens": 24, "prompt_tokens": 24}
  assert engine.stats == {**counted, "retries": 0, "weight_updates": 0}


def test_cancelling_hangs_up_and_frees_the_place(serve):
  stub = serve(vllm())
  stub.gate.clear()
  engine = engine_for(stub.url, concurrency=1)

  async def go():
    first, second = (asyncio.create_task(engine.generate(r)) for r in numbered(2))
    await until(stub.arrived)
    first.cancel()
    await until(stub.left)
    await until(stub.arrived)  # the second took its place
    stub.gate.set()
    assert (await second).stop_reason is StopReason.STOP
    with pytest.raises(asyncio.CancelledError):
      await first

  asyncio.run(asyncio.wait_for(go(), 20))
  assert engine.metrics() == NOTHING


def test_a_deadline_gives_an_empty_completion(serve):
  stub = serve(vllm())
  stub.gate.clear()
  engine = engine_for(stub.url, concurrency=1)
  soon = time.monotonic() + 0.2
  late = dataclasses.replace(REQUEST, deadline=time.monotonic() - 1)
  # The second one's passes while it waits for its turn.
  out = run(engine, *(dataclasses.replace(r, deadline=soon) for r in numbered(2)), late)
  for c in out:
    assert c.stop_reason is StopReason.TIMEOUT
    assert [len(x) for x in (c.tokens, c.logprobs, c.versions, c.mixed)] == [0] * 4
  assert stub.left.acquire(timeout=60)
  assert len(stub.seen) <= 2
  assert engine.metrics() == NOTHING and engine.stats["requests"] == 0


def test_frozen_weights_have_one_version(serve):
  stub = serve(vllm())
  engine = engine_for(stub.url, version=None)
  assert engine.version == -1 and engine.error is None
  with pytest.raises(RunFailed, match="before set_params"):
    run(engine, REQUEST)
  engine = engine_for(stub.url, 3)
  engine.set_params(3, None)
  with pytest.raises(UserError, match="frozen at version 3.*'disk'.*native"):
    engine.set_params(4, None)
  with pytest.raises(ValueError, match="version 2 offered to an engine that has 3"):
    engine.set_params(2, None)
  assert run(engine, REQUEST).versions.tolist() == [3, 3, 3]
  assert stub.paths() == ["/v1/completions"]


def sglang_with_weights(told: list):
  """A server whose label of its weights is the last one loaded; what it loads is looked at."""

  def reply(path, body):
    if path == "/generate":
      return 200, sglang(weight_version=told[-1][0] if told else "default")
    folder = Path(body["model_path"])
    told.append((body["weight_version"], sorted(p.name for p in folder.iterdir())))
    return 200, {"success": True, "message": "ok"}

  return reply


@pytest.fixture(scope="module")
def weights():
  return params_lib.init(jax.random.key(0), MODEL)


def disk(folder) -> dict:
  return dict(dialect="sglang", weights="disk", weights_folder=folder, model_config=MODEL)


def test_disk_weights_reach_the_server_before_the_next_request(serve, tmp_path, weights):
  told: list = []
  stub = serve(sglang_with_weights(told))
  engine = engine_for(stub.url, None, **disk(tmp_path / "shared"))

  async def go():
    for version in 0, 1, 4:
      engine.set_params(version, weights)
      outs = await asyncio.gather(*map(engine.generate, numbered(3)))
      assert {v for o in outs for v in o.versions.tolist()} == {version} == {engine.version}
      engine.set_params(version, weights)  # the same again is no change
    engine.set_params(5, weights)
    engine.set_params(6, weights)  # before anybody asked for 5
    assert (await engine.generate(REQUEST)).versions.tolist() == [6, 6, 6]
    with pytest.raises(ValueError, match="version 5 offered to an engine that has 6"):
      engine.set_params(5, weights)

  asyncio.run(asyncio.wait_for(go(), 60))
  assert [v for v, _ in told] == ["0", "1", "4", "6"]
  assert all("config.json" in files and "model.safetensors" in files for _, files in told)
  one = ["/update_weights_from_disk", *["/generate"] * 3]
  assert stub.paths() == [*one * 3, "/update_weights_from_disk", "/generate"]
  assert sorted(p.name for p in (tmp_path / "shared").iterdir()) == ["v4", "v6"]
  assert engine.stats["weight_updates"] == 4


def test_requests_in_flight_end_under_their_version(serve, tmp_path, weights):
  told: list = []
  stub = serve(sglang_with_weights(told))
  engine = engine_for(stub.url, None, **disk(tmp_path))
  a, b = numbered(2)

  async def go():
    engine.set_params(1, weights)
    await engine.generate(a)
    await until(stub.arrived)
    await until(stub.arrived)
    stub.gate.clear()
    before = asyncio.create_task(engine.generate(a))
    await until(stub.arrived)
    engine.set_params(2, weights)
    after = asyncio.create_task(engine.generate(b))
    await asyncio.sleep(0.1)
    assert len(stub.seen) == 3 and engine.version == 1  # neither loaded nor sent
    stub.gate.set()
    return await asyncio.gather(before, after)

  before, after = asyncio.run(asyncio.wait_for(go(), 60))
  assert before.versions.tolist() == [1] * 3 and after.versions.tolist() == [2] * 3
  assert not before.mixed.any() and not after.mixed.any()
  assert [v for v, _ in told] == ["1", "2"]


def test_cancelling_does_not_stop_weights_on_their_way(serve, tmp_path, weights):
  told: list = []
  stub = serve(sglang_with_weights(told))
  engine = engine_for(stub.url, None, **disk(tmp_path))
  stub.gate.clear()

  async def go():
    engine.set_params(0, weights)
    first = asyncio.create_task(engine.generate(REQUEST))
    await until(stub.arrived)  # the weights
    assert "loading weights" in engine.describe()
    first.cancel()
    await asyncio.wait([first])
    second = asyncio.create_task(engine.generate(REQUEST))
    await asyncio.sleep(0)
    stub.gate.set()
    return await second

  out = asyncio.run(asyncio.wait_for(go(), 60))
  assert out.versions.tolist() == [0] * 3 and len(told) == 1
  assert stub.paths() == ["/update_weights_from_disk", "/generate"]
  assert engine.metrics() == NOTHING


@pytest.mark.parametrize(
  "reply, message",
  [
    ((200, {"success": False, "message": "wrong shape"}), "wrong shape.*expected success: true"),
    ((400, "bad"), "HTTP 400: bad"),
  ],
)
def test_weights_that_cannot_be_loaded_end_the_engine(serve, tmp_path, weights, reply, message):
  stub = serve(lambda path, body: reply if "weights" in path else (200, sglang()))
  engine = engine_for(stub.url, None, **disk(tmp_path))
  engine.set_params(0, weights)

  async def go():
    return await asyncio.gather(*map(engine.generate, numbered(2)), return_exceptions=True)

  errors = asyncio.run(asyncio.wait_for(go(), 60))
  assert isinstance(engine.error, RunFailed) and engine.version == -1
  assert all(type(e) is RunFailed and e.__cause__ is engine.error for e in errors)
  assert errors[0] is not errors[1]
  with pytest.raises(RunFailed, match=message):
    engine.set_params(1, weights)
  assert stub.paths() == ["/update_weights_from_disk"]


def test_somebody_elses_weights_are_an_error(serve, tmp_path, weights):
  def reply(path, body):
    return 200, sglang(weight_version="theirs") if path == "/generate" else {"success": True}

  stub = serve(reply)
  engine = engine_for(stub.url, None, **disk(tmp_path))
  engine.set_params(0, weights)
  with pytest.raises(RunFailed, match="from weights 'theirs'; expected '0'"):
    run(engine, REQUEST)


def test_one_event_loop_only(serve):
  engine = engine_for(serve(vllm()).url)
  run(engine, REQUEST)
  with pytest.raises(RunFailed, match="two event loops"):
    run(engine, REQUEST)


@pytest.mark.parametrize("outside", [True, False])
def test_closing_fails_open_and_later_requests(serve, outside):
  stub = serve(vllm())
  stub.gate.clear()
  engine = engine_for(stub.url, concurrency=1)

  async def go():
    tasks = [asyncio.create_task(engine.generate(r)) for r in numbered(2)]
    await until(stub.arrived)
    if outside:
      await asyncio.to_thread(engine.close)
    else:
      engine.close()
    for task in tasks:
      with pytest.raises(RunFailed, match="was closed"):
        await task
    with pytest.raises(RunFailed, match="was closed"):
      await engine.generate(REQUEST)

  asyncio.run(asyncio.wait_for(go(), 20))
  with pytest.raises(RunFailed, match="was closed"):
    engine.set_params(1, None)
  engine.close()  # its loop has ended
  assert len(stub.seen) == 1


def test_runs_are_counted():
  engine = engine_for("http://127.0.0.1:1")
  member = engine.member((0, 1, 2))
  assert member is engine
  member.enter()
  member.enter()
  member.leave()
  assert "1 runs open" in engine.describe()
  engine.close()


@pytest.mark.parametrize(
  "url, change, message",
  [
    ("localhost:8000", {}, "base_url = 'localhost:8000': expected http"),
    ("http://me:pw@host", {}, "use api_key"),
    ("http://h", {"dialect": "tgi"}, "dialect = 'tgi': expected one of 'vllm', 'sglang'"),
    ("http://h", {"logprobs": "cooked"}, "logprobs = 'cooked'"),
    ("http://h", {"weights": "warm"}, "weights = 'warm': expected one of 'frozen', 'disk'"),
    ("http://h", {"weights": "disk"}, "weights = 'disk' with dialect = 'vllm'.*'sglang'"),
    ("http://h", {"weights": "disk", "dialect": "sglang"}, "needs weights_folder"),
    ("http://h", {"concurrency": 0}, "concurrency = 0"),
    ("http://h", {"timeout": 0.0}, "timeout = 0.0"),
  ],
)
def test_arguments_that_do_not_fit(url, change, message):
  with pytest.raises(UserError, match=message) as e:
    engine_for(url, **change)
  assert "pw" not in str(e.value)
