"""Devices that are not there, to compile for: TPU slices by libtpu, an H100 by jax's CUDA plugin.

`make aot-check` installs what this needs; without it the tests that ask are skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

TPUS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
H100 = "h100"  # four of them

# Neither a TPU machine's metadata server nor a CUDA driver is there: do not wait for, or check it.
for name, value in (
  ("TPU_SKIP_MDS_QUERY", "1"),
  ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
  ("TPU_WORKER_HOSTNAMES", "localhost"),
  ("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1"),
):
  os.environ.setdefault(name, value)


def devices(target: str):
  """Four devices of `target`: one of TPUS, or H100."""
  from jax.experimental import topologies

  installs = "(make aot-check installs it)"
  if target != H100:
    pytest.importorskip("libtpu", reason=f"libtpu is not installed {installs}")
    return topologies.get_topology_desc(platform="tpu", topology_name=target).devices
  pytest.importorskip("jax_cuda12_plugin", reason=f"jax-cuda12-plugin is not installed {installs}")
  description = (Path(__file__).parent / "h100.textproto").read_text()
  found = topologies.get_topology_desc(platform="cuda", target_config=description, topology="1x1x4")
  return found.devices
