"""A stage's plan: memory, time, verdict and advice, from what a compiler would say."""

from __future__ import annotations

import dataclasses
import types

import jax
import launching
import numpy as np
import pytest

from trinity_jax.config import base_config, resolve
from trinity_jax.errors import UserError
from trinity_jax.memory import memory_per_device
from trinity_jax.plan import choosing, lowering, report
from trinity_jax.plan.costs import Collective, Cost
from trinity_jax.plan.lowering import Compiled
from trinity_jax.plan.topologies import Chip, Topology

CHIP = Chip(1e12, 50e6, 1e10, 1e9, source="a data sheet")
TINY = dict(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocab_size=512)


def config(**changes):
  c = base_config()
  c.model.tiny = TINY
  c.taskset.generate = "trinity_jax.tasks.arithmetic:generate"
  c.sampler.slots = 8
  c.sampler.max_prompt_length = 24
  c.sampler.max_response_length = 8
  c.sampler.prefill_batches = (1,)
  c.sampler.prompt_buckets = (16, 24)
  c.sampler.cache_buckets = (32,)
  c.sampler.prefill_chunk = 24
  c.explorer.batch_size = 6
  c.explorer.group_size = 4
  c.trainer.rows_per_micro = 4
  c.trainer.row_lengths = (32, 64)
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, 2, 2
  for key, value in changes.items():
    group, name = key.split("__")
    c[group][name] = value
  return resolve(c)


def topology(chip=CHIP):
  return Topology("four", jax.devices()[:4], chip)


def compiled(temporary=1_000_000, **exceeds):
  """What a compiler might say: numbers that can be followed."""
  busy = Cost(
    4e9,
    2e7,
    (
      Collective("all-gather", 3e6, 1000, (0, 1), False),
      Collective("all-reduce", 2e6, 9, (0, 1), True),
    ),
  )
  idle = Cost(1e7, 1e7)
  return [
    Compiled("train step", 5, 100, temporary, 200, None if exceeds else busy,
             exceeds.get("train", 0.0)),
    Compiled("prefill", 5, 10, 2000, 30, idle),
    Compiled("decode", 5, 10, 5000, 30, idle),
    Compiled("publish", 5, 7000, 0, 1, idle),
    Compiled("prepare", 5, 7000, 0, 1, idle),
  ]  # fmt: skip


@pytest.fixture
def made(monkeypatch):
  def make(chip=CHIP, temporary=1_000_000, exceeds=0.0, **changes):
    found = compiled(temporary, **({"train": exceeds} if exceeds else {}))
    monkeypatch.setattr(report, "compile_all", lambda stage, note: found)
    return report.make_plan(config(**changes), topology(chip))

  return make


def test_times():
  cost = compiled()[0].cost
  times = report.times_of(cost, CHIP)
  assert times == (4e-3, 2e-3, 3e-3, 2e-3)
  assert times.total == 7e-3  # the all-reduce hides behind the products
  slow = report.times_of(cost, CHIP._replace(link=1e8))
  assert slow.total == pytest.approx(4e-3 + 30e-3 + (20e-3 - 4e-3))
  assert report.times_of(cost, CHIP._replace(host=1, far=1e8)).total == pytest.approx(slow.total)


def test_step(made):
  """24 sequences of 32 tokens, two to a row of 64: three micro-batches of four rows."""
  plan = made()
  assert plan.stage.micros == 3 and plan.stage.longest == 32
  assert report.tokens_per_device(plan.stage) == 3 * 4 * 64 / 4
  assert lowering.programs(plan.stage)["train step"][1] == (3.0, 1.0)
  # One prompt of a group on each of two shards at a time; three waves of eight slots, 8 tokens.
  assert plan.step == pytest.approx(
    {"prefill": 3 * 1e-3, "decode": 3 * 8 * 1e-3, "train": 7e-3, "publish": 2e-3}
  )


