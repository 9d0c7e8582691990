"""Rewards that an environment gives per step, from its `step` to the advantages of the tokens."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses

import numpy as np
import pytest

from trinity_jax.algorithms.algorithm import make
from trinity_jax.experience import ExperienceId
from trinity_jax.explorer.environments.environment import Step
from trinity_jax.explorer.runner import Runner
from trinity_jax.explorer.workflows.multi_turn import episode_score, play
from trinity_jax.trainer import step as train
from trinity_jax.trainer.extras import extras_of
from trinity_jax.trainer.packing import PackSpec, pack

REWARDS = ((1.0, 0.0, -0.5), (0.0, 0.25, 2.0))  # of each run's steps


class Pays:
  """Pays what it was told to, whatever is done."""

  def __init__(self, rewards):
    self._rewards = list(rewards)

  def reset(self):
    return "a"

  def step(self, action):
    reward = self._rewards.pop(0)
    return Step("b", reward, done=not self._rewards)

  def close(self): ...


async def one_dialogue(task, model):
  return episode_score("paid", await play(model, Pays(REWARDS[model.id.run]), 3))


async def dialogue_a_step(task, model):
  """Each step begins anew: three token logs, whose states an algorithm may compare."""
  for i, reward in enumerate(REWARDS[model.id.run]):
    await model.chat([{"role": "user", "content": "ab"[min(i, 1)]}])
    model.reward(reward)
  found = model.experiences(0.0)
  for i, e in enumerate(found):
    e.info["env_state"] = min(i, 1)
  return found


def played(world, workflow):
  async def main(sampler):
    def model(id):
      out = world.model(sampler, id)
      out.params = dataclasses.replace(out.params, limit=3)
      return out

    async def grade(response, task):
      raise AssertionError("episodes bring their rewards")

    runner = Runner(
      workflow, grade, model, lambda _: sampler.leave(),
      lambda _: contextlib.nullcontext(), timeout=60, retries=0, most_logs=3,
    )  # fmt: skip
    sampler.enter()
    sampler.enter()
    runs = (runner.run(world.task(), ExperienceId(1, 0, run, 0)) for run in range(2))
    return [e for ran in await asyncio.gather(*runs) for e in ran.experiences()]

  with world.sampler() as sampler:
    return asyncio.run(main(sampler))


def advantages(name, experiences, **keys):
  """Of each experience's action tokens, as the train step computes them."""
  algorithm = make(name, kl_coef=0.0, **keys)
  spec = PackSpec((64,), 2, len(experiences))
  batch = pack(experiences, spec, extras=extras_of(algorithm))
  _, whole, _ = train.prepare(algorithm, batch, num_groups=len(experiences), max_response=8)
  at = lambda i: batch.action_mask & (batch.sequence_index == i)
  return [np.asarray(whole["advantages"])[at(i)] for i in range(len(experiences))]


def returns(rewards, turns, gamma):
  """Discounted sums from each action token on, a turn's reward on its last token."""
  paid = np.concatenate([[0.0] * (n - 1) + [r] for r, n in zip(rewards, turns)])
  out, after = [], 0.0
  for reward in paid[::-1]:
    after = reward + gamma * after
    out.append(after)
  return np.array(out[::-1])


def turn_lengths(e):
  """Tokens that the policy wrote in each turn."""
  mask = np.concatenate([[0], e.action_mask.astype(int), [0]])
  edges = np.flatnonzero(np.diff(mask))
  return (edges[1::2] - edges[::2]).tolist()


@pytest.mark.parametrize(
  ("name", "gamma"),
  [("reinforceplusplus", 0.5), pytest.param("ppo", 1.0, marks=pytest.mark.slow)],
)
def test_every_token_is_credited_with_the_rewards_from_its_turn_on(world, name, gamma):
  found = played(world, one_dialogue)
  assert [e.reward for e in found] == [0.5, 2.25]
  assert [e.metrics["rewards/paid"] for e in found] == [0.5, 2.25]
  lengths = [turn_lengths(e) for e in found]
  assert all(len(turns) == 3 for turns in lengths)
  want = [returns(r, n, gamma) for r, n in zip(REWARDS, lengths)]
  every = np.concatenate(want)
  want = [(w - every.mean()) / np.sqrt(every.var(ddof=1) + 1e-8) for w in want]
  got = advantages(name, found, advantage_args={"gamma": gamma})
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_group_algorithms_see_their_sum(world):
  found = played(world, one_dialogue)
  difference = (2.25 - 0.5) / 2 / np.std([0.5, 2.25], ddof=1)
  for got, want in zip(advantages("grpo", found), (-difference, difference), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.slow
def test_steps_as_dialogues_of_their_own_are_compared_by_their_states(world):
  """GiGPO: the returns of the runs are 0.5 and 2.25; from the first state on they are the same,
  from the second (twice a run) on -0.5, -0.5, 2.25 and 2."""
  found = played(world, dialogue_a_step)
  assert [(e.id.run, e.id.step) for e in found] == [(r, s) for r in (0, 1) for s in (0, 1, 2)]
  assert [e.info["step_reward"] for e in found] == [*REWARDS[0], *REWARDS[1]]
  got = advantages("gigpo", found, advantage_args={"omega": 1.0, "gamma": 1.0})
  episode = np.repeat([0.5 - 1.375, 2.25 - 1.375], 3)
  step = np.array([0.5 - 1.375, -0.5, -0.5, 2.25 - 1.375, 2.25, 2.0])
  step[[1, 2, 4, 5]] -= (-0.5 - 0.5 + 2.25 + 2.0) / 4
  for a, b in zip(got, episode + step, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  for a, b in zip(advantages("multi_step_grpo", found), advantages("grpo", found), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
