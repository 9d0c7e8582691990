"""Checkpoints come back bit for bit, on any mesh, and never half."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import optax
import pytest

from trinity_jax.errors import RunFailed, UserError
from trinity_jax.trainer.checkpoint import Checkpointer, changed_terms, terms_of_exactness
from trinity_jax.trainer.state import init_state


@pytest.fixture
def make_state(tools):
  """(mesh axes, scale, ...) -> a TrainState whose every leaf is distinct."""

  def make(mesh=(1, 1, 1), scale=1.0, optimizer=None, offload=False):
    mesh = tools.mesh_of(*mesh)
    optimizer = optimizer or optax.adamw(1e-3)
    params = jax.tree.map(lambda x: scale * x, tools.params_on(mesh))
    state = init_state(params, optimizer, mesh, offload=offload)
    rng = np.random.default_rng(int(scale * 1000))

    def fill(x):
      value = rng.integers(0, 99, x.shape) if x.dtype == np.int32 else rng.normal(size=x.shape)
      return jax.device_put(np.asarray(value, x.dtype), x.sharding)

    return jax.tree.map(fill, state)

  return make


def assert_bit_equal(a, b):
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
  ):
    assert x.dtype == y.dtype, path
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def test_save_and_restore(tmp_path, make_state):
  checkpoints = Checkpointer(tmp_path / "c", keep=2)
  state, other = make_state(), make_state(scale=2.0)
  meta = {"seed": 3, "taskset": {"position": 12}, "terms": {"cores": 2}}
  assert checkpoints.latest_step() is None
  checkpoints.save(5, state, meta)
  checkpoints.close()
  again = Checkpointer(tmp_path / "c", keep=2)
  assert again.latest_step() == 5
  restored, back = again.restore(5, other)
  assert_bit_equal(restored, state)
  assert back == meta
  again.close()


@pytest.mark.parametrize("saved, wanted", [((2, 2, 2), (1, 1, 1)), ((1, 1, 1), (1, 4, 2))])
def test_restore_onto_another_mesh(tmp_path, make_state, saved, wanted):
  checkpoints = Checkpointer(tmp_path, keep=2)
  state, like = make_state(saved), make_state(wanted, scale=2.0)
  checkpoints.save(1, state, {})
  restored, _ = checkpoints.restore(1, like)
  assert_bit_equal(restored, state)
  for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
  checkpoints.close()


@pytest.mark.parametrize("before", [False, True])
def test_restore_with_and_without_offloading(tmp_path, make_state, before):
  checkpoints = Checkpointer(tmp_path, keep=2)
  state = make_state((1, 2, 1), offload=before)
  like = make_state((1, 2, 1), scale=2.0, offload=not before)
  checkpoints.save(1, state, {})
  restored, _ = checkpoints.restore(1, like)
  assert_bit_equal(restored, state)
  kinds = lambda tree: [x.sharding.memory_kind for x in jax.tree.leaves(tree)]
  assert kinds(restored) == kinds(like) != kinds(state)
  checkpoints.close()


def test_keeps_the_newest_and_the_best(tmp_path, make_state):
  checkpoints, state = Checkpointer(tmp_path, keep=2), make_state()
  steps = lambda: sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit())
  for step in (10, 20):
    checkpoints.save(step, state, {})
  checkpoints.offer_best(10, 0.5)
  checkpoints.offer_best(15, 0.9)  # never saved: cannot be the best
  checkpoints.offer_best(20, 0.4)
  assert checkpoints.best() == {"step": 10, "score": 0.5}
  checkpoints.save(30, state, {})
  assert steps() == [10, 20, 30]
  checkpoints.save(40, state, {})
  assert steps() == [10, 30, 40]
  checkpoints.offer_best(40, 0.6)
  checkpoints.save(50, state, {})
  assert steps() == [40, 50]
  checkpoints.close()
  again = Checkpointer(tmp_path, keep=1)  # the best survives the process
  assert again.best() == {"step": 40, "score": 0.6}
  again.save(60, state, {})
  assert steps() == [40, 60]
  again.close()


def test_a_score_may_come_before_its_checkpoint(tmp_path, make_state):
  """Evaluation runs beside the trainer and may be faster than the save."""
  checkpoints = Checkpointer(tmp_path, keep=1)
  checkpoints.offer_best(10, 0.5)
  assert checkpoints.best() == {}
  checkpoints.save(10, make_state(), {})
  assert checkpoints.best() == {"step": 10, "score": 0.5}
  checkpoints.close()


def test_an_older_step_is_not_dropped_silently(tmp_path, make_state):
  checkpoints = Checkpointer(tmp_path, keep=2)
  checkpoints.save(10, make_state(), {})
  with pytest.raises(RunFailed, match="not take a checkpoint of step 5: its newest is of step 10"):
    checkpoints.save(5, make_state(), {})
  checkpoints.close()


def test_another_shape_is_refused_by_name(tmp_path, make_state):
  checkpoints, state = Checkpointer(tmp_path, keep=2), make_state()
  checkpoints.save(1, state, {})
  params = {**state.params, "embed": np.zeros((128, 32), np.float32)}
  like = dataclasses.replace(state, params=params)
  with pytest.raises(UserError, match=r"params\.embed: \(64, 32\) in the checkpoint, \(128, 32\)"):
    checkpoints.restore(1, like)
  with pytest.raises(UserError, match="does not fit this run's model or optimizer.*opt_state"):
    checkpoints.restore(1, make_state(optimizer=optax.sgd(0.1)))
  checkpoints.close()


def test_killed_while_writing(tmp_path, make_state):
  """Whatever files of the next checkpoint exist, the previous one is the newest and readable."""
  done = tmp_path / "done"
  checkpoints, state, newer = Checkpointer(done, keep=5), make_state(), make_state(scale=2.0)
  checkpoints.save(1, state, {"n": 1})
  before = {p.relative_to(done) for p in done.rglob("*")}
  checkpoints.save(2, newer, {"n": 2})
  checkpoints.close()
  files = sorted(p.relative_to(done) for p in (done / "2").rglob("*") if p.is_file())
  assert len(files) > 3
  # Orbax writes into a temporary folder and renames it last: keep the first k files of that.
  temporary = f"2.orbax-checkpoint-tmp-{os.getpid()}"
  for k in (0, 1, len(files) // 2, len(files)):
    half = tmp_path / f"half{k}"
    shutil.copytree(done, half, ignore=lambda d, names: ["2"] if d == str(done) else [])
    assert {p.relative_to(half) for p in half.rglob("*")} == before
    for file in files[:k]:
      target = half / temporary / file.relative_to("2")
      target.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(done / file, target)
    again = Checkpointer(half, keep=5)
    assert again.latest_step() == 1
    restored, meta = again.restore(1, newer)
    assert_bit_equal(restored, state)
    assert meta == {"n": 1}
    again.save(2, newer, {"n": 2})  # and the run goes on over the remains
    assert_bit_equal(again.restore(2, state)[0], newer)
    again.close()


def test_terms(tools):
  terms = terms_of_exactness(tools.mesh_of(2, 2, 2))
  assert terms == json.loads(json.dumps(terms))
  assert terms["mesh"] == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
  assert terms["cores"] >= 1 and terms["libraries"]["jax"] == jax.__version__
  assert changed_terms(terms, terms) == []
  other = {**terms, "cores": 99, "libraries": {**terms["libraries"], "jax": "0.1"}}
  changed = changed_terms(other, terms)
  assert len(changed) == 2 and changed[0] == f"cores: 99 -> {terms['cores']}"
  assert changed[1].startswith("libraries: ") and "0.1" in changed[1]
  assert changed_terms({}, terms) != []
