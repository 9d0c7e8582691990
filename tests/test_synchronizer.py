"""Publishing: no aliasing, cast, versions, waits."""

from __future__ import annotations

import asyncio
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from trinity_jax.errors import RunFailed
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import sharding
from trinity_jax.synchronizer import Synchronizer

WAIT = 30


def make(dtype=jnp.float32, keep=2, timeout=WAIT, sizes=(1, 1, 1)):
  mesh = sharding.make_mesh(*sizes, jax.devices()[: np.prod(sizes)])
  rollout = jax.sharding.NamedSharding(mesh, PartitionSpec(None, "tensor"))
  layout = {"w": rollout, "b": jax.sharding.NamedSharding(mesh, PartitionSpec())}
  return Synchronizer(layout, dtype, LaunchOrder(mesh), keep=keep, timeout=timeout), mesh


def params(mesh, value=0.0):
  train = jax.sharding.NamedSharding(mesh, PartitionSpec("fsdp"))
  host = {"w": np.full((8, 6), value, np.float32), "b": np.arange(4, dtype=np.float32) / 3}
  return jax.device_put(host, train)


def pointers(tree) -> set[int]:
  return {
    shard.data.unsafe_buffer_pointer()
    for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards
  }  # fmt: skip


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 2)])
def test_published_params_never_alias_the_train_state_which_is_donated(sizes):
  sync, mesh = make(sizes=sizes)
  step = jax.jit(lambda p: jax.tree.map(lambda x: x * 0 - 7, p), donate_argnums=0)
  state = params(mesh, 1.5)
  sync.publish(0, state)
  assert not pointers(sync.params(0)) & pointers(state)
  for version in (1, 2):
    state = step(state)  # writes to the donated buffers
    held = sync.params(version - 1)
    sync.publish(version, state)
    np.testing.assert_array_equal(held["w"], 1.5 if version == 1 else -7)
    assert not pointers(held) & pointers(state)


def test_it_casts_and_lays_out_for_the_rollout():
  sync, mesh = make(jnp.bfloat16, sizes=(2, 2, 2))
  state = params(mesh, 1 / 3)
  sync.publish(4, state)
  out = sync.params(4)
  assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype(jnp.bfloat16)}
  assert out["w"].sharding.spec == PartitionSpec(None, "tensor")
  assert state["w"].dtype == jnp.float32 and not state["w"].is_deleted()
  np.testing.assert_array_equal(np.asarray(out["b"]), np.asarray(state["b"], jnp.bfloat16))


def test_a_publish_that_changes_a_weight_stops_and_names_it():
  sync, mesh = make(sizes=(2, 2, 2))
  cast = sync._cast
  sync._cast = lambda p: {**(out := cast(p)), "w": out["w"].at[3, 2].add(1e-3)}
  with pytest.raises(RunFailed, match=r"version 1 in the rollout layout: .*: w has checksum"):
    sync.publish(1, params(mesh))
  assert sync.version == -1, "nobody may take it"


def test_a_pinned_version_stays_until_it_is_not():
  sync, mesh = make(keep=1)
  pinned = {1, 2}
  sync._pinned = pinned.__contains__
  for version in (0, 1, 2, 3):
    sync.publish(version, params(mesh, version))
  assert [sync.params(v) is not None for v in (0, 1, 2, 3)] == [False, True, True, True]
  assert [sync.recent(v) is not None for v in (0, 1, 2, 3)] == [False, False, False, True]
  pinned.discard(1)
  sync.publish(4, params(mesh, 4))
  assert [sync.params(v) is not None for v in (1, 2, 3, 4)] == [False, True, False, True]


def test_versions_only_go_up_and_the_newest_are_kept():
  sync, mesh = make(keep=2)
  assert sync.version == -1
  for version in (0, 2, 4):
    sync.publish(version, params(mesh, version))
  for old in (3, 4):
    with pytest.raises(ValueError, match=f"version {old} published after version 4"):
      sync.publish(old, params(mesh))
  assert sync.version == 4
  assert sync.params(0) is None and sync.params(3) is None
  for version in (2, 4):
    np.testing.assert_array_equal(sync.params(version)["w"], version)


def test_a_wait_ends_at_once_when_the_version_is_there():
  sync, mesh = make(keep=2)
  for version in (0, 2, 4):
    sync.publish(version, params(mesh, version))

  async def go():
    return [(await sync.wait_for(v))[0] for v in (2, 4, 1, 3)]

  assert asyncio.run(go()) == [2, 4, 4, 4]  # the exact one while it is kept, else the newest


def test_a_wait_ends_when_the_version_comes():
  sync, mesh = make()
  sync.publish(0, params(mesh))
  waiting = threading.Event()
  got = []

  async def go():
    early, late = (asyncio.create_task(sync.wait_for(v)) for v in (1, 2))
    await asyncio.sleep(0)
    waiting.set()
    got.append((await early)[0])
    assert not late.done() or sync.version == 2
    version, published = await late
    got.append((version, float(published["w"][0, 0])))

  thread = threading.Thread(target=lambda: asyncio.run(asyncio.wait_for(go(), WAIT)))
  thread.start()
  assert waiting.wait(WAIT)
  for version in (1, 2):
    sync.publish(version, params(mesh, version))
  thread.join(WAIT)
  assert got == [1, (2, 2.0)]


def test_a_thread_waits_as_a_coroutine_does():
  sync, mesh = make(keep=2)
  for version in (0, 2, 4):
    sync.publish(version, params(mesh, version))
  assert [sync.wait(v)[0] for v in (2, 4, 1, 3)] == [2, 4, 4, 4]
  later = threading.Timer(0.05, lambda: sync.publish(5, params(mesh, 5)))
  later.start()
  version, published = sync.wait(5)
  assert (version, float(published["w"][0, 0])) == (5, 5.0)
  later.join()
  late, _ = make(timeout=0.01)
  with pytest.raises(RunFailed, match=r"\(sync\.timeout\) for version 3; .* newest is -1"):
    late.wait(3)
  assert not late._waiters
  sync.close(ValueError("bad step"))
  with pytest.raises(RunFailed, match="closed"):
    sync.wait(6)


def test_an_expired_wait_names_the_version_and_harms_nobody():
  sync, mesh = make(timeout=0.01)
  sync.publish(0, params(mesh))
  with pytest.raises(RunFailed, match=r"\(sync\.timeout\) for version 3; .* newest is 0"):
    asyncio.run(sync.wait_for(3))
  sync.publish(3, params(mesh, 3))  # the waiter that gave up is forgotten
  assert asyncio.run(sync.wait_for(3))[0] == 3
  assert not sync._waiters


def test_closing_after_a_wait_has_expired_or_was_cancelled():
  sync, _ = make(timeout=0.01)

  async def go():
    with pytest.raises(RunFailed):
      await sync.wait_for(1)
    waiting = asyncio.create_task(sync.wait_for(2))
    await asyncio.sleep(0)
    waiting.cancel()
    sync.close(ValueError("bad step"))  # before the cancelled task has run again

  asyncio.run(go())
  assert not sync._waiters


def test_close_fails_everyone_now_and_later():
  sync, mesh = make()
  cause = ValueError("bad step")

  async def go():
    tasks = [asyncio.create_task(sync.wait_for(v)) for v in (1, 2)]
    await asyncio.sleep(0)
    sync.close(cause)
    errors = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), WAIT)
    for e in errors:
      assert isinstance(e, RunFailed) and e.__cause__ is cause
    with pytest.raises(RunFailed, match="closed"):
      await sync.wait_for(0)

  sync.publish(0, params(mesh))
  asyncio.run(go())
