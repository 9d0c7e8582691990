"""A stage wired from its parts, on eight devices, with weights that change under the sampler."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from trinity_jax.config import base_config, resolve, stage_configs
from trinity_jax.config_checks import check_lag, check_rows
from trinity_jax.control import shuffled_rewards
from trinity_jax.errors import UserError
from trinity_jax.experience import Experience, ExperienceId, StopReason
from trinity_jax.monitor.metrics import undocumented
from trinity_jax.monitor.progress import samples
from trinity_jax.monitor.writers import read_jsonl
from trinity_jax.run import run
from trinity_jax.stage_result import StageResult, read_stage_result, write_stage_result

SUMS = "trinity_jax.tasks.arithmetic:generate"
# An untrained model answers no sum: reward what differs by chance, so that there is a gradient.
REWARD = """
def odd(response, truth, task=None):
  return float(sum(ord(c) % 2 for c in response))
"""


def small_config(**sets):
  """SFT, then GRPO that is up to two versions off-policy; a model of 25 k parameters."""
  c = base_config()
  c.model.tiny = dict(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=64)
  c.monitor.progress, c.monitor.tensorboard = "none", False
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 2, 2, 2
  c.taskset.generate, c.taskset.reward = SUMS, "arithmetic"
  c.sampler.max_prompt_length, c.sampler.max_response_length, c.sampler.slots = 9, 4, 16
  c.sampler.prefill_batches, c.sampler.prompt_buckets, c.sampler.cache_buckets = (8,), (9,), (13,)
  c.trainer.row_lengths, c.trainer.rows_per_micro, c.trainer.save_interval = (13,), 16, 4
  c.optimizer.learning_rate = 1e-2
  c.stages = (
    {"name": "sft", "algorithm.name": "sft", "trainer.total_steps": 4, "trainer.batch_size": 32,
     "taskset.generate_args": dict(split="sft", rows=64)},
    {"name": "grpo", "taskset.generate_args": dict(split="rl", rows=16), "trainer.total_steps": 6,
     "explorer.batch_size": 4, "explorer.group_size": 4, "sync.interval": 2, "sync.offset": 1,
     "algorithm.kl_coef": 0.01, "taskset.reward": "stage_test_reward:odd"},
  )  # fmt: skip
  for path, value in sets.items():
    group, _, key = path.partition("__")
    c[group][key] = value
  return resolve(c)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(config, workdir, summary, rows of metrics.jsonl by stage)."""
  folder = tmp_path_factory.mktemp("stage")
  (folder / "stage_test_reward.py").write_text(REWARD)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(folder)  # this process
    patch.setenv("PYTHONPATH", str(folder))  # grading processes
    workdir, config = folder / "run", small_config()
    summary = run(config, workdir)
    rows = {s: read_jsonl(workdir / s / "metrics.jsonl") for s in ("sft", "grpo")}
    yield config, workdir, summary, rows


def test_every_step_is_there(finished):
  _, workdir, summary, rows = finished
  assert [r["step"] for r in rows["sft"]] == [1, 2, 3, 4]
  assert [r["step"] for r in rows["grpo"]] == [1, 2, 3, 4, 5, 6]
  assert rows["sft"][-1]["nll"] < rows["sft"][0]["nll"]
  names = {k for stage in rows.values() for r in stage for k in r}
  assert undocumented(names) == []
  for r in rows["sft"] + rows["grpo"]:
    assert sum(v for k, v in r.items() if k.startswith("time_split/")) == pytest.approx(100)
  assert summary["stages"] == ["sft", "grpo"] and summary["compiles_after_warmup"] == 0
  for name in ("summary.json", "curves.png", "trace.json", "grpo/hf/config.json"):
    assert (workdir / name).stat().st_size > 0


def test_old_versions_are_compared_with_their_own_parameters(finished):
  """interval 2, offset 1: explorer `1 2 3 [sync] 4 5 [sync] 6`, trainer `. 1 2 [sync] 3 4 ...`.

  Steps sample from versions 0 0 0 2 2 4, and the trainer has made 0 1 2 3 4 5 steps by then.
  """
  grpo = finished[3]["grpo"]
  for r, lag in zip(grpo, [0, 1, 2, 1, 2, 1], strict=True):
    assert r["staleness/mean"] == r["staleness/max"] == lag, r["step"]
    # Present although all tokens of the step are old, and as small as if they were not.
    assert r["logprob_diff/p999"] <= 1e-5 and r["logprob_diff/max"] <= 5e-5, r["step"]
    # The current policy is another one by then.
    assert r["ratio/max"] > 1.001 if lag else r["ratio/max"] == pytest.approx(1, abs=1e-4)
    assert r["rollout/count"] == 16 and r["grad_norm"] > 0
    assert r["compile/after_warmup"] == 0
  assert grpo[0]["kl"] == pytest.approx(0, abs=1e-8) and grpo[-1]["kl"] > 1e-6


def test_a_finished_run_is_not_run_again(finished):
  config, workdir, summary, rows = finished
  before = (workdir / "grpo/hf/model.safetensors").stat().st_mtime_ns
  again = run(config, workdir)
  assert again["resumed"] is True and again["model"] == summary["model"]
  assert (workdir / "grpo/hf/model.safetensors").stat().st_mtime_ns == before
  assert read_jsonl(workdir / "grpo/metrics.jsonl") == rows["grpo"]
  assert again["logprob_diff_max"] == summary["logprob_diff_max"]


