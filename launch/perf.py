"""Measures speed: python launch/perf.py NAME [--json FILE]

Names:
  step   one GRPO step (16 prompts x 8 runs, 64 new tokens, fp32), generation and training apart,
         beside the machine's own matmul rate, and beside peers when --peers names their scripts
  half   a half-full train step against a full one

Every figure is a median over repeats with the minimum beside it; compilation is reported apart. A
ratio compares two figures of the same run. Rows of --json: name, value, unit, ratio_to, ratio.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

_JSON = flags.DEFINE_string("json", None, "Write the rows here.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed repeats of each figure.", lower_bound=1)
_SIZES = flags.DEFINE_list("sizes", ["s", "m"], "Model sizes of `step`.")
_MODELS = flags.DEFINE_string("models", None, "Folder with model_s and model_m to load.")
_PEERS = flags.DEFINE_string("peers", None, "Folder with the peers' scripts (trl_grpo.py, ...).")
_ENVS = flags.DEFINE_string("peer_envs", None, "Folder with their environments trl/ and tunix/.")

SIZES = {
  "s": dict(hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, intermediate=768),
  "m": dict(hidden=512, layers=8, heads=8, kv_heads=4, head_dim=64, intermediate=1536),
}
PROMPTS, GROUP, MAX_PROMPT, NEW_TOKENS, VOCAB = 16, 8, 32, 64, 512
PEERS = {  # name -> (environment, script and arguments; the best settings seen on 2 cores)
  "trl": ("trl", ["trl_grpo.py", "--micro", "32"]),
  "tunix": ("tunix", ["tunix_grpo.py", "--micro", "16"]),
}


@dataclasses.dataclass
class Row:
  """One figure; `ratio` = value of ratio_to / value for times, value / that for rates."""

  name: str
  value: float
  unit: str
  ratio_to: str = ""
  ratio: float | None = None
  minimum: float | None = None


def timed(f: Callable[[], Any], repeats: int) -> tuple[float, float]:
  """(median, minimum) seconds of f(), which must wait for its result."""
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    f()
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds), min(seconds)


def matmul_rate(repeats: int, n: int = 2048) -> float:
  """The machine's own fp32 rate in GFLOP/s, best of the repeats of one n x n x n product."""
  import jax
  import jax.numpy as jnp

  x = jnp.ones((n, n), jnp.float32)
  f = jax.jit(lambda a, b: a @ b)
  f(x, x).block_until_ready()
  _, best = timed(lambda: f(x, x).block_until_ready(), max(repeats, 8))
  return 2 * n**3 / best / 1e9


# --- one GRPO step -------------------------------------------------------------------------------


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
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    layout = sharding.param_shardings(model, mesh)
    params, _ = hf.load(folder, dtype=jnp.float32, shardings=layout)
    launch = LaunchOrder(mesh)
    self.programs = build.make_programs(c, model, mesh, layout, launch)
    self.sampler = Sampler(
      self.programs, steps_per_dispatch=NEW_TOKENS, refill_fraction=1.0, deterministic=True
    )
    self.trainer = Trainer(
      c, make(c.algorithm), build.policy_of(c, model), params, mesh, launch
    )
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
    from trinity_jax.sampler.sampling import request_key
    from trinity_jax.sampler.scheduler import Request

    self.sampler.set_params(
      self.number, jax.block_until_ready(self.copy(self.trainer.state.params))
    )
    ids = [
      ExperienceId(self.number, t, r, 0) for t in range(PROMPTS) for r in range(GROUP)
    ]
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
  with tempfile.TemporaryDirectory() as scratch:
    for size in _SIZES.value:
      folder = Path(_MODELS.value or scratch) / f"model_{size}"
      if not _MODELS.value:
        from trinity_jax.models.hf import write_tiny_checkpoint

        write_tiny_checkpoint(folder, vocab_size=VOCAB, **SIZES[size])
      rows += our_step(size, folder)
      if _PEERS.value:
        rows += peer_steps(size, rows)
  return rows


def our_step(size: str, folder: Path) -> list[Row]:
  rate = matmul_rate(_REPEATS.value)
  ours = GrpoStep(size, folder)
  ours.run()  # the first step after compilation still pages memory in
  runs = [ours.run() for _ in range(_REPEATS.value)]
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
    rows.append(
      Row(f"{size}/ours/{key}_rate", got, "GFLOP/s", f"{size}/matmul", got / rate)
    )
  rows.append(Row(f"{size}/ours/logprob_diff_max", max(r["logprob_diff"] for r in runs), "nats"))
  return rows


def peer_steps(size: str, ours: Sequence[Row]) -> list[Row]:
  """Runs each peer's script in its own environment, one after the other."""
  if not _PEERS.value or not _ENVS.value:
    sys.exit("error: --peers and --peer_envs go together")
  scripts = Path(_PEERS.value).absolute()
  environments = Path(_ENVS.value).absolute()
  found = {r.name: r for r in ours}
  rows = []
  for name, (env, command) in PEERS.items():
    python = environments / env / "bin" / "python"
    call = [str(python), *command, "--size", size, "--steps", str(_REPEATS.value + 2)]
    environment = {**os.environ}
    if _MODELS.value:
      environment["PEERS_OUT"] = str(Path(_MODELS.value).absolute())
    done = subprocess.run(call, cwd=scripts, capture_output=True, text=True, env=environment)
    if done.returncode:
      print(f"{name}: failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
      continue
    report = json.loads(done.stdout[done.stdout.index("{\n") : done.stdout.rindex("}") + 1])
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

  with tempfile.TemporaryDirectory() as scratch:
    from trinity_jax.models.hf import write_tiny_checkpoint

    folder = write_tiny_checkpoint(Path(scratch) / "model", vocab_size=VOCAB, **SIZES["s"])
    ours = GrpoStep("s", folder)
    experiences = ours.generate()
    ours.reward(experiences)
    ours.sampler.close()

    def step(n):
      ours.trainer.step(experiences[:n])
      jax.block_until_ready(ours.trainer.state.params)

    step(len(experiences))
    full, half = [], []
    for _ in range(_REPEATS.value):  # interleaved: the machine's load is shared
      full.append(timed(lambda: step(len(experiences)), 1)[0])
      half.append(timed(lambda: step(len(experiences) // 2), 1)[0])
  f, h = statistics.median(full), statistics.median(half)
  return [
    Row("half/full", f, "s", minimum=min(full)),
    Row("half/half", h, "s", "half/full", h / f, min(half)),
  ]


COMMANDS: dict[str, Callable[[], list[Row]]] = {"step": bench_step, "half": bench_half}


def table(rows: Sequence[Row]) -> str:
  lines = ["| name | median | min | unit | ratio |", "|---|---|---|---|---|"]
  for r in rows:
    least = "" if r.minimum is None else f"{r.minimum:.4g}"
    ratio = "" if r.ratio is None else f"{r.ratio:.2f} of {r.ratio_to}"
    lines.append(f"| {r.name} | {r.value:.4g} | {least} | {r.unit} | {ratio} |")
  return "\n".join(lines)


def main(argv: list[str]) -> None:
  if len(argv) != 2 or argv[1] not in COMMANDS:
    sys.exit(f"error: name one of: {', '.join(COMMANDS)}\n{__doc__}")
  rows = COMMANDS[argv[1]]()
  print(table(rows))
  if _JSON.value:
    path = Path(_JSON.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([dataclasses.asdict(r) for r in rows], indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
