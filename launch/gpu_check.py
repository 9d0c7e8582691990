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
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))


def check_linear_logprob() -> str:
  """Value and gradient of the chunked log-probs against the plain ones, float32."""
  from trinity_jax import ops

  keys = jax.random.split(jax.random.key(0), 3)
  T, D, V = 1000, 256, 8000
  hidden = jax.random.normal(keys[0], (T, D))
  weight = jax.random.normal(keys[1], (D, V)) * 0.05
  targets = jax.random.randint(keys[2], (T,), 0, V)
  mask = jnp.arange(T) % 3 > 0

  def loss(implementation):
    def f(hidden, weight):
      logprob, entropy, _ = ops.linear_logprob(
        hidden, weight, targets, mask, 0.7, implementation=implementation
      )
      return jnp.sum(logprob) + 0.1 * jnp.sum(entropy)

    return jax.jit(jax.value_and_grad(f, (0, 1)))

  with jax.default_matmul_precision("highest"):
    (want, want_g), (got, got_g) = (loss(i)(hidden, weight) for i in ("reference", "xla"))
  worst = max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) for a, b in zip(want_g, got_g))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert worst < 1e-4, worst
  return f"relative gradient difference {worst:.1e}"


def check_attention() -> str:
  """The default attention against float64 numpy, packed segments and GQA."""
  from trinity_jax import ops

  keys = jax.random.split(jax.random.key(1), 3)
  B, T, H, K, A = 2, 96, 4, 2, 32
  q = jax.random.normal(keys[0], (B, T, H, A))
  k, v = (jax.random.normal(key, (B, T, K, A)) for key in keys[1:])
  segments = jnp.where(jnp.arange(T) < 60, 1, 2)[None].repeat(B, 0)
  positions = jnp.where(jnp.arange(T) < 60, jnp.arange(T), jnp.arange(T) - 60)[None].repeat(B, 0)
  with jax.default_matmul_precision("highest"):
    got = jax.jit(ops.attention)(q, k, v, positions=positions, segment_ids=segments)
  qn, kn, vn = (np.asarray(x, np.float64) for x in (q, k, v))
  kn, vn = (np.repeat(x, H // K, axis=2) for x in (kn, vn))
  scores = np.einsum("bqha,bkha->bhqk", qn, kn) / np.sqrt(A)
  segment = np.asarray(segments)[0]
  seen = np.tril(np.ones((T, T), bool)) & (segment[:, None] == segment)
  scores = np.where(seen, scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  want = np.einsum("bhqk,bkha->bqha", weights, vn)
  worst = float(np.abs(np.asarray(got) - want).max())
  assert worst < 1e-4, worst
  return f"largest difference {worst:.1e}"


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
  checks: list[Callable[[], str]] = [check_linear_logprob, check_attention, check_run]
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
