"""Built-in workflows by name."""

from __future__ import annotations

from trinity_jax import plugins
from trinity_jax.errors import UserError, suggestion
from trinity_jax.explorer.adapt import as_workflow
from trinity_jax.explorer.workflow import Workflow
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


def find_workflow(name: str) -> Workflow:
  """Returns a built-in workflow or the user's 'module:function' (or class, see adapt.as_workflow).

  Raises:
    UserError: no such workflow.
  """
  if name in WORKFLOWS:
    return as_workflow(WORKFLOWS[name], name)
  if ":" in name:
    return as_workflow(plugins.load(name, "workflow"), name)
  raise UserError(
    f"config.taskset.workflow = {name!r}: no such workflow{suggestion(name, WORKFLOWS)} (or name "
    "your own as 'module:function')"
  )
