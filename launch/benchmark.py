"""What the benchmarks share: rows, timing, the machine's own rates, sizes, peers, flags."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

REPEATS = flags.DEFINE_integer("repeats", 5, "Timed repeats of each figure.", lower_bound=1)
SIZES_FLAG = flags.DEFINE_list("sizes", ["s", "m"], "Model sizes.")
MODELS = flags.DEFINE_string("models", None, "Folder with model_s and model_m to load.")
PEERS = flags.DEFINE_string("peers", None, "Folder with the peers' scripts (trl_grpo.py, ...).")
ENVS = flags.DEFINE_string("peer_envs", None, "Folder with their environments trl/ and tunix/.")

AGAINST = flags.DEFINE_list("against", [], "Names of the peers to run; empty: all.")
CPU_DEVICES = flags.DEFINE_integer(
  "cpu_devices", os.cpu_count(), "As how many devices ours runs on a CPU (mesh.cpu_devices)."
)

SIZES: dict[str, dict[str, Any]] = {
  "s": dict(hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, intermediate=768),
  "m": dict(hidden=512, layers=8, heads=8, kv_heads=4, head_dim=64, intermediate=1536),
}
VOCAB = 512


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


def matmul_rate(repeats: int, n: int = 2048, dtype: str = "float32") -> float:
  """The machine's own rate in GFLOP/s, best of the repeats of one n x n x n product."""
  import jax
  import jax.numpy as jnp

  x = jnp.ones((n, n), dtype)
  f = jax.jit(lambda a, b: a @ b)
  f(x, x).block_until_ready()
  _, best = timed(lambda: f(x, x).block_until_ready(), max(repeats, 8))
  return 2 * n**3 / best / 1e9


@contextlib.contextmanager
def model_folders() -> Iterator[Callable[[str], Path]]:
  """size -> its Hugging Face folder: of --models, or made here."""
  with tempfile.TemporaryDirectory() as scratch:

    def folder(size: str) -> Path:
      path = Path(MODELS.value or scratch) / f"model_{size}"
      if not path.is_dir():
        from trinity_jax.models.hf import write_tiny_checkpoint

        write_tiny_checkpoint(path, vocab_size=VOCAB, **SIZES[size])
      return path

    yield folder


def peers(known: Mapping[str, Any]) -> list[tuple[str, Any]]:
  """Those of the known peers that --against names."""
  return [(k, v) for k, v in known.items() if not AGAINST.value or k in AGAINST.value]


def run_peer(environment: str, command: Sequence[str]) -> dict[str, Any] | None:
  """The JSON report of a peer's script in its own environment; None (and a line) if it failed."""
  if not PEERS.value or not ENVS.value:
    sys.exit("error: --peers and --peer_envs go together")
  python = Path(ENVS.value).absolute() / environment / "bin" / "python"
  variables = {**os.environ}
  if MODELS.value:
    variables["PEERS_OUT"] = str(Path(MODELS.value).absolute())
  done = subprocess.run(
    [str(python), *command],
    cwd=Path(PEERS.value).absolute(),
    capture_output=True,
    text=True,
    env=variables,
  )
  if done.returncode:
    print(f"{command[0]}: failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
    return None
  return json.loads(done.stdout[done.stdout.index("{\n") : done.stdout.rindex("}") + 1])
