"""What travels between the hops: Task, Experience (host) and Batch (device).

Axis letters: L tokens of one experience, M micro-batches, B rows, T row length, N sequences.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from trinity_jax import blobs
from trinity_jax.errors import UserError


class StopReason(enum.IntEnum):
  """Why a run ended. Logged as rates `stop/<name>`; integers so that a batch can carry them."""

  RUNNING = 0
  STOP = 1  # sampled a stop token
  LENGTH = 2  # used up its response limit
  TIMEOUT = 3  # the run's deadline passed
  ERROR = 4  # the workflow, environment or reward raised
  ABORTED = 5  # cancelled by us
  PROMPT_TOO_LONG = 6
  DEMONSTRATION = 7  # not sampled: an expert or a human wrote it
  QUARANTINED = 8  # not run: its task had failed too often

  @property
  def failed(self) -> bool:
    """True when nothing of the run can be trained on."""
    return self in (
      StopReason.TIMEOUT,
      StopReason.ERROR,
      StopReason.ABORTED,
      StopReason.PROMPT_TOO_LONG,
      StopReason.QUARANTINED,
    )


class Source(enum.IntEnum):
  """Who wrote an experience's action tokens."""

  ROLLOUT = 0
  EXPERT = 1
  HUMAN = 2


@dataclasses.dataclass(frozen=True)
class Task:
  """One row of a taskset.

  Attributes:
    index: position of the row in its taskset: the task's identity over epochs and resumes.
    messages: the prompt as chat messages ({"role": ..., "content": ...}).
    truth: what a verifier compares with ("" when there is none).
    response: a demonstration (supervised training only), else None.
    chosen, rejected: a preference pair, else None.
    text: plain text to continue pre-training on, else None; then there are no messages.
    taskset: name of the taskset it came from.
    is_eval: evaluated, never trained on.
    raw: the whole row as read.
  """

  index: int
  messages: tuple[dict[str, Any], ...]
  truth: str = ""
  response: str | None = None
  chosen: str | None = None
  rejected: str | None = None
  text: str | None = None
  taskset: str = "train"
  is_eval: bool = False
  raw: dict[str, Any] = dataclasses.field(default_factory=dict)


class ExperienceId(NamedTuple):
  """Identity of an experience; sorting ids gives the order of a synchronous run."""

  batch: int  # explorer step that started it (1, 2, ...)
  task: int  # place of the task inside that step
  run: int  # which of the group's runs
  step: int  # which of the run's experiences (step-wise workflows)

  @property
  def group(self) -> tuple[int, int]:
    """Runs of one task in one explorer step share this."""
    return self.batch, self.task

  def __str__(self) -> str:
    return f"{self.batch}/{self.task}/{self.run}/{self.step}"


_ARRAYS = {
  "tokens": np.int32,
  "action_mask": np.bool_,
  "logprobs": np.float32,
  "versions": np.int32,
  "mixed": np.bool_,
  "token_rewards": np.float32,
  "advantages": np.float32,
}
_OPTIONAL = ("mixed", "token_rewards", "advantages")


