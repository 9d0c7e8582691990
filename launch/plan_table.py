"""The table launch/PLAN.md: programs compiled ahead of time for slices and servers nobody paid for.

  python launch/plan_table.py                          all cases (hours on 2 cores; see --cases)
  python launch/plan_table.py --cases=qwen3-0.6b-v5e-4,...

Each case replaces what PLAN.json, beside it, holds of it, from which the table is written. Needs
what --mode=plan needs: `make aot-check` installs it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from trinity_jax.config import Config, base_config, resolve

CASES = flags.DEFINE_list("cases", [], "Names of cases; none means all.")
OUT = flags.DEFINE_string("out", str(Path(__file__).with_name("PLAN.md")), "File to write; the "
                          "cases' figures lie beside it, as .json.")  # fmt: skip

TOKENS = 16384  # per device and optimizer step
HEAD = """# Plans: compiled ahead of time, run nowhere

Written by `python launch/plan_table.py`, which compiles the train step, prefill, decode and publish
of each case with --mode=plan's code: 16384 tokens a device and optimizer step, bfloat16 with
float32 parameters and AdamW, remat full, micro-batches chosen by `trinity_jax/plan/choosing.py`.
GB per device. Times are estimates: the larger of FLOPs and memory traffic at published rates
(`trinity_jax/plan/topologies.py`), and collectives that do not overlap; nothing was run.

- samplers: of each host, and the devices that share a head's weights; released: sampler.release,
  while the trainer works; elsewhere: explorers of their own.
- kept: parameters, optimizer, published and sampler's weights, cache; peak: with the phase that
  needs most, by the compiler's count; check: --mode=check's estimate, which compiles nothing.
- all-gather: elements of the train step's largest one over the parameters of one layer.

"""
NOTES = """
## What the plans say

- Over many devices XLA gathers by adding up: each puts its part into zeros, and an all-reduce sends
  twice as much. Llama-70B on v5p:4x8x8 with fsdp 256 instead of data 4 x fsdp 64: 24.7 s a step
  instead of 21.9 (38.5 GB instead of 61.7).
- v6e is bound by its memory: over fsdp 16 XLA multiplies piece by piece while the next piece of a
  weight arrives, and reads and writes float32 sums of the whole result each time (4.2 TB). With
  LIBTPU_INIT_ARGS=--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000 in the environment it
  moves 1.4 TB and sends 88 GB instead of 67: 1.54 s instead of 2.71. A v5p has more bandwidth for
  its FLOPs and is not bound so. Nobody has measured either on a chip.
"""
WEAK = """
## Weak scaling

The train step of Qwen3-8B with equal tokens a device, by the same estimate: fsdp 16 stays, data
grows; the last row is the other slice of 256 chips, whose torus has no axes for 16 x 16. `waiting`:
collectives beside which nothing runs; sends: GB a device, by a ring's algorithm.

What grows from 16 to 64 chips is not the traffic between more chips: on 64 XLA gathers a layer's
weights whole and waits, on 16 it multiplies piece by piece while the next piece arrives
(collective-permute). Data parallelism itself adds the all-reduce of each device's share of the
gradients.

