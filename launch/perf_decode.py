"""Decoding alone, of a published architecture with random weights: what share of the memory's rate.

The figure for a GPU or TPU, where decoding is bound by reading weights and cache.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics

from absl import flags
from benchmark import REPEATS, Row, timed

_PRESET = flags.DEFINE_string("preset", "Qwen3-0.6B", "Row of trinity_jax.models.presets.PRESETS.")
_SLOTS = flags.DEFINE_integer("slots", 256, "Sequences decoded at once.")
_CONTEXT = flags.DEFINE_integer("context", 1024, "Cache entries of each sequence.")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Of weights and computation.")
_CACHE = flags.DEFINE_string("cache_dtype", "bfloat16", "bfloat16, float32 or int8.")
STEPS = 32


def bench_decode() -> list[Row]:
  """Steps at full context, every slot active, sampled at temperature 1."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from trinity_jax.models import transformer
  from trinity_jax.models.presets import PRESETS
  from trinity_jax.sampler import engine, roofline

  model, S, C = PRESETS[_PRESET.value], _SLOTS.value, _CONTEXT.value
  dtype = jnp.dtype(_DTYPE.value)
  spec = engine.EngineSpec(model, S, (C,), STEPS, dtype, jnp.dtype(_CACHE.value))
  init = lambda key: transformer.unstack(transformer.init(key, model, dtype), model)
  params = jax.jit(init)(jax.random.key(0))
  state = jax.jit(functools.partial(engine.init_state, spec))()
  generate = jax.jit(functools.partial(engine.generate, spec, live=C), donate_argnums=1)

  def full(state):
    asked = engine.Requests.empty(S)
    asked.limit[:] = 2 * STEPS
    asked.key[:] = np.arange(2 * S).reshape(S, 2)
    return dataclasses.replace(
      state,
      active=jnp.ones(S, bool),
      length=jnp.full(S, C - STEPS - 1, jnp.int32),
      generated=jnp.zeros(S, jnp.int32),
      requests=jax.tree.map(jnp.asarray, asked),
    )

  compiled = timed(lambda: generate.lower(params, full(state), 0, STEPS, S).compile(), 1)[0]
  seconds = []
  for _ in range(REPEATS.value + 1):
    state = jax.block_until_ready(full(state))

    def run():
      nonlocal state
      state, done = generate(params, state, 0, STEPS, S)
      assert int(done) == STEPS

    seconds.append(timed(run, 1)[0] / STEPS)
  step, least = statistics.median(seconds[1:]), min(seconds[1:])
  work, rates = roofline.work(spec), roofline.measure(spec, S, jax.devices()[:1])
  read = work.weight_bytes + S * (C - STEPS / 2) * work.entry_bytes
  name = f"{_PRESET.value}/{S}x{C}"
  best = roofline.step_seconds(work, rates, 1, S * (C - STEPS / 2))
  return [
    Row("copy", rates.copy / 1e9, "GB/s"),
    Row("matmul", rates.matmul / 1e9, "GFLOP/s"),
    Row(f"{name}/compile", compiled, "s"),
    Row(f"{name}/step", 1e3 * step, "ms", minimum=1e3 * least),
    Row(f"{name}/tokens", S / step, "tokens/s", minimum=S / max(seconds[1:])),
    # A copy reads and writes: its traffic is twice its rate.
    Row(f"{name}/read", read / step / 1e9, "GB/s", "2 x copy", read / step / (2 * rates.copy)),
    Row(f"{name}/roofline", best / step, "fraction"),
  ]
