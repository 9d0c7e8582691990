"""Publishing weights against a plain copy of them: train layout -> rollout layout, with checksums.

A model of Qwen3-0.6B's width and --layers layers, in float32, lies split over `fsdp` and is
published as it lies, split over `tensor`, and whole on each device. `copy` copies what was
published, in its own layout; `move` is the program that publishes; `publish` is
Synchronizer.publish: the move, and the checksums of both sides compared. The three take turns, so
that what else the machine does meets all of them.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from benchmark import REPEATS, Row, timed

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
  names = ("copy", "move", "publish")
  seconds = in_turns(
    lambda: jax.block_until_ready(copy(published)),
    lambda: jax.block_until_ready(move(params)),
    lambda: synchronizer.publish(next(versions), params),
  )
  for what, taken in zip(names, seconds):
    median = statistics.median(taken)
    rows.append(Row(f"{name}/{what}", median, "s", minimum=min(taken)))
    if what != "copy":
      rows[-1].ratio_to = f"{name}/copy"
      rows[-1].ratio = statistics.median(seconds[0]) / median
  return rows


def in_turns(*programs: Callable[[], Any]) -> list[Sequence[float]]:
  """Seconds of each program's repeats, after one that compiles."""
  for program in programs:
    program()
  rounds = [[timed(program, 1)[0] for program in programs] for _ in range(REPEATS.value)]
  return list(zip(*rounds))
