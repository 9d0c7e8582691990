"""An episode in an environment of the user's own, in this process or in one of its own."""

from __future__ import annotations

from collections.abc import Mapping

from trinity_jax import plugins
from trinity_jax.errors import UserError
from trinity_jax.experience import Task
from trinity_jax.explorer.environments.environment import Environment
from trinity_jax.explorer.rewards import Score
from trinity_jax.explorer.workflow import Model
from trinity_jax.explorer.workflows.multi_turn import episode_score, play

MAX_TURNS = 32


async def environment(task: Task, model: Model) -> Score:
  """Plays one episode; the sum of its rewards, component "return", is the run's.

  The row: "environment" ('module:function' that makes an Environment), and if it likes
  "environment_args" (its keyword arguments), "own_process" (false; true: it lives in a process
  that is killed when it hangs and replaced when it dies: config.explorer.environment_processes),
  "max_turns" (default 32). The first turn's text comes from the environment; a system message of
  the row stays.

  Raises:
    UserError: the row names no environment that there is.
  """
  row = task.raw
  name, args, turns = row.get("environment"), row.get("environment_args", {}), row.get("max_turns")
  turns = MAX_TURNS if turns is None else turns
  if not isinstance(name, str) or ":" not in name or not isinstance(args, Mapping):
    raise UserError(
      f"{task.taskset} row {task.index}: environment = {name!r}, environment_args = {args!r}: "
      "expected 'module:function' and an object"
    )
  if not isinstance(turns, int) or turns < 1:
    raise UserError(f"{task.taskset} row {task.index}: max_turns = {turns!r}: expected 1 or more")
  made: Environment
  if not row.get("own_process", False):
    made = plugins.load(name, "environment")(**args)
  elif model.processes is None:
    raise UserError(f"{task.taskset} row {task.index}: own_process: no processes are kept here")
  else:
    made = model.processes.environment(name, args, model.sampler)
  first = task.messages[0] if task.messages else {"role": ""}
  system = first["content"] if first["role"] == "system" else ""
  return episode_score("return", await play(model, made, turns, system=system))
