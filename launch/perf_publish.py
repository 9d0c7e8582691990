"""Publishing weights against a plain copy of them: train layout -> rollout layout, with checksums.

A model of Qwen3-0.6B's width and --layers layers, in float32, lies split over `fsdp` and is
published as it lies, split over `tensor`, and whole on each device. `copy` copies what was
published, in its own layout; `move` is the program that publishes; `publish` is
Synchronizer.publish: the move, and the checksums of both sides compared. The three take turns, so
that what else the machine does meets all of them; `_cpu` is the time of this process's threads,
which that changes little.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

from absl import flags
from benchmark import REPEATS, Row

_LAYERS = flags.DEFINE_integer("layers", 8, "Layers of what is published.", lower_bound=1)


def bench_publish() -> list[Row]:
  """Rows LAYOUT/copy, LAYOUT/move, LAYOUT/publish in seconds; ratio: the copy's over theirs."""
  import jax
  import jax.numpy as jnp

  from trinity_jax.models import params as params_lib
  from trinity_jax.models import sharding
  from trinity_jax.models.presets import PRESETS

  sizes = dict(num_layers=_LAYERS.value, vocab_size=4096)
  model = dataclasses.replace(PRESETS["Qwen3-0.6B"], **sizes)
  train = sharding.make_mesh(1, -1, 1)
  same = sharding.param_shardings(model, train)
  init = jax.jit(lambda key: params_lib.init(key, model, jnp.float32), out_shardings=same)
  params = jax.block_until_ready(init(jax.random.key(0)))
  layouts = {
    "same": same,
    "tensor": sharding.param_shardings(model, sharding.make_mesh(1, 1, -1)),
    "whole": jax.tree.map(lambda s: jax.NamedSharding(train, jax.P()), same),
  }
  rows = [Row("parameters", sum(x.nbytes for x in jax.tree.leaves(params)) / 1e6, "MB")]
  for name, layout in layouts.items():
    rows += _of(name, params, layout)
  return rows


def _of(name: str, params: Any, layout: Any) -> list[Row]:
  import jax
  import jax.numpy as jnp

  from trinity_jax.launch_order import LaunchOrder
  from trinity_jax.synchronizer import Synchronizer, publishing

  program = publishing(layout, jnp.float32)
  begin = time.perf_counter()
  move = program.lower(params).compile()
  rows = [Row(f"{name}/compile", time.perf_counter() - begin, "s")]
  published = move(params)
  copy = program.lower(published).compile()
  launch = LaunchOrder(jax.tree.leaves(layout)[0].mesh)
  synchronizer = Synchronizer(layout, jnp.float32, launch, keep=1, timeout=60)
  versions = iter(range(REPEATS.value + 1))
  wall, cpu = in_turns(
    lambda: jax.block_until_ready(copy(published)),
    lambda: jax.block_until_ready(move(params)),
    lambda: synchronizer.publish(next(versions), params),
  )
  for suffix, seconds in (("", wall), ("_cpu", cpu)):
    first = statistics.median(seconds[0])
    for what, taken in zip(("copy", "move", "publish"), seconds):
      rows.append(Row(f"{name}/{what}{suffix}", statistics.median(taken), "s", minimum=min(taken)))
      if what != "copy":
        rows[-1].ratio_to, rows[-1].ratio = f"{name}/copy{suffix}", first / rows[-1].value
  return rows


def in_turns(*programs: Callable[[], Any]) -> tuple[list[list[float]], list[list[float]]]:
  """Seconds of each program's repeats on the clock, and of this process's CPUs."""
  wall, cpu = [[] for _ in programs], [[] for _ in programs]
  for program in programs:
    program()  # compiles
  for _ in range(REPEATS.value):
    for i, program in enumerate(programs):
      begin = time.perf_counter(), time.process_time()
      program()
      wall[i].append(time.perf_counter() - begin[0])
      cpu[i].append(time.process_time() - begin[1])
  return wall, cpu
