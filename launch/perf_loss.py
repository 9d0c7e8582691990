"""The loss over a large vocabulary: time and memory of linear_logprob beside naive JAX and torch.

A loss is sum(weight * logprob) with gradients of hidden and weight; entropy and logsumexp come too.
"""

from __future__ import annotations

import functools
import importlib
import threading
import time
from collections.abc import Callable
from typing import Any

from absl import flags
from benchmark import REPEATS, Row, matmul_rate

TOKENS = flags.DEFINE_integer("tokens", 4096, "T of `loss`.", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", None, "D of `loss`: 512; 4096 on an accelerator.")
VOCABULARIES = flags.DEFINE_list("vocabularies", ["32768", "151936"], "Each V of `loss`.")
MASKED = 0.8  # share of the rows


def bench_loss() -> list[Row]:
  import jax

  accelerator = jax.default_backend() != "cpu"
  dtype, width = ("bfloat16", 4096) if accelerator else ("float32", 512)
  width = WIDTH.value or width
  rate = matmul_rate(REPEATS.value, 8192, dtype) if accelerator else matmul_rate(REPEATS.value)
  rows = [Row("matmul", rate, "GFLOP/s")]
  for vocabulary in map(int, VOCABULARIES.value):
    rows += _bench(TOKENS.value, width, vocabulary, dtype, rate)
  return rows


def _bench(count: int, width: int, vocabulary: int, dtype: str, rate: float) -> list[Row]:
  data = _data(count, width, vocabulary, dtype)
  programs, rows = {}, []
  name = lambda method, what: f"{vocabulary}/{method}/{what}"
  for method, f in {"naive": _naive, "general": _general, "fused": _fused}.items():
    programs[method], seconds, memory = _compile(f, data)
    rows.append(Row(name(method, "compile"), seconds, "s"))
    rows.append(_against(Row(name(method, "temporaries"), memory / 2**20, "MiB"), rows))
  masks = _masks(count)
  runs: dict[Any, Callable[[], Any]] = {
    (m, k): functools.partial(p, *data, masks[k]) for m, p in programs.items() for k in masks
  }
  torch = _torch_step(data)
  if torch is not None:
    run, memory = torch
    runs["torch", "none"] = run
    rows.append(_against(Row(name("torch", "temporaries"), memory / 2**20, "MiB"), rows))
  flop = 6 * count * width * vocabulary  # three products: what has to be done
  for (method, masked), (median, least) in _interleaved(runs).items():
    what = "time" if masked == "none" else f"masked_{masked}"
    row = Row(name(method, what), median, "s", minimum=least)
    rows.append(_against(row, rows, name(method, "time") if masked != "none" else None))
    if masked == "none":
      got = flop / least / 1e9
      rows.append(Row(name(method, "rate"), got, "GFLOP/s", "matmul", got / rate))
  return rows


def _against(row: Row, rows: list[Row], other: str | None = None) -> Row:
  """With its ratio to `other`, or to what naive JAX takes; minima, which load disturbs least."""
  vocabulary, method, what = row.name.split("/")
  other = other or f"{vocabulary}/naive/{what}"
  base = next((r for r in rows if r.name == other), None)
  if base is not None:
    least = lambda r: r.value if r.minimum is None else r.minimum
    row.ratio_to, row.ratio = other, least(row) / least(base)
  return row


def _interleaved(runs: dict[Any, Callable[[], Any]]) -> dict[Any, tuple[float, float]]:
  """(median, minimum) seconds of each; in turns, so that the machine's load is shared."""
  import statistics

  import jax

  seconds: dict[Any, list[float]] = {k: [] for k in runs}
  for i in range(REPEATS.value + 1):
    for k, run in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      if i:  # the first one still pages memory in
        seconds[k].append(time.perf_counter() - start)
  return {k: (statistics.median(s), min(s)) for k, s in seconds.items()}


def _data(count: int, width: int, vocabulary: int, dtype: str) -> tuple[Any, ...]:
  """(hidden, weight, targets, coefficients)"""
  import jax

  keys = jax.random.split(jax.random.key(0), 4)
  return (
    jax.random.normal(keys[0], (count, width), dtype),
    (jax.random.normal(keys[1], (width, vocabulary)) * 0.05).astype(dtype),
    jax.random.randint(keys[2], (count,), 0, vocabulary),
    jax.random.normal(keys[3], (count,)),
  )


def _masks(count: int) -> dict[str, Any]:
  """none masked; 80 % row by row; 80 % in runs of 64 to 512 rows."""
  import jax.numpy as jnp
  import numpy as np

  rng = np.random.default_rng(0)
  scattered = np.arange(count) >= round(MASKED * count)
  in_runs = np.zeros(count, bool)
  at, want = 0, round((1 - MASKED) * count)
  while at < count:
    live = int(rng.integers(64, 513))
    in_runs[at + 4 * live : at + 5 * live] = True
    at += 5 * live
  live = np.flatnonzero(in_runs)
  in_runs[live[want:]] = False  # as many rows as scattered; the rest where it is still 0
  in_runs[np.flatnonzero(~in_runs)[: want - in_runs.sum()]] = True
  masks = {"none": np.ones(count, bool), "iid": rng.permutation(scattered), "runs": in_runs}
  return {k: jnp.asarray(v) for k, v in masks.items()}


def _compile(f: Callable[..., Any], data: tuple[Any, ...]) -> tuple[Callable[..., Any], float, int]:
  """(the program of f's value and gradients, seconds to compile, bytes of temporaries)"""
  import jax
  import jax.numpy as jnp

  step = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))
  start = time.perf_counter()
  program = step.lower(*data, jnp.ones(data[0].shape[0], bool)).compile()
  seconds = time.perf_counter() - start
  memory = program.memory_analysis()
  assert memory is not None, "this backend does not account for memory"
  return program, seconds, memory.temp_size_in_bytes


