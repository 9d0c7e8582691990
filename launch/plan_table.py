"""The table launch/PLAN.md: programs compiled ahead of time for slices and servers nobody paid for.

  python launch/plan_table.py                          all cases (hours on 2 cores; see --cases)
  python launch/plan_table.py --cases=qwen3-0.6b-v5e-4,...

Each case replaces its own row. Needs what --mode=plan needs: `make aot-check` installs it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from trinity_jax.config import Config, base_config, resolve

CASES = flags.DEFINE_list("cases", [], "Names of cases; none means all.")
OUT = flags.DEFINE_string("out", str(Path(__file__).with_name("PLAN.md")), "File to write.")

TOKENS = 16384  # per device and optimizer step
HEAD = """# Plans: compiled ahead of time, run nowhere

Written by `python launch/plan_table.py`, which compiles the train step, prefill, decode and publish
of each case with --mode=plan's code: 16384 tokens a device and optimizer step, bfloat16 with
float32 parameters and AdamW, remat full, micro-batches chosen by `trinity_jax/plan/choosing.py`.
GB per device. Times are estimates: the larger of FLOPs and memory traffic at published rates
(`trinity_jax/plan/topologies.py`), and collectives that do not overlap; nothing was run.

- kept: parameters, optimizer, published and sampler's weights, cache; peak: with the phase that
  needs most, by the compiler's count; check: --mode=check's estimate, which compiles nothing.
- all-gather: elements of the train step's largest one over the parameters of one layer.
- "-" under all-gather and times: libtpu gives some of the work to SparseCores, which is not counted
  yet, so that times would be too short.

