"""Pieces of an algorithm by name: a function, the arrays it reads, its hyper-parameters.

The rule that makes any function usable as a piece: positional parameters are arrays, called by the
names in INPUTS (or by the name of an extra that the batch's schema declares); keyword-only
parameters are hyper-parameters with defaults. So what an algorithm needs is read off signatures and
cannot disagree with them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from trinity_jax import plugins
from trinity_jax.errors import UserError, suggestion

# Arrays that the framework can provide. X = the shape of token arrays, [N] = one entry a sequence.
INPUTS = {
  "rewards": "[N] reward of each sequence",
  "group_ids": "[N] index of its group (task) in [0, num_groups); where an advantage reads it (and "
  "not run_ids), a run's sequences come as one: its last, with the tokens of all",
  "valid": "[N] False where a slot holds no sequence",
  "num_groups": "static int",
  "mask": "X, True at tokens the policy wrote",
  "logprob": "X, under the policy being trained (differentiated)",
  "old_logprob": "X, under the distribution that was sampled from",
  "ref_logprob": "X, under the reference model",
  "teacher_logprob": "X, under the teacher model",
  "prox_logprob": "X, under the policy as it is when the optimizer step begins (no gradient)",
  "prox_entropy": "X, entropy of that distribution, nats",
  "expected_score": "X, sum over the vocabulary of p^2 (H + log p) of that distribution",
  "values": "X, the critic's value before the token is written",
  "entropy": "X, of the policy's distribution (differentiated)",
  "advantages": "X, from the advantage function",
  "token_rewards": "X, reward of each token; over a sequence they add up to its reward",
  "versions": "X, policy version that sampled the token, -1 where none did",
  "is_expert": "X, True where an expert or a human wrote the token",
  "sequence_index": "X, index of the token's sequence in [0, num_sequences)",
  "num_sequences": "static int N",
  "run_ids": "[N] which run of its group (step-wise runs have several sequences)",
  "step_ids": "[N] which of the run's sequences, in order",
  "leader": "[N] index of the sequence that stands for the run",
  "state_ids": "[N] equal where two sequences started from the same environment state, -1 unknown",
  "step_rewards": "[N] reward of that turn alone",
  "baselines": "[N] reward of the task's greedy run",
  "pair_ids": "[N] number of the preference pair, -1 where there is none",
  "step": "number of the optimizer step (traced scalar)",
  "key": "PRNG key of the optimizer step",
}


def whole_step(**companions: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
  """Gives a policy loss arrays that need statistics of the whole optimizer step.

  A loss sees one micro-batch at a time. `@whole_step(kept=f)` has `f` called before the split, on
  the arrays of the whole step (any of INPUTS but logprob and entropy), without gradient; its result
  (shape X) reaches the loss as the parameter `kept`. Options of equal name go to both.
  """

  def mark(function):
    function.whole_step = companions
    return function

  return mark


def per_sequence(*names: str) -> Callable[[Any], Any]:
  """Says that the extras `names` which a function reads hold one number per sequence ([N])."""

  def mark(function):
    function.per_sequence = names
    return function

  return mark


def by_option(option: str, others: Mapping[Any, Callable[..., Any]]) -> Callable[[Any], Any]:
  """Has `others[value]` stand in for the function where `option` has that value.

  What a piece reads is told by its signature; an option that changes what is read is therefore a
  choice between functions. Each of `others` has `option` among its options, too.
  """

  def mark(function):
    function.by_option = (option, others)
    return function

  return mark


class Part(NamedTuple):
  """A function bound to its hyper-parameters; picks the arrays it reads from all there are."""

  kind: str
  name: str
  function: Callable[..., Any]
  required: tuple[str, ...]
  optional: tuple[str, ...]
  options: Mapping[str, Any]
  companions: Mapping[str, Part] = {}

  @property
  def inputs(self) -> frozenset[str]:
    """Names of all arrays that the function and its companions can read."""
    own = frozenset(self.required + self.optional) - self.companions.keys()
    return own.union(*(c.inputs for c in self.companions.values()))

  @property
  def needs(self) -> frozenset[str]:
    """Those of `inputs` that must be there."""
    own = frozenset(self.required) - self.companions.keys()
    return own.union(*(c.needs for c in self.companions.values()))

  def before_split(self, **available: Any) -> dict[str, Any]:
    """The companions' arrays, from those of the whole step."""
    return {
      name: jax.lax.stop_gradient(part(**available)) for name, part in self.companions.items()
    }

  def __call__(self, **available: Any) -> Any:
    """Calls the function with those of `available` that it names (None counts as absent)."""
    names = self.required + self.optional
    there = {k: v for k, v in available.items() if v is not None and k in names}
    missing = [k for k in self.required if k not in there]
    if missing:
      raise UserError(
        f"{self.kind} {self.name!r} reads {', '.join(missing)}, which was not given; "
        f"given: {', '.join(sorted(k for k, v in available.items() if v is not None)) or 'nothing'}"
      )
    return self.function(**there, **self.options)


