"""Snapshots: written whole or not at all, read checked, versions and lineages only go up."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from trinity_jax import snapshots
from trinity_jax.checksums import checksums
from trinity_jax.errors import RunFailed
from trinity_jax.models import sharding
from trinity_jax.probe import Probe
from trinity_jax.publishing import LineageChanged, SnapshotPublisher, SnapshotReader
from trinity_jax.snapshots import folder, kept, read_manifest

WAIT = 30


class Bell:
  """Rings in the caller's thread."""

  def __init__(self):
    self.callbacks = []

  def ring(self):
    for callback in list(self.callbacks):
      callback()

  def subscribe(self, callback):
    self.callbacks.append(callback)
    return lambda: callback in self.callbacks and self.callbacks.remove(callback)


def host(value=0.0, dtype=np.float32):
  w = np.arange(48, dtype=np.float32).reshape(8, 6) / 7 + value
  return {"layers": {"w": w.astype(dtype), "b": np.full(4, value, dtype)}}


def layout(sizes=(1, 1, 1), w=None):
  mesh = sharding.make_mesh(*sizes, jax.devices()[: int(np.prod(sizes))])
  w = w or PartitionSpec()
  return {"layers": {"w": NamedSharding(mesh, w), "b": NamedSharding(mesh, PartitionSpec())}}


def reader(directory, shardings=None, dtype=np.float32, bell=None, timeout=WAIT, **kwargs):
  shardings = shardings or layout()
  return SnapshotReader(directory, shardings, dtype, bell=bell or Bell(), timeout=timeout, **kwargs)


def read(source, version=0):
  return asyncio.run(source.wait_for(version))


