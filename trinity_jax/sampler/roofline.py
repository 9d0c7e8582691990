"""How fast decoding could be at best on this machine: measured rates, not a data sheet's.

A decode step multiplies every slot's hidden state with every weight and reads every weight and
every live cache entry once: max(FLOP / matmul rate, bytes / copy rate) (Williams et al. 2009).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from trinity_jax.sampler.engine import EngineSpec

_COPIED = 2**26  # bytes of the measured copy: more than caches hold


class Rates(NamedTuple):
  """Of one device: matmul in FLOP/s with as many rows as it has slots, copy in bytes/s."""

  matmul: float
  copy: float


class Work(NamedTuple):
  """Of one decode step over all devices: matmul FLOP, bytes of weights, bytes of a cache entry."""

  flops: float
  weight_bytes: float
  entry_bytes: float


def work(spec: EngineSpec) -> Work:
  """What a step of all slots costs, idle ones included."""
  m, size = spec.model, jnp.dtype(spec.dtype).itemsize
  attention = m.hidden_size * m.head_dim * 2 * (m.num_heads + m.num_kv_heads)
  layer = attention + 3 * m.hidden_size * m.intermediate_size
  weights = m.num_layers * layer + m.vocab_size * m.hidden_size
  dtype = jnp.dtype(spec.dtype if spec.cache_dtype is None else spec.cache_dtype)
  entry = m.head_dim * dtype.itemsize + (4 if dtype == jnp.int8 else 0)  # a scale per int8 vector
  return Work(
    2.0 * spec.slots * weights,
    float(weights * size),
    float(2 * m.num_layers * m.num_kv_heads * entry),
  )


def step_seconds(work: Work, rates: Rates, devices: int, entries: float) -> float:
  """The least a decode step can take with `entries` live cache entries in all slots together.

  Weights are taken to be split over all devices, which is more than data parallelism does.
  """
  compute = work.flops / rates.matmul
  memory = (work.weight_bytes + entries * work.entry_bytes) / rates.copy
  return max(compute, memory) / devices


def measure(spec: EngineSpec, slots: int, devices: Sequence[Any], repeats: int = 3) -> Rates:
  """Measures devices that work at the same time, as CPU devices share cores and memory; the rates
  are those of one. Well under a second for small models.

  Args:
    slots: rows that one device decodes at once.
  """
  m = spec.model
  full = lambda *shape: [jnp.full(shape, 1e-3, spec.dtype, device=d) for d in devices]
  up, down = full(m.hidden_size, m.intermediate_size), full(m.intermediate_size, m.hidden_size)
  x = full(slots, m.hidden_size)
  pair = 4.0 * slots * m.hidden_size * m.intermediate_size
  rounds = max(4, min(256, int(4e9 / pair)))

  @jax.jit
  def multiply(x, up, down):
    return lax.fori_loop(0, rounds, lambda _, x: (x @ up) @ down, x)

  @jax.jit
  def copy(y):
    return lax.fori_loop(0, 8, lambda _, y: y + 1, y)

  y = [jnp.zeros(_COPIED // 4, jnp.float32, device=d) for d in devices]
  return Rates(
    matmul=rounds * pair / _best(lambda: [multiply(*a) for a in zip(x, up, down)], repeats),
    copy=8 * _COPIED / _best(lambda: [copy(a) for a in y], repeats),
  )


def _best(f: Callable[[], Any], repeats: int) -> float:
  jax.block_until_ready(f())  # compiles
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(f())
    seconds.append(time.perf_counter() - start)
  return min(seconds)
