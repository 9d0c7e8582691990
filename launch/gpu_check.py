"""What a machine with a GPU can check, with the packages it has: python launch/gpu_check.py

Every implementation of the kernels against its reference on the device, and two GRPO steps of a
tiny model through the whole loop. Prints one line per check; exit code 1 when one fails or there
is no accelerator. Needs the bare loop's packages only.
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))


def check_linear_logprob(vocabulary: int = 151936) -> str:
  """The general and the fused loss against the plain one: value and gradient, large vocabulary."""
  found = []
  for dtype, bound in ((jnp.float32, 1e-4), (jnp.bfloat16, 2e-2)):
    hidden, weight, targets, mask = loss_inputs(1000, 256, vocabulary, dtype)
    with jax.default_matmul_precision("highest"):
      want, *want_g = (np.asarray(x, np.float64) for x in loss("reference")(
        hidden.astype(jnp.float32), weight.astype(jnp.float32), targets, mask
      ))  # fmt: skip
      for name in ("xla", "fused", None):
        got, *got_g = (np.asarray(x.astype(jnp.float32), np.float64) for x in loss(name)(
          hidden, weight, targets, mask
        ))  # fmt: skip
        np.testing.assert_allclose(got, want, rtol=1e-5)
        worst = max(np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(want_g, got_g))
        assert worst < bound, (name, dtype, worst)
        found.append(f"{name or 'default'} {jnp.dtype(dtype).name} {worst:.1e}")
  return "relative gradient difference: " + ", ".join(found)


def loss_inputs(T: int, D: int, V: int, dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  hidden = jax.random.normal(keys[0], (T, D), dtype)
  weight = jax.random.normal(keys[1], (D, V), dtype) / jnp.asarray(D**0.5, dtype)
  return hidden, weight, jax.random.randint(keys[2], (T,), 0, V), jnp.arange(T) % 3 > 0


def loss(name: str | None):
  """Value and gradients by an implementation, or "fused" with the loss of each token."""
  from trinity_jax import ops

  def f(hidden, weight, targets, mask):
    if name == "fused":
      each = lambda logprob, entropy, arrays: logprob + 0.1 * entropy
      return ops.linear_logprob_loss(hidden, weight, targets, mask, 0.7, each, ())[0]
    logprob, entropy, _ = ops.linear_logprob(
      hidden, weight, targets, mask, 0.7, implementation=name
    )
    return jnp.sum(logprob) + 0.1 * jnp.sum(entropy)

  def flat(*args):
    value, gradients = jax.value_and_grad(f, (0, 1))(*args)
    return value, *gradients

  return jax.jit(flat)


def check_loss_memory() -> str:
  """Temporaries of the compiled loss at T=8192, D=4096, V=151936 in bfloat16: 35 % of plain's."""
  T, D, V = 8192, 4096, 151936
  shapes = [
    jax.ShapeDtypeStruct(s, d) for s, d in (
      ((T, D), jnp.bfloat16), ((D, V), jnp.bfloat16), ((T,), jnp.int32), ((T,), jnp.bool_)
    )
  ]  # fmt: skip
  used = {}
  for name in ("reference", None, "fused"):
    memory = loss(name).lower(*shapes).compile().memory_analysis()
    assert memory is not None
    used[name] = memory.temp_size_in_bytes
  assert max(used[None], used["fused"]) <= 0.35 * used["reference"], used
  return ", ".join(f"{name or 'general'} {size / 2**20:.0f} MiB" for name, size in used.items())


def check_attention(names: Sequence[str | None] = (None, "cudnn")) -> str:
  """The default and cuDNN's attention against the reference in float32: value and gradient."""
  from trinity_jax import ops

  keys = jax.random.split(jax.random.key(1), 4)
  B, T, H, K, A = 2, 256, 4, 2, 64
  q, g = (jax.random.normal(key, (B, T, H, A), jnp.bfloat16) for key in keys[:2])
  k, v = (jax.random.normal(key, (B, T, K, A), jnp.bfloat16) for key in keys[2:])
  place = jnp.arange(T)
  segments = jnp.where(place < 150, 1, 2)[None].repeat(B, 0)
  positions = jnp.where(place < 150, place, place - 150)[None].repeat(B, 0)

  def run(name, window, dtype):
    def f(q, k, v):
      out = ops.attention(
        q, k, v, positions=positions, segment_ids=segments, window=window, implementation=name
      )
      return jnp.sum((out * g.astype(dtype)).astype(jnp.float32)), out

    step = jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))
    (_, out), gradients = step(*(x.astype(dtype) for x in (q, k, v)))
    return [np.asarray(x.astype(jnp.float32), np.float64) for x in (out, *gradients)]

  def difference(want, got):
    return max(np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(want, got))

  found = []
  for window in (None, 40):
    with jax.default_matmul_precision("highest"):
      want = run("reference", window, jnp.float32)
      exact = run(None, window, jnp.float32)
    assert difference(want, exact) < 1e-4, (window, difference(want, exact))
    for name in names:
      worst = difference(want, run(name, window, jnp.bfloat16))
      assert worst < 2e-2, (name, window, worst)
      found.append(f"{name or 'default'} window {window} {worst:.1e}")
  return "relative difference in bfloat16: " + ", ".join(found)


def check_run() -> str:
  """SFT and GRPO of a tiny model: sampler and trainer must agree on every log-prob."""
  from trinity_jax.config import base_config
  from trinity_jax.run import run

  c = base_config()
  c.name = "gpu_check"
  c.model.tiny = dict(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=128)
  c.taskset.generate = "trinity_jax.tasks.arithmetic:generate"
  c.taskset.generate_args = dict(split="rl")
  c.taskset.reward = "arithmetic"
  c.explorer.batch_size = 8
  c.sampler.slots = 64
  c.sampler.max_prompt_length = 9
  c.sampler.max_response_length = 4
  c.trainer.total_steps = 4
  c.monitor.tensorboard = False
  c.monitor.progress = "plain"
  with tempfile.TemporaryDirectory() as workdir:
    summary = run(c, workdir)
  assert summary["compiles_after_warmup"] == 0, summary
  # TensorFloat-32 matmuls differ between programs by more than float32 ones do.
  assert summary["logprob_diff_max"] < 2e-2, summary
  return f"log-prob difference at most {summary['logprob_diff_max']:.1e}"


def main() -> int:
  device = jax.devices()[0]
  if device.platform == "cpu":
    print("error: no accelerator: jax sees only the CPU; install jax[cuda12]", file=sys.stderr)
    return 1
  print(f"jax {jax.__version__}, {len(jax.devices())} x {device.device_kind}")
  failed = 0
  checks: list[Callable[[], str]] = [
    check_linear_logprob, check_loss_memory, check_attention, check_run,
  ]  # fmt: skip
  for check in checks:
    start = time.monotonic()
    try:
      result = f"ok     {check()}"
    except Exception:  # the other checks still say something
      traceback.print_exc()
      result, failed = "FAILED", failed + 1
    name = check.__name__.removeprefix("check_")
    print(f"{name:<16} {result} ({time.monotonic() - start:.1f} s)", flush=True)
  return int(failed > 0)


if __name__ == "__main__":
  sys.exit(main())