@dataclasses.dataclass
class Experience:
  """One token log with what is known about each token (host, numpy).

  Attributes:
    tokens: i32[L], prompt and responses of every turn as the policy saw them.
    action_mask: bool[L], True where the policy wrote the token.
    logprobs: f32[L], log-prob under the distribution really sampled from where action_mask,
      else 0.
    versions: i32[L], policy version that sampled the token where action_mask, else -1.
    reward: scalar reward, None while it has not arrived or when the run failed.
    mixed: bool[L] or None, True where the sampler's context of the token was (partly) computed by
      another version than the one that sampled it, so that no forward pass gives its log-prob.
    token_rewards, advantages: f32[L] or None.
    id: who it is; `batch`, `task` and `run` also seed its randomness.
    source: who wrote the action tokens.
    stop_reason: why it ended.
    temperature: sampling temperature of the action tokens (1.0 for greedy and demonstrations).
    messages: the dialogue as text, for people.
    metrics: numbers about the run, logged as means over the step.
    info: anything JSON can hold.
    extras: arrays that an algorithm's schema declares, [L] or scalar.
  """

  tokens: np.ndarray
  action_mask: np.ndarray
  logprobs: np.ndarray
  versions: np.ndarray
  id: ExperienceId
  reward: float | None = None
  mixed: np.ndarray | None = None
  token_rewards: np.ndarray | None = None
  advantages: np.ndarray | None = None
  source: Source = Source.ROLLOUT
  stop_reason: StopReason = StopReason.STOP
  temperature: float = 1.0
  messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  metrics: dict[str, float] = dataclasses.field(default_factory=dict)
  info: dict[str, Any] = dataclasses.field(default_factory=dict)
  extras: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    for name, dtype in _ARRAYS.items():
      value = getattr(self, name)
      if value is not None:
        # Contiguous: safetensors writes the memory behind a strided view, not its elements.
        value = np.ascontiguousarray(value, dtype)
        if value.shape != (len(self.tokens),):
          raise UserError(
            f"experience {self.id}: {name} has shape {value.shape}, expected ({len(self.tokens)},) "
            "like tokens; give every token one entry"
          )
        setattr(self, name, value)
      elif name not in _OPTIONAL:
        raise UserError(f"experience {self.id}: {name} is None, expected an array")

  @property
  def num_actions(self) -> int:
    return int(self.action_mask.sum())

  @classmethod
  def failed(cls, id: ExperienceId, reason: StopReason, info: dict[str, Any]) -> Experience:
    """A run that gave nothing: keeps its group complete, adds nothing to statistics or loss."""
    none = np.zeros(0)
    return cls(none, none, none, none, id, stop_reason=reason, info=info)

  def to_bytes(self) -> bytes:
    """One safetensors blob; everything that is not an array is JSON in its header."""
    arrays = {k: getattr(self, k) for k in _ARRAYS if getattr(self, k) is not None}
    arrays |= {f"extras.{k}": v for k, v in self.extras.items()}
    header = {
      "id": list(self.id),
      "reward": self.reward,
      "source": int(self.source),
      "stop_reason": int(self.stop_reason),
      "temperature": self.temperature,
      "messages": self.messages,
      "metrics": self.metrics,
      "info": self.info,
    }
    return blobs.pack("experience", header, arrays)

  @classmethod
  def from_bytes(cls, data: bytes) -> Experience:
    """Inverse of `to_bytes`; a damaged record is a UserError, never executed."""
    from safetensors import SafetensorError

    try:
      header, arrays = blobs.unpack("experience", data)
      for name, dtype in _ARRAYS.items():
        if name in arrays and arrays[name].dtype != dtype:
          raise ValueError(f"{name} is {arrays[name].dtype}, expected {np.dtype(dtype)}")
      return cls(
        **{k: arrays.get(k) for k in _ARRAYS},
        id=ExperienceId(*header.pop("id")),
        source=Source(header.pop("source")),
        stop_reason=StopReason(header.pop("stop_reason")),
        extras={k[len("extras.") :]: v for k, v in arrays.items() if k.startswith("extras.")},
        **header,
      )
    # Whatever is wrong with a header shows as one of these.
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
      raise UserError(f"experience record of {len(data)} bytes is damaged: {e}") from e


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """One optimizer step's experiences as packed rows (device pytree).

  Rows are grouped in M micro-batches of B rows of length T; micro-batches at or above `num_micro`
  are empty and cost nothing. x[m, b, t] speaks of tokens[m, b, t] given what precedes it in its
  segment.

  Attributes:
    tokens, positions: i32[M, B, T]; positions count from 0 in each segment.
    segment_ids: i32[M, B, T], 1, 2, ... along a row; 0 is padding.
    action_mask: bool[M, B, T].
    logprobs: f32[M, B, T], behaviour log-probs.
    versions: i32[M, B, T], -1 where not sampled.
    ref_logprobs: f32[M, B, T], zeros unless the algorithm needs a reference.
    sequence_index: i32[M, B, T], which of the N sequences a token belongs to (0 on padding).
    rewards: f32[N], 0 where not valid.
    group: i32[N], group number within the step.
    valid: bool[N], False for failed runs and unused rows of the table.
    run, step, pair, source, stop_reason: i32[N].
    leader: i32[N], the sequence that stands for the run in comparisons of runs: the run's last one
      with action tokens, of runs with one sequence that one.
    temperature: f32[N].
    num_micro: i32[], live micro-batches.
    num_tokens: i32[], action tokens of the whole step (the global denominator).
    num_sequences: i32[], valid sequences of the whole step.
    extras: arrays an algorithm's schema declares, [M, B, T] or [N].
  """

  tokens: Any
  positions: Any
  segment_ids: Any
  action_mask: Any
  logprobs: Any
  versions: Any
  ref_logprobs: Any
  sequence_index: Any
  rewards: Any
  group: Any
  valid: Any
  run: Any
  step: Any
  pair: Any
  leader: Any
  source: Any
  stop_reason: Any
  temperature: Any
  num_micro: Any
  num_tokens: Any
  num_sequences: Any
  extras: dict[str, Any] = dataclasses.field(default_factory=dict)

  TOKEN_FIELDS: ClassVar[tuple[str, ...]] = (
    "tokens", "positions", "segment_ids", "action_mask", "logprobs", "versions",
    "ref_logprobs", "sequence_index",
  )  # fmt: skip