def _naive(hidden, weight, targets, coefficients, mask):
  import jax
  import jax.numpy as jnp

  logits = jnp.dot(hidden, weight, preferred_element_type=jnp.float32)
  log_p = jax.nn.log_softmax(logits)
  logprob = jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]
  return jnp.sum(jnp.where(mask, coefficients * logprob, 0)), ()


def _general(hidden, weight, targets, coefficients, mask):
  import jax.numpy as jnp

  from trinity_jax import ops

  outs = ops.linear_logprob(hidden, weight, targets, mask)
  return jnp.sum(coefficients * outs[0]), outs


def _fused(hidden, weight, targets, coefficients, mask):
  from trinity_jax import ops

  loss = lambda logprob, entropy, x: x * logprob
  return ops.linear_logprob_loss(hidden, weight, targets, mask, 1.0, loss, coefficients)


# --- torch ----------------------------------------------------------------------------------------


def _torch_step(data: tuple[Any, ...]) -> tuple[Callable[[], None], int] | None:
  """(one step, its peak of memory above inputs and gradients); None where torch is missing."""
  try:
    torch = importlib.import_module("torch")  # a peer, not a dependency
  except ModuleNotFoundError:
    return None
  import jax
  import numpy as np

  on_gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
  place = "cuda" if on_gpu else "cpu"
  dtype = torch.bfloat16 if data[0].dtype == "bfloat16" else torch.float32
  move = lambda x: torch.from_numpy(np.array(x)).to(place)
  floats = lambda x: move(x.astype("float32")).to(dtype).requires_grad_()
  hidden, weight = floats(data[0]), floats(data[1])
  targets, coefficients = move(data[2]).long(), move(data[3])

  def step() -> None:
    hidden.grad = weight.grad = None
    logits = (hidden @ weight).float()
    log_p = torch.nn.functional.log_softmax(logits, dim=-1)
    (coefficients * log_p.gather(1, targets[:, None])[:, 0]).sum().backward()
    if on_gpu:
      torch.cuda.synchronize()

  outputs = sum(x.numel() * x.element_size() for x in (hidden, weight))
  if on_gpu:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return step, torch.cuda.max_memory_allocated() - before - outputs
  return step, max(0, _resident_peak(step) - outputs)


def _resident_peak(f: Callable[[], None]) -> int:
  """Bytes by which f raises this process's resident memory, looked at every millisecond."""
  import psutil

  process = psutil.Process()
  before = process.memory_info().rss
  peak, done = before, threading.Event()

  def watch() -> None:
    nonlocal peak
    while not done.wait(0.001):
      peak = max(peak, process.memory_info().rss)

  thread = threading.Thread(target=watch)
  thread.start()
  try:
    f()
  finally:
    done.set()
    thread.join()
  return peak - before
