"""An explorer's process: what a restart of it keeps."""

from __future__ import annotations

import contextlib
import types

import pytest

from trinity_jax import build, exploring, loop
from trinity_jax.config import base_config, resolve
from trinity_jax.errors import RunFailed
from trinity_jax.models.hf import write_tiny_checkpoint
from trinity_jax.monitor.writers import FILE, make_writers, read_jsonl
from trinity_jax.snapshots import Manifest


class Far(Exception):
  pass


@pytest.mark.parametrize(
  ("newest", "kept"), [(None, []), (5, [5]), (10, [5, 10]), (12, [5, 10, 12])]
)
def test_evaluations_that_are_still_true_are_kept(tmp_path, monkeypatch, newest, kept):
  """They were all deleted, and versions that are published once are not evaluated again."""
  c = base_config()
  c.mode, c.explorer.name, c.explorer.deterministic = "explore", "a", False
  c.model.path = str(write_tiny_checkpoint(tmp_path / "model", hidden=32, layers=1))
  c.taskset.generate = "trinity_jax.tasks.arithmetic:generate"
  c.monitor.tensorboard = False
  config = resolve(c)
  exploring.announce(tmp_path, tmp_path / "model")
  own, seen = tmp_path / "explorers" / "a", []
  own.mkdir(parents=True)
  writers = make_writers(config, own)
  for version in (5, 10, 12):
    writers.write(version, {"eval/accuracy": 0.5})
  writers.close()
  if newest is not None:
    (tmp_path / "weights").mkdir()
    manifest = Manifest(newest, 0, f"0-{newest}", newest, "float32", {}, {}, False, 0.0)
    manifest.write(tmp_path / "weights")

  def far(*args, **kwargs):
    raise Far

  monkeypatch.setattr(build, "make_engine", far)
  progress = types.SimpleNamespace(message=seen.append)
  timeline = types.SimpleNamespace(span=None)
  with contextlib.ExitStack() as stack, pytest.raises(Far):
    exploring._explore(stack, config, tmp_path, timeline, progress, None)
  assert [row["step"] for row in read_jsonl(own / FILE)] == kept


def test_what_ends_after_the_last_step():
  """A run that is asked to end then must say so to its other processes, not leave them waiting."""

  def stage(requested):
    preemption = types.SimpleNamespace(requested=requested)
    return types.SimpleNamespace(publisher=None, preemption=preemption)

  def fail():
    raise RunFailed("closed")

  good, bad = types.SimpleNamespace(finish=lambda: None), types.SimpleNamespace(finish=fail)
  assert loop._finish(stage(True), good) and loop._finish(stage(False), good)
  assert not loop._finish(stage(True), bad)
  with pytest.raises(RunFailed):
    loop._finish(stage(False), bad)
