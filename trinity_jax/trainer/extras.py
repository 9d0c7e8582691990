"""Arrays that only some algorithms read: where they come from when a batch is packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trinity_jax.algorithms.algorithm import SCORES, Algorithm
from trinity_jax.errors import UserError
from trinity_jax.experience import Experience


class Extras(NamedTuple):
  """What a batch holds besides its fixed fields.

  Attributes:
    tokens: name -> how to read it off an experience, f32[L] or a scalar.
    sequences: name -> how to make the [N] array of (experiences, N).
    filled: names of token arrays that the trainer computes on the device.
  """

  tokens: Mapping[str, Callable[[Experience], Any]]
  sequences: Mapping[str, Callable[[Sequence[Experience], int], np.ndarray]]
  filled: tuple[str, ...]


NO_EXTRAS = Extras({}, {}, ())


def extras_of(
  algorithm: Algorithm, *, teacher: bool = False, scores: Sequence[str] = ()
) -> Extras:
  """The extras that an algorithm reads.

  Args:
    teacher: a teacher model computes teacher_logprob; otherwise experiences bring it.
    scores: more of algorithm.SCORES than the algorithm asks for.
  """
  inputs = algorithm.inputs
  tokens: dict[str, Callable[[Experience], Any]] = {}
  sequences: dict[str, Callable[[Sequence[Experience], int], np.ndarray]] = {}
  filled = [name for name in SCORES if name in algorithm.scores or name in scores]
  if "token_rewards" in inputs:
    tokens["token_rewards"] = token_rewards
  if "values" in inputs:
    filled.append("values")
  if "teacher_logprob" in inputs and teacher:
    filled.append("teacher_logprob")
  elif "teacher_logprob" in inputs:
    tokens["teacher_logprob"] = _extra("teacher_logprob", "set algorithm.teacher, or have")
  if "state_ids" in inputs:
    sequences["state_ids"] = state_ids
  if "step_rewards" in inputs:
    sequences["step_rewards"] = step_rewards
  for name in sorted(algorithm.schema):
    if name in algorithm.per_sequence:
      sequences[name] = _column(name)
    else:
      tokens[name] = _extra(name, "have")
  return Extras(tokens, sequences, tuple(filled))


def token_rewards(e: Experience) -> np.ndarray:
  """The experience's own, or its reward at the last token that the policy wrote."""
  if e.token_rewards is not None:
    return e.token_rewards
  out = np.zeros(len(e.tokens), np.float32)
  if e.num_actions and e.reward is not None:
    out[np.flatnonzero(e.action_mask)[-1]] = e.reward
  return out


def state_ids(experiences: Sequence[Experience], size: int) -> np.ndarray:
  """i32[N]: equal where info["env_state"] is equal, -1 where there is none (GiGPO's anchors)."""
  out, known = np.full(size, -1, np.int32), {}
  for i, e in enumerate(experiences):
    if "env_state" in e.info:
      out[i] = known.setdefault(str(e.info["env_state"]), len(known))
  return out


def step_rewards(experiences: Sequence[Experience], size: int) -> np.ndarray:
  """f32[N]: info["step_reward"]; without one, the reward at the run's last step and 0 before."""
  out = np.zeros(size, np.float32)
  last: dict[tuple[int, int, int], int] = {}
  for e in experiences:
    last[e.id[:3]] = max(e.id.step, last.get(e.id[:3], 0))
  for i, e in enumerate(experiences):
    final = (e.reward or 0.0) if e.id.step == last[e.id[:3]] else 0.0
    out[i] = e.info.get("step_reward", final)
  return out


def _lacking(e: Experience, name: str, how: str) -> UserError:
  return UserError(
    f"experience {e.id}: the algorithm reads {name!r}, which its extras do not hold (they hold "
    f"{', '.join(e.extras) or 'nothing'}); {how} the workflow return it"
  )


def _extra(name: str, how: str) -> Callable[[Experience], Any]:
  def read(e: Experience):
    if name not in e.extras:
      raise _lacking(e, name, how)
    value = np.asarray(e.extras[name])
    if value.shape not in ((), (len(e.tokens),)):
      raise UserError(
        f"experience {e.id}: extras[{name!r}] has shape {value.shape}, expected a number or "
        f"({len(e.tokens)},), one a token"
      )
    return value

  return read


def _column(name: str) -> Callable[[Sequence[Experience], int], np.ndarray]:
  def read(experiences: Sequence[Experience], size: int) -> np.ndarray:
    out = np.zeros(size, np.float32)
    for i, e in enumerate(experiences):
      if not e.num_actions:
        continue
      if name not in e.extras:
        raise _lacking(e, name, "have")
      value = np.asarray(e.extras[name])
      if value.shape != ():
        raise UserError(
          f"experience {e.id}: extras[{name!r}] has shape {value.shape}, expected one number"
        )
      out[i] = value
    return out

  return read
