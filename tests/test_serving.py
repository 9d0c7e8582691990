"""--mode=serve as a process: it answers, asks for its token, and ends when it is told to."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx

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


def test_serve(tmp_path):
  (tmp_path / "config.py").write_text(CONFIG)
  env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
  process = subprocess.Popen(
    [sys.executable, "launch/main.py", f"--config={tmp_path}/config.py", "--mode=serve",
     f"--workdir={tmp_path}/run"],
    cwd=ROOT, env=env | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip
  try:
    assert process.stdout is not None
    text = ""
    while "token: " not in text:
      line = process.stdout.readline()
      assert line, text
      text += line
    address = re.search(r"at (http://127\.0\.0\.1:\d+)/v1", text)
    token = re.search(r"token: (\S+)", text)
    assert address and token, text
    ask = {"model": "policy", "messages": [{"role": "user", "content": "1+2="}]}
    with httpx.Client(base_url=address[1], timeout=60, trust_env=False) as client:
      assert client.post("/v1/chat/completions", json=ask).status_code == 401
      found = client.post(
        "/v1/chat/completions", json=ask, headers={"Authorization": f"Bearer {token[1]}"}
      )
    assert found.status_code == 200, found.text
    assert 1 <= found.json()["usage"]["completion_tokens"] <= 4
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
  finally:
    process.kill()
    process.wait()
