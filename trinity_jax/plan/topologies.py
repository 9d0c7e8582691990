"""Devices that need not be there, and the published figures of their chips.

TPU slices are compiled for by libtpu (pip install 'trinity_jax[plan]'), GPUs by jax's CUDA plugin
(`make aot-check` installs it beside the environment); neither needs a device, or a driver.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from trinity_jax.errors import UserError, suggestion


class Chip(NamedTuple):
  """One device, per second and in bytes.

  Attributes:
    flops: peak of bfloat16 matrix products (dense).
    memory, bandwidth: of its main memory.
    link: bytes a second that it can send to the others of a collective: on a TPU along one axis of
      the torus, both ways round.
    host: devices that reach each other so fast; 0 all. `far`: bytes a second beyond.
    source: where the figures stand.
  """

  flops: float
  memory: float
  bandwidth: float
  link: float
  host: int = 0
  far: float = 0.0
  source: str = ""

  def rate(self, group: Sequence[int]) -> float:
    """Bytes a second that a device sends in a collective of the devices of these numbers."""
    return self.far if self.host and len({d // self.host for d in group}) > 1 else self.link


# A chip's published interconnect is the sum of all its ports, both directions: a torus of two
# dimensions has 4 of them, one of three 6, and a ring along one axis sends through two.
CHIPS = {
  "v5e": Chip(197e12, 16e9, 819e9, 400e9 / 4, source="cloud.google.com/tpu/docs/v5e"),
  "v5p": Chip(459e12, 95e9, 2765e9, 1200e9 / 6, source="cloud.google.com/tpu/docs/v5p"),
  "v6e": Chip(918e12, 32e9, 1600e9, 800e9 / 4, source="cloud.google.com/tpu/docs/v6e"),
  "h100": Chip(
    989.4e12, 80e9, 3350e9, 450e9, host=8, far=50e9,
    source="nvidia.com/en-us/data-center/h100 (SXM; NVLink within a server of 8, 400 Gb/s beyond)",
  ),
}  # fmt: skip

# What XLA has to know of an H100 SXM, as its target configuration.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Topology(NamedTuple):
  """Attributes:
  name: as given.
  host: where it has several hosts, the devices of one as a slice of its own: what a host compiles
    for itself is compiled for that.
  chip: None where the devices at hand are none of CHIPS.
  """

  name: str
  devices: Sequence[Any]
  chip: Chip | None
  host: Sequence[Any] = ()


def find(name: str) -> Topology:
  """ "v5p:4x4x8", "h100", "h100x16" (two servers), or "local": the devices at hand.

  Raises:
    UserError: no such chip or shape, or the package that compiles for it is missing.
  """
  if name == "local":
    devices = jax.devices()
    return Topology(name, devices, CHIPS.get(_kind(devices[0].device_kind)))
  slice_ = re.fullmatch(r"(v\w+):(\d+(?:x\d+){1,2})", name)
  if slice_ and slice_[1] in CHIPS:
    devices = _tpu(name)
    own = f"{slice_[1]}:2x2x1" if slice_[2].count("x") == 2 else f"{slice_[1]}:2x2"
    several = len({d.process_index for d in devices}) > 1
    return Topology(name, devices, CHIPS[slice_[1]], _tpu(own) if several else ())
  gpus = re.fullmatch(r"h100(?:x(\d+))?", name)
  if gpus:
    return Topology(name, _gpu(name, int(gpus[1] or 1)), CHIPS["h100"])
  known = ("v5e:2x2", "v5p:2x2x4", "v6e:4x4", "h100", "h100x8", "local")
  raise UserError(
    f"--topology={name}: no such devices{suggestion(name, known)}; name a slice of "
    f"{', '.join(k for k in CHIPS if k != 'h100')} such as v5p:4x4x8, or h100, h100x8, or local"
  )


def _kind(device_kind: str) -> str:
  """The name in CHIPS of a device as JAX calls it; "" where it is none of them."""
  kinds = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}
  return "h100" if "H100" in device_kind else kinds.get(device_kind, "")


def _tpu(name: str) -> Sequence[Any]:
  from jax.experimental import topologies

  _without_devices()
  # libtpu would ask the metadata server of a TPU machine what it runs on.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU that two plans could fight for
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
  except RuntimeError as e:
    if "not installed" in str(e):
      raise UserError(
        f"--topology={name} is compiled for by libtpu, which is not installed: "
        "pip install 'trinity_jax[plan]'"
      ) from e
    raise UserError(f"--topology={name}: libtpu has no such slice: {_first_line(e)}") from e


def _gpu(name: str, count: int) -> Sequence[Any]:
  from jax.experimental import topologies

  _without_devices()
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
  servers, rest = divmod(count, CHIPS["h100"].host)
  if not count or (rest and servers):
    raise UserError(f"--topology={name}: up to 8 GPUs, or a multiple of 8")
  shape = f"1x{servers}x8" if servers else f"1x1x{count}"
  try:
    found = topologies.get_topology_desc(platform="cuda", target_config=_H100, topology=shape)
  except NotImplementedError as e:
    raise UserError(
      f"--topology={name} is compiled for by jax's CUDA plugin, which is not installed: "
      f"pip install --no-deps jax-cuda12-plugin=={jax.__version__} "
      f"jax-cuda12-pjrt=={jax.__version__}"
    ) from e
  return found.devices


def _without_devices() -> None:
  """Plans for devices elsewhere touch none here: a TPU or GPU at hand may be in use."""
  jax.config.update("jax_platforms", "cpu")


def _first_line(error: Exception) -> str:
  return str(error).strip().splitlines()[0]
