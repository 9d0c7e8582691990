"""Sizes that fit, by the estimate of --mode=check: nothing is compiled."""

from __future__ import annotations

import dataclasses

from trinity_jax.config import Config
from trinity_jax.errors import UserError
from trinity_jax.memory import memory_per_device
from trinity_jax.plan.lowering import stage_on
from trinity_jax.plan.topologies import Topology

ROOM = 0.9  # of the memory: what the estimate leaves out, see launch/PLAN.md


def rows_that_fit(config: Config, topology: Topology) -> int:
  """The most rows of a micro-batch (trainer.rows_per_micro) whose estimated peak leaves room.

  Raises:
    UserError: not even the fewest do, or the devices' memory is not known.
  """
  if topology.chip is None:
    raise UserError(f"--topology={topology.name}: the memory of these devices is not known")
  with_rows = lambda n: dataclasses.replace(
    config, trainer=dataclasses.replace(config.trainer, rows_per_micro=n)
  )
  # Any number of rows tells how the mesh splits them.
  mesh = stage_on(with_rows(len(topology.devices)), topology.devices).meshes.train
  fewest = mesh.shape["data"] * mesh.shape["fsdp"]
  best, rows = 0, fewest
  while True:
    stage = stage_on(with_rows(rows), topology.devices)
    memory = memory_per_device(
      stage.config, stage.model, stage.meshes.train, stage.layout, stage.sampler, stage.spec,
      stage.algorithm,
    )  # fmt: skip
    if memory["peak"] > ROOM * topology.chip.memory:
      break
    best, rows = rows, 2 * rows
    if best >= stage.spec.sequences:
      break
  if not best:
    raise UserError(
      f"--topology={topology.name}: {fewest} rows of {max(stage.spec.row_lengths)} tokens are "
      f"estimated to need {memory['peak'] / 1e9:.3g} GB a device, which has "
      f"{topology.chip.memory / 1e9:.3g}; use shorter rows, a larger mesh.context or more devices"
    )
  return best
