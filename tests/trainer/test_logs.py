"""Runs of several token logs in a train step: who stands for a run, and room that is not used."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from trinity_jax.algorithms.algorithm import make
from trinity_jax.config import base_config, resolve
from trinity_jax.errors import UserError
from trinity_jax.experience import Experience, ExperienceId, StopReason
from trinity_jax.trainer import step as train
from trinity_jax.trainer.arrays import greedy_rewards
from trinity_jax.trainer.packing import PackSpec, leaders, pack
from trinity_jax.trainer.trainer import pack_spec

# (run, step, reward, action tokens): run 0 has two logs, run 2 three, run 1 one, run 3 failed.
LOGS = [(0, 0, 9.0, 4), (0, 1, 1.0, 4), (1, 0, 0.0, 5), (2, 0, 7.0, 3), (2, 1, 0.5, 2),
        (2, 2, 8.0, 0), (3, 0, 0.0, 0)]  # fmt: skip


def experiences():
  """One group; the last log of run 2 has no token left to train on."""
  rng, out = np.random.default_rng(0), []
  for run, step, reward, actions in LOGS:
    id, n = ExperienceId(1, 0, run, step), 3 + actions
    if run == 3:
      out.append(Experience.failed(id, StopReason.ERROR, {}))
      continue
    mask = np.arange(n) >= 3
    out.append(
      Experience(
        rng.integers(0, 64, n), mask, np.where(mask, -4.0, 0), np.where(mask, 0, -1), id, reward
      )
    )
  return out


def test_the_last_log_with_action_tokens_stands_for_its_run():
  assert leaders(experiences(), 9).tolist() == [1, 1, 2, 4, 4, 5, 6, 7, 8]
  assert leaders(experiences()[::-1], 7).tolist() == [0, 1, 2, 2, 4, 5, 5]
  batch = pack(experiences(), PackSpec((16,), 2, 8))
  assert batch.leader.tolist() == [1, 1, 2, 4, 4, 5, 6, 7]
  assert batch.step.tolist() == [0, 1, 0, 0, 1, 2, 0, 0]
  # A greedy run's baseline is the reward that stands for it, too.
  np.testing.assert_array_equal(greedy_rewards(batch, 8)[:5], 1.0)


def test_a_step_compares_runs_and_teaches_every_log_by_hand():
  """Rewards of the runs are 1, 0 and 0.5: advantages 1, -1 and 0."""
  batch = pack(experiences(), PackSpec((16,), 2, 8))
  algorithm = make("grpo", kl_coef=0.0)
  _, whole, found = train.prepare(algorithm, batch, num_groups=8, max_response=16)
  advantages = np.asarray(whole["advantages"])
  for i, (run, _, _, actions) in enumerate(LOGS):
    at = batch.action_mask & (batch.sequence_index == i)
    assert at.sum() == actions
    np.testing.assert_allclose(advantages[at], (1.0, -1.0, 0.0, 0.0)[run], atol=1e-5)
  assert float(found["groups_of_one"].parts[0]) == 0


@pytest.mark.slow
def test_room_for_more_logs_changes_nothing(tools):
  """The same step with room for four logs a run: as many live micro-batches, the same gradient."""
  found = tools.make_experiences()
  a = tools.whole_step(found, tools.PackSpec((16,), 4, 12))
  b = tools.whole_step(found, tools.PackSpec((16,), 4, 48))
  assert b.packed.tokens.shape[0] == 4 * a.packed.tokens.shape[0]
  assert b.packed.num_micro == a.packed.num_micro
  assert b.loss == pytest.approx(a.loss, rel=1e-6)
  for x, y in zip(jax.tree.leaves(a.grads), jax.tree.leaves(b.grads), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def config(**more):
  c = base_config()
  c.model.path = c.taskset.path = "unused"
  c.explorer.batch_size, c.explorer.group_size = 3, 4
  c.update_from_flattened_dict(more)
  return resolve(c)


def test_a_step_has_room_for_the_logs_that_a_run_may_have():
  several = {"explorer.max_logs": 5}
  assert pack_spec(config(), make("grpo")).sequences == 12
  assert pack_spec(config(**several), make("grpo")).sequences == 60
  assert pack_spec(config(**several), make("sft")).sequences == 12
  spec = pack_spec(config(**several, **{"trainer.minibatches": 3}), make("grpo"))
  assert spec.sequences == 20
  with pytest.raises(UserError, match=r"7 experiences in one step.*explorer\.max_logs"):
    pack(experiences(), PackSpec((16,), 2, 6))
  assert dataclasses.replace(spec, sequences=7).micros == 1