def assert_equal(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


# --- what is written is what is read -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_every_layout_reads_what_any_layout_wrote(tmp_path, dtype):
  trained = layout((2, 2, 2), PartitionSpec("fsdp", "tensor"))
  published = SnapshotPublisher(tmp_path, keep=2, dtype=dtype).publish(
    3, jax.device_put(host(1.5), trained)
  )
  assert (published.version, published.lineage, published.dtype) == (3, 0, str(jnp.dtype(dtype)))
  expected = jax.tree.map(lambda x: x.astype(dtype), host(1.5))
  for sizes, spec in (
    ((1, 1, 1), ()),
    ((1, 2, 2), ("tensor", "fsdp")),
    ((4, 1, 2), (None, "tensor")),
  ):
    wanted = layout(sizes, PartitionSpec(*spec))
    version, params = read(reader(tmp_path, wanted, dtype))
    assert version == 3
    assert_equal(params, expected)
    for leaf, where in zip(jax.tree.leaves(params), jax.tree.leaves(wanted)):
      assert leaf.dtype == dtype and leaf.sharding == where
  assert checksums(expected) == published.checksums


def test_a_reader_casts_after_it_has_compared(tmp_path):
  SnapshotPublisher(tmp_path, keep=1).publish(0, host(1 / 3))
  assert_equal(read(reader(tmp_path, dtype=jnp.bfloat16))[1], host(1 / 3, jnp.bfloat16))


def test_the_file_is_what_safetensors_reads(tmp_path):
  from safetensors.numpy import load_file

  SnapshotPublisher(tmp_path, keep=1).publish(0, {"a": {"b": np.float32(2)}, "c": host()["layers"]})
  found = load_file(tmp_path / "0-0" / "weights.safetensors")
  assert sorted(found) == ["a.b", "c.b", "c.w"] and found["a.b"] == 2
  np.testing.assert_array_equal(found["c.w"], host()["layers"]["w"])
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  manifest = read_manifest(tmp_path)
  back = snapshots.read(tmp_path, manifest, {"a": {"b": one}, "c": {"b": one, "w": one}})
  assert checksums(back) == manifest.checksums


def test_another_model_is_refused_by_name(tmp_path):
  SnapshotPublisher(tmp_path, keep=1).publish(0, host()["layers"])
  with pytest.raises(RunFailed, match=r"another model: missing \['layers\.b', 'layers\.w'\]"):
    read(reader(tmp_path))


def test_a_flipped_bit_names_its_tensor(tmp_path):
  SnapshotPublisher(tmp_path, keep=1).publish(7, host())
  file = tmp_path / "0-7" / "weights.safetensors"
  data = bytearray(file.read_bytes())
  data[-40] ^= 4  # leaves are in the order b, w: the end is w's
  file.write_bytes(data)
  with pytest.raises(RunFailed, match=r"version 7 read from .*0-7: weights differ: layers\.w has"):
    read(reader(tmp_path))
  file.write_bytes(data[:-8])
  with pytest.raises(RunFailed, match=r"weights\.safetensors: damaged"):
    read(reader(tmp_path))


def test_a_damaged_manifest_is_named(tmp_path):
  (tmp_path / "manifest.json").write_text('{"version": 3')
  with pytest.raises(RunFailed, match=r"manifest\.json: damaged"):
    read(reader(tmp_path))
  with pytest.raises(RunFailed, match=r"manifest\.json: damaged"):
    SnapshotPublisher(tmp_path, keep=1)


# --- versions and lineages -----------------------------------------------------------------------


def test_versions_never_go_back_and_only_the_newest_are_kept(tmp_path):
  publisher, source = SnapshotPublisher(tmp_path, keep=2), reader(tmp_path)
  for version in (0, 2, 4):
    publisher.publish(version, host(version))
  for old in (3, 4):
    with pytest.raises(ValueError, match=f"version {old} published after version 4"):
      publisher.publish(old, host())
  assert kept(tmp_path) == [(0, 2), (0, 4)]
  source._look()

  async def go():
    return [await source.wait_for(v) for v in (4, 2, 0, 3)]

  found = asyncio.run(go())
  assert [v for v, _ in found] == [4, 2, 4, 4]  # the exact one while it is kept, else the newest
  for version, params in found:
    assert_equal(params, host(version))


def test_resuming_at_the_manifest_writes_nothing(tmp_path):
  SnapshotPublisher(tmp_path, keep=2).publish(5, host(5))
  source, file = reader(tmp_path), tmp_path / "0-5" / "weights.safetensors"
  before = file.stat().st_mtime_ns
  again = SnapshotPublisher(tmp_path, keep=2)
  assert again.publish(5, host(5)).order == (0, 5)
  assert file.stat().st_mtime_ns == before
  assert again.publish(6, host(6)).order == (0, 6)
  with pytest.raises(ValueError, match="version 6 published after version 6"):
    again.publish(6, host(6))
  source._look()
  assert read(source, 6)[0] == 6


@pytest.mark.parametrize("resumed, value", [(3, 3), (5, 5.5)], ids=["behind", "other weights"])
def test_a_trainer_that_went_back_begins_a_lineage(tmp_path, resumed, value):
  """Killed after it had published 5, before the checkpoint: 5 comes again, perhaps another."""
  bell = Bell()
  SnapshotPublisher(tmp_path, keep=3).publish(5, host(5))
  source, idle = reader(tmp_path, bell=bell), reader(tmp_path, bell=bell)
  assert read(source, 5)[0] == 5

  async def go():
    waiting = asyncio.create_task(source.wait_for(6))
    await asyncio.sleep(0)
    publisher = SnapshotPublisher(tmp_path, keep=3, bell=bell)
    assert publisher.publish(resumed, host(value)).order == (1, resumed)
    assert publisher.publish(6, host(6)).order == (1, 6)
    with pytest.raises(LineageChanged, match="version 5 of lineage 0, and now version"):
      await waiting
    for reader_ in (source, idle):
      with pytest.raises(LineageChanged):  # later, and whatever version
        await reader_.wait_for(0)

  asyncio.run(go())
  assert not bell.callbacks
  assert isinstance(source.failure, LineageChanged)
  fresh = reader(tmp_path)
  assert fresh.failure is None
  assert (fresh.version, fresh.lineage) == (6, 1)
  assert_equal(read(fresh, resumed)[1], host(value))
  assert_equal(read(fresh, 6)[1], host(6))
  assert kept(tmp_path) == [(0, 5), (1, resumed), (1, 6)]


def test_resuming_beyond_the_manifest_goes_on_with_its_lineage(tmp_path):
  SnapshotPublisher(tmp_path, keep=1).publish(4, host())
  source = reader(tmp_path)
  assert SnapshotPublisher(tmp_path, keep=1).publish(6, host(6)).order == (0, 6)
  source._look()
  assert read(source, 5)[0] == 6


def test_a_lost_manifest_or_snapshot_begins_a_lineage(tmp_path):
  SnapshotPublisher(tmp_path, keep=1).publish(4, host(4))
  (tmp_path / "manifest.json").unlink()
  assert SnapshotPublisher(tmp_path, keep=1).publish(4, host(4)).order == (1, 4)
  snapshots.delete(tmp_path, folder(1, 4))
  with pytest.raises(RunFailed, match="its manifest names it, but it is not there"):
    read(reader(tmp_path))
  assert SnapshotPublisher(tmp_path, keep=1).publish(4, host(4)).order == (2, 4)
  assert_equal(read(reader(tmp_path))[1], host(4))


def test_two_trainers_in_one_folder_are_noticed(tmp_path):
  source = reader(tmp_path)
  SnapshotPublisher(tmp_path, keep=1).publish(4, host(4))
  source._look()
  old = dataclasses.replace(read_manifest(tmp_path), version=3)
  old.write(tmp_path)
  source._look()
  with pytest.raises(RunFailed, match="version 3 came after version 4 of the same lineage"):
    read(source)


# --- what a writer that died, or had no room, leaves ---------------------------------------------


def test_what_was_not_finished_is_not_seen_and_is_cleaned_away(tmp_path):
  publisher = SnapshotPublisher(tmp_path, keep=3)
  publisher.publish(1, host(1))
  manifest = read_manifest(tmp_path)
  publisher.publish(2, host(2))
  manifest.write(tmp_path)  # killed between the folder's name and the manifest
  (tmp_path / "0-3.part").mkdir()
  (tmp_path / "0-3.part" / "weights.safetensors").write_bytes(b"half")
  (tmp_path / ".manifest.json.x7_1").write_bytes(b"half")
  assert read(reader(tmp_path))[0] == 1
  again = SnapshotPublisher(tmp_path, keep=3)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["0-1", "manifest.json"]
  assert again.publish(1, host(1)).order == (0, 1)
  assert again.publish(2, host(2.5)).order == (0, 2)
  assert_equal(read(reader(tmp_path), 2)[1], host(2.5))


def no_room(path, data):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_names_the_folder_and_the_old_snapshot_stays(tmp_path):
  """The limit on a file's size is the kernel's own refusal to write on."""
  import resource
  import signal

  publisher = SnapshotPublisher(tmp_path, keep=1)
  publisher.publish(0, host())
  large = {"layers": {"w": np.zeros((8, 2**15), np.float32), "b": np.zeros(4, np.float32)}}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
  try:
    with pytest.raises(RunFailed, match=f"{tmp_path}: cannot write a snapshot: File too large"):
      publisher.publish(1, large)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["0-0", "manifest.json"]
  assert_equal(read(reader(tmp_path))[1], host())
  with pytest.MonkeyPatch.context() as patch, pytest.raises(RunFailed, match="No space left"):
    patch.setattr(snapshots, "write_atomic", no_room)  # for the manifest alone
    publisher.publish(1, large)
  assert read(reader(tmp_path))[0] == 0
  assert publisher.publish(1, large).order == (0, 1)  # when there is room again


def test_a_snapshot_deleted_while_it_is_read_is_read_to_the_end(tmp_path, monkeypatch):
  publisher = SnapshotPublisher(tmp_path, keep=1)
  publisher.publish(0, host(0))
  source, read_leaf, seen = reader(tmp_path), snapshots._read_leaf, []

  def slowly(*args):
    if not seen:
      publisher.publish(1, host(1))
      assert kept(tmp_path) == [(0, 1)]
    seen.append(args)
    return read_leaf(*args)

  monkeypatch.setattr(snapshots, "_read_leaf", slowly)
  version, params = read(source)
  assert version == 0
  assert_equal(params, host(0))


def test_a_snapshot_deleted_before_it_is_opened_gives_way_to_the_next(tmp_path):
  publisher, source = SnapshotPublisher(tmp_path, keep=1), reader(tmp_path)
  publisher.publish(0, host(0))
  source._look()
  publisher.publish(1, host(1))  # nobody rang
  assert source.version == 0
  version, params = read(source)
  assert version == 1
  assert_equal(params, host(1))


# --- waits ---------------------------------------------------------------------------------------


def test_a_wait_ends_when_the_version_comes(tmp_path):
  bell = Bell()
  source, publisher = reader(tmp_path, bell=bell), SnapshotPublisher(tmp_path, keep=2, bell=bell)
  assert (source.version, source.lineage, source.finished) == (-1, -1, False)
  waiting, got = threading.Event(), []

  async def go():
    early, late = (asyncio.create_task(source.wait_for(v)) for v in (0, 2))
    await asyncio.sleep(0)
    waiting.set()
    got.append((await early)[0])
    version, params = await late
    got.append((version, float(params["layers"]["b"][0])))

  thread = threading.Thread(target=lambda: asyncio.run(asyncio.wait_for(go(), WAIT)))
  thread.start()
  assert waiting.wait(WAIT)
  for version in (0, 2):
    publisher.publish(version, host(version))
  thread.join(WAIT)
  assert got[0] in (0, 2) and got[1] == (2, 2.0)
  assert not source._waiters


def test_an_expired_wait_names_version_and_folder(tmp_path):
  source = reader(tmp_path, timeout=0.01)
  with pytest.raises(RunFailed, match=r"\(sync\.timeout\) for version 3; .* newest in .* is -1"):
    read(source, 3)
  assert not source._waiters


def test_after_the_end_nobody_waits(tmp_path):
  bell = Bell()
  publisher, source = SnapshotPublisher(tmp_path, keep=1, bell=bell), reader(tmp_path, bell=bell)
  publisher.publish(2, host(2))

  async def go():
    waiting = asyncio.create_task(source.wait_for(3))
    await asyncio.sleep(0)
    publisher.finish()
    for wait in (waiting, source.wait_for(9)):
      with pytest.raises(RunFailed, match="will not come: the trainer has finished with version 2"):
        await wait
    assert (await source.wait_for(2))[0] == 2

  asyncio.run(go())
  assert source.finished
  more = SnapshotPublisher(tmp_path, keep=1, bell=bell)  # the run is made longer
  more.publish(2, host(2))
  assert not source.finished
  more.publish(3, host(3))
  assert read(source, 3)[0] == 3


def test_close_fails_everyone_now_and_later(tmp_path):
  bell, cause = Bell(), ValueError("bad step")
  source = reader(tmp_path, bell=bell)

  rung = []
  bell.subscribe(lambda: rung.append(source.failure))

  async def go():
    tasks = [asyncio.create_task(source.wait_for(v)) for v in (1, 2)]
    await asyncio.sleep(0)
    source.close(cause)
    assert len(rung) == 1 and rung[0].__cause__ is cause
    errors = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), WAIT)
    for e in errors:
      assert isinstance(e, RunFailed) and e.__cause__ is cause
    with pytest.raises(RunFailed, match="closed"):
      await source.wait_for(0)

  asyncio.run(go())
  assert len(bell.callbacks) == 1  # the test's


def test_the_probe_is_recorded_and_compared(tmp_path):
  tokens = np.arange(4, dtype=np.int32)
  score = lambda params, tokens: params["layers"]["b"][0] + np.zeros(3, np.float32)
  SnapshotPublisher(tmp_path, keep=1, probe=Probe(score, tokens)).publish(0, host(2))
  assert json.loads((tmp_path / "manifest.json").read_text())["probe"]["logprobs"] == [2.0] * 3
  assert read(reader(tmp_path, probe=Probe(score, tokens)))[0] == 0
  with pytest.raises(RunFailed, match="version 0: the log-prob of the probe's token 1 is 3"):
    read(reader(tmp_path, probe=Probe(lambda *a: score(*a) + 1, tokens)))
