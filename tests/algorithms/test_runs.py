"""Runs of several token logs: groups compare runs; what a run gets goes to all of its tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trinity_jax.algorithms import make
from trinity_jax.algorithms.advantages import ADVANTAGES
from trinity_jax.algorithms.parts import resolve

# Two groups. Group 0: run 0 has three logs, run 1 one, run 2 two; group 1: two runs of one log, one
# of which failed. Tokens per log:
LENGTHS = np.array([2, 3, 1, 4, 2, 2, 5, 0])
GROUP = np.array([0, 0, 0, 0, 0, 0, 1, 1])
RUN = np.array([0, 0, 0, 1, 2, 2, 0, 1])
STEP = np.array([0, 1, 2, 0, 0, 1, 0, 0])
LEADER = np.array([2, 2, 2, 3, 5, 5, 6, 7])
REWARD = np.array([1.0, 1.0, 1.0, 0.0, 0.5, 0.5, 2.0, 0.0])
N, T = 8, 5


def step(**more):
  mask = np.arange(T) < LENGTHS[:, None]
  rng = np.random.default_rng(0)
  noise = lambda: jnp.asarray(-np.abs(rng.normal(size=(N, T))) - 0.1, jnp.float32)
  return {
    "rewards": jnp.asarray(REWARD, jnp.float32), "group_ids": jnp.asarray(GROUP),
    "run_ids": jnp.asarray(RUN), "step_ids": jnp.asarray(STEP), "leader": jnp.asarray(LEADER),
    "valid": jnp.asarray(LENGTHS > 0), "mask": jnp.asarray(mask), "num_sequences": N,
    "sequence_index": jnp.broadcast_to(jnp.arange(N)[:, None], (N, T)),
    "old_logprob": noise(), "ref_logprob": noise(), "prox_logprob": noise(),
    "prox_entropy": -noise(), "expected_score": noise(), "key": jax.random.key(0),
    **more,
  }  # fmt: skip


def advantages(algorithm, arrays):
  whole, found = algorithm.before_split(num_groups=2, max_length=None, **arrays)
  return np.asarray(whole["advantages"]), found


def test_grpo_counts_a_run_once_by_hand():
  """Rewards of group 0's runs are 1, 0 and 0.5: mean 0.5, deviation 0.5. Counting logs, the mean
  would be 2/3."""
  got, found = advantages(make("grpo", kl_coef=0.0), step())
  want = {0: 1.0, 1: -1.0, 2: 0.0}
  for i in range(6):
    np.testing.assert_allclose(got[i, : LENGTHS[i]], want[RUN[i]], atol=1e-5)
    assert not got[i, LENGTHS[i] :].any()
  np.testing.assert_allclose(got[6], 2.0, rtol=1e-5)  # alone in its group
  assert not got[7].any()
  assert float(found["groups_of_one"].parts[0]) == 1


@pytest.mark.slow
def test_the_last_log_brings_the_runs_reward():
  """As in Trinity's multi-step GRPO, rewards of earlier logs do not count in comparisons."""
  changed = REWARD.copy()
  changed[[0, 1, 4]] = 9.0, -9.0, 3.0
  for name in ("grpo", "multi_step_grpo"):
    algorithm = make(name, kl_coef=0.0)
    got, _ = advantages(algorithm, step(rewards=jnp.asarray(changed, jnp.float32)))
    np.testing.assert_array_equal(got, advantages(algorithm, step())[0])
  one, many = (advantages(make(n, kl_coef=0.0), step())[0] for n in ("grpo", "multi_step_grpo"))
  np.testing.assert_allclose(one, many, atol=1e-6)


def as_one_log_a_run(arrays):
  """The same runs, each as one row that holds the tokens of all its logs."""
  leads = [i for i in range(N) if LEADER[i] == i]
  rows = [np.flatnonzero(LEADER == i) for i in leads]
  wide = {}
  for name in ("mask", "old_logprob", "ref_logprob", "prox_logprob", "prox_entropy",
               "expected_score"):  # fmt: skip
    full = np.zeros((len(leads), 3 * T), arrays[name].dtype)
    for r, members in enumerate(rows):
      full[r, : len(members) * T] = np.asarray(arrays[name])[members].ravel()
    wide[name] = jnp.asarray(full)
  pick = ("rewards", "group_ids", "run_ids", "step_ids", "valid")
  wide |= {k: arrays[k][jnp.asarray(leads)] for k in pick}
  index = jnp.broadcast_to(jnp.arange(len(leads))[:, None], (len(leads), 3 * T))
  more = {"num_sequences": len(leads), "leader": jnp.arange(len(leads)), "sequence_index": index}
  return {**arrays, **wide, **more}, rows


COMPARE = sorted(
  name
  for name, function in ADVANTAGES.items()
  if "group_ids" in (inputs := resolve("advantage", name, ADVANTAGES).inputs)
  and "run_ids" not in inputs
)


FAST = ("grpo", "opo", "reinforce++_baseline")


@pytest.mark.parametrize(
  "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in COMPARE]
)
def test_a_run_in_several_logs_is_worth_what_it_is_in_one(name):
  algorithm = make("grpo", advantage=name, kl_coef=0.0)
  got, found = advantages(algorithm, step())
  whole, rows = as_one_log_a_run(step())
  want, expected = advantages(algorithm, whole)
  for r, members in enumerate(rows):
    np.testing.assert_allclose(
      got[members].ravel(), want[r, : len(members) * T], rtol=1e-5, atol=1e-6
    )
  for key, stat in expected.items():
    np.testing.assert_allclose(
      np.array(found[key].parts), np.array(stat.parts), rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
def test_ranks_and_a_penalty_in_the_reward_are_those_of_runs():
  options = {"rank_penalty": 0.5}
  penalty = {"kl": "k1", "kl_in": "reward", "kl_coef": 0.1}
  for algorithm in (make("grpo", advantage_args=options, kl_coef=0.0), make("grpo", **penalty)):
    got, _ = advantages(algorithm, step())
    whole, rows = as_one_log_a_run(step())
    want, _ = advantages(algorithm, whole)
    for r, members in enumerate(rows):
      np.testing.assert_allclose(
        got[members].ravel(), want[r, : len(members) * T], rtol=1e-5, atol=1e-6
      )


@pytest.mark.slow
def test_advantages_of_tokens_and_of_single_logs_do_not_join_them():
  """Two logs of a run next to one another in a row: nothing flows from one into the other."""
  arrays = step(token_rewards=jnp.asarray(np.eye(N, T, 1), jnp.float32))
  single = {**arrays, "leader": jnp.arange(N)}
  for name in ("reinforceplusplus", "reinforce"):
    algorithm = make(name, kl_coef=0.0)
    np.testing.assert_array_equal(
      advantages(algorithm, arrays)[0], advantages(algorithm, single)[0]
    )
