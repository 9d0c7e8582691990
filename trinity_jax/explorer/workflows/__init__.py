"""Built-in workflows by name."""

from __future__ import annotations

from trinity_jax.explorer.workflows.calculator_agent import calculator_agent
from trinity_jax.explorer.workflows.environment import environment
from trinity_jax.explorer.workflows.gym import gym
from trinity_jax.explorer.workflows.single_turn import single_turn
from trinity_jax.explorer.workflows.tool_use import tool_use

WORKFLOWS = {
  "calculator_agent": calculator_agent,
  "environment": environment,
  "gym": gym,
  "single_turn": single_turn,
  "tool_use": tool_use,
}
