"""The host side of a step: programs, donation, numbers that go wrong, sampler against trainer."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trinity_jax.algorithms.algorithm import make
from trinity_jax.config import base_config, resolve
from trinity_jax.errors import RunFailed, UserError
from trinity_jax.experience import Experience, ExperienceId
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.monitor.compiles import CompileCounter
from trinity_jax.monitor.metrics import undocumented
from trinity_jax.trainer import step as train
from trinity_jax.trainer.mismatch import mismatch, mixed_tokens, packing_metrics
from trinity_jax.trainer.optimizer import learning_rate
from trinity_jax.trainer.packing import PackSpec, pack
from trinity_jax.trainer.trainer import Trainer, pack_spec


def make_trainer(tools, *, published, row_lengths, mesh=(1, 1, 1), **sets):
  c = base_config()
  c.model.tiny = dict(hidden=32)
  c.taskset.generate = "anything:else"
  c.sampler.max_prompt_length, c.sampler.max_response_length = 4, 12
  c.explorer.batch_size, c.explorer.group_size = 4, 3
  c.trainer.row_lengths, c.trainer.rows_per_micro = row_lengths, 4
  c.trainer.max_nonfinite, c.trainer.total_steps = 2, 100
  c.optimizer.learning_rate, c.optimizer.warmup_steps = 1e-2, 4
  c.algorithm.kl_coef = 0.0
  for path, value in sets.items():
    group, _, key = path.partition("__")
    c[group][key] = value
  config = resolve(c)
  mesh = tools.mesh_of(*mesh)
  return Trainer(
    config, make(config.algorithm), tools.POLICY, tools.params_on(mesh), mesh, LaunchOrder(mesh),
    published,
  )  # fmt: skip


KEPT = {}  # version -> parameters as published


@pytest.fixture(scope="module")
def trainer(tools):
  """One trainer for all tests (its four programs take a while), so none relies on its state."""
  trainer = make_trainer(
    tools, published=KEPT.get, row_lengths=(16, 40), algorithm__kl_coef=0.1, sync__interval=2,
    model__rollout_dtype="bfloat16",
  )  # fmt: skip
  trainer.warmup()
  return trainer


@pytest.fixture(autouse=True)
def _nothing_published():
  KEPT.clear()


def test_one_program_per_row_length_and_none_later(tools, trainer):
  assert sorted(trainer._programs) == [16, 40]
  before = jax.tree.leaves(trainer.state)
  start, lengths = trainer.step_number, set()
  with CompileCounter() as compiles:
    for step in range(8):
      if step == 2:
        compiles.mark_warm()
      # Few or many, short or long, some failed: other shapes of data, the same two programs.
      size = (4, 1, 3, 2)[step % 4]
      many = tools.make_experiences(step, groups=size, low=5 + 7 * (step % 2), high=12 + step % 5)
      metrics = trainer.step(many)
      lengths.add(trainer.last_batch is many and _row_length(trainer, many))
      assert metrics["policy_version"] == start + step + 1 == trainer.step_number
      assert step == 0 or metrics["kl"] > 0
  assert lengths == {16, 40}
  assert compiles.since_warmup == 0, compiles.late
  assert all(x.is_deleted() for x in before), "the state was not donated"


def _row_length(trainer, experiences):
  return pack(experiences, trainer.spec).tokens.shape[-1]


def test_metrics_of_a_step(tools, trainer):
  experiences = tools.make_experiences()
  rate = learning_rate(trainer.config.optimizer, trainer.config.trainer.total_steps)
  expected = float(rate(trainer.step_number - int(trainer.state.skipped)))
  metrics = trainer.step(experiences)
  assert undocumented(metrics) == []
  assert all(isinstance(v, (int, float)) and math.isfinite(v) for v in metrics.values())
  assert metrics["lr"] == pytest.approx(expected)
  packed = pack(experiences, trainer.spec)
  assert metrics["packing/efficiency"] == pytest.approx(
    (packed.segment_ids > 0)[: packed.num_micro].mean()
  )
  rows = (packed.segment_ids > 0).any(-1).sum()
  assert metrics["packing/rows"] == rows > 0
  assert metrics["packing/micro_batches"] == -(-rows // 4)
  rewards = {}
  for e in experiences:
    if e.num_actions:
      rewards.setdefault(e.id.group, []).append(e.reward)
  teaching = [r for r in rewards.values() if len(set(r)) > 1]
  flat = len(rewards) - len(teaching)
  assert metrics["frac_reward_zero_std"] == pytest.approx(flat / len(rewards))
  effective = sum(np.count_nonzero(np.array(r) != np.mean(r)) for r in teaching)
  assert metrics["group/effective_batch_size"] == effective


def test_nonfinite_steps_change_nothing_and_end_the_run(tools, trainer, tmp_path):
  good = tools.make_experiences()
  bad = [dataclasses.replace(e) for e in good]
  bad[0].reward = math.nan  # its group's advantages become NaN
  trainer.step(good)
  before = jax.device_get((trainer.state.params, trainer.state.opt_state))
  skipped = int(trainer.state.skipped)
  rate = trainer.step(bad)
  assert rate["nonfinite_steps"] == 1 and rate["loss/nan_count"] == skipped + 1
  assert math.isnan(rate["loss"]) and rate["update_norm"] == 0
  after = jax.device_get((trainer.state.params, trainer.state.opt_state))
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

  metrics = trainer.step(good)  # a good step ends the row of bad ones
  assert metrics["nonfinite_steps"] == 0 and metrics["loss/nan_count"] == skipped + 1
  assert metrics["lr"] == rate["lr"]  # the schedule counts updates, not batches
  assert metrics["update_norm"] > 0

  trainer.step(bad)
  with pytest.raises(RunFailed, match="not finite for 2 steps in a row"):
    trainer.step(bad)
  trainer.save_last_batch(tmp_path / "bad_batch")
  files = sorted((tmp_path / "bad_batch").iterdir())
  read = {e.id: e for e in (Experience.from_bytes(f.read_bytes()) for f in files)}
  assert read.keys() == {e.id for e in bad}
  for e in bad:
    np.testing.assert_array_equal(read[e.id].tokens, e.tokens)
    np.testing.assert_array_equal(read[e.id].logprobs, e.logprobs)
  assert math.isnan(read[bad[0].id].reward)
  zero = jnp.zeros_like(trainer.state.nonfinite)
  trainer.load_state(dataclasses.replace(trainer.state, nonfinite=zero))


def test_nonfinite_values_of_other_tokens_are_never_read(tools, trainer):
  """NaN where nothing was sampled is no NaN of the step."""
  experiences = tools.make_experiences(seed=4)
  for e in experiences:
    e.logprobs[~e.action_mask] = np.nan
  assert trainer.step(experiences)["nonfinite_steps"] == 0


def test_logprob_limit(tools, trainer, monkeypatch):
  limited = dataclasses.replace(trainer.config.trainer, logprob_limit=1e-3)
  monkeypatch.setattr(trainer, "config", dataclasses.replace(trainer.config, trainer=limited))
  experiences = tools.make_experiences()
  for e in experiences:
    e.versions[e.action_mask] = trainer.step_number
  with pytest.raises(RunFailed, match=r"step \d+: .* differs by .* trainer\.logprob_limit"):
    trainer.step(experiences)  # their log-probs are random numbers


def test_a_step_that_does_not_fit(tools, trainer):
  before = trainer.step_number
  with pytest.raises(UserError, match=r"13 experiences.*room for 12"):
    trainer.step([*tools.make_experiences(), tools.make_experiences()[0]])
  long = tools.make_experience(np.random.default_rng(0), 41, 2)
  with pytest.raises(UserError, match=r"41 tokens does not fit trainer\.row_lengths"):
    trainer.step([long])
  assert trainer.step_number == before


def test_pack_spec_of_a_config(tools, trainer):
  assert pack_spec(trainer.config, trainer.algorithm) == PackSpec((16, 40), 4, 12)
  other = dataclasses.replace(trainer.config.trainer, row_lengths=(), batch_size=6)
  c = dataclasses.replace(trainer.config, trainer=other)
  assert pack_spec(c, make("grpo")) == PackSpec((16,), 4, 6)  # longest prompt + longest response


# --- sampler against trainer ----------------------------------------------------------------------


def test_mismatch_by_hand():
  experiences = [
    Experience([1, 2, 3], [0, 1, 1], [0, -1.0, -2.0], [-1, 5, 5], ExperienceId(1, 0, 0, 0)),
    Experience([1, 2, 3], [0, 1, 1], [0, -1.5, -0.5], [-1, 4, 4], ExperienceId(1, 1, 0, 0)),
    Experience([1, 2, 3], [0, 1, 1], [0, -9.0, -9.0], [-1, 3, 3], ExperienceId(1, 2, 0, 0)),
  ]
  batch = pack(experiences, PackSpec((3,), 1, 3))
  under = {v: np.full(batch.tokens.shape, np.nan, np.float32) for v in (5, 4)}
  under[5][0, 0, 1:] = [-1.1, -1.8]
  under[4][1, 0, 1:] = [-1.5, -0.9]
  none = np.zeros_like(batch.action_mask)
  out = mismatch(batch, under, none)
  d = np.array([-0.1, 0.2, 0.0, -0.4])  # version 3 is not known: its tokens do not count
  ratio = np.exp(d)
  assert out["logprob_diff/mean"] == pytest.approx(np.abs(d).mean(), rel=1e-5)
  assert out["logprob_diff/max"] == out["logprob_diff/p999"] == pytest.approx(0.4, rel=1e-5)
  assert out["mismatch/k1"] == pytest.approx(0.3 / 4, rel=1e-5)
  assert out["mismatch/k3"] == pytest.approx((ratio - 1 - d).mean(), rel=1e-4)
  assert out["mismatch/ess"] == pytest.approx(ratio.sum() ** 2 / (ratio**2).sum() / 4, rel=1e-6)
  assert out["staleness/mean"] == pytest.approx(1.0) and out["staleness/max"] == 2

  same = mismatch(batch, {5: np.where(batch.versions == 5, batch.logprobs, np.nan)}, none)
  assert same["logprob_diff/max"] == same["mismatch/k1"] == same["mismatch/k3"] == 0
  assert same["mismatch/ess"] == pytest.approx(1)
  assert mismatch(batch, {7: under[5]}, none).keys() == {
    "staleness/mean", "staleness/max", "staleness/mixed_tokens"
  }  # fmt: skip
  experiences[0].mixed = np.array([False, False, True])
  out = mismatch(batch, under, mixed_tokens(batch, experiences))
  assert out["mismatch/k1"] == pytest.approx((0.1 + 0.4) / 3, rel=1e-5)  # the 0.2 does not count
  assert out["staleness/mixed_tokens"] == pytest.approx(1 / 6)


def test_packing_metrics_of_nothing():
  batch = pack([], PackSpec((8,), 2, 4))
  assert packing_metrics(batch) == {
    "packing/efficiency": 0.0, "packing/rows": 0, "packing/micro_batches": 0,
  }  # fmt: skip


def test_older_versions_are_recomputed_with_what_was_published(tools, trainer):
  """Tokens of two versions in one batch; the rollout copy has another dtype than the parameters."""
  old = trainer.step_number
  KEPT[old] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trainer.state.params)
  trainer.step(tools.make_experiences(seed=1))
  new = trainer.step_number
  assert new == old + 1

  # What a sampler would have reported: the old version from the rounded copy, the new from ours.
  experiences = tools.make_experiences(seed=2)
  for i, e in enumerate(experiences):
    e.versions[e.action_mask] = old + i % 2
  packed = pack(experiences, trainer.spec)
  score = trainer._programs[packed.tokens.shape[-1]].logprobs
  batch = jax.device_put(packed, train.batch_shardings(packed, trainer.mesh))
  widened = jax.tree.map(lambda x: x.astype(jnp.float32), KEPT[old])
  under = [np.asarray(score(p, batch)["logprob"]) for p in (widened, trainer.state.params)]
  assert np.abs(under[0] - under[1]).max() > 1e-3  # they can be told apart
  for i, e in enumerate(experiences):
    at = (packed.sequence_index == i) & packed.action_mask
    if e.num_actions:
      e.logprobs[e.action_mask] = under[i % 2][at]

  with CompileCounter() as compiles:
    compiles.mark_warm()
    metrics = trainer.step(experiences)
  assert compiles.since_warmup == 0, compiles.late
  assert metrics["logprob_diff/max"] <= 1e-5
  assert metrics["staleness/max"] == 1 and 0 < metrics["staleness/mean"] < 1

  # A version that is no longer kept is left out, not compared with the wrong one.
  KEPT.clear()
  for e in experiences:
    e.versions[e.action_mask] = old
  metrics = trainer.step(experiences)
  assert "logprob_diff/max" not in metrics and metrics["staleness/mean"] == 2
