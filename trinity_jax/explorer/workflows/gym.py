"""An episode in a gymnasium environment, as a task's row describes it."""

from __future__ import annotations

from collections.abc import Mapping

from trinity_jax.errors import UserError
from trinity_jax.experience import Task
from trinity_jax.explorer.environments.gym import GymEnvironment
from trinity_jax.explorer.rewards import Score
from trinity_jax.explorer.workflow import Model
from trinity_jax.explorer.workflows.multi_turn import episode_score, play

MAX_TURNS = 32


async def gym(task: Task, model: Model) -> Score:
  """Plays the episode of a row; the sum of its rewards is the run's.

  The row: "environment" (gymnasium's id), and if it likes "environment_args" (keyword arguments of
  gymnasium.make), "environment_text" ('module:name' of how it speaks), "seed" (default: the row's
  number), "max_turns" (default 32). The first turn's text comes from the environment; the row's
  prompt is only for people. A system message of the row stays.

  What speaks text already and is not gymnasium's (ALFWorld, ScienceWorld, WebShop, which the user
  installs) goes through the workflow `environment`: its row names
  "trinity_jax.explorer.environments.text:TextEnvironment" as "environment", and as
  "environment_args" {"make": "my_module:function", "args": {...}, "commands":
  "admissible_commands"}; with "own_process" each game has a process of its own. See
  `environments.text`.

  Raises:
    UserError: the row names no environment that there is.
  """
  row = task.raw
  name, args, turns = row.get("environment"), row.get("environment_args", {}), row.get("max_turns")
  turns = MAX_TURNS if turns is None else turns
  if not isinstance(name, str) or not isinstance(args, Mapping):
    raise UserError(
      f"{task.taskset} row {task.index}: environment = {name!r}, environment_args = {args!r}: the "
      "gym workflow expects gymnasium's id and an object"
    )
  if not isinstance(turns, int) or turns < 1:
    raise UserError(f"{task.taskset} row {task.index}: max_turns = {turns!r}: expected 1 or more")
  seed, text = row.get("seed", task.index), row.get("environment_text", "")
  environment = GymEnvironment(name, args, seed=seed, text=text)
  first = task.messages[0] if task.messages else {"role": ""}
  system = first["content"] if first["role"] == "system" else ""
  episode = await play(model, environment, turns, system=system)
  return episode_score(environment.text.component, episode)
