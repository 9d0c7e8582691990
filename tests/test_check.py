"""--mode=check: the plan of every recipe, memory per device, problems named; nothing runs."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import launching
import pytest

from trinity_jax import check as check_lib
from trinity_jax.algorithms.algorithm import make
from trinity_jax.algorithms.table import TABLE
from trinity_jax.config import resolve
from trinity_jax.errors import UserError
from trinity_jax.memory import memory_per_device, one_layer
from trinity_jax.models import sharding
from trinity_jax.models.params import abstract
from trinity_jax.models.presets import PRESETS
from trinity_jax.models.tokenizer import write_byte_tokenizer
from trinity_jax.trainer.trainer import pack_spec

ROOT = launching.ROOT
TINY = "--config.model.tiny={'hidden': 32, 'layers': 1, 'intermediate': 32}"


def config_of(name: str, *overrides: str):
  _, values = launching.launcher().parse(
    ["main.py", f"--config={ROOT / 'configs' / name}.py", *overrides]
  )
  return resolve(values)


@pytest.fixture
def gsm8k(tmp_path) -> list[str]:
  """Flags that give the GSM8K recipes rows, and a model folder without weights."""
  rows = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(200)]
  (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  return [f"--config.taskset.path={tmp_path}/train.jsonl"]


@pytest.fixture
def qwen(tmp_path) -> str:
  """A folder with the config and a tokenizer of Qwen2.5-1.5B's shape."""
  folder = tmp_path / "qwen"
  folder.mkdir()
  model = next(m for name, m in PRESETS.items() if "1.5b" in name.lower())
  (folder / "config.json").write_text(json.dumps(model.to_hf()))
  write_byte_tokenizer(folder, vocab_size=1024, max_length=4096)
  return f"--config.model.path={folder}"


def test_every_algorithm_has_a_recipe(qwen):
  for name, row in TABLE.items():
    _, values = launching.launcher().parse(
      ["main.py", f"--config={ROOT / 'configs' / 'algorithms.py'}:{name}", qwen]
    )
    config = resolve(values)
    assert config.algorithm.name == name
    stage = check_lib.plan(config)  # every key fits its algorithm
    assert stage.algorithm.supervised == row.supervised


def values_of(text: str) -> list[dict[str, str]]:
  return [dict(line.split("  ", 1) for line in stage.splitlines()) for stage in text.split("\n\n")]


def test_every_recipe_is_checked(gsm8k, qwen):
  names = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))
  assert names == ["algorithms", "asynchrony", "blackjack", "calculator_agent", "dpo",
                   "frozen_lake", "gsm8k_grpo", "gsm8k_smoke", "judge", "mixed", "off_policy",
                   "quickstart", "replay", "retrieval", "sft", "sql", "step_wise", "sudoku",
                   "tool_use"]  # fmt: skip
  flags = {"gsm8k_grpo": [*gsm8k, qwen], "gsm8k_smoke": gsm8k, "algorithms": [qwen],
           "asynchrony": [qwen], "off_policy": [qwen], "replay": [qwen]}  # fmt: skip
  for name in names:
    extra = flags.get(name, [])
    config = config_of(name, *extra)
    text = check_lib.check(config)
    stages = text.split("\n\n")
    assert len(stages) == max(1, len(config.stages)), text
    for stage in stages:
      for line in ("algorithm", "model", "devices", "tasks", "steps", "rows", "sampler", "memory"):
        assert f"\n{line} " in stage
      assert "per device, estimated: parameters" in stage and "peak" in stage


def test_recipes_start_with_their_command():
  for path in sorted((ROOT / "configs").glob("*.py")):
    text = path.read_text()
    assert f"python launch/main.py --config=configs/{path.name} --workdir=" in text[:600], path
    assert text.index("python launch/main.py") < 200


def test_numbers_of_the_large_recipe(gsm8k, qwen):
  text = check_lib.check(config_of("gsm8k_grpo", *gsm8k, qwen))
  assert "qwen2, 1,543,714,304 parameters, 28 layers" in text
  assert "8 cpu, mesh {'data': 1, 'fsdp': 8, 'context': 1, 'tensor': 1}" in text
  assert "200, 96 a step, 37.44 epochs" in text
  assert "78 of 768 experiences, saved every 20" in text
  assert "parameters 772 MB, optimizer 1.54 GB" in text  # 1.54e9 x 4 bytes / 8 devices
  assert "published 386 MB" in text  # bfloat16


