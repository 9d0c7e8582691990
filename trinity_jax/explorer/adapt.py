"""Classes and plain functions as workflows: what users write that is no coroutine function."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from trinity_jax.errors import UserError
from trinity_jax.experience import Task
from trinity_jax.explorer.answer import RunEnded
from trinity_jax.explorer.threads import in_thread

if TYPE_CHECKING:
  from trinity_jax.explorer.workflow import Model, Returned, Workflow

T = TypeVar("T")
CLOSING = 10.0  # seconds that an instance may take to close


class SyncModel:
  """A Model for code without `await`, in a thread of its own.

  The methods that wait return what the Model's coroutines do; everything else is the Model's.
  """

  def __init__(self, model: Model, loop: asyncio.AbstractEventLoop):
    self._model, self._loop = model, loop

  def __getattr__(self, name: str) -> Any:
    return getattr(self._model, name)

  def chat(self, messages: Sequence[Any], tools: Sequence[Any] | None = None) -> str:
    """See Model.chat."""
    return self._wait(self._model.chat(messages, tools))

  def generate(self, tokens: Sequence[int]) -> np.ndarray:
    """See Model.generate."""
    return self._wait(self._model.generate(tokens))

  def logprobs(self, tokens: Sequence[int], temperature: float | None = None) -> np.ndarray:
    """See Model.logprobs."""
    return self._wait(self._model.logprobs(tokens, temperature))

  def feedback(self) -> float | None:
    """See Model.feedback."""
    return self._wait(self._model.feedback())

  def openai(self, **kwargs: Any) -> Any:
    """An official OpenAI client whose calls are this run's turns; see Model.openai."""

    async def make() -> Any:
      return self._model.openai(sync=True, **kwargs)

    return self._wait(make())

  def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
    try:
      future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
    except RuntimeError as e:  # the loop has ended, and the run with it
      coroutine.close()
      raise RunEnded("the run has ended; its model answers no more") from e
    return future.result()


class ClassWorkflow:
  """A workflow from a class with `run(task, model)`.

  An instance serves one run at a time. With a method `reset(task)` it is kept for later runs, which
  begin with it; without, every run has its own. `close()`, if there is one, ends an instance: after
  its run, after a run that failed, or with `ClassWorkflow.close`. Methods may be coroutines or not;
  those that are not are called in a thread.
  """

  def __init__(self, make: type):
    self._make = make
    self._keep = hasattr(make, "reset")
    self._free: list[Any] = []
    self.__name__ = make.__name__

  async def __call__(self, task: Task, model: Model) -> Returned:
    instance = self._free.pop() if self._free else await in_thread(self._make)
    try:
      if self._keep:
        await _call(instance.reset, task)
      reward = await _run(instance.run, task, model)
    except BaseException:  # cancelled too: an instance in an unknown state serves nobody again
      await self._end(instance)
      raise
    if self._keep:
      self._free.append(instance)
    else:
      await self._end(instance)
    return reward

  async def close(self) -> None:
    """Ends the instances that are kept."""
    while self._free:
      await self._end(self._free.pop())

  async def _end(self, instance: Any) -> None:
    if hasattr(instance, "close"):
      # The run has its result, or its own error.
      with contextlib.suppress(Exception, TimeoutError):
        async with asyncio.timeout(CLOSING):
          await _call(instance.close)


def as_workflow(thing: Any, name: str) -> Workflow:
  """Returns a coroutine function as it is, and a class or a plain function as one.

  Args:
    name: what the user wrote, for messages.

  Raises:
    UserError: a class without `run`.
  """
  if inspect.isclass(thing):
    if not callable(getattr(thing, "run", None)):
      raise UserError(f"workflow {name!r} is a class without a method run(self, task, model)")
    return ClassWorkflow(thing)
  if _is_async(thing):
    return thing

  async def workflow(task: Task, model: Model) -> Returned:
    return await _run(thing, task, model)

  return workflow


def _is_async(function: Any) -> bool:
  return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
    getattr(function, "__call__", None)  # noqa: B004 (an object's own)
  )


async def _run(function: Any, task: Task, model: Model) -> Returned:
  if _is_async(function):
    return await function(task, model)
  try:
    return await in_thread(function, task, SyncModel(model, asyncio.get_running_loop()))
  finally:
    await model.aclose()  # the thread may go on, its run has ended


async def _call(function: Any, *args: Any) -> Any:
  return await function(*args) if _is_async(function) else await in_thread(function, *args)
