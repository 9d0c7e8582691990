"""Measures speed: python launch/perf.py NAME [--json FILE]

Names:
  step     one GRPO step (16 prompts x 8 runs, 64 new tokens, fp32), generation and training apart,
           beside the machine's own matmul rate, and beside peers when --peers names their scripts
  half     a half-full train step against a full one
  sampler  tokens per second for equal and for long-tailed lengths, slot occupancy, share of the
           roofline, the host's share, group prefill, multi-turn; beside peers as above
  decode   decode steps of a published architecture (--preset) with random weights: the share of
           the memory's rate that a GPU or TPU reaches
  loss     loss and gradients over a large vocabulary (--tokens, --width, --vocabularies): the
           general operator and the fused path beside naive JAX and torch, time and temporaries,
           with nothing and with 80 % masked
  rft      speed-up of one-step-off and fully asynchronous training over on-policy training on
           traces of environment latencies, beside the bound that no schedule can beat
  agents   many episodes at once that wait for their environments: against batches with a barrier,
           and how late the event loop runs
  server   the sampler's rate beside a client in another process that holds open streams and asks
           /health all the time, and how long that takes
  chaos    episodes whose environments raise, hang, die, are slow or talk nonsense, beside calm ones
  publish  weights from train layout to rollout layout, with the checksums of both, against a plain
           copy of them
  buffer   the replay buffer in SQLite and PostgreSQL: experiences of 4096 tokens a second in and
           out, and how put and sample grow up to --held experiences

Every figure is a median over repeats with the minimum beside it; compilation is reported apart. A
ratio compares two figures of the same run. Rows of --json: name, value, unit, ratio_to, ratio.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging
from benchmark import CPU_DEVICES, Row
from perf_agents import bench_agents
from perf_buffer import bench_buffer
from perf_chaos import bench_chaos
from perf_decode import bench_decode
from perf_loss import bench_loss
from perf_publish import bench_publish
from perf_rft import bench_rft
from perf_sampler import bench_sampler
from perf_server import bench_server
from perf_step import bench_half, bench_step

_JSON = flags.DEFINE_string("json", None, "Write the rows here.")

COMMANDS: dict[str, Callable[[], list[Row]]] = {
  "step": bench_step,
  "half": bench_half,
  "sampler": bench_sampler,
  "decode": bench_decode,
  "loss": bench_loss,
  "buffer": bench_buffer,
  "rft": bench_rft,
  "agents": bench_agents,
  "chaos": bench_chaos,
  "server": bench_server,
  "publish": bench_publish,
}


def table(rows: Sequence[Row]) -> str:
  lines = ["| name | median | min | unit | ratio |", "|---|---|---|---|---|"]
  for r in rows:
    least = "" if r.minimum is None else f"{r.minimum:.4g}"
    ratio = "" if r.ratio is None else f"{r.ratio:.2f} of {r.ratio_to}"
    lines.append(f"| {r.name} | {r.value:.4g} | {least} | {r.unit} | {ratio} |")
  return "\n".join(lines)


def main(argv: list[str]) -> None:
  logging.set_verbosity(logging.WARNING)  # JAX tells which backends there are not
  if len(argv) != 2 or argv[1] not in COMMANDS:
    sys.exit(f"error: name one of: {', '.join(COMMANDS)}\n{__doc__}")
  if CPU_DEVICES.value:
    import jax

    jax.config.update("jax_num_cpu_devices", CPU_DEVICES.value)
  rows = COMMANDS[argv[1]]()
  print(table(rows))
  if _JSON.value:
    path = Path(_JSON.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([dataclasses.asdict(r) for r in rows], indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
