"""Snapshots between real processes, some of which are killed."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from trinity_jax.buffer.bell import FileBell
from trinity_jax.publishing import SnapshotPublisher, SnapshotReader
from trinity_jax.snapshots import kept, read_manifest

WAIT = 60
ONE = """
import jax
jax.config.update("jax_platforms", "cpu")
one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
layout = {"a": one, "w": one}
"""
READ = f"""
import asyncio, sys
import numpy as np
from trinity_jax.buffer.bell import FileBell
from trinity_jax.errors import RunFailed
from trinity_jax.publishing import SnapshotReader
{ONE}
bell = FileBell(sys.argv[1])
reader = SnapshotReader(sys.argv[1], layout, np.float32, bell=bell, timeout={WAIT})
print("ready", flush=True)
version = -1
try:
  while True:
    version, params = asyncio.run(reader.wait_for(version + 1))
    print(version, float(params["w"][0, 0]), float(params["a"][3]), flush=True)
except RunFailed as e:
  print(type(e).__name__, str(e), flush=True)
bell.close()
"""
# Publishes as fast as it can, until it is killed. Every element of version v is v.
WRITE = """
import sys
import numpy as np
from trinity_jax.publishing import SnapshotPublisher
publisher = SnapshotPublisher(sys.argv[1], keep=2)
for version in range(int(sys.argv[2]), 10**6):
  done = publisher.publish(version, {"a": np.full(64, version, np.float32),
                                     "w": np.full((1024, 1024), version, np.float32)})
  print(done.lineage, done.version, flush=True)
"""


def params(value):
  return {"a": np.full(64, value, np.float32), "w": np.full((8, 8), value, np.float32)}


def start(code, *args):
  return subprocess.Popen(
    [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip


def test_another_process_reads_what_this_one_publishes(tmp_path):
  bell = FileBell(tmp_path)
  child = start(READ, tmp_path)
  watchdog = threading.Timer(WAIT, child.kill)
  watchdog.start()
  try:
    assert child.stdout.readline() == "ready\n"
    publisher = SnapshotPublisher(tmp_path, keep=1, bell=bell)
    for version in range(4):
      publisher.publish(version, params(version + 0.5))
      assert child.stdout.readline() == f"{version} {version + 0.5} {version + 0.5}\n"
    # Killed and resumed from an older checkpoint: the other process is told so while it waits.
    SnapshotPublisher(tmp_path, keep=1, bell=bell).publish(2, params(2))
    said = child.stdout.readline()
    assert said.startswith("LineageChanged") and "version 3 of lineage 0, and now version 2" in said
    assert child.wait(WAIT) == 0
  finally:
    watchdog.cancel()
    child.kill()
    bell.close()


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_in_the_middle_of_a_publish(tmp_path, kills):
  """What was acknowledged is there, whole; (lineage, version) never goes back."""
  rng = random.Random(kills)
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  newest, resume, cut = (-1, -1), 0, 0
  for _ in range(kills):
    child = start(WRITE, tmp_path, resume)
    try:
      lines = [child.stdout.readline()]  # it has begun
      assert lines[0], "the publisher ended by itself"
      threading.Event().wait(rng.uniform(0.0, 0.08))  # a moment of its loop, whatever it does there
    finally:
      child.kill()
    rest, _ = child.communicate(timeout=WAIT)
    acknowledged = [tuple(map(int, line.split())) for line in lines + rest.splitlines()]
    manifest = read_manifest(tmp_path)
    assert manifest.order >= acknowledged[-1] and acknowledged == sorted(acknowledged)
    assert acknowledged[0] > newest or acknowledged[0][1] == resume
    assert manifest.order >= newest
    cut += any(tmp_path.glob("*.part")) or any(tmp_path.glob(".manifest*"))
    cut += any(order > manifest.order for order in kept(tmp_path))
    bell = FileBell(tmp_path)
    source = SnapshotReader(tmp_path, {"a": one, "w": one}, np.float32, bell=bell, timeout=WAIT)
    version, found = asyncio.run(source.wait_for(manifest.version))  # checks every tensor
    bell.close()
    assert version == manifest.version
    assert {float(x) for leaf in found.values() for x in np.unique(leaf)} == {float(version)}
    newest, resume = manifest.order, rng.choice([manifest.version, max(manifest.version - 2, 0)])
  assert cut or kills < 10  # some were killed while they published
  SnapshotPublisher(tmp_path, keep=2)
  names = {p.name for p in tmp_path.iterdir()} - {"manifest.json", "bell"}
  assert len(names) == len(kept(tmp_path)) <= 3
