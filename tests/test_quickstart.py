"""The quickstart as a newcomer runs it: learning curves, exactness, what the run leaves behind."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import launching
import numpy as np
import pytest

from trinity_jax.monitor.metrics import undocumented
from trinity_jax.monitor.writers import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def launch(workdir, *overrides, timeout=1800):
  """Runs launch/main.py on one CPU device, as `make quickstart` does."""
  command = [sys.executable, "launch/main.py", "--config=configs/quickstart.py",
             f"--workdir={workdir}", *overrides]  # fmt: skip
  done = subprocess.run(
    command, cwd=ROOT, env=launching.environment(), timeout=timeout, capture_output=True, text=True
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  return json.loads((workdir / "summary.json").read_text())


@functools.cache
def _run(folder, seed, *overrides):
  workdir = folder / f"run{seed}{len(overrides)}"
  summary = launch(workdir, f"--config.seed={seed}", *overrides)
  rows = {s: read_jsonl(workdir / s / "metrics.jsonl") for s in ("sft", "grpo")}
  return workdir, summary, rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """seed, overrides -> (workdir, summary, rows by stage); one process each, kept for the module."""
  folder = tmp_path_factory.mktemp("quickstart")
  return functools.partial(_run, folder)


def training(rows):
  return [r for r in rows if "loss" in r]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learns(run, seed):
  """Imitation stops at its teachers' level; reinforcement passes it."""
  workdir, summary, rows = run(seed)
  print({k: v for k, v in summary.items() if not isinstance(v, str)})
  assert 0.15 <= summary["accuracy_after_sft"] <= 0.65
  assert summary["accuracy_final"] >= 0.9
  assert summary["seed"] == seed and summary["resumed"] is False
  assert summary["compiles_after_warmup"] == 0
  assert summary["peak_rss_mb"] < 2000
  assert (workdir / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_step(run, seed):
  """Sampler and trainer agree in each step; metrics are complete, documented and add up."""
  _, summary, rows = run(seed)
  steps = training(rows["grpo"])
  assert [r["step"] for r in steps] == list(range(1, len(steps) + 1))
  assert len(training(rows["sft"])) >= 100 and len(steps) >= 20
  for r in steps:
    assert r["logprob_diff/p999"] <= 1e-5, r["step"]
    assert r["logprob_diff/max"] <= 5e-5, r["step"]
    assert r["compile/after_warmup"] == 0
    assert r["staleness/max"] == 0
    assert 0 <= r["frac_reward_zero_std"] <= 1
  assert summary["logprob_diff_max"] == max(r["logprob_diff/max"] for r in steps)
  assert summary["logprob_diff_p999"] == max(r["logprob_diff/p999"] for r in steps)
  for r in training(rows["sft"]) + steps:
    split = sum(v for k, v in r.items() if k.startswith("time_split/"))
    assert split == pytest.approx(100, abs=0.1)
    assert r["nonfinite_steps"] == 0 and np.isfinite(r["loss"])
  names = {name for stage in rows.values() for r in stage for name in r}
  assert undocumented(names) == []


def test_shuffled_rewards_teach_nothing(run):
  """The control: the same run with each step's rewards dealt out at random."""
  _, summary, rows = run(0, "--config.algorithm.shuffle_rewards=True")
  print(summary["accuracy_after_sft"], summary["accuracy_final"])
  assert abs(summary["accuracy_final"] - summary["accuracy_after_sft"]) <= 0.1
  # It did train: shuffling is the only difference.
  assert all(r["grad_norm"] > 0 for r in training(rows["grpo"])[:5])
  assert summary["accuracy_after_sft"] == run(0)[1]["accuracy_after_sft"]


def test_the_model_loads_in_transformers(run):
  """Logits of the folder the run leaves, read by transformers and by us."""
  torch = pytest.importorskip("torch")
  import jax
  import jax.numpy as jnp
  import transformers

  from trinity_jax.models import hf, transformer

  _, summary, _ = run(0)
  path = Path(summary["model"])
  theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": "27+58="}], add_generation_prompt=True, return_dict=False
  )
  with torch.no_grad():
    want = theirs(torch.tensor([ids])).logits[0].numpy()
    answer = theirs.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, len(ids):]
  params, config = hf.load(path, dtype=jnp.float32)
  tokens = jnp.array([ids])
  positions = jnp.arange(len(ids))[None]
  hidden = jax.jit(lambda p: transformer.forward(p, config, tokens, positions,
                                                 jnp.ones_like(tokens)))(params)  # fmt: skip
  have = np.asarray(transformer.logits(params, config, hidden))[0]
  np.testing.assert_allclose(have, want, atol=1e-4)
  assert tokenizer.decode(answer, skip_special_tokens=True).strip().isdigit()