"""
COLUMNS = (
  "case", "mesh", "samplers", "micro-batches", "kept", "train temp", "prefill temp", "decode temp",
  "peak", "of", "fits", "check", "all-gather", "train s", "MFU %", "decode ms", "step s",
  "compile s",
)  # fmt: skip
WEAK_COLUMNS = (
  "slice", "mesh", "train s", "growth %", "compute s", "memory s", "waiting s", "hidden s", "sends",
)  # fmt: skip


class Case(NamedTuple):
  """Attributes:
  mesh: sizes of the training mesh.
  samplers, tensor: independent samplers of a host, and devices that share a head's weights; 0: none
    here.
  slots: of each sampler. length: tokens of a prompt, and of a response.
  release: sampler.release.
  """

  model: str
  topology: str
  mesh: dict[str, int]
  samplers: int
  tensor: int
  slots: int
  length: int
  release: bool = False


WHOLE = {
  "qwen3-0.6b-v5e-4": Case("Qwen3-0.6B", "v5e:2x2", {"fsdp": 4}, 4, 1, 8, 1024),
  "qwen3-8b-v5p-16": Case("Qwen3-8B", "v5p:2x2x4", {"fsdp": 16}, 1, 4, 128, 1024),
  "qwen3-8b-v6e-16": Case("Qwen3-8B", "v6e:4x4", {"fsdp": 16}, 1, 4, 64, 1024, True),
  "llama-70b-v5p-256": Case(
    "Llama-3.1-70B", "v5p:4x8x8", {"data": 4, "fsdp": 64}, 1, 4, 32, 1024, True
  ),
  # Its weights do not fit a host of v5e: explorers of their own sample.
  "llama-70b-v5e-256": Case(
    "Llama-3.1-70B", "v5e:16x16", {"fsdp": 64, "tensor": 4}, 0, 0, 64, 1024
  ),
  # Weak scaling of the train step, from qwen3-8b-v5p-16 on.
  "qwen3-8b-v5p-64": Case("Qwen3-8B", "v5p:4x4x4", {"data": 4, "fsdp": 16}, 0, 0, 64, 1024),
  "qwen3-8b-v5p-256": Case("Qwen3-8B", "v5p:4x4x16", {"data": 16, "fsdp": 16}, 0, 0, 256, 1024),
  "qwen3-8b-v5p-256-wide": Case("Qwen3-8B", "v5p:4x8x8", {"data": 8, "fsdp": 32}, 0, 0, 256, 1024),
  "qwen3-8b-h100-8": Case("Qwen3-8B", "h100x8", {"fsdp": 8}, 8, 1, 8, 1024),
}


def config_of(case: Case, devices: int) -> Any:
  """The config of a case, micro-batches aside, as a ConfigDict."""
  c = base_config()
  c.model.path = case.model
  c.model.dtype, c.model.remat, c.model.unroll = "bfloat16", "full", 1
  c.taskset.generate = "trinity_jax.tasks.arithmetic:generate"
  c.mesh.data = 1
  for axis, size in case.mesh.items():
    c.mesh[axis] = size
  s = c.sampler
  s.max_prompt_length = s.max_response_length = s.prefill_chunk = case.length
  s.prompt_buckets, s.cache_buckets = (case.length,), (2 * case.length,)
  s.prefill_batches, s.slots = (1,), case.slots
  s.engine = "native" if case.samplers else "openai"
  s.replicas, s.tensor, s.release = max(1, case.samplers), case.tensor, case.release
  c.explorer.group_size = 8
  c.explorer.batch_size = max(1, TOKENS * devices // (2 * case.length) // c.explorer.group_size)
  c.trainer.rows_per_micro = devices  # of any mesh; chosen below
  return c


def figures_of(name: str, case: Case) -> tuple[dict[str, Any], list[str]]:
  """Compiles a case; what PLAN.json holds of it, and what is not as it should be."""
  from trinity_jax.plan import choosing, report
  from trinity_jax.plan.topologies import find

  topology = find(case.topology)
  values = config_of(case, len(topology.devices))
  values.trainer.rows_per_micro = choosing.rows_that_fit(resolve(values), topology)
  config: Config = resolve(values)
  made = report.make_plan(config, topology, lambda line: print(name, line, file=sys.stderr))
  print(report.render(made), "\n", flush=True)
  cost = made.compiled["train step"].cost
  if cost is None:
    sys.exit(f"{name}: the train step needs {made.peak / 1e9:.1f} GB a device")
  gb = lambda n: f"{n / 1e9:.2f}"
  temp = lambda n: _temporary(made.compiled.get(n))
  kept = sum(
    v for k, v in made.memory.items() if k not in ("training", "sampling", "publishing", "peak")
  )
  train, decode = made.times["train step"], made.times.get("decode")
  row = [
    f"{name} ({case.topology})", _mesh(case),
    _samplers(case),
    f"{made.stage.micros} of {made.stage.spec.rows} x {max(made.stage.spec.row_lengths)}",
    gb(kept), temp("train step"), temp("prefill"), temp("decode"), gb(made.peak),
    gb(made.chip.memory), "yes" if made.fits else "no", gb(made.estimate["peak"]),
    report.gathered_layers(made), f"{train.total:.2f}",
    f"{100 * report.model_flops_share(made):.0f}",
    f"{1e3 * decode.total:.1f}" if decode else "-",
    f"{sum(made.step.values()):.1f}" if "decode" in made.step else "-",
    f"{sum(c.seconds for c in made.compiled.values()):.0f}",
  ]  # fmt: skip
  sent = {k: round(v) for k, v in sorted(cost.sent().items()) if v}
  return {"row": row, "train": {**train._asdict(), "total": train.total, "sent": sent}}, problems(
    name, made
  )


def _samplers(case: Case) -> str:
  if not case.samplers:
    return "elsewhere"
  return f"{case.samplers}, tensor {case.tensor}" + ", released" * case.release


def _mesh(case: Case) -> str:
  return " x ".join(f"{k} {v}" for k, v in case.mesh.items())


def problems(name: str, made: Any) -> list[str]:
  """What a plan of the table must not show."""
  from trinity_jax.plan import report

  out = []
  if not made.fits:
    out.append(f"{name}: needs {made.peak / 1e9:.1f} GB a device")
  elif float(report.gathered_layers(made)) > 1:
    out.append(f"{name}: gathers {report.gathered_layers(made)} layers at once")
  for c in made.compiled.values():
    if c.cost and c.cost.unknown:
      out.append(f"{name}: {c.name}: not counted is the work of {', '.join(c.cost.unknown)}")
  if abs(made.estimate["peak"] / made.peak - 1) > 0.1:
    share = made.estimate["peak"] / made.peak
    out.append(f"{name}: --mode=check estimates {share:.2f} of the compiler's peak")
  return out


def _temporary(c: Any) -> str:
  if c is None:
    return "-"
  return f"{c.temporary / 1e9:.2f}" if c.cost else f"asks {c.exceeds / 1e9:.1f}"


def table(found: dict[str, Any]) -> str:
  """PLAN.md, of what PLAN.json holds."""
  weak = [n for n in WHOLE if n in found and n.startswith("qwen3-8b-v5p-")]
  rows = [found[n]["row"] for n in WHOLE if n in found]
  text = HEAD + _rows(COLUMNS, rows) + NOTES
  return text + WEAK + _rows(WEAK_COLUMNS, [_weak(n, found, weak[0]) for n in weak])


def _weak(name: str, found: dict[str, Any], first: str) -> list[str]:
  own, start = found[name]["train"], found[first]["train"]["total"]
  sent = ", ".join(f"{k} {v / 1e9:.1f}" for k, v in own["sent"].items() if v > 5e7)
  seconds = [f"{own[k]:.2f}" for k in ("compute", "memory", "waiting", "hidden")]
  growth = f"{100 * (own['total'] / start - 1):.1f}"
  return [WHOLE[name].topology, _mesh(WHOLE[name]), f"{own['total']:.2f}", growth, *seconds, sent]


def _rows(columns: Sequence[str], rows: list[list[str]]) -> str:
  lines = [columns, ["---"] * len(columns), *rows]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(_: list[str]) -> None:
  unknown = [n for n in CASES.value if n not in WHOLE]
  if unknown:
    raise app.UsageError(f"--cases={','.join(unknown)}: unknown; known: {', '.join(WHOLE)}")
  out, wrong = Path(OUT.value), []
  kept = out.with_suffix(".json")
  for name in CASES.value or WHOLE:
    figures, found = figures_of(name, WHOLE[name])
    wrong += found
    cases = json.loads(kept.read_text()) if kept.exists() else {}
    cases[name] = figures
    kept.write_text(json.dumps(cases, indent=1) + "\n")
    out.write_text(table(cases))
  if wrong:
    sys.exit("\n".join(wrong))


if __name__ == "__main__":
  app.run(main)
