"""Groups of a run that kept them, read again in their order."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from trinity_jax.buffer.recorded import Recorded
from trinity_jax.buffer.replay import ReplayBuffer
from trinity_jax.buffer.store import open_store
from trinity_jax.errors import UserError
from trinity_jax.experience import Experience, ExperienceId


def group(batch: int, task: int) -> list[Experience]:
  return [
    Experience([1, 2, batch], [0, 1, 1], [0, -1, -2], [-1, 3, 3], ExperienceId(batch, task, r, 0),
               reward=float(r))
    for r in range(2)
  ]  # fmt: skip


def record(directory, keep: bool) -> None:
  store = open_store("sqlite", directory)
  buffer = ReplayBuffer(store, capacity=99, order="id", tasks_per_step=2, keep=keep)

  async def fill():
    for batch in (1, 2):
      for task in (1, 0):
        await buffer.put(group(batch, task))

  asyncio.run(fill())
  for step in (1, 2):
    buffer.sample(2, step, 10)
  buffer.commit(2)
  buffer.close()
  store.close()


def test_what_was_kept_comes_again_and_again(tmp_path):
  record(tmp_path, keep=True)
  recorded = Recorded(tmp_path)
  assert len(recorded) == 4
  found = recorded.groups(2, 3)  # the last two, and the first again
  assert [g[0].id.group for g in found] == [(2, 0), (2, 1), (1, 0)]
  assert [e.reward for e in found[0]] == [0.0, 1.0]
  assert found[0][0].tokens.tolist() == [1, 2, 2]
  np.testing.assert_array_equal(found[0][0].versions, [-1, -1, -1])  # no policy of this run
  recorded.close()


def test_a_run_that_kept_nothing_says_so(tmp_path):
  record(tmp_path, keep=False)
  with pytest.raises(UserError, match="holds no experiences; .* buffer.keep=True"):
    Recorded(tmp_path)
  empty = tmp_path / "empty"
  empty.mkdir()
  with pytest.raises(UserError, match="there is no buffer.sqlite"):
    Recorded(empty)
