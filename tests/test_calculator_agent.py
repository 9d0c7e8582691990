"""A run whose agent knows only the openai package, against the same run without any text between.

Both are trained; every bit of what they leave is compared.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sqlite3
from pathlib import Path

import pytest

from trinity_jax.config import resolve
from trinity_jax.errors import UserError
from trinity_jax.experience import Experience, ExperienceId
from trinity_jax.explorer.workflows.calculator_agent import calculate
from trinity_jax.models.tokenizer import Tokenizer, write_byte_tokenizer
from trinity_jax.monitor.writers import read_jsonl
from trinity_jax.run import run
from trinity_jax.tasks.tool_sums import TOOLS, generate, value

ROOT = Path(__file__).resolve().parents[1]
TOKENS_ONLY = '''
"""The dialogue of the calculator agent, written in tokens."""

import json

from trinity_jax.explorer.workflows.calculator_agent import MAX_TURNS, calculate
from trinity_jax.tasks.tool_sums import TOOLS


async def tokens_only(task, model):
  t = model.tokenizer
  head, question = json.dumps(TOOLS), task.messages[-1]["content"]
  log, text = t.encode(f"<|system|>{head}<|end|><|user|>{question}<|end|><|assistant|>"), ""
  for _ in range(MAX_TURNS):
    new = (await model.generate(log)).tolist()
    text = t.decode(new)
    try:
      call = json.loads(text)
      assert call["name"] == "calc" and isinstance(call["arguments"], dict)
    except (ValueError, KeyError, TypeError, AssertionError):
      break
    found = calculate(json.dumps(call["arguments"]))
    end = "" if new[-1] in t.stop_ids else "<|end|>"
    log = log + new + t.encode(f"{end}<|tool|>{found}<|end|><|assistant|>")
  return {"accuracy": float(text.strip() == task.truth)}
'''


def recipe():
  spec = importlib.util.spec_from_file_location("recipe", ROOT / "configs/calculator_agent.py")
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def small(workflow: str):
  """The recipe, cut short: enough imitation to call the tool now and then, and three steps."""
  c = recipe()
  c.monitor.progress, c.monitor.tensorboard, c.buffer.keep = "none", False, True
  c.sampler.slots, c.sampler.prefill_batches = 32, (16,)
  c.eval.on_start = False
  sft, grpo = (dict(s) for s in c.stages)
  sft["trainer"] = dict(total_steps=120, batch_size=32, rows_per_micro=16, save_interval=120)
  sft["taskset.generate_args"] = dict(split="sft", rows=4000)
  sft["optimizer"] = {**sft["optimizer"], "learning_rate": 4e-3}
  grpo["taskset.workflow"] = workflow
  grpo["explorer"] = dict(batch_size=8, group_size=4)
  grpo["trainer"] = dict(total_steps=3, rows_per_micro=8, save_interval=3)
  for stage in (sft, grpo):
    stage["eval.interval"] = 1000
  c.stages = (sft, grpo)
  c.eval.tasksets = ()
  return resolve(c)


def experiences(file: Path) -> dict[ExperienceId, Experience]:
  with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
    rows = connection.execute("select data from experiences").fetchall()
  return {e.id: e for e in (Experience.from_bytes(data) for (data,) in rows)}


@pytest.mark.slow
def test_an_agent_trains_as_its_tokens_would(tmp_path, monkeypatch):
  (tmp_path / "agent_test_tokens.py").write_text(TOKENS_ONLY)
  monkeypatch.syspath_prepend(tmp_path)
  agent, pure = tmp_path / "agent", tmp_path / "pure"
  run(small("calculator_agent"), agent)
  run(small("agent_test_tokens:tokens_only"), pure)
  a, b = (experiences(w / "grpo" / "buffer.sqlite") for w in (agent, pure))
  assert len(a) == 96 and a.keys() == b.keys()
  for id, e in a.items():
    p = b[id]
    assert (e.reward, e.stop_reason) == (p.reward, p.stop_reason), (e.info, p.info)
    for name in ("tokens", "action_mask", "logprobs", "versions"):
      assert getattr(e, name).tobytes() == getattr(p, name).tobytes(), (id, name)
  turns = [e.metrics["num_turns"] for e in a.values()]
  assert sum(n > 1 for n in turns) > 20, "hardly any tool was called"
  rows = [read_jsonl(w / "grpo/metrics.jsonl") for w in (agent, pure)]
  for one, other in zip(*rows, strict=True):
    for name in ("loss", "grad_norm", "reward/mean", "num_turns/mean"):
      assert one[name] == other[name], name
    assert one["grad_norm"] > 0
  weights = [(w / "grpo/hf/model.safetensors").read_bytes() for w in (agent, pure)]
  assert weights[0] == weights[1]


def test_demonstrations_are_what_the_agent_is_shown(tmp_path):
  """The first message of a demonstration is what the template makes of the tools."""
  write_byte_tokenizer(tmp_path, vocab_size=320, max_length=512)
  t = Tokenizer.load(tmp_path)
  call, answer, *_ = generate("sft", rows=2)
  question = call["messages"][1:]
  assert t.chat_text(question, add_generation_prompt=True, tools=TOOLS) == t.chat_text(
    call["messages"], add_generation_prompt=True
  )
  asked = json.loads(call["response"])
  assert asked["name"] == TOOLS[0]["function"]["name"]
  assert calculate(json.dumps(asked["arguments"])) == answer["messages"][-1]["content"]
  assert answer["response"] == answer["messages"][-1]["content"]


def test_rows():
  held = {r["prompt"] for r in generate("eval")}
  assert len(held) == 60
  shown = {r["prompt"] for r in generate("rl")}
  asked = {r["messages"][1]["content"] for r in generate("sft")}
  assert len(shown) == 140 and asked <= shown and not held & shown
  assert all(r["answer"] == str(value(r["prompt"])) for r in generate("rl", rows=50))
  right = [r for r in generate("sft", wrong_fraction=0.0) if "messages" in r]
  assert all(r["messages"][1]["content"] in r["response"] for r in right[::2])
  assert [value(x) for x in ("8-3", "3-8", "12+30", "", "8", "8-", "--", "9" * 99 + "+1")] == [
    5, -5, 42, None, None, None, None, None,
  ]  # fmt: skip
  with pytest.raises(UserError, match="tool_sums split 'x'"):
    generate("x")
  for rows, held_out in ((-1, 1), (1, 51)):
    with pytest.raises(UserError, match="tool_sums"):
      generate("rl", rows=rows, held_out=held_out)
