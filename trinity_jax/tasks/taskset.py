"""A taskset: tasks, an order over epochs, and a cursor that a checkpoint can hold."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from trinity_jax import plugins
from trinity_jax.config import TasksetConfig
from trinity_jax.errors import UserError
from trinity_jax.experience import Task
from trinity_jax.tasks import selectors
from trinity_jax.tasks.formats import Row, read_rows, to_task


class Taskset:
  """An endless, ordered stream over `tasks`; not thread-safe, the explorer's loop owns it.

  Attributes:
    tasks: all tasks, tasks[i].index == i.
    position: number of tasks handed out so far: the whole state.
  """

  def __init__(self, tasks: Sequence[Task], *, selector: str = "shuffle", seed: int = 0):
    if not tasks:
      raise UserError("the taskset is empty; give it at least one row")
    for i, task in enumerate(tasks):
      if task.index != i:
        raise ValueError(f"tasks[{i}].index is {task.index}; it must be the task's place")
    self.tasks = tuple(tasks)
    self.position = 0
    self._selector_name, self._seed = selector, seed
    # One epoch's order is asked for once per batch.
    self._selector = functools.lru_cache(maxsize=2)(selectors.resolve(selector))

  def __len__(self) -> int:
    return len(self.tasks)

  @property
  def epoch(self) -> int:
    """Epoch of the next task, from 0."""
    return self.position // len(self.tasks)

  def next_batch(self, n: int) -> list[Task]:
    """Returns the next `n` tasks and moves the cursor; goes on into the next epoch."""
    tasks = self.at(self.position, n)
    self.position += n
    return tasks

  def at(self, position: int, n: int) -> list[Task]:
    """Returns the `n` tasks from a place of the stream on; the cursor stays."""
    if n < 1:
      raise UserError(f"taskset batch of {n} tasks: must be at least 1 (explorer.batch_size)")
    chosen = selectors.select(self._selector, self._seed, len(self.tasks), position, n)
    return [self.tasks[i] for i in chosen]

  def state(self) -> dict[str, Any]:
    """Returns what `restore` needs, as JSON can hold it: the cursor, and what it is a cursor of."""
    return {
      "position": self.position,
      "size": len(self.tasks),
      "selector": self._selector_name,
      "seed": self._seed,
      "digest": self._digest,
    }

  def restore(self, state: Mapping[str, Any]) -> None:
    """Goes on where `state` was taken.

    Raises:
      UserError: the state belongs to another taskset, selector or seed, where the same position
        would mean other tasks; or it is damaged.
    """
    position = state.get("position")
    if not isinstance(position, int) or isinstance(position, bool) or position < 0:
      raise UserError(f"taskset state: position = {position!r}; expected an int of at least 0")
    for name, mine in self.state().items():
      if name != "position" and state.get(name, mine) != mine:
        raise UserError(
          f"taskset state: {name} was {state[name]!r} when it was saved and is {mine!r} now; "
          "resume with the same taskset, selector and seed, or start in a new workdir"
        )
    self.position = position

  @functools.cached_property
  def _digest(self) -> str:
    """Fingerprint of prompts, truths and demonstrations in order."""
    digest = hashlib.sha256()
    for task in self.tasks:
      what = [task.messages, task.truth, task.response, task.chosen, task.rejected, task.text]
      digest.update(json.dumps(what, default=str).encode())
    return digest.hexdigest()[:16]


def load_taskset(
  config: TasksetConfig,
  *,
  seed: int = 0,
  is_eval: bool = False,
  require: Sequence[str] = (),
) -> Taskset:
  """Reads or generates the taskset that a config describes and checks every row.

  Args:
    config: where rows come from (`path` or `generate`), their fields, the selector.
    seed: the selector's; also the generator's, if it takes a `seed` that `generate_args` does not
      set.
    is_eval: mark the tasks as held-out; their order is that of the rows.
    require: fields that every task must have: truth, response, chosen, rejected, text.

  Raises:
    UserError: names the file and line, the value and the fix.
  """
  rows = _generated(config, seed) if config.generate else read_rows(config.path)
  if config.limit:
    rows = rows[: config.limit]
  tasks = [to_task(row, i, config, is_eval=is_eval) for i, row in enumerate(rows)]
  for name in require:
    key = getattr(config, f"{name}_key")
    for row, task in zip(rows, tasks):
      if not getattr(task, name):
        raise UserError(
          f"{row.where}: no {name}: field {key!r} is missing or empty; set taskset.{name}_key to "
          f"the field that holds it (fields here: {', '.join(row.data)})"
        )
  return Taskset(tasks, selector="sequential" if is_eval else config.selector, seed=seed)


def _generated(config: TasksetConfig, seed: int) -> list[Row]:
  generate = plugins.load(config.generate, "taskset.generate")
  args = dict(config.generate_args)
  parameters = inspect.signature(generate).parameters
  if "seed" in parameters:
    args.setdefault("seed", seed)
  try:
    inspect.signature(generate).bind(**args)
  except TypeError as e:
    raise UserError(
      f"taskset.generate_args = {dict(config.generate_args)!r}: {config.generate} takes "
      f"({', '.join(parameters)}): {e}"
    ) from e
  rows = list(generate(**args))
  for i, row in enumerate(rows):
    if not isinstance(row, dict):
      raise UserError(
        f"{config.generate}[{i}]: expected a dict, got {type(row).__name__}; return a list of dicts"
      )
  if not rows:
    raise UserError(f"taskset.generate = {config.generate!r} returned no rows")
  return [Row(f"{config.generate}[{i}]", row) for i, row in enumerate(rows)]