def resolve(
  kind: str,
  name: str,
  registry: Mapping[str, Callable[..., Any]],
  options: Mapping[str, Any] | None = None,
) -> Part:
  """Finds `name` in `registry` (or imports a 'module:function') and binds `options` to it.

  Raises:
    UserError: unknown name or option, option of the wrong type, or a function whose signature does
      not follow the rule above.
  """
  if name in registry:
    function = registry[name]
  elif ":" in name:
    function = plugins.load(name, kind)
  else:
    raise UserError(
      f"{kind} {name!r} does not exist{suggestion(name, registry)} (or name your own function as "
      "'module:function')"
    )
  option, others = getattr(function, "by_option", ("", {}))
  chosen = (options or {}).get(option)
  function = next((f for value, f in others.items() if value == chosen), function)
  functions = {"": function, **getattr(function, "whole_step", {})}
  signatures = {k: _signature(kind, name, f) for k, f in functions.items()}
  defaults = {k: v for *_, own in signatures.values() for k, v in own.items()}
  bound = {k: _checked(kind, name, k, v, defaults) for k, v in (options or {}).items()}

  def part(of: str) -> Part:
    required, optional, own = signatures[of]
    title = f"{name}.{of}" if of else name
    return Part(
      kind, title, functions[of], required, optional, {k: v for k, v in bound.items() if k in own}
    )

  return part("")._replace(companions={k: part(k) for k in functions if k})


def _signature(kind, name, function):
  required, optional, defaults = [], [], {}
  for parameter in inspect.signature(function).parameters.values():
    if parameter.kind is parameter.KEYWORD_ONLY:
      if parameter.default is parameter.empty:
        raise UserError(f"{kind} {name!r}: option {parameter.name!r} has no default; give it one")
      defaults[parameter.name] = parameter.default
    elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
      group = required if parameter.default is parameter.empty else optional
      group.append(parameter.name)
    else:
      raise UserError(
        f"{kind} {name!r}: parameter {parameter.name!r} must be named and passable by keyword: "
        "no *args, **kwargs or positional-only parameters"
      )
  return tuple(required), tuple(optional), defaults


def _checked(kind, name, option, value, defaults):
  if option not in defaults:
    known = suggestion(option, defaults) if defaults else "; it has none"
    raise UserError(f"{kind} {name!r} has no option {option!r}{known}")
  default = defaults[option]
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if isinstance(default, bool):
    ok, expected = isinstance(value, bool), "True or False"
  elif isinstance(default, int):
    ok, expected = isinstance(value, int) and number, "an integer"
  elif isinstance(default, float):
    # None switches a bound off (dual_clip); a function without that meaning rejects it itself.
    ok, expected = number or value is None, "a number"
  elif isinstance(default, str):
    ok, expected = isinstance(value, str), "a string"
  else:
    ok, expected = True, ""
  if not ok:
    raise UserError(
      f"{kind} {name!r}: option {option} = {value!r}: expected {expected}, default {default!r}"
    )
  return value
