"""Devices by name, and what their chips can do."""

from __future__ import annotations

import jax
import pytest

from trinity_jax.errors import UserError
from trinity_jax.models import sharding
from trinity_jax.plan import topologies
from trinity_jax.plan.topologies import CHIPS, find


@pytest.mark.parametrize(
  ("name", "words"),
  [
    (
      "v5x:2x2",
      "--topology=v5x:2x2: no such devices; did you mean 'v5e:2x2'.; name a slice of v5e",
    ),
    ("v5e", "no such devices.*such as v5p:4x4x8, or h100, h100x8, or local"),
    ("v5e:4", "no such devices"),
    ("h100x12", "--topology=h100x12: up to 8 GPUs, or a multiple of 8"),
    ("h100x0", "up to 8 GPUs"),
  ],
)
def test_no_such_devices(name, words):
  with pytest.raises(UserError, match=words):
    find(name)


def test_a_missing_compiler_says_how_to_get_it(monkeypatch):
  from jax.experimental import topologies as of_jax

  def missing(error):
    def get(**_):
      raise error

    monkeypatch.setattr(of_jax, "get_topology_desc", get)

  missing(RuntimeError("JAX TPU support not installed; cannot generate TPU topology"))
  with pytest.raises(UserError, match=r"by libtpu, which is not installed: pip install"):
    find("v5e:2x2")
  missing(RuntimeError("INVALID_ARGUMENT: 3x3 is not divisible\nat some place"))
  with pytest.raises(UserError, match="v5e:3x3: libtpu has no such slice: INVALID.* divisible$"):
    find("v5e:3x3")
  missing(NotImplementedError("topology not implemented for cuda"))
  with pytest.raises(UserError, match=r"pip install --no-deps jax-cuda12-plugin==\d"):
    find("h100x8")


def test_servers_and_gpus(monkeypatch):
  from jax.experimental import topologies as of_jax

  asked = []

  def get(*, platform, target_config, topology):
    asked.append(topology)
    assert platform == "cuda" and "H100" in target_config
    return type("Topology", (), {"devices": [None] * 8})

  monkeypatch.setattr(of_jax, "get_topology_desc", get)
  assert find("h100").chip is CHIPS["h100"]
  find("h100x4"), find("h100x8"), find("h100x32")
  assert asked == ["1x1x1", "1x1x4", "1x1x8", "1x4x8"]


def test_the_devices_at_hand():
  found = find("local")
  assert list(found.devices) == jax.devices() and found.chip is None  # CPUs have no data sheet


def test_kinds():
  assert [topologies._kind(k) for k in ("TPU v5 lite", "TPU v5", "TPU v6 lite", "cpu")] == [
    "v5e", "v5p", "v6e", "",
  ]  # fmt: skip
  assert topologies._kind("NVIDIA H100 80GB HBM3") == "h100"


def test_links_between_servers_are_slower():
  chip = CHIPS["h100"]
  assert chip.rate(range(8)) == chip.link > chip.rate(range(16)) == chip.far > 0
  assert chip.rate((0, 8)) == chip.far and chip.rate((8, 15)) == chip.link
  assert CHIPS["v5p"].rate(range(256)) == CHIPS["v5p"].link


@pytest.mark.aot
def test_sizes_that_are_no_axes_of_a_torus():
  """JAX's own make_mesh refuses them on v5p and v6e; a run would have ended with its traceback."""
  pytest.importorskip("libtpu", reason="libtpu is not installed (make aot-check installs it)")
  for name, sizes in (("v5p:4x8x8", (16, 16, 1)), ("v6e:16x16", (2, 32, 4))):
    devices = find(name).devices
    with pytest.raises(NotImplementedError):
      jax.make_mesh(sizes, ("a", "b", "c"), devices=devices)
    mesh = sharding.make_mesh(*sizes, devices)
    assert mesh.shape == dict(zip(("data", "fsdp", "tensor"), sizes)) | {"context": 1}
    assert set(mesh.devices.flat) == set(devices)
