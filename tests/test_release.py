"""sampler.release: while the trainer works, the sampler holds nothing on the devices."""

from __future__ import annotations

import importlib.util
import weakref

import jax
import pytest
from launching import write_recipe

from trinity_jax.config import resolve
from trinity_jax.errors import UserError
from trinity_jax.models import hf
from trinity_jax.monitor.writers import read_jsonl
from trinity_jax.run import run
from trinity_jax.sampler.driver import Driver
from trinity_jax.trainer.trainer import Trainer


def config_of(folder, **values):
  model = folder / "model"
  if not model.exists():
    hf.write_tiny_checkpoint(
      model, hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, intermediate=32
    )
  spec = importlib.util.spec_from_file_location("r", write_recipe(folder / "recipe.py", model))
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config()
  c.buffer.url = "memory"
  c.mesh.data = 8
  c.update_from_flattened_dict(values)
  return resolve(c)


@pytest.mark.slow
def test_the_phases_do_not_share_the_memory(tmp_path, monkeypatch):
  drivers, seen, prepared = [], [], []
  init, step, set_params = Driver.__init__, Trainer.step, Driver.set_params

  def watched_init(self, *args, **kwargs):
    init(self, *args, **kwargs)
    drivers.append(self)

  def watched_params(self, *args):
    set_params(self, *args)
    held = jax.tree.leaves((self.params, self._state))
    prepared.append([weakref.ref(x) for x in held])

  def watched_step(self, experiences):
    (driver,) = drivers
    assert driver.params is None and driver._state is None
    seen.append(sum(ref() is not None for ref in prepared[-1]))
    return step(self, experiences)

  monkeypatch.setattr(Driver, "__init__", watched_init)
  monkeypatch.setattr(Driver, "set_params", watched_params)
  monkeypatch.setattr(Trainer, "step", watched_step)
  run(config_of(tmp_path, **{"sampler.release": True}), tmp_path / "released")
  assert seen == [0, 0] and all(prepared)  # not one array of the rollout phase is left
  monkeypatch.undo()
  run(config_of(tmp_path), tmp_path / "kept")
  a, b = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("released", "kept"))
  for name in ("loss", "reward/mean", "grad_norm", "logprob_diff/max", "response_length/mean"):
    assert [r[name] for r in a] == [r[name] for r in b], name


def test_rollouts_that_never_rest_keep_their_memory(tmp_path):
  with pytest.raises(UserError, match="config.sampler.release = True: rollouts never rest"):
    config_of(tmp_path, **{"sampler.release": True, "sync.offset": 1})
