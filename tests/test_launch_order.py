"""One launch at a time."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import sharding


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(8, 1, 1)


def test_launches_never_overlap(mesh):
  launch = LaunchOrder(mesh)
  inside, most, calls = [0], [0], [0]

  def program(x):
    inside[0] += 1
    most[0] = max(most[0], inside[0])
    threading.Event().wait(0.001)
    calls[0] += 1
    inside[0] -= 1
    return x + 1

  def many(out, i):
    out.append([launch(program, np.int32(j)) for j in range(i, i + 10)])

  outs = [[] for _ in range(4)]
  threads = [threading.Thread(target=many, args=(o, i)) for i, o in enumerate(outs)]
  for t in threads:
    t.start()
  for t in threads:
    t.join(30)
  assert most[0] == 1 and calls[0] == 40
  assert [o[0] for o in outs] == [list(range(i + 1, i + 11)) for i in range(4)]


def test_programs_with_collectives_from_several_threads_all_finish(mesh):
  """On one pool of CPU threads two at once could wait for each other for ever."""
  launch = LaunchOrder(mesh)
  over = NamedSharding(mesh, PartitionSpec("data"))
  total = jax.jit(lambda x: jnp.sum(jnp.sin(x)), in_shardings=over)
  x = jax.device_put(np.arange(64, dtype=np.float32), over)
  want = float(launch(total, x))
  got = []
  threads = [
    threading.Thread(target=lambda: got.extend(float(launch(total, x)) for _ in range(20)))
    for _ in range(4)
  ]
  for t in threads:
    t.start()
  for t in threads:
    t.join(60)
  assert got == [want] * 80


def test_a_program_that_raises_leaves_the_door_open(mesh):
  launch = LaunchOrder(mesh)
  with pytest.raises(ZeroDivisionError):
    launch(lambda: 1 // 0)
  assert launch(lambda x: x, 3) == 3
