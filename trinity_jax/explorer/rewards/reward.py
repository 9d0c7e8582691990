"""From a config's reward spec to a function that scores a response."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from trinity_jax import plugins
from trinity_jax.errors import UserError, suggestion
from trinity_jax.explorer.rewards.arithmetic import arithmetic_reward
from trinity_jax.explorer.rewards.boxed import (
  accuracy_reward,
  accuracy_reward_async,
  boxed_reward,
  boxed_reward_async,
)
from trinity_jax.explorer.rewards.code import code_reward, code_reward_async
from trinity_jax.explorer.rewards.countdown import countdown_reward
from trinity_jax.explorer.rewards.dapo import dapo_reward, dapo_reward_async, response_tokens
from trinity_jax.explorer.rewards.exact import exact_reward
from trinity_jax.explorer.rewards.format import format_reward
from trinity_jax.explorer.rewards.math import math_reward, math_reward_async
from trinity_jax.explorer.rewards.rubric import rubric_reward
from trinity_jax.explorer.rewards.ruler import ruler_reward
from trinity_jax.explorer.threads import in_thread

if TYPE_CHECKING:
  from trinity_jax.experience import Task

T = TypeVar("T")


class RewardFn(Protocol):
  """What a reward function looks like; it may be a coroutine function as well.

  Returns a number, or named components that are summed with the config's weights.
  """

  def __call__(
    self, response: str, truth: str, task: Task | None = None, /, **args: Any
  ) -> float | Mapping[str, float]: ...


class GroupRewardFn(Protocol):
  """One that sees all responses to a task at once, to compare them or to grade them as a batch.

  Known by an attribute `judges_group = True` of the function. Returns one value per response, each
  as a RewardFn's; may be a coroutine function as well.
  """

  def __call__(
    self, responses: Sequence[str], truth: str, task: Task | None = None, /, **args: Any
  ) -> Sequence[float | Mapping[str, float]]: ...


class Score(NamedTuple):
  """A reward and what it is the weighted sum of (components before weighting)."""

  total: float
  components: dict[str, float]


class _Builtin(NamedTuple):
  function: Callable[..., Any]
  coroutine: Callable[..., Any] | None  # where grading waits for somebody


_BUILTINS = {
  "accuracy": _Builtin(accuracy_reward, accuracy_reward_async),
  "arithmetic": _Builtin(arithmetic_reward, None),
  "boxed": _Builtin(boxed_reward, boxed_reward_async),
  "code": _Builtin(code_reward, code_reward_async),
  "countdown": _Builtin(countdown_reward, None),
  "dapo": _Builtin(dapo_reward, dapo_reward_async),
  "exact": _Builtin(exact_reward, None),
  "format": _Builtin(format_reward, None),
  "math": _Builtin(math_reward, math_reward_async),
  "rubric": _Builtin(rubric_reward, None),
  "ruler": _Builtin(ruler_reward, None),
}


def resolve(name: str) -> Callable[..., Any]:
  """Returns the reward function of that name, or the one that "module:function" names.

  Raises:
    UserError: there is none.
  """
  if name in _BUILTINS:
    return _BUILTINS[name].function
  if ":" in name:
    return plugins.load(name, "reward")
  raise UserError(
    f"reward {name!r} does not exist{suggestion(name, _BUILTINS)} (or name a function of yours as "
    "'module:function')"
  )


def combine(components: Mapping[str, float], weights: Mapping[str, float]) -> float:
  """Returns sum over components of weight x value; the weight is 1 where none is given.

  Raises:
    UserError: a weight for a component that is not there.
  """
  for name in weights:
    if name not in components:
      raise UserError(f"reward weight {name!r}: no such component{suggestion(name, components)}")
  return math.fsum(weights.get(name, 1.0) * value for name, value in components.items())


@dataclasses.dataclass(frozen=True)
class _Part:
  name: str
  function: Callable[..., Any]
  coroutine: Callable[..., Any] | None
  inline: bool  # ours and quick, so it may run on the event loop
  group: bool  # wants all responses of a group
  weight: float

  async def run(self, response: Any, truth: str, task: Task | None) -> Any:
    if self.coroutine:
      return await self.coroutine(response, truth, task)
    if self.inline:
      return self.function(response, truth, task)
    return await in_thread(self.function, response, truth, task)

  def read(self, value: Any) -> dict[str, float]:
    """Checks what the function returned and names it."""
    values = dict(value) if isinstance(value, Mapping) else {self.name: value}
    for name, number in values.items():
      try:
        values[name] = float(number)
      except (TypeError, ValueError):
        values[name] = math.nan
      if not math.isfinite(values[name]):
        raise UserError(
          f"reward {self.name!r} returned {name} = {number!r}; expected a finite number, or a dict "
          "of them"
        )
    return values


@dataclasses.dataclass(frozen=True)
class Reward:
  """Scores responses; see `make_reward`."""

  spec: str
  parts: tuple[_Part, ...]
  weights: Mapping[str, float]

  @property
  def needs_group(self) -> bool:
    """Whether only `grade_group` can score: one of the functions compares responses."""
    return any(part.group for part in self.parts)

  def __call__(self, response: str, truth: str, task: Task | None = None) -> Score:
    """Scores in the calling thread."""
    self._refuse_single()
    return self._sum([part.function(response, truth, task) for part in self.parts])

  async def grade(self, response: str, truth: str, task: Task | None = None) -> Score:
    """Scores without blocking the event loop: coroutines are awaited, a user's plain function
    runs in a thread."""
    self._refuse_single()
    return self._sum([await part.run(response, truth, task) for part in self.parts])

  async def grade_group(
    self,
    responses: Sequence[str],
    truth: str,
    task: Task | None = None,
    tokens: Sequence[int] | None = None,
  ) -> list[Score]:
    """Scores all responses to a task, in order, as `grade` does; each of its functions either sees
    them one by one (all at the same time) or, a group reward, all at once.

    Args:
      tokens: how many each response has, for functions that ask (see `response_tokens`).
    """
    if not responses:
      return []

    async def single(part: _Part, i: int) -> Any:
      with response_tokens(tokens[i]) if tokens is not None else contextlib.nullcontext():
        return await part.run(responses[i], truth, task)

    async def column(part: _Part) -> list[Any]:
      if not part.group:
        return await _together(single(part, i) for i in range(len(responses)))
      values = list(await part.run(list(responses), truth, task))
      if len(values) != len(responses):
        raise UserError(
          f"reward {part.name!r} returned {len(values)} values for {len(responses)} responses; "
          "expected one each"
        )
      return values

    columns = await _together(map(column, self.parts))
    return [self._sum(list(row)) for row in zip(*columns)]

  def _refuse_single(self) -> None:
    if self.needs_group:
      raise UserError(f"reward {self.spec!r} compares the runs of a group; use grade_group")

  def _sum(self, results: list[Any]) -> Score:
    values, weights = {}, dict(self.weights)
    for part, result in zip(self.parts, results):
      for name, value in part.read(result).items():
        if name in values:
          raise UserError(f"reward {self.spec!r}: two functions return a component {name!r}")
        values[name] = value
        weights[name] = part.weight * self.weights.get(name, 1.0)
    return Score(combine(values, weights), values)


async def _together(awaitables: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
  """All results, in order; when one fails the others are cancelled and its error is raised."""
  try:
    async with asyncio.TaskGroup() as group:
      tasks = [group.create_task(a) for a in awaitables]
  except BaseExceptionGroup as e:
    raise e.exceptions[0] from e
  return [t.result() for t in tasks]


def make_reward(
  spec: str, args: Mapping[str, Any] | None = None, *, workers: int | None = None
) -> Reward:
  """Builds the reward that a config describes.

  Args:
    spec: a name, "module:function", or several joined by "+": "math+format".
    args: for one function its keyword arguments; for several {name: weight or {keyword: value,
      "weight": w}}. "weights" holds weights of named components (default 1):
      {"weights": {"accuracy": 1.0, "format": 0.5}}.
    workers: grader processes, for built-in functions that take `workers` and are not given it.

  Raises:
    UserError: unknown function, argument or weight.
  """
  names = [name.strip() for name in spec.split("+")]
  args = dict(args or {})
  weights = _weights(spec, args.pop("weights", {}))
  if len(names) > 1:
    for name in args:
      if name not in names:
        raise UserError(f"reward_args.{name}: reward {spec!r} has no such part"
                        f"{suggestion(name, names)}")  # fmt: skip
    per_part = [args.get(name, {}) for name in names]
  else:
    per_part = [args]
  if len(set(names)) < len(names):
    raise UserError(f"reward {spec!r} names a function twice")
  parts = [_part(name, part_args, workers) for name, part_args in zip(names, per_part)]
  return Reward(spec, tuple(parts), weights)


def _part(name: str, args: Any, workers: int | None) -> _Part:
  function = resolve(name)
  builtin = _BUILTINS.get(name)
  coroutine = builtin.coroutine if builtin else None
  group = bool(getattr(function, "judges_group", False))
  if inspect.iscoroutinefunction(function):
    function, coroutine = functools.partial(_refuse, name), function
  keywords = dict(args) if isinstance(args, Mapping) else {"weight": args}
  weight = _weights(name, {"weight": keywords.pop("weight", 1.0)})["weight"]
  target = coroutine or function
  if builtin and workers is not None and "workers" in inspect.signature(target).parameters:
    keywords.setdefault("workers", workers)
  try:
    inspect.signature(target).bind("", "", None, **keywords)
  except TypeError as e:
    raise UserError(
      f"reward {name!r} cannot be called as f(response, truth, task"
      f"{''.join(f', {k}=...' for k in keywords)}): {e}; check reward_args"
    ) from e
  return _Part(
    name=name.partition(":")[2] or name,
    function=functools.partial(function, **keywords),
    coroutine=functools.partial(coroutine, **keywords) if coroutine else None,
    inline=builtin is not None,
    group=group,
    weight=weight,
  )


def _refuse(name: str, *_: Any, **__: Any) -> Any:
  raise UserError(f"reward {name!r} is a coroutine function; use `await reward.grade(...)`")


def _weights(spec: str, weights: Any) -> dict[str, float]:
  if not isinstance(weights, Mapping):
    raise UserError(f"reward {spec!r}: weights = {weights!r}; expected {{component: number}}")
  for name, value in weights.items():
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
      raise UserError(f"reward {spec!r}: weight {name} = {value!r}; expected a finite number")
  return {name: float(value) for name, value in weights.items()}