def test_memory_is_that_of_the_shards():
  """Hand-computed where it is exact; monotonic where it is an estimate."""
  config = config_of("quickstart")
  stage = check_lib.stage_configs(config)[1]
  model = check_lib.model_config(stage)
  numbers = sum(math.prod(s.shape) for s in jax.tree.leaves(abstract(model)))
  assert numbers == model.num_params()

  def measure(changes=(), **mesh):
    c = dataclasses.replace(stage, **dict(changes))
    grid = sharding.make_mesh(**mesh)
    layout = sharding.param_shardings(model, grid)
    programs = check_lib.build.make_programs(c, model, grid, layout, None)
    algorithm = make("grpo", kl_coef=0.0)
    spec = pack_spec(c, algorithm)
    return memory_per_device(c, model, grid, layout, programs, spec, algorithm)

  one = measure(data=1, devices=jax.devices()[:1])
  assert one["parameters"] == one["published"] == 4 * numbers
  assert one["optimizer"] == 8 * numbers and one["reference"] == 0
  s, m = stage.sampler, model
  cache = 2 * 4 * m.num_layers * s.slots * m.num_kv_heads * 13 * m.head_dim
  assert cache <= one["cache"] < 1.2 * cache  # and the requests' arrays
  assert one["sampler"] == one["published"]  # of one version
  kept = sum(one[k] for k in ("parameters", "optimizer", "published", "sampler", "cache"))
  assert one["peak"] == kept + max(one["training"], one["sampling"])

  free = {"sampler": dataclasses.replace(stage.sampler, release=True)}
  released = measure(free, data=1, devices=jax.devices()[:1])
  kept -= one["sampler"] + one["cache"]
  rollouts = one["sampler"] + one["cache"] + one["sampling"]
  assert released["peak"] == kept + max(one["training"], rollouts) < one["peak"]

  offload = {"trainer": dataclasses.replace(stage.trainer, offload="optimizer")}
  offloaded = measure(offload, data=1, devices=jax.devices()[:1])
  assert offloaded["host"] == one["optimizer"] and offloaded["optimizer"] == 0
  there = 4 * numbers + 4 * numbers + 2 * one["optimizer"]  # gradients; moments in and out
  needed = max(one["training"], there)
  kept = sum(one[k] for k in ("parameters", "published", "sampler", "cache"))
  assert offloaded["peak"] == kept + max(needed, one["sampling"]) < one["peak"]

  data = measure(data=8)
  assert data["parameters"] == one["parameters"] and data["cache"] * 8 == one["cache"]
  context = measure(data=1, context=8)
  assert {k: context[k] for k in ("parameters", "cache")} == {
    k: data[k] for k in ("parameters", "cache")
  }
  assert data["training"] < context["training"] < one["training"]  # it gathers keys and values
  fsdp = measure(data=1, fsdp=8)
  assert numbers / 8 <= fsdp["parameters"] / 4 < numbers / 8 + 2000  # norms are on every device
  assert fsdp["training"] < data["training"] < one["training"]
  # The parameters of a layer, which fsdp gathers: all but embedding (and head) and final norm.
  outside = (1 if m.tie_word_embeddings else 2) * m.vocab_size * m.hidden_size + m.hidden_size
  layer = 4 * (numbers - outside) // m.num_layers
  for tensor in (1, 2):
    grid = sharding.make_mesh(1, 8 // tensor, tensor)
    assert one_layer(model, grid, "float32") == layer // tensor
  assert fsdp["sampling"] - data["sampling"] == 2 * layer + 4 * m.vocab_size * m.hidden_size

  # Two devices of each kind: neither holds what only the other needs.
  train = sharding.make_mesh(1, 2, 1, jax.devices()[:2])
  rollout = sharding.make_mesh(1, 1, 2, jax.devices()[2:4])
  programs = check_lib.build.make_programs(
    stage, model, rollout, sharding.param_shardings(model, rollout), None
  )
  layout = sharding.param_shardings(model, train)
  algorithm = make("grpo", kl_coef=0.0)
  spec = pack_spec(stage, algorithm)
  apart = memory_per_device(stage, model, train, layout, programs, spec, algorithm)
  there = apart["sampler"] + apart["cache"] + max(apart["sampler"], apart["sampling"])
  here = sum(apart[k] for k in ("parameters", "optimizer", "published", "training"))
  assert apart["peak"] == max(here, there)
  assert numbers / 2 <= apart["sampler"] / 4 < numbers / 2 + 2000

  remat = {k: measure({"model": dataclasses.replace(stage.model, remat=k)}, data=8)["training"]
           for k in ("none", "dots", "full")}  # fmt: skip
  assert remat["full"] < remat["none"]
  lag = measure({"sync": dataclasses.replace(stage.sync, interval=2, offset=1)}, data=8)
  assert lag["published"] == 3 * data["published"]


def test_check_through_the_launcher_runs_nothing(tmp_path, capsys, monkeypatch):
  """No weights are made or loaded and no workdir is needed."""
  from trinity_jax.models import hf, params

  for module, name in ((hf, "load"), (hf, "write_tiny_checkpoint"), (params, "init")):
    monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("a check must not do this"))
  recipe = launching.write_recipe(tmp_path / "recipe.py", "")
  before = sorted(p.name for p in tmp_path.iterdir())
  main = launching.launcher().main
  assert main(["main.py", f"--config={recipe}", "--mode=check", TINY]) == 0
  out = capsys.readouterr().out
  assert "algorithm  grpo (ppo loss, token-mean)" in out
  assert "steps      2 of 8 experiences, saved every 2" in out
  assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
  ("args", "expected"),
  [
    ([], "config.model.path is empty: give a Hugging Face folder"),
    (["--config.model.tiny={'hiden': 3}"], "config.model.tiny = {'hiden': 3}: tiny_config() got"),
    (["--config.model.tiny={'layers': 0}"], "config.model.tiny = {'layers': 0}: layers = 0, exp"),
    (["--config.model.tiny={'heads': 3}"], "heads = 3, expected a multiple of kv_heads = 2"),
    (["--config.model.path=/none"], "config.model.path = '/none': no such folder"),
    ([TINY, "--config.mesh.tensor=3"], "context=1, tensor=3 does not fit 8 device(s)"),
    ([TINY, "--config.mesh.tensor=4"], "num_kv_heads = 2 does not divide over mesh axis tensor"),
    ([TINY, "--config.trainer.rows_per_micro=3"], "must be a multiple of the 8 devices"),
    ([TINY, "--config.sampler.slots=3"], "config.sampler.slots = 3: must be a multiple of the 8"),
    ([TINY, "--config.taskset.reward=nope"], "nope"),
    ([TINY, "--config.taskset.workflow=single"], "did you mean 'single_turn'?"),
    ([TINY, "--config.sampler.max_prompt_length=3"], "no prompt (a sample of 256 of"),
    ([TINY, "--config.eval.tasksets=({'path': 'no.jsonl'},)"], "taskset file no.jsonl does not"),
    ([TINY, "--config.trainer.batch_size=16"], "config.trainer.batch_size = 16: one optimizer"),
    ([TINY, "--config.algorithm.kl=k9"], "'k9'"),
  ],
)
def test_problems_are_errors(tmp_path, capsys, args, expected):
  recipe = launching.write_recipe(tmp_path / "recipe.py", "")
  assert launching.launcher().main(["main.py", f"--config={recipe}", "--mode=check", *args]) == 1
  err = capsys.readouterr().err
  assert err.count("\n") == 1 and expected in err, err


