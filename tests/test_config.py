"""Config: every kind of mistake is one line that names key, value, limit and fix."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from trinity_jax import config_keys, config_schema
from trinity_jax.config import base_config, resolve, stage_configs
from trinity_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def minimal(**changes):
  c = base_config()
  c.model.tiny = dict(hidden=32)
  c.taskset.generate = "module:function"
  for path, value in changes.items():
    node = c
    *groups, leaf = path.split("__")
    for group in groups:
      node = node[group]
    with c.unlocked():  # a file cannot do this; a hand-made dict can
      node._fields[leaf] = value  # past ConfigDict's own type check
  return c


def message(config) -> str:
  with pytest.raises(UserError) as e:
    resolve(config)
  assert "\n" not in str(e.value)
  return str(e.value)


def test_defaults_resolve_to_frozen_dataclasses():
  c = resolve(minimal())
  assert c.trainer.total_steps == 100 and c.sampler.prefill_batches == (1, 8)
  with pytest.raises(dataclasses.FrozenInstanceError):
    c.seed = 3  # type: ignore[misc]
  # A dict is as good as a ConfigDict, and keys left out have their defaults.
  assert resolve({"model": {"path": "x"}, "taskset": {"path": "y"}}).explorer.group_size == 8


def test_defaults_are_not_shared():
  a, b = config_schema.Config(), config_schema.Config()
  assert a.model.tiny is not config_schema.ModelConfig().tiny
  first, second = base_config(), base_config()
  first.model.tiny.hidden = 7
  first.explorer.group_size = 3
  assert "hidden" not in second.model.tiny and second.explorer.group_size == 8
  assert a == b


def test_base_config_is_locked_but_arguments_are_free():
  c = base_config()
  with pytest.raises(AttributeError, match='Did you mean "total_steps"'):
    c.trainer.total_step = 3
  with pytest.raises(AttributeError, match='Did you mean "trainer"'):
    c.trainr = 3
  free = [path for path, _, default in config_keys.walk() if isinstance(default, dict)]
  assert "algorithm.policy_loss_args" in free and len(free) >= 5
  for path in free:
    node = c
    for part in path.split("."):
      node = node[part]
    node.anything = 1
    assert node.anything == 1


def test_every_key_is_documented_and_its_default_is_within_its_limits():
  seen = set()
  for path, meta, default in config_keys.walk():
    assert path not in seen and len(meta["doc"]) > 4 and meta["doc"].endswith("."), path
    assert meta["choices"] is None or default in meta["choices"], path
    seen.add(path)
  resolve(minimal())  # checks every default against its own type and limits


def test_every_key_is_read_somewhere():
  """A key that nothing reads is a lie; its name must occur as an attribute in the code."""
  code = "\n".join(
    p.read_text()
    for folder in ("trinity_jax", "launch")
    for p in sorted((ROOT / folder).rglob("*.py"))
    if p.name != "config_schema.py"
  )
  unread = [
    path
    for path, _, _ in config_keys.walk()
    if not re.search(rf"\.{path.rsplit('.', 1)[-1]}\b", code)
  ]
  assert unread == []


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({"trainer__total_steps": "x"}, "config.trainer.total_steps = 'x': expected int, got str"),
    ({"trainer__total_steps": True}, "config.trainer.total_steps = True: expected int, got bool"),
    ({"trainer__total_steps": 1.5}, "config.trainer.total_steps = 1.5: expected int, got float"),
    ({"trainer__total_steps": 0}, "config.trainer.total_steps = 0: must be at least 1"),
    ({"optimizer__learning_rate": "a"}, "config.optimizer.learning_rate = 'a': expected float"),
    ({"optimizer__learning_rate": 0.0}, "config.optimizer.learning_rate = 0.0: must be above 0"),
    ({"optimizer__learning_rate": float("nan")}, "learning_rate = nan: must be above 0"),
    ({"optimizer__beta1": 1.5}, "config.optimizer.beta1 = 1.5: must be at most 1.0"),
    ({"explorer__deterministic": 1}, "config.explorer.deterministic = 1: expected bool, got int"),
    ({"name": 3}, "config.name = 3: expected str, got int"),
    ({"taskset__generate_args": 3}, "config.taskset.generate_args = 3: expected dict, got int"),
    ({"sampler__prompt_buckets": 16}, "config.sampler.prompt_buckets = 16: expected tuple"),
    ({"sampler__prompt_buckets": (16, "a")}, "prompt_buckets[1] = 'a': expected a positive int"),
    ({"sampler__prefill_batches": (0,)}, "prefill_batches[0] = 0: expected a positive int"),
    ({"trainer__row_lengths": (True,)}, "row_lengths[0] = True: expected a positive int"),
    ({"stages": ("sft",)}, "config.stages[0] = 'sft': expected dict"),
    ({"eval__tasksets": (3,)}, "config.eval.tasksets[0] = 3: expected dict"),
    ({"eval__tasksets": ({"pth": "x"},)}, "eval.tasksets[0].pth: unknown key; did you mean 'path'"),
    ({"eval__tasksets": ({"limit": -1},)}, "eval.tasksets[0].limit = -1: must be at least 0"),
    ({"optimizer__schedule": "cosin"}, "'cosin': expected one of 'constant', 'cosine', 'linear'; "
     "did you mean 'cosine'?"),
    ({"trainer": 4}, "config.trainer = 4: expected a group of keys"),
    ({"traner": 4}, "config.traner: unknown key; did you mean 'trainer'?"),
    ({"trainer__total_step": 4}, "config.trainer.total_step: unknown key; did you mean 'total_ste"),
    ({"zzz": 4}, "config.zzz: unknown key; known: algorithm, buffer"),
  ],
)  # fmt: skip
def test_wrong_values_are_named(changes, expected):
  assert expected in message(minimal(**changes))


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({"model__tiny": {}}, "config.model.path is empty"),
    ({"taskset__generate": ""}, "config.taskset.path is empty"),
    ({"trainer__row_lengths": (64,)}, "row_lengths = (64,): the longest must hold 2048 tokens"),
    ({"sampler__cache_buckets": (64,)}, "cache_buckets = (64,): the longest must hold 2048 tokens"),
    ({"sampler__prompt_buckets": (64,)}, "max_prompt_length and prefill_chunk); add 1024"),
    ({"sampler__prefill_batches": ()}, "config.sampler.prefill_batches = ()"),
    ({"sampler__temperature": 0.0}, "greedy runs of a group are all equal"),
    ({"sampler__top_p": 0.9}, "use top_p=1.0 and top_k=0"),
    ({"sampler__top_k": 5}, "use top_p=1.0 and top_k=0"),
    ({"trainer__batch_size": 12}, "must be a multiple of explorer.group_size = 8"),
    ({"buffer__capacity": 8}, "config.buffer.capacity = 8: must hold one step of 64"),
    ({"algorithm__kl_coef": -0.5}, "config.algorithm.kl_coef = -0.5: expected 0 or more, or -1"),
  ],
)
def test_keys_that_contradict_each_other(changes, expected):
  assert expected in message(minimal(**changes))


def test_stages_merge_dotted_and_nested_names():
  c = minimal()
  c.stages = (
    {"name": "a", "trainer.total_steps": 5, "optimizer": {"learning_rate": 1, "warmup_steps": 2}},
    {"name": "b", "trainer": {"total_steps": 7}, "model.tiny.layers": 3,
     "algorithm.policy_loss_args": {"clip_high": 0.28}},
  )  # fmt: skip
  a, b = stage_configs(resolve(c))
  assert (a.name, a.trainer.total_steps, a.optimizer.learning_rate, a.optimizer.warmup_steps) == (
    "a", 5, 1.0, 2
  )  # fmt: skip
  assert isinstance(a.optimizer.learning_rate, float)
  assert a.optimizer.beta1 == 0.9 and a.trainer.save_interval == 50
  assert (b.trainer.total_steps, b.optimizer.warmup_steps) == (7, 0)
  assert b.model.tiny == {"hidden": 32, "layers": 3} and a.model.tiny == {"hidden": 32}
  assert b.algorithm.policy_loss_args == {"clip_high": 0.28}
  assert a.stages == b.stages == ()


def test_a_stage_replaces_free_arguments_given_whole():
  c = minimal()
  c.taskset.generate_args = dict(split="sft", n=4)
  c.stages = ({"name": "a", "taskset.generate_args": {"split": "rl"}},
              {"name": "b", "taskset.generate_args.split": "rl"})  # fmt: skip
  a, b = stage_configs(resolve(c))
  assert a.taskset.generate_args == {"split": "rl"}
  assert b.taskset.generate_args == {"split": "rl", "n": 4}


@pytest.mark.parametrize(
  ("stage", "expected"),
  [
    ({"trainer.total_steps": 5}, "config.stages[0].name = '': expected a name of its own"),
    ({"name": "a/b"}, "config.stages[0].name = 'a/b'"),
    ({"name": 3}, "config.stages[0].name = 3"),
    ({"name": "s", "trainr.x": 5}, "stage 's': config.trainr: unknown key; did you mean 'trainer'"),
    ({"name": "s", "trainer.total_stepz": 5}, "stage 's': config.trainer.total_stepz: unknown key"),
    ({"name": "s", "trainer": {"total_steps": "x"}}, "stage 's': config.trainer.total_steps = 'x'"),
    ({"name": "s", "trainer.total_steps.x": 5}, "config.trainer.total_steps = {'x': 5}: expected"),
    ({"name": "s", "explorer.group_size": 0}, "config.explorer.group_size = 0: must be at least 1"),
    ({"name": "s", "sampler.top_k": 5}, "stage 's': config.sampler.top_p = 1.0, top_k = 5"),
    ({"name": "s", "stages": ()}, "stage 's': config.stages belongs to the whole run"),
    ({"name": "s", "explorer": 4}, "stage 's': config.explorer = 4: expected a group of keys"),
  ],
)
def test_wrong_stages_are_named(stage, expected):
  assert expected in message(minimal(stages=(stage,)))


def test_two_stages_of_one_name():
  assert "config.stages[1].name = 'a'" in message(minimal(stages=({"name": "a"}, {"name": "a"})))


def test_a_stage_whose_model_the_next_one_needs():
  c = minimal(stages=({"name": "a", "trainer.save_hf": "never"}, {"name": "b"}))
  assert "stage 'a': config.trainer.save_hf = 'never', but the next stage starts" in message(c)
  assert resolve(minimal(stages=({"name": "a", "trainer.save_hf": "never"},))).stages


def test_keys_are_listed_with_default_limits_and_meaning():
  text = config_keys.render_keys()
  for path, meta, default in config_keys.walk():
    assert f"config.{path} = {default!r}" in text
    assert meta["doc"].split()[0] in text
  assert "config.explorer.group_size = 8  (int >= 1)\n    Runs per task." in text
  assert "config.optimizer.beta1 = 0.9  (float >= 0.0 and <= 1.0)" in text
  assert "config.trainer.save_hf = 'last'  (one of 'last', 'always', 'never')" in text
  assert "config.sampler.prefill_batches = (1, 8)  (tuple of int)" in text
  assert config_keys.describe("trainer").startswith("a group of keys")
  assert config_keys.describe("nothing") == ""


def test_check_key():
  for path, _, default in config_keys.walk():
    config_keys.check_key(path)
    if isinstance(default, dict):
      config_keys.check_key(f"{path}.anything.goes")
  for path, expected in (
    ("trainr.x", "config.trainr: unknown key; did you mean 'trainer'"),
    ("trainer.total_step", "config.trainer.total_step: unknown key; did you mean 'total_steps'"),
    ("seed.x", "config.seed.x: unknown key; config.seed is one value"),
  ):
    with pytest.raises(UserError, match=re.escape(expected)):
      config_keys.check_key(path)


@pytest.mark.parametrize(
  ("values", "expected"),
  [
    ({"sync.style": "fully_async"}, "config.sync.style = 'fully_async'.*explorer.deterministic"),
    ({"explorer.over_rollout": 0.5}, "config.explorer.over_rollout = 0.5.*deterministic=False"),
    ({"buffer.max_uses": 2}, "config.buffer.max_uses = 2.*deterministic=False"),
    (
      {"sync.style": "explorer_driven", "explorer.deterministic": False, "mode": "train"},
      "explorers can ask for weights in --mode=both only",
    ),
  ],
)
def test_what_depends_on_the_clock_is_not_deterministic(values, expected):
  c = base_config()
  c.model.path = c.taskset.path = "unused"
  c.update_from_flattened_dict(values)
  with pytest.raises(UserError, match=expected):
    resolve(c)
