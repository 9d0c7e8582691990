"""An episode: the agent's turns and an environment's, one after the other, in one dialogue."""

from __future__ import annotations

import asyncio
import dataclasses

from trinity_jax.explorer.environments.environment import Environment, Step, call, checked
from trinity_jax.explorer.rewards import Score
from trinity_jax.explorer.workflow import Model

CLOSING = 10.0  # seconds that an environment may take to close


@dataclasses.dataclass(frozen=True)
class Episode:
  """How an episode went.

  Attributes:
    total: sum of its rewards.
    turns: actions of the agent.
    done: the environment ended it, not the limit of turns.
    invalid: its last action was none.
  """

  total: float
  turns: int
  done: bool
  invalid: bool


async def play(
  model: Model, environment: Environment, max_turns: int, *, system: str = ""
) -> Episode:
  """Plays one episode and closes the environment.

  Observations are user messages: tokens that the policy did not write are never in the loss. Each
  step's reward goes to the turn that earned it (`model.reward`), so that algorithms that read
  token_rewards see it there; the run's reward is their sum, without what a workflow returns beside.

  Args:
    model: the run's handle.
    environment: fresh, used by nobody else.
    max_turns: actions after which the episode is over.
    system: system message, if any.

  Raises:
    ValueError: the environment returned what is no observation or reward.
    RuntimeError: it did not close in CLOSING seconds.
  """
  messages = [{"role": "system", "content": system}] if system else []
  total, turns, step = 0.0, 0, Step("")
  try:
    messages.append({"role": "user", "content": await call(environment, "reset")})
    while turns < max_turns and not step.done:
      action = await model.chat(messages)
      step = checked(await call(environment, "step", action))
      if step.reward:
        model.reward(step.reward)
      total, turns = total + step.reward, turns + 1
      messages = [*model.messages, {"role": "user", "content": step.observation}]
  finally:
    await _close(environment)
  return Episode(total, turns, step.done, step.invalid)


def episode_score(component: str, episode: Episode) -> Score:
  """What a workflow returns after `play`: nothing more, as its turns have their rewards, but the
  sum's name."""
  return Score(0.0, {component: episode.total})


async def _close(environment: Environment) -> None:
  """Closes it within a deadline of its own: a run that was cancelled must not wait for ever."""
  deadline = asyncio.timeout(CLOSING)
  try:
    async with deadline:
      await call(environment, "close")
  except TimeoutError as e:
    if deadline.expired():
      raise RuntimeError(f"the environment did not close in {CLOSING:g} s") from e
    raise
