"""TPU slices by the name that --topology has: v5e:4x4.

Published at cloud.google.com/tpu/docs (v5e, v5p, v6e: "Configurations", and "TPU software
versions") and cloud.google.com/kubernetes-engine/docs/concepts/tpus ("Topology").
"""

from __future__ import annotations

import dataclasses
import math

from trinity_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Kind:
  """A TPU generation.

  accelerator: first part of its accelerator types, whose number counts `cores` a chip.
  node: its name among GKE's node labels.
  runtime: software version of its TPU VMs.
  shapes: the slices that an accelerator type stands for.
  """

  accelerator: str
  cores: int
  node: str
  runtime: str
  shapes: tuple[str, ...]


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16",
         "8x16x16")  # fmt: skip
KINDS = {
  "v5e": Kind("v5litepod", 1, "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite", FLAT),
  "v6e": Kind("v6e", 1, "tpu-v6e-slice", "v2-alpha-tpuv6e", FLAT),
  "v5p": Kind("v5p", 2, "tpu-v5p-slice", "v2-alpha-tpuv5", CUBES),
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """One slice: its generation and its shape in chips, such as "2x2x4"."""

  kind: Kind
  shape: str

  @property
  def chips(self) -> int:
    return math.prod(int(n) for n in self.shape.split("x"))

  @property
  def chips_per_host(self) -> int:
    """Chips that one host, and so one process, has: 4, but a flat slice of 8 has one host."""
    return self.chips if self.chips <= 4 or self.shape == "2x4" else 4

  @property
  def hosts(self) -> int:
    return self.chips // self.chips_per_host

  @property
  def accelerator_type(self) -> str:
    """Such as v5litepod-16 (chips) or v5p-32 (TensorCores)."""
    return f"{self.kind.accelerator}-{self.chips * self.kind.cores}"


def parse(topology: str) -> Slice:
  """The slice that "v5p:2x2x4" names.

  Raises:
    UserError: no such generation, or a shape it is not offered in.
  """
  name, _, shape = topology.partition(":")
  if name not in KINDS:
    raise UserError(
      f"--topology={topology}: expected GENERATION:SHAPE such as v5e:4x4, with one of "
      f"{', '.join(KINDS)}"
    )
  if shape not in KINDS[name].shapes:
    raise UserError(
      f"--topology={topology}: {name} slices are {', '.join(KINDS[name].shapes)}; choose one"
    )
  return Slice(KINDS[name], shape)