def test_some_prompts_that_do_not_fit_are_a_warning(tmp_path):
  rows = [{"prompt": "1" * n, "answer": "2"} for n in (3, 4, 30, 5)]
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))
  recipe = launching.write_recipe(tmp_path / "recipe.py", "")
  _, values = launching.launcher().parse([
    "main.py", f"--config={recipe}", TINY, "--config.taskset.generate=",
    f"--config.taskset.path={path}",
  ])  # fmt: skip
  text = check_lib.check(resolve(values))
  assert (
    "warning: stage 'tiny': taskset 'train': 1 of 4 prompts looked at are longer than "
    "sampler.max_prompt_length = 9 (the longest: 33 tokens, row 2, counted from 0)" in text
  )


def test_long_sequences_beyond_the_model_are_pointed_out(gsm8k):
  assert "beware" not in check_lib.check(config_of("gsm8k_smoke", *gsm8k))
  short = "--config.model.tiny.max_positions=1024"
  text = check_lib.check(config_of("gsm8k_smoke", *gsm8k, short))
  assert "beware     sequences of 1056 tokens, but the model was made for 1024" in text


def test_own_workflows_bring_their_own_prompts(tmp_path):
  """Only single_turn's prompts are the rows' own."""
  from trinity_jax.config import TasksetConfig
  from trinity_jax.tasks.prompts import check_prompts, spread

  own = TasksetConfig(workflow="module:function")
  assert check_prompts(own, [], None, 3) == ""  # type: ignore[arg-type]
  assert spread(list(range(1000)), 4) == [0, 250, 500, 750]  # type: ignore[arg-type]
  assert spread([1, 2], 4) == [1, 2]  # type: ignore[arg-type]


def test_model_folder_is_read_without_weights(qwen):
  with pytest.raises(UserError, match="safetensors"):
    from trinity_jax.models import hf

    hf.load(Path(qwen.split("=", 1)[1]))
