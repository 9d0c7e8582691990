"""Checksums: equal for every layout, different for any other bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from trinity_jax.checksums import _checksums, checksums, compare, names, verify
from trinity_jax.errors import RunFailed
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import sharding

SPECS = ((), ("fsdp",), (None, "tensor"), ("fsdp", "tensor"), (("data", "fsdp"), None))


def host(dtype=np.float32):
  rng = np.random.default_rng(3)
  return {
    "layers": {"w": rng.normal(size=(8, 6)).astype(dtype), "b": np.zeros(4, dtype)},
    "scale": np.asarray(0.5, dtype),
  }


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(2, 2, 2)


def place(tree, mesh, spec):
  def leaf(x):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*(spec if x.ndim == 2 else ()))))

  return jax.tree.map(leaf, tree)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int8])
def test_equal_for_every_sharding_and_on_the_host(mesh, dtype):
  expected = checksums(host(dtype))
  assert list(expected) == names(host()) == ["layers.b", "layers.w", "scale"]
  assert all(0 <= n < 2**32 for n in expected.values())
  for spec in SPECS:
    found = checksums(place(host(dtype), mesh, spec), launch=LaunchOrder(mesh))
    assert found == expected, spec


def test_against_an_independent_sum(monkeypatch):
  """The definition in plain Python."""

  def mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)

  def checksum(w):
    rows = w.view(np.uint32).reshape(-1, w.shape[-1]).tolist()
    place = [[mix(i) + mix(j ^ 0x9E3779B9) for j in range(w.shape[-1])] for i in range(len(rows))]
    pairs = zip(sum(rows, []), sum(place, []))
    return sum(mix(word ^ (p % 2**32)) for word, p in pairs) % 2**32

  monkeypatch.setattr("trinity_jax.checksums._BLOCK", 10)  # several blocks, and a rest
  rng = np.random.default_rng(1)
  for shape in ((8, 6), (3, 3, 3), (7,), (5, 1), (2, 2, 2, 16)):
    w = rng.normal(size=shape).astype(np.float32)
    assert checksums({"w": w}) == {"w": checksum(w)}, shape


def test_any_single_bit_changes_its_tensor_and_no_other():
  expected = checksums(host())
  rng = np.random.default_rng(0)
  for place_, bit in zip(rng.integers(0, 48, 40), rng.integers(0, 32, 40)):
    tree = host()
    tree["layers"]["w"].view(np.uint32).reshape(-1)[place_] ^= np.uint32(1 << bit)
    found = checksums(tree)
    assert found["layers.w"] != expected["layers.w"]
    assert found["scale"] == expected["scale"] and found["layers.b"] == expected["layers.b"]


def test_order_signs_and_places_count():
  w = host()["layers"]["w"]
  swapped = w.copy()
  swapped[[0, 1]] = swapped[[1, 0]]
  zeros, moved = np.zeros((4, 4), np.float32), np.zeros((4, 4), np.float32)
  zeros[0, 1], moved[1, 0] = 1, 1
  different = [w, w[::-1].copy(), swapped, -w, zeros, moved, zeros.T * 0, -0.0 * np.abs(zeros)]
  assert len({checksums({"w": x})["w"] for x in different}) == len(different)


def test_bfloat16_to_its_last_bit():
  """XLA computes with bfloat16 in float32 on a CPU: no value may change on the way."""
  finite = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
  finite = finite[np.isfinite(finite.astype(np.float32))]
  found = {checksums({"w": np.asarray([x])})["w"] for x in finite[::61]}
  assert len(found) == len(finite[::61])
  wide = {"w": finite.reshape(2, -1).view(np.uint16).astype(np.uint32)}
  assert checksums({"w": finite.reshape(2, -1)}) == checksums(wide)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_needs_no_memory_of_the_tensors_size(dtype):
  x = jax.ShapeDtypeStruct((8, 1024, 1000), dtype)
  spec = jax.sharding.PartitionSpec()
  done = _checksums.lower([x], dtype=None, mesh=None, specs=(spec,)).compile()
  assert done.memory_analysis().temp_size_in_bytes < x.size * x.dtype.itemsize


def test_every_copy_is_looked_at(mesh):
  """Not only that of the first device."""
  copies = [jax.device_put(host()["scale"], d) for d in mesh.devices.flat]
  copies[5] = copies[5] + 1
  whole = NamedSharding(mesh, PartitionSpec())
  params = {"a": {"scale": jax.make_array_from_single_device_arrays((), whole, copies)}}
  with pytest.raises(RunFailed, match=r"cpu:5, beside cpu:0: weights differ: a\.scale has"):
    checksums(params)


def test_wide_dtypes_are_refused_by_name():
  with pytest.raises(ValueError, match=r"checksum of a\.b: dtype float64"):
    checksums({"a": {"b": np.zeros(3)}})
  with pytest.raises(ValueError, match="dtype bool"):
    checksums({"a": np.zeros(3, bool)})


def test_compare_names_the_tensors():
  compare({"a": 1}, {"a": 1}, "x")
  with pytest.raises(RunFailed) as e:
    compare({"a": 1, "b": 255, "c": 3}, {"a": 1, "b": 16, "d": 3}, "version 7")
  assert str(e.value) == (
    "version 7: weights differ: c is missing; d is unexpected; b has checksum 00000010, expected "
    "000000ff"
  )
  with pytest.raises(RunFailed, match="and 4 more"):
    compare({str(i): 0 for i in range(9)}, {str(i): 1 for i in range(9)}, "x")


def test_verify_compares_across_meshes_and_dtypes(mesh):
  rollout = sharding.make_mesh(1, 1, 2, jax.devices()[:2])
  source = place(host(), mesh, ("fsdp", "tensor"))
  launches = dict(source_launch=LaunchOrder(mesh), published_launch=LaunchOrder(rollout))
  bf16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16), host())
  published = place(bf16, rollout, (None, "tensor"))
  assert verify(source, published, **launches) == checksums(bf16)
  bf16["layers"]["w"][3, 2] *= -1
  with pytest.raises(RunFailed, match=r"version 4: weights differ: layers\.w has checksum"):
    verify(source, place(bf16, rollout, ()), what="version 4", **launches)
  with pytest.raises(ValueError, match="expected one"):
    verify(source, {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float16)})
