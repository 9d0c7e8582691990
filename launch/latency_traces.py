"""Writes latency_traces.json: python launch/latency_traces.py

How long a group of rollouts waits for its environment, in units of the mean (which is 1), for
each explorer step and task. lognormal: sigma 1, a tail without end; bimodal: six in seven
episodes are solved early, the seventh runs into its limit, about nine times as long. Batches of 4
and of 32 groups.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FILE = Path(__file__).parent / "latency_traces.json"
SEED = 0
BATCHES = 64
SIZES = (4, 32)
SIGMA = 1.0
LATE, SHORT, LONG, SPREAD = 1 / 7, 1.0, 9.0, 0.1

Trace = list[list[float]]  # [batches][tasks]


def lognormal(rng: random.Random) -> float:
  return rng.lognormvariate(0.0, SIGMA)


def bimodal(rng: random.Random) -> float:
  mean = LONG if rng.random() < LATE else SHORT
  return mean * rng.uniform(1 - SPREAD, 1 + SPREAD)


def make() -> dict[str, Trace]:
  """name (distribution, "-", tasks per step) -> trace of mean 1, to four places."""
  out = {}
  for draw in (lognormal, bimodal):
    for size in SIZES:
      rng = random.Random(f"{SEED} {draw.__name__} {size}")
      values = [draw(rng) for _ in range(BATCHES * size)]
      mean = sum(values) / len(values)
      rows = [values[i : i + size] for i in range(0, len(values), size)]
      out[f"{draw.__name__}-{size}"] = [[round(v / mean, 4) for v in row] for row in rows]
  return out


def read() -> dict[str, Trace]:
  """The committed traces."""
  return json.loads(FILE.read_text())["traces"]


def main() -> None:
  rows = lambda trace: ",\n    ".join(json.dumps(row) for row in trace)
  traces = (f'  "{name}": [\n    {rows(trace)}\n  ]' for name, trace in make().items())
  FILE.write_text('{"unit": "mean", "traces": {\n' + ",\n".join(traces) + "\n}}\n")


if __name__ == "__main__":
  main()