def test_a_workdir_belongs_to_one_config(finished):
  _, workdir, *_ = finished
  with pytest.raises(UserError, match="optimizer"):
    run(small_config(optimizer__learning_rate=1e-4), workdir)


# --- parts ----------------------------------------------------------------------------------------


def _experience(i, reward):
  return Experience([1, 2], [0, 1], [0, -1], [-1, 0], ExperienceId(1, i // 2, i % 2, 0),
                    reward=reward)  # fmt: skip


def test_shuffled_rewards():
  experiences = [_experience(i, float(i)) for i in range(12)]
  experiences[5] = Experience.failed(experiences[5].id, StopReason.ERROR, {})
  out = shuffled_rewards(experiences, seed=1, step=2)
  rewards = lambda es: [e.reward for e in es]
  assert rewards(out) != rewards(experiences) and out[5].reward is None
  assert sorted(r for r in rewards(out) if r is not None) == sorted(
    r for r in rewards(experiences) if r is not None
  )
  assert [e.id for e in out] == [e.id for e in experiences]
  assert rewards(experiences)[:5] == [0, 1, 2, 3, 4]  # the originals are untouched
  assert rewards(shuffled_rewards(experiences, 1, 2)) == rewards(out)
  assert rewards(shuffled_rewards(experiences, 1, 3)) != rewards(out)
  assert rewards(shuffled_rewards(experiences, 2, 2)) != rewards(out)


def test_shuffled_rewards_are_those_of_runs():
  """All logs of a run get the reward that another run's last log had, and nothing else tells."""

  def log(run, step):
    e = _experience(0, 10.0 * run + step)
    return dataclasses.replace(
      e, id=ExperienceId(1, 0, run, step), info={"step_reward": 1},
      token_rewards=np.ones(len(e.tokens)),
    )  # fmt: skip

  experiences = [log(run, step) for run in range(6) for step in range(2)]
  out = shuffled_rewards(experiences, seed=1, step=2)
  assert [e.id for e in out] == [e.id for e in experiences]
  assert [e.reward for e in out[::2]] == [e.reward for e in out[1::2]]
  assert sorted(e.reward for e in out[::2]) == [10.0 * run + 1 for run in range(6)]
  assert [e.reward for e in out[1::2]] != [e.reward for e in experiences[1::2]]
  assert all(e.token_rewards is None and not e.info for e in out)


def test_rows_must_divide_over_devices(finished):
  from trinity_jax.models.sharding import make_mesh

  mesh = make_mesh(4, 2, 1)
  check_rows(small_config(trainer__rows_per_micro=16), mesh)
  with pytest.raises(UserError, match=r"rows_per_micro = 12: .* 8 devices .*; use 16"):
    check_rows(small_config(trainer__rows_per_micro=12), mesh)


def test_rows_must_divide_over_the_context_axis():
  from trinity_jax.algorithms.algorithm import make
  from trinity_jax.models.sharding import make_mesh
  from trinity_jax.trainer.packing import pack_spec

  mesh = make_mesh(2, context=4)
  c = small_config(trainer__rows_per_micro=2, trainer__row_lengths=(64, 98))
  with pytest.raises(UserError, match=r"row_lengths: 98 .* mesh\.context = 4.*; use 100"):
    check_rows(c, mesh)
  check_rows(small_config(trainer__rows_per_micro=2, trainer__row_lengths=(64, 100)), mesh)
  c = small_config(mesh__context=64, trainer__row_lengths=())
  (length,) = pack_spec(c, make("grpo")).row_lengths
  longest = c.sampler.max_prompt_length + c.sampler.max_response_length
  assert length % 64 == 0 and 0 <= length - longest < 64


def test_a_group_cannot_need_more_runs_than_it_has():
  from trinity_jax.algorithms.algorithm import make

  c = small_config(explorer__min_runs=9)
  with pytest.raises(UserError, match=r"explorer\.min_runs = 9: .* explorer\.group_size = 8 runs"):
    check_lag(c, make("grpo"))


def test_lag_needs_a_ratio():
  from trinity_jax.algorithms.algorithm import make

  grpo = stage_configs(small_config())[1]
  check_lag(grpo, make("grpo"))
  with pytest.raises(UserError, match=r"up to 2 versions old.*neither clips nor corrects"):
    check_lag(grpo, make("grpo", policy_loss="sft"))
  one = dataclasses.replace(grpo, explorer=dataclasses.replace(grpo.explorer, group_size=1))
  with pytest.raises(UserError, match=r"group_size = 1: .* compares the runs of a task"):
    check_lag(one, make("grpo"))
  other = dataclasses.replace(grpo, trainer=dataclasses.replace(grpo.trainer, batch_size=8))
  with pytest.raises(UserError, match=r"batch_size = 8: one optimizer step takes .* of 16"):
    check_lag(other, make("grpo"))


def test_result_of_a_stage(tmp_path):
  result = StageResult("grpo", "/m", False)
  write_stage_result(tmp_path / "stage.json", result, 12.0)
  assert read_stage_result(tmp_path / "stage.json") == result
  assert json.loads((tmp_path / "stage.json").read_text())["seconds"] == 12.0


def test_samples_are_first_runs_with_a_dialogue():
  talk = [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]
  experiences = [_experience(i, 1.0) for i in range(8)]
  for e in experiences[2:]:
    e.messages = talk
  shown = samples(experiences, 2)
  assert len(shown) == 2 and np.all([s.prompt == "2+2=" for s in shown])
