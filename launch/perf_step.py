"""One GRPO step (16 prompts x 8 runs, 64 new tokens, fp32), whole and half full."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark import (
  PEERS,
  REPEATS,
  SIZES_FLAG,
  Row,
  matmul_rate,
  model_folders,
  peers,
  run_peer,
  timed,
)

PROMPTS, GROUP, MAX_PROMPT, NEW_TOKENS = 16, 8, 32, 64
STEP_PEERS = {  # name -> (environment, script and arguments; the best settings seen on 2 cores)
  "trl": ("trl", ["trl_grpo.py", "--micro", "32"]),
  "tunix": ("tunix", ["tunix_grpo.py", "--micro", "16"]),
}


def step_config(model: Path) -> Any:
  """The benchmark's config: on-policy GRPO without KL, AdamW 1e-4."""
  from trinity_jax.config import base_config, resolve

  c = base_config()
  c.model.path = str(model)
  c.taskset.path = "none"
  c.explorer.batch_size, c.explorer.group_size = PROMPTS, GROUP
  c.sampler.slots = PROMPTS * GROUP
  c.sampler.max_prompt_length, c.sampler.max_response_length = MAX_PROMPT, NEW_TOKENS
  c.sampler.prompt_buckets, c.sampler.prefill_batches = (MAX_PROMPT,), (PROMPTS,)
  c.sampler.steps_per_dispatch = NEW_TOKENS
  c.sampler.cache_buckets = (MAX_PROMPT + NEW_TOKENS,)
  c.trainer.rows_per_micro = 16
  c.algorithm.kl_coef = 0.0
  c.optimizer.learning_rate = 1e-4
  return resolve(c)


def prompts(step: int) -> list[str]:
  """16 prompts of 27 to 31 bytes, as the peers' scripts draw them."""
  import numpy as np

  pairs = np.random.default_rng(0).integers(1, 1000, (512, 2))
  first = step % 32 * PROMPTS
  return [f"Q: compute the sum {a}+{b}=? A:" for a, b in pairs[first : first + PROMPTS]]


class GrpoStep:
  """Sampler and trainer of one size, wired without files or threads of their own."""

  def __init__(self, size: str, folder: Path):
    import jax
    import jax.numpy as jnp

    from trinity_jax import build
    from trinity_jax.algorithms.algorithm import make
    from trinity_jax.launch_order import LaunchOrder
    from trinity_jax.models import hf, sharding
    from trinity_jax.models.tokenizer import Tokenizer
    from trinity_jax.sampler.scheduler import Sampler
    from trinity_jax.trainer.trainer import Trainer

    start = time.perf_counter()
    c = self.config = step_config(folder)
    self.tokenizer = Tokenizer.load(folder)
    model = self.model = hf.load_config(folder)
    meshes = build.make_meshes(c)
    mesh = meshes.train
    layout = sharding.param_shardings(model, mesh)
    params, _ = hf.load(folder, dtype=jnp.float32, shardings=layout)
    launch = LaunchOrder(mesh)
    self.programs = build.make_programs(c, model, mesh, layout, launch)
    self.sampler = Sampler(
      self.programs, steps_per_dispatch=NEW_TOKENS, refill_fraction=1.0, deterministic=True
    )
    self.trainer = Trainer(c, make(c.algorithm), build.policy_of(c, model), params, mesh, launch)
    self.copy = jax.jit(lambda p: jax.tree.map(jnp.copy, p))
    self.programs.warmup(params)
    self.trainer.warmup()
    self.sampler.start()
    self.compile_seconds = time.perf_counter() - start
    self.number = 0

  def generate(self) -> list[Any]:
    """128 completions of the current policy, as experiences without reward."""
    import jax
    import numpy as np

    from trinity_jax.experience import Experience, ExperienceId
    from trinity_jax.sampler.request import Request
    from trinity_jax.sampler.sampling import request_key

    self.sampler.set_params(
      self.number, jax.block_until_ready(self.copy(self.trainer.state.params))
    )
    ids = [ExperienceId(self.number, t, r, 0) for t in range(PROMPTS) for r in range(GROUP)]
    encoded = [np.array(self.tokenizer.encode(p), np.int32) for p in prompts(self.number)]
    for _ in ids:
      self.sampler.enter()
    futures = [
      self.sampler.submit(
        Request(encoded[i.task], request_key(0, *i), tuple(i), NEW_TOKENS, self.tokenizer.stop_ids)
      )
      for i in ids
    ]
    out = []
    for i, future in zip(ids, futures):
      done = future.result()
      self.sampler.leave()
      prompt, n = encoded[i.task], len(done.tokens)
      pad = lambda x, fill, prompt=prompt: np.concatenate([np.full(len(prompt), fill), x])
      out.append(
        Experience(
          tokens=np.concatenate([prompt, done.tokens]),
          action_mask=pad(np.ones(n), 0),
          logprobs=pad(done.logprobs, 0),
          versions=pad(done.versions, -1),
          id=i,
          stop_reason=done.stop_reason,
        )
      )
    return out

  def reward(self, experiences: Sequence[Any]) -> None:
    """Share of digits in the completion."""
    for e in experiences:
      text = self.tokenizer.decode(e.tokens[e.action_mask])
      e.reward = sum(ch.isdigit() and ch.isascii() for ch in text) / max(1, len(text))

  def run(self) -> dict[str, float]:
    """One step; returns seconds and tokens."""
    import jax

    t0 = time.perf_counter()
    experiences = self.generate()
    t1 = time.perf_counter()
    self.reward(experiences)
    t2 = time.perf_counter()
    metrics = self.trainer.step(experiences)
    jax.block_until_ready(self.trainer.state.params)
    t3 = time.perf_counter()
    self.number += 1
    return {
      "gen": t1 - t0,
      "reward": t2 - t1,
      "train": t3 - t2,
      "step": t3 - t0,
      "new_tokens": sum(e.num_actions for e in experiences),
      "tokens": sum(len(e.tokens) for e in experiences),
      "logprob_diff": metrics["logprob_diff/max"],
    }

  def flops(self, tokens: float) -> tuple[float, float]:
    """(forward, forward + backward) FLOP of `tokens`: 2 and 6 per matmul parameter and token, and
    causal attention over about 96 tokens."""
    m = self.model
    matmul = m.num_params()  # tied: the embedding is the output matrix
    attention = 2 * m.num_layers * m.num_heads * m.head_dim * (MAX_PROMPT + NEW_TOKENS) / 2
    forward = 2 * (matmul + attention) * tokens
    return forward, 3 * forward


