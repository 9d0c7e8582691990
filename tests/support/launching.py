"""For tests: the launcher, in this process or in one of its own, and a config that is quick."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
# What one process has compiled the others of a session read: most of a short run's time.
_COMPILED = tempfile.TemporaryDirectory(prefix="compiled")

RECIPE = """
from trinity_jax.config import base_config

def get_config():
  c = base_config()
  c.name = "tiny"
  c.model.path = {model!r}
  c.taskset.generate = "trinity_jax.tasks.arithmetic:generate"
  c.taskset.generate_args = dict(split="rl")
  c.taskset.reward = "arithmetic"
  c.explorer.batch_size = 2
  c.explorer.group_size = 4
  c.sampler.slots = 8
  c.sampler.max_prompt_length = 9
  c.sampler.max_response_length = 4
  c.sampler.prefill_batches = (2,)
  c.sampler.prompt_buckets = (9,)
  c.sampler.cache_buckets = (13,)
  c.trainer.row_lengths = (13,)
  c.trainer.rows_per_micro = 8
  c.trainer.total_steps = 2
  c.trainer.save_interval = 2
  c.monitor.tensorboard = False
  c.monitor.progress = "none"
  return c
"""


def environment(**more: str) -> dict[str, str]:
  """For processes of their own, on one CPU device whatever this one has."""
  env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
  cache = {
    "JAX_COMPILATION_CACHE_DIR": _COMPILED.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  return {**env, **cache, "JAX_PLATFORMS": "cpu", **more}


def write_recipe(path: Path, model: Path | str) -> Path:
  """Writes a config file for a run that takes seconds."""
  path.write_text(RECIPE.format(model=str(model)))
  return path


def launcher() -> ModuleType:
  """launch/main.py as a module; it is a script, not part of the package."""
  spec = importlib.util.spec_from_file_location("launch_main", ROOT / "launch" / "main.py")
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def spawn(*args: str, code: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
  """Runs launch/main.py (or python code) in a process of its own, on one CPU device."""
  script = ["-c", code] if code is not None else [str(ROOT / "launch" / "main.py")]
  return subprocess.run(
    [sys.executable, *script, *args], capture_output=True, text=True, timeout=300, cwd=ROOT,
    env=environment(**env),
  )  # fmt: skip
