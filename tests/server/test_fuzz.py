"""Requests that schemathesis makes up from our OpenAPI document: no 500, no crash."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections import Counter

import httpx
import pytest

with warnings.catch_warnings():
  warnings.simplefilter("ignore")
  schemathesis = pytest.importorskip("schemathesis")
  from hypothesis import HealthCheck, Phase, given, settings

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
MALFORMED, EXAMPLES = 200, 60


def test_made_up_requests_never_break_the_server(served):
  with served.server(max_body=50_000) as (sampler, server):
    headers = {"authorization": f"Bearer {server.token}"}
    seen = Counter()
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
      document = client.get("/openapi.json").json()
      schema = schemathesis.openapi.from_dict(document)
      for operation in schema.get_all_operations():
        if operation.ok().method == "post":
          _try(operation.ok(), client, seen)
      _mutants(client, seen)
      assert client.get("/v1/models").status_code == 200
    served.wait_until_free(sampler)
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
  print(dict(seen))
  refused = sum(n for status, n in seen.items() if 400 <= status < 500)
  assert refused >= MALFORMED and seen[200] >= 20 and not any(s >= 500 for s in seen)


def _try(operation, client, seen) -> None:
  """Requests as the document describes them, and requests that it forbids."""
  modes = schemathesis.GenerationMode
  for mode in (modes.POSITIVE, modes.NEGATIVE):
    quiet = settings(
      max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
      phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    @quiet
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case):
      ask = case.as_transport_kwargs(base_url=str(client.base_url))
      body = ask.get("json") if "json" in ask else ask.get("data")
      _send(client, case.method, case.formatted_path, body, "json" in ask, seen)

    send()


def _send(client, method, path, body, as_json, seen) -> None:
  kwargs = {"json": body} if as_json else {"content": body if isinstance(body, bytes) else None}
  with contextlib.suppress(httpx.InvalidURL, httpx.LocalProtocolError, ValueError):
    answer = client.request(method, path, **kwargs)
    seen[answer.status_code] += 1
    assert answer.status_code < 500, (method, path, body, answer.text)
    if answer.status_code >= 400:
      assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def _mutants(client, seen) -> None:
  """Good requests with one value, anywhere in them, replaced by another kind of thing."""
  rng = random.Random(0)
  values = [
    None, True, 0, -1, 2**70, 1.5, -1e308, "", "x" * 3000, "\x00\ud7ff\U0001f600", [], [[]], {},
    {"": {}}, [None], "auto", [1, "a"],
  ]  # fmt: skip
  function = {"name": "f", "arguments": '{"a": 1}'}
  tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
  good = {
    "/v1/chat/completions": {
      "messages": [
        {"role": "user", "content": "a", "name": "n"},
        {"role": "assistant", "content": "b",
         "tool_calls": [{"id": "1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "c"}]},
      ],
      "tools": [tool], "tool_choice": "auto", "n": 1, "stream": False, "max_tokens": 2,
      "stream_options": {"include_usage": True}, "temperature": 1.0, "top_p": 1.0, "top_k": 3,
      "min_p": 0.1, "seed": 1, "stop": ["s"], "logprobs": True, "logit_bias": {},
      "response_format": {"type": "text"}, "parallel_tool_calls": True,
    },
    "/v1/completions": {"prompt": [[1, 2], [3]], "max_tokens": 2, "logprobs": 0, "echo": False},
    "/feedback": {"session": "s", "reward": 1.0},
    "/commit": {"session": "s", "reward": 1.0},
  }  # fmt: skip
  for path, body in good.items():
    for _ in range(150 if len(body) > 4 else 40):
      _send(client, "POST", path, _mutated(body, rng, values), True, seen)


def _mutated(value, rng, values):
  if rng.random() < 0.15 or not isinstance(value, dict | list) or not value:
    return rng.choice(values)
  if isinstance(value, dict):
    key = rng.choice(sorted(value))
    return {**value, key: _mutated(value[key], rng, values)}
  i = rng.randrange(len(value))
  return [*value[:i], _mutated(value[i], rng, values), *value[i + 1 :]]
