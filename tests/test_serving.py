"""--mode=serve as a process: it answers, asks for its token, and ends when it is told to."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
from trinity_jax.config import base_config

def get_config():
  c = base_config()
  c.model.tiny = dict(hidden=32, layers=1, heads=2, kv_heads=2, head_dim=16, intermediate=32)
  c.taskset.generate = "trinity_jax.tasks.arithmetic:generate"
  c.taskset.generate_args, c.taskset.reward = dict(split="rl", rows=8), "arithmetic"
  c.sampler.max_prompt_length, c.sampler.max_response_length, c.sampler.slots = 16, 4, 4
  c.sampler.prefill_batches, c.sampler.prompt_buckets, c.sampler.cache_buckets = (4,), (16,), (20,)
  return c
"""


ASK = {"model": "policy", "messages": [{"role": "user", "content": "1+2="}]}


@contextmanager
def launched(folder: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
  env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
  process = subprocess.Popen(
    [sys.executable, "launch/main.py", f"--config={folder}/config.py", f"--workdir={folder}/run",
     *flags],
    cwd=ROOT, env=env | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip
  try:
    yield process
  finally:
    process.kill()
    process.wait()


def client_of(process: subprocess.Popen[str]) -> httpx.Client:
  """Of the server that the process says it has."""
  assert process.stdout is not None
  text = ""
  while "token: " not in text:
    line = process.stdout.readline()
    assert line, text
    text += line
  address = re.search(r"at (http://127\.0\.0\.1:\d+)/v1", text)
  token = re.search(r"token: (\S+)", text)
  assert address and token, text
  headers = {"Authorization": f"Bearer {token[1]}"}
  return httpx.Client(base_url=address[1], timeout=60, trust_env=False, headers=headers)


def test_serve(tmp_path):
  (tmp_path / "config.py").write_text(CONFIG)
  with launched(tmp_path, "--mode=serve") as process, client_of(process) as client:
    nobody = client.post("/v1/chat/completions", json=ASK, headers={"Authorization": "Bearer x"})
    assert nobody.status_code == 401
    found = client.post("/v1/chat/completions", json=ASK)
    assert found.status_code == 200, found.text
    assert 1 <= found.json()["usage"]["completion_tokens"] <= 4
    assert client.post("/commit", json={"session": "a", "reward": 1}).status_code == 404
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


@pytest.mark.slow
def test_traffic_trains_the_policy_that_serves_it(tmp_path):
  """Two trainer steps of two sessions each, one of them with a reward that comes late."""
  (tmp_path / "config.py").write_text(CONFIG)
  flags = ["--config.explorer.deterministic=False", "--config.explorer.batch_size=2",
           "--config.trainer.total_steps=2", "--config.sync.style=fully_async",
           "--config.trainer.row_lengths=(20,)", "--config.monitor.tensorboard=False",
           "--config.sync.timeout=240.0", "--config.server.record=True",
           "--config.explorer.group_size=1",
           "--config.algorithm.name=reinforceplusplus"]  # fmt: skip
  with (
    launched(tmp_path, "--mode=train", *flags) as trainer,
    launched(tmp_path, "--mode=serve", *flags) as server,
    client_of(server) as client,
  ):
    for i in range(4):
      head = {"x-session-id": f"user {i}"}
      assert client.post("/v1/chat/completions", json=ASK, headers=head).status_code == 200
      now = {} if i == 3 else {"reward": i % 2}
      assert client.post("/commit", json=now, headers=head).status_code == 200
    late = client.post("/feedback", json={"session": "user 3", "reward": 1.0})
    assert late.status_code == 200, late.text
    out, _ = trainer.communicate(timeout=240)
    assert trainer.returncode == 0, out[-3000:]
    ask = {**ASK, "return_token_ids": True}
    fresh = client.post("/v1/chat/completions", json=ask, headers={"x-session-id": "new"})
    assert fresh.status_code == 200, "served after the end of the training"
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0
  steps = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  trained = [s for s in steps if "loss" in s]
  assert [s["step"] for s in trained] == [1, 2]
  assert [s["reward/mean"] for s in trained] == [0.5, 0.5]
