"""--mode=bench: every checkpoint on every set, once."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import launching
import numpy as np
import pytest

from trinity_jax import bench as bench_lib
from trinity_jax import build
from trinity_jax.bench import bench, measures, table
from trinity_jax.checksums import checksums
from trinity_jax.config import resolve
from trinity_jax.errors import UserError
from trinity_jax.experience import Experience, ExperienceId, StopReason
from trinity_jax.models import hf, sharding
from trinity_jax.models import params as params_lib
from trinity_jax.sampler.request import Completion
from trinity_jax.trainer.checkpoint import Checkpointer, restore_params
from trinity_jax.trainer.state import TrainState

SIZES = {"hidden": 32, "layers": 1, "intermediate": 32}


class Engine:
  """Answers a length that only the weights and the request's key decide."""

  def __init__(self):
    self.given, self.requests, self.closed, self.version, self.digest = [], 0, False, -1, 0

  def start(self):
    pass

  def close(self):
    self.closed = True

  def set_params(self, version, params):
    assert version > self.version
    self.version, self.digest = version, checksums(params)["embed"]
    self.given.append(params)

  def member(self, order):
    return self

  def enter(self):
    pass

  def leave(self):
    pass

  async def generate(self, request):
    await asyncio.sleep(0)
    self.requests += 1
    n = 1 + (int(request.key[0]) + self.digest) % request.limit
    tokens = np.full(n, ord("a") + 3, np.int32)
    return Completion(
      tokens, np.zeros(n, np.float32), np.zeros(n, np.int32), np.zeros(n, bool), StopReason.STOP
    )

  def describe(self):
    return "a fake"


def config_of(tmp_path, names=("sums",), runs=3, temperature=1.0, **changes):
  values = launching.launcher().load_config(str(launching.write_recipe(tmp_path / "recipe.py", "")))
  values.model.tiny = SIZES
  given = dict(generate="trinity_jax.tasks.arithmetic:generate", reward="graded:by_length")
  values.eval.tasksets = tuple(
    dict(name=n, generate_args={"split": "eval"}, limit=5 + i, **given) for i, n in enumerate(names)
  )
  values.eval.runs, values.eval.temperature = runs, temperature
  values.update_from_flattened_dict(changes)
  return values


def weights(model, step):
  """Weights of a step."""
  return jax.tree.map(
    lambda spec: jnp.full(spec.shape, 0.1 + step, jnp.float32), params_lib.abstract(model)
  )


