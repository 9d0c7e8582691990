"""Keys from the command line, of the whole config and of one stage."""

from __future__ import annotations

import launching
import pytest

from trinity_jax.config import base_config, resolve, stage_configs
from trinity_jax.config_overrides import override
from trinity_jax.errors import UserError


def config(*stages):
  c = base_config()
  c.model.tiny, c.taskset.generate, c.stages = {"hidden": 32}, "a:b", stages
  return c


TWO = (
  {"name": "a", "trainer": {"total_steps": 10}, "algorithm.name": "sft"},
  {"name": "b", "trainer.total_steps": 20, "taskset": {"generate_args": {"rows": 5}}},
)


def stages(*args):
  values, rest = override(config(*TWO), args)
  assert not rest
  return stage_configs(resolve(values))


@pytest.mark.parametrize(
  "name", ["trainer.total_steps", "algorithm.name", "taskset.generate_args.rows",
           "taskset.generate_args.other"],
)  # fmt: skip
def test_a_key_that_a_stage_sets_is_not_overridden_in_vain(name):
  setting = {"trainer.total_steps": "'a' and 'b'", "algorithm.name": "'a'"}.get(name, "'b'")
  with pytest.raises(UserError, match=rf"config\.{name}: {setting} of config.stages set it") as e:
    stages(f"--config.{name}=3")
  last = setting.split()[-1].strip("'")
  assert f"--config.stages.{last}.{name}=..." in str(e.value)


def test_keys_of_one_stage():
  a, b = stages(
    "--config.seed=4", "--config.stages.a.trainer.total_steps=3", "--config.trainer.batch_size=8",
    "--config.stages.b.optimizer.learning_rate=1e-3", "--config.stages.b.explorer.group_size=2",
    "--config.stages.b.taskset.generate_args.rows=7", "--noconfig.stages.b.explorer.deterministic",
  )  # fmt: skip
  assert (a.trainer.total_steps, b.trainer.total_steps) == (3, 20)
  assert a.seed == b.seed == 4 and a.trainer.batch_size == 8
  assert b.optimizer.learning_rate == 1e-3 != a.optimizer.learning_rate
  assert b.taskset.generate_args == {"rows": 7} and a.taskset.generate_args == {}
  assert a.explorer.deterministic and not b.explorer.deterministic


@pytest.mark.parametrize(
  ("arg", "expected"),
  [
    ("--config.stages.c.seed=1", "config.stages.c.seed: no stage of that name; .* stages: a, b"),
    ("--config.stages.a.trainr.x=1", "config.trainr: unknown key; did you mean 'trainer'"),
    ("--config.trainr.x=1", "config.trainr: unknown key; did you mean 'trainer'"),
  ],
)
def test_mistakes(arg, expected):
  with pytest.raises(UserError, match=expected):
    stages(arg)


def test_a_config_without_stages():
  with pytest.raises(UserError, match="the config's stages: none"):
    override(config(), ["--config.stages.a.seed=1"])
  values, rest = override(config(), ["--config.trainer.total_steps=3", "x"])
  assert values.trainer.total_steps == 3 and rest == ["x"]


def test_the_launcher_says_so(capsys):
  args = ["main.py", "--config=configs/quickstart.py", "--mode=check"]
  assert launching.launcher().main([*args, "--config.trainer.total_steps=3"]) == 1
  assert "config.trainer.total_steps: 'sft' and 'grpo' of config.stages" in capsys.readouterr().err
  assert launching.launcher().main([*args, "--config.stages.grpo.trainer.total_steps=3"]) == 0