"""
COLUMNS = (
  "case", "mesh", "samplers", "micro-batches", "kept", "train temp", "prefill temp", "decode temp",
  "peak", "of", "fits", "check", "all-gather", "train s", "MFU %", "decode ms", "step s",
  "compile s",
)  # fmt: skip


class Case(NamedTuple):
  """Attributes:
  mesh: sizes of the training mesh.
  samplers, tensor: independent samplers and how many devices share a head's weights; 0: none on
    these devices.
  slots: of each sampler. length: tokens of a prompt, and of a response.
  """

  model: str
  topology: str
  mesh: dict[str, int]
  samplers: int
  tensor: int
  slots: int
  length: int


WHOLE = {
  "qwen3-0.6b-v5e-4": Case("Qwen3-0.6B", "v5e:2x2", {"fsdp": 4}, 4, 1, 8, 1024),
  "qwen3-8b-v5p-16": Case("Qwen3-8B", "v5p:2x2x4", {"fsdp": 16}, 1, 4, 128, 1024),
  "qwen3-8b-v6e-16": Case("Qwen3-8B", "v6e:4x4", {"fsdp": 16}, 0, 0, 64, 1024),
  "llama-70b-v5p-256": Case("Llama-3.1-70B", "v5p:4x8x8", {"fsdp": 256}, 0, 0, 32, 1024),
  # Its weights do not fit a host of v5e: explorers of their own sample.
  "llama-70b-v5e-256": Case(
    "Llama-3.1-70B", "v5e:16x16", {"fsdp": 64, "tensor": 4}, 0, 0, 64, 1024
  ),
  # Weak scaling of the train step, from qwen3-8b-v5p-16 on.
  "qwen3-8b-v5p-64": Case("Qwen3-8B", "v5p:4x4x4", {"data": 4, "fsdp": 16}, 0, 0, 64, 1024),
  "qwen3-8b-v5p-256": Case("Qwen3-8B", "v5p:4x8x8", {"data": 16, "fsdp": 16}, 0, 0, 256, 1024),
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
  s.replicas, s.tensor = max(1, case.samplers), case.tensor
  c.explorer.group_size = 8
  c.explorer.batch_size = max(1, TOKENS * devices // (2 * case.length) // c.explorer.group_size)
  c.trainer.rows_per_micro = devices  # of any mesh; chosen below
  return c


def row_of(name: str, case: Case) -> tuple[list[str], list[str]]:
  """Compiles a case; its row of the table, and what is not as it should be."""
  from trinity_jax.plan import choosing, report
  from trinity_jax.plan.topologies import find

  topology = find(case.topology)
  values = config_of(case, len(topology.devices))
  values.trainer.rows_per_micro = choosing.rows_that_fit(resolve(values), topology)
  config: Config = resolve(values)
  made = report.make_plan(config, topology, lambda line: print(name, line, file=sys.stderr))
  print(report.render(made), "\n", flush=True)
  gb = lambda n: f"{n / 1e9:.2f}"
  temp = lambda n: _temporary(made.compiled.get(n))
  kept = sum(
    v for k, v in made.memory.items() if k not in ("training", "sampling", "publishing", "peak")
  )
  mesh = " x ".join(f"{k} {v}" for k, v in case.mesh.items())
  samplers = f"{case.samplers}, tensor {case.tensor}" if case.samplers else "elsewhere"
  cost = made.compiled["train step"].cost
  counted = cost is not None and not cost.unknown  # else times would be too short
  decode = made.times.get("decode")
  row = [
    f"{name} ({case.topology})", mesh, samplers,
    f"{made.stage.micros} of {made.stage.spec.rows} x {max(made.stage.spec.row_lengths)}",
    gb(kept), temp("train step"), temp("prefill"), temp("decode"), gb(made.peak),
    gb(made.chip.memory), "yes" if made.fits else "no", gb(made.estimate["peak"]),
    report.gathered_layers(made) if counted else "-",
    f"{made.times['train step'].total:.2f}" if counted else "-",
    f"{100 * report.model_flops_share(made):.0f}" if counted else "-",
    f"{1e3 * decode.total:.1f}" if decode else "-",
    f"{sum(made.step.values()):.1f}" if "decode" in made.step and counted else "-",
    f"{sum(c.seconds for c in made.compiled.values()):.0f}",
  ]  # fmt: skip
  return row, problems(name, made)


def problems(name: str, made: Any) -> list[str]:
  """What a plan of the table must not show."""
  from trinity_jax.plan import report

  out = []
  if not made.fits:
    out.append(f"{name}: needs {made.peak / 1e9:.1f} GB a device")
  elif float(report.gathered_layers(made)) > 1:
    out.append(f"{name}: gathers {report.gathered_layers(made)} layers at once")
  if abs(made.estimate["peak"] / made.peak - 1) > 0.1:
    share = made.estimate["peak"] / made.peak
    out.append(f"{name}: --mode=check estimates {share:.2f} of the compiler's peak")
  return out


def _temporary(c: Any) -> str:
  if c is None:
    return "-"
  return f"{c.temporary / 1e9:.2f}" if c.cost else f"asks {c.exceeds / 1e9:.1f}"


def table(rows: dict[str, str]) -> str:
  order = [n for n in WHOLE if n in rows]
  lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
  return HEAD + "\n".join(f"| {line} |" for line in lines + [rows[n] for n in order]) + "\n"


def read_rows(text: str) -> dict[str, str]:
  """The rows of an earlier table, by case."""
  found = (re.match(r"\| (\S+) \(\S+\) \|", line) for line in text.splitlines())
  return {m[1]: m.string.strip("| ") for m in found if m and m[1] in WHOLE}


def main(_: list[str]) -> None:
  unknown = [n for n in CASES.value if n not in WHOLE]
  if unknown:
    raise app.UsageError(f"--cases={','.join(unknown)}: unknown; known: {', '.join(WHOLE)}")
  out, found = Path(OUT.value), []
  for name in CASES.value or WHOLE:
    cells, wrong = row_of(name, WHOLE[name])
    found += wrong
    rows = read_rows(out.read_text()) if out.exists() else {}
    out.write_text(table({**rows, name: " | ".join(cells)}))
  if found:
    sys.exit("\n".join(found))


if __name__ == "__main__":
  app.run(main)