def save(directory, model, *steps):
  checkpoints = Checkpointer(directory / "checkpoints", keep=9)
  for step in steps:
    zero = jnp.zeros((), jnp.int32)
    # Moments that nobody reads: they could not be of any model.
    state = TrainState(weights(model, step), {"mu": jnp.ones(3)}, zero, zero, zero, jnp.zeros(()))
    checkpoints.save(step, state, {})
  checkpoints.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run with checkpoints of steps 2 and 4 and the model of step 4."""
  out = tmp_path_factory.mktemp("bench") / "run"
  hf.write_tiny_checkpoint(out / "model", **SIZES)
  model = hf.load_config(out / "model")
  save(out, model, 2, 4)
  hf.save(out / "hf", weights(model, 4), model, tokenizer_dir=out / "model")
  return out


@pytest.fixture
def workdir(tmp_path, finished):
  """A copy of its own."""
  return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def model(finished):
  return hf.load_config(finished / "model")


@pytest.fixture
def engines(monkeypatch):
  """The engines that were made."""
  made = []

  def make(*args, **kwargs):
    made.append(Engine())
    return made[-1]

  monkeypatch.setattr(build, "make_engine", make)
  return made


def quiet(config, workdir):
  lines = []
  return bench(config, workdir, report=lines.append)["results"], lines


def names(results):
  return [(r["checkpoint"], r["set"]) for r in results]


def scores(results):
  return [{k: v for k, v in r.items() if k != "seconds"} for r in results]


def test_every_checkpoint_on_every_set(tmp_path, workdir, engines):
  config = config_of(tmp_path, ("sums", "more"))
  results, lines = quiet(config, workdir)
  assert names(results) == [(c, s) for c in ("2", "4", "hf") for s in ("sums", "more")]
  assert [r["step"] for r in results[::2]] == [2, 4, 4]
  assert json.loads((workdir / "bench.json").read_text()) == {"results": results}
  assert (workdir / "bench.png").read_bytes()[:4] == b"\x89PNG"
  (engine,) = engines
  assert engine.closed
  # hf holds the weights of step 4, which are not sampled again.
  assert len(engine.given) == 2 and engine.requests == 2 * 3 * (5 + 6)
  assert scores([{**r, "checkpoint": "", "stamp": 0} for r in results[2:4]]) == scores(
    [{**r, "checkpoint": "", "stamp": 0} for r in results[4:]]
  )
  assert results[0]["weights"] != results[2]["weights"] == results[4]["weights"]
  for r in results:
    assert 0 <= r["worst@3"] <= r["mean@3"] <= r["best@3"] <= 1
    assert r["tasks"] == (5 if r["set"] == "sums" else 6)
  assert any(r["worst@3"] < r["mean@3"] < r["best@3"] for r in results)
  assert len(lines) == 6 + 2 and "best@k" in lines[-2] and str(workdir) in lines[-1]

  # A rerun has nothing to do, another run of the same gives the same, to the bit.
  assert quiet(config, workdir)[0] == results and len(engines) == 1
  (workdir / "bench.json").unlink()
  assert scores(quiet(config, workdir)[0]) == scores(results)


def test_a_rerun_does_what_is_new(tmp_path, workdir, engines, model):
  results, _ = quiet(config_of(tmp_path), workdir)
  asked = lambda: engines[-1].requests // (3 * 5)
  assert asked() == 2

  save(workdir, model, 6)  # the run went on: hf now counts as of step 6, with weights of 4
  again, _ = quiet(config_of(tmp_path), workdir)
  assert names(again) == [("2", "sums"), ("4", "sums"), ("6", "sums"), ("hf", "sums")]
  assert again[:2] == results[:2] and asked() == 1

  shutil.rmtree(workdir / "checkpoints" / "2")  # the result of a deleted checkpoint stays
  hotter, _ = quiet(config_of(tmp_path, temperature=0.7), workdir)
  assert names(hotter) == names(again) and hotter[0] == again[0]
  assert [r["settings"]["temperature"] for r in hotter] == [1.0, 0.7, 0.7, 0.7]

  both, _ = quiet(config_of(tmp_path, ("sums", "more"), temperature=0.7), workdir)
  assert [r for r in both if r["set"] == "sums"] == hotter
  assert engines[-1].requests == 3 * 3 * 6


def test_a_bench_that_was_stopped_goes_on(tmp_path, workdir, engines, monkeypatch):
  measure, count = bench_lib._Bench._measure, []

  def stopped(*args):
    if count:
      raise KeyboardInterrupt
    count.append(1)
    return measure(*args)

  monkeypatch.setattr(bench_lib._Bench, "_measure", stopped)
  with pytest.raises(KeyboardInterrupt):
    quiet(config_of(tmp_path), workdir)
  assert engines[0].closed
  assert names(json.loads((workdir / "bench.json").read_text())["results"]) == [("2", "sums")]
  monkeypatch.setattr(bench_lib._Bench, "_measure", measure)
  assert len(quiet(config_of(tmp_path), workdir)[0]) == 3
  assert len(engines[1].given) == 1


def test_a_checkpoint_that_the_run_deletes_meanwhile(tmp_path, workdir, engines, monkeypatch):
  load = bench_lib._Bench._load

  def late(self, one, layout):
    if one.name == "2":
      shutil.rmtree(one.path)
    return load(self, one, layout)

  monkeypatch.setattr(bench_lib._Bench, "_load", late)
  results, lines = quiet(config_of(tmp_path), workdir)
  assert names(results) == [("4", "sums"), ("hf", "sums")]
  assert lines[0] == "tiny 2: deleted meanwhile, not evaluated"
  (workdir / "checkpoints" / "4" / "state" / "manifest.ocdbt").unlink()
  with pytest.raises(Exception, match="is damaged or was deleted"):  # damaged: not skipped
    quiet(config_of(tmp_path), workdir)


def test_stages_each_with_their_own_sets(tmp_path, workdir, engines, model):
  config = config_of(tmp_path)
  config.stages = ({"name": "sft", "eval.tasksets": ()}, {"name": "rl"}, {"name": "more"})
  for stage in ("sft", "rl", "more"):
    (workdir / stage).mkdir()
    save(workdir / stage, model, 1)
  results, _ = quiet(config, workdir)
  assert [(r["stage"], r["checkpoint"]) for r in results] == [("rl", "1"), ("more", "1")]
  assert (workdir / "bench.png").exists()


def test_wrong_inputs(tmp_path, workdir, engines):
  def refused(match, workdir=workdir, **kwargs):
    with pytest.raises(UserError, match=match):
      quiet(config_of(tmp_path, **kwargs), workdir)

  refused(r"eval\.temperature = 0\.0 with eval\.runs = 3: greedy runs", temperature=0.0)
  refused(r"config\.eval\.tasksets is empty", names=())
  refused("several are named 'x'", names=("x", "x"))
  refused("holds no run of this config", workdir=tmp_path / "elsewhere")
  (tmp_path / "new" / "model").mkdir(parents=True)
  refused("holds no checkpoint to evaluate", workdir=tmp_path / "new")
  (workdir / "bench.json").write_text('{"results": [')
  refused(r"bench\.json: damaged .* delete it")
  assert not engines


def test_parameters_alone_are_restored(finished, model):
  mesh = sharding.make_mesh(1, 2, 2, jax.devices()[:4])
  layout = sharding.param_shardings(model, mesh)
  like = jax.tree.map(
    lambda spec, s: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16, sharding=s),
    params_lib.abstract(model), layout,
  )  # fmt: skip
  found = restore_params(finished / "checkpoints", 4, like)
  for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(like)):
    assert leaf.dtype == jnp.bfloat16 and leaf.sharding == wanted.sharding
  assert checksums(found) == checksums(weights(model, 4), dtype=jnp.bfloat16)
  other = params_lib.abstract(dataclasses.replace(model, hidden_size=64))
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=one), other)
  with pytest.raises(UserError, match=r"does not fit the model: embed: \(320, 32\) in the check"):
    restore_params(finished / "checkpoints", 4, like)


def graded(batch, task, run, score):
  id = ExperienceId(batch, task, run, 0)
  if score is None:
    return Experience.failed(id, StopReason.ERROR, {})
  return SimpleNamespace(
    metrics={"rewards/accuracy": score}, reward=score + 1, stop_reason=StopReason.STOP,
    num_actions=4,
  )  # fmt: skip


def test_measures_and_table():
  of = [[0.0, 1.0], [1.0, 1.0], [0.0, None], [0.5, 0.0]]
  found = measures([[graded(1, t, r, s) for r, s in enumerate(g)] for t, g in enumerate(of)])
  means = np.array([0.5, 1.0, 0.0, 0.25])
  assert found == {
    "mean@2": means.mean(),
    "best@2": (1 + 1 + 0 + 0.5) / 4,
    "worst@2": (0 + 1 + 0 + 0) / 4,
    "stderr": pytest.approx(np.sqrt(sum((means - 0.4375) ** 2) / 3) / 2),
    "reward": (1 + 2 + 2 + 2 + 1 + 0 + 1.5 + 1) / 8,
    "errored": 1 / 8,
    "length": 4 * 7 / 8,
    "tasks": 4,
  }
  entry = {**found, "stage": "rl", "checkpoint": "10", "set": "sums", "settings": {"runs": 2}}
  better = {**entry, "checkpoint": "20", "mean@2": 0.75}
  lines = table([entry, better]).splitlines()
  assert lines[2].split() == "rl 10 sums 0.438 ± 0.213 0.625 0.250 2 4 12.5%".split()
  assert lines[3].split() == "rl 20 sums 0.750 ± 0.213 * 0.625 0.250 2 4 12.5%".split()


@pytest.mark.slow
def test_a_real_run(tmp_path):
  """Trained, evaluated while it trained, and evaluated again by the bench: the same accuracy."""
  from trinity_jax.run import run

  values = config_of(tmp_path, runs=2)
  values.eval.interval, values.trainer.save_interval, values.trainer.keep = 1, 1, 9
  run(resolve(values), tmp_path / "run")
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
  seen = {r["step"]: r["eval/accuracy"] for r in rows if "eval/accuracy" in r}
  results, _ = quiet(values, tmp_path / "run")
  assert names(results) == [("1", "sums"), ("2", "sums"), ("hf", "sums")]
  for r in results:
    assert r["mean@2"] == pytest.approx(seen[r["step"]])