def bench_step() -> list[Row]:
  rows: list[Row] = []
  with model_folders() as folder:
    for size in SIZES_FLAG.value:
      rows += our_step(size, folder(size))
      if PEERS.value:
        rows += peer_steps(size, rows)
  return rows


def our_step(size: str, folder: Path) -> list[Row]:
  rate = matmul_rate(REPEATS.value)
  ours = GrpoStep(size, folder)
  ours.run()  # the first step after compilation still pages memory in
  runs = [ours.run() for _ in range(REPEATS.value)]
  ours.sampler.close()
  median = lambda key: statistics.median(r[key] for r in runs)
  least = lambda key: min(r[key] for r in runs)
  rows = [Row(f"{size}/matmul", rate, "GFLOP/s")]
  rows += [Row(f"{size}/ours/compile", ours.compile_seconds, "s")]
  for key in ("step", "gen", "train", "reward"):
    rows.append(Row(f"{size}/ours/{key}", median(key), "s", minimum=least(key)))
  rows.append(Row(f"{size}/ours/gen_tokens", median("new_tokens") / median("gen"), "tokens/s"))
  forward, both = ours.flops(median("tokens"))
  for key, flop in (("train", both), ("gen", forward)):
    got = flop / least(key) / 1e9
    rows.append(Row(f"{size}/ours/{key}_rate", got, "GFLOP/s", f"{size}/matmul", got / rate))
  rows.append(Row(f"{size}/ours/logprob_diff_max", max(r["logprob_diff"] for r in runs), "nats"))
  return rows


def peer_steps(size: str, ours: Sequence[Row]) -> list[Row]:
  """Runs each peer's script in its own environment, one after the other."""
  found = {r.name: r for r in ours}
  rows = []
  for name, (env, command) in peers(STEP_PEERS):
    report = run_peer(env, [*command, "--size", size, "--steps", str(REPEATS.value + 2)])
    if report is None:
      continue
    for key in ("step", "gen", "train"):
      mine = found[f"{size}/ours/{key}"]
      value, least = report[key]["wall"], report[key]["wall_min"]
      rows.append(
        Row(f"{size}/{name}/{key}", value, "s", mine.name, value / mine.value, minimum=least)
      )
  return rows


# --- a half-full step ----------------------------------------------------------------------------


def bench_half() -> list[Row]:
  """Live micro-batches bound the work: half of the sequences, half of the time."""
  import jax

  with model_folders() as folder:
    ours = GrpoStep("s", folder("s"))
    experiences = ours.generate()
    ours.reward(experiences)
    ours.sampler.close()

    def step(n):
      ours.trainer.step(experiences[:n])
      jax.block_until_ready(ours.trainer.state.params)

    step(len(experiences))
    full, half = [], []
    for _ in range(REPEATS.value):  # interleaved: the machine's load is shared
      full.append(timed(lambda: step(len(experiences)), 1)[0])
      half.append(timed(lambda: step(len(experiences) // 2), 1)[0])
  f, h = statistics.median(full), statistics.median(half)
  return [
    Row("half/full", f, "s", minimum=min(full)),
    Row("half/half", h, "s", "half/full", h / f, min(half)),
  ]