def test_every_host_samples(made):
  """Two hosts of two devices, each with eight slots: two waves instead of three."""
  plan = made()
  devices = np.array([types.SimpleNamespace(process_index=i // 2) for i in range(4)])
  hosts = plan.stage.meshes._replace(train=types.SimpleNamespace(devices=devices))
  stage = plan.stage._replace(meshes=hosts)
  assert (plan.stage.samplers, stage.samplers) == (1, 2)
  times = {name: plan.times[name] for name in ("prefill", "decode")}
  assert report.step_seconds(stage, times, CHIP) == pytest.approx(
    {"prefill": 2 * 1e-3, "decode": 2 * 8 * 1e-3}
  )


def test_memory_is_the_compilers(made):
  plan = made()
  kept = sum(plan.memory[k] for k in plan.estimate if k not in ("training", "sampling", "peak"))
  assert plan.memory["training"] == 1_000_000 + 200 + 100
  assert plan.memory["sampling"] == 5040 and plan.memory["publishing"] == 7001
  assert plan.memory["peak"] == kept + 1_000_300 and plan.fits
  for key in ("parameters", "optimizer", "published", "reference", "sampler", "cache"):
    assert plan.memory[key] == plan.estimate[key] > 0


def test_released_samplers_do_not_count_while_training(made):
  kept, released = made(), made(sampler__release=True)
  gone = kept.memory["sampler"] + kept.memory["cache"]
  assert kept.memory["peak"] - released.memory["peak"] == gone


def test_remote_samplers_need_nothing_here():
  stage = lowering.stage_on(config(sampler__engine="openai"), jax.devices()[:4])
  assert set(lowering.programs(stage)) == {"train step", "publish"}
  memory = report.estimate(stage)
  assert memory["sampler"] == memory["cache"] == memory["sampling"] == 0


def test_text_of_a_plan(made):
  text = report.render(made())
  assert "four: 4 x 1 TFLOP/s, 0.05 GB at 10 GB/s, links 1 GB/s (a data sheet)" in text
  assert "data 1, fsdp 2, context 1, tensor 2" in text
  assert "24 sequences of up to 32 tokens: 3 micro-batches of 4 x 64, 192 tokens a device" in text
  assert "sends in GB: all-gather 0.003, all-reduce 0.002; the largest all-gather has 1,000" in text
  assert "fits" in text and "does NOT fit" not in text and "change" not in text
  assert "estimate of a step: 0.036 s" in text and "An estimate:" in text
  assert "not in this estimate: the reference's log-probs" in text


def test_what_to_change(made):
  plan = made(CHIP._replace(memory=2e6), temporary=2_000_000)
  assert not plan.fits
  text = report.render(plan)
  assert "does NOT fit" in text and "change config.trainer.rows_per_micro = 2: about" in text
  advice = report.advice(plan)
  assert any(a.startswith("config.model.remat = 'full'") for a in advice)
  fitting = [a.endswith(", fits") for a in advice]
  assert fitting == sorted(fitting, reverse=True)  # those that fit come first
  assert any(a.startswith("config.sampler.release = True") for a in advice)
  ahead = made(CHIP._replace(memory=2e6), temporary=2_000_000, sync__offset=1)
  assert not any("release" in a for a in report.advice(ahead))  # not on-policy: it cannot be had
  lean = made(CHIP._replace(memory=1.0), trainer__rows_per_micro=2, model__remat="full")
  assert not any("remat" in a for a in report.advice(lean))


def test_a_program_that_its_compiler_refuses(made):
  plan = made(exceeds=60e6)
  assert plan.peak == 60e6 and not plan.fits and "train step" not in plan.times
  text = report.render(plan)
  assert "does not fit: its compiler asks for 0.06 GB" in text and "change config." in text
  assert report.gathered_layers(plan) == "-"


def test_the_compilers_words():
  assert lowering.exceeded("... Used 23.50G of 15.75G hbm. Exceeded hbm capacity by 7.75G") == (
    23.5 * 2**30
  )
  assert lowering.exceeded("INTERNAL: something else") == 0


def test_published_models_go_by_name():
  c = config()
  named = dataclasses.replace(c, model=dataclasses.replace(c.model, path="Qwen3-8B"))
  assert lowering.model_of(named).num_layers == 36
  wrong = dataclasses.replace(c, model=dataclasses.replace(c.model, path="Qwen3-8"))
  with pytest.raises(
    UserError, match=r"config.model.path = 'Qwen3-8': neither a folder .*Qwen3-8B"
  ):
    lowering.model_of(wrong)


def test_rows_that_fit():
  def peak(rows):
    stage = lowering.stage_on(config(trainer__rows_per_micro=rows), jax.devices()[:4])
    return memory_per_device(
      stage.config, stage.model, stage.meshes.train, stage.layout, stage.sampler, stage.spec,
      stage.algorithm,
    )["peak"]  # fmt: skip

  enough = CHIP._replace(memory=1.001 * peak(8) / choosing.ROOM)
  assert choosing.rows_that_fit(config(), topology(enough)) == 8
  with pytest.raises(UserError, match="2 rows of 64 tokens are estimated to need .* shorter rows"):
    choosing.rows_that_fit(config(), topology(CHIP._replace(memory=1e3)))
  with pytest.raises(UserError, match="memory of these devices is not known"):
    choosing.rows_that_fit(config(), topology(None))
  assert choosing.rows_that_fit(config(), topology(CHIP._replace(memory=1e15))) == 32


@pytest.mark.slow
def test_plan_through_the_launcher(tmp_path, capsys, monkeypatch):
  """Compiled for the devices at hand; no weights are made and nothing runs."""
  from trinity_jax.models import hf, params

  for module, name in ((hf, "load"), (hf, "write_tiny_checkpoint"), (params, "init")):
    monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("a plan must not do this"))
  recipe = launching.write_recipe(tmp_path / "recipe.py", "")
  flags = [f"--config={recipe}", "--mode=plan", f"--config.model.tiny={TINY}"]
  assert launching.launcher().main(["main.py", *flags]) == 0
  out, err = capsys.readouterr()
  assert "local: 8 x" in out and "fits" in out and "measured on these devices" in out
  assert "train step compiled in" in err and "decode compiled in" in err
  assert launching.launcher().main(["main.py", *flags, "--topology=v9:1x1"]) == 1
  assert "error: --topology=v9:1x1: no such devices" in capsys.readouterr().err
