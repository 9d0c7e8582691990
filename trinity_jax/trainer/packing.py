"""Experiences -> a `Batch` of declared shape, in numpy.

Axis letters: M micro-batches, B rows per micro-batch, T row length, N sequences, L one sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from trinity_jax.errors import UserError
from trinity_jax.experience import Batch, Experience


@dataclasses.dataclass(frozen=True)
class PackSpec:
  """The shapes a train step is compiled for.

  Attributes:
    row_lengths: T choices, ascending; one program each.
    rows: B, rows of one micro-batch over all devices.
    sequences: N, most sequences of one step.
  """

  row_lengths: tuple[int, ...]
  rows: int
  sequences: int

  @property
  def micros(self) -> int:
    """M: enough for one sequence per row, so that a step always fits."""
    return -(-self.sequences // self.rows)


def assign_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
  """First-fit decreasing: returns rows as lists of sequence numbers.

  Deterministic (ties keep the order given). Sequences of length 0 get no place.
  """
  order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (-lengths[i], i))
  rows: list[list[int]] = []
  free: list[int] = []
  first_open = 0  # rows before it are full for even the shortest sequence
  shortest = min((n for n in lengths if n), default=0)
  for i in order:
    need = lengths[i]
    if need > row_length:
      raise UserError(f"sequence {i} has {need} tokens, more than the row length {row_length}")
    while first_open < len(free) and free[first_open] < shortest:
      first_open += 1
    for r in range(first_open, len(free)):
      if free[r] >= need:
        rows[r].append(i)
        free[r] -= need
        break
    else:
      rows.append([i])
      free.append(row_length - need)
  return rows


def choose_row_length(lengths: Sequence[int], spec: PackSpec) -> tuple[int, list[list[int]]]:
  """Picks the declared T with the least padded work (micro-batches x T; ties: the shorter rows,
  whose attention is cheaper) and the rows it gives."""
  longest = max(lengths, default=0)
  fitting = [t for t in sorted(spec.row_lengths) if t >= longest]
  if not fitting:
    raise UserError(
      f"an experience of {longest} tokens does not fit trainer.row_lengths={spec.row_lengths}; "
      f"add a length of at least {longest}"
    )
  plans = [(t, assign_rows(lengths, t)) for t in fitting]
  return min(plans, key=lambda p: (-(-len(p[1]) // spec.rows) * p[0], p[0]))


def pack(
  experiences: Sequence[Experience], spec: PackSpec, pairs: Sequence[int] | None = None
) -> Batch:
  """Packs experiences into one `Batch` of numpy arrays.

  Args:
    experiences: at most spec.sequences; failed ones (no tokens) only fill their [N] entries.
    spec: declared shapes.
    pairs: pair number of each experience (preference data); -1 where there is none.

  Returns:
    Batch with numpy leaves; advantages and ref_logprobs are zeros.

  Raises:
    UserError: too many experiences, one longer than every row length, or one whose first token
      is an action (nothing precedes it, so it has no log-prob).
  """
  if len(experiences) > spec.sequences:
    raise UserError(
      f"{len(experiences)} experiences in one step, but trainer.batch_size allows {spec.sequences}"
    )
  for e in experiences:
    if len(e.tokens) and e.action_mask[0]:
      raise UserError(f"experience {e.id}: its first token is an action; give it a prompt token")
  row_length, rows = choose_row_length([len(e.tokens) for e in experiences], spec)
  shape = (spec.micros * spec.rows, row_length)
  fields: dict[str, Any] = {
    "tokens": np.zeros(shape, np.int32),
    "positions": np.zeros(shape, np.int32),
    "segment_ids": np.zeros(shape, np.int32),
    "action_mask": np.zeros(shape, np.bool_),
    "logprobs": np.zeros(shape, np.float32),
    "versions": np.full(shape, -1, np.int32),
    "advantages": np.zeros(shape, np.float32),
    "ref_logprobs": np.zeros(shape, np.float32),
    "sequence_index": np.zeros(shape, np.int32),
  }
  for r, members in enumerate(rows):
    start = 0
    for segment, i in enumerate(members, 1):
      e = experiences[i]
      at = np.s_[r, start : start + len(e.tokens)]
      for name in ("tokens", "action_mask", "logprobs", "versions"):
        fields[name][at] = getattr(e, name)
      fields["positions"][at] = np.arange(len(e.tokens))
      fields["segment_ids"][at] = segment
      fields["sequence_index"][at] = i
      start += len(e.tokens)
  micro_shape = (spec.micros, spec.rows, row_length)
  fields = {k: v.reshape(micro_shape) for k, v in fields.items()}
  return Batch(
    **fields,
    **_sequence_fields(experiences, spec.sequences, pairs),
    num_micro=np.int32(-(-len(rows) // spec.rows)),
    num_tokens=np.int32(fields["action_mask"].sum()),
    num_sequences=np.int32(sum(e.num_actions > 0 for e in experiences)),
  )


def _sequence_fields(experiences, size: int, pairs) -> dict[str, Any]:
  """The [N] table: one entry per experience, in the order given."""
  groups: dict[tuple[int, int], int] = {}
  table = {
    "rewards": np.zeros(size, np.float32),
    "group": np.zeros(size, np.int32),
    "valid": np.zeros(size, np.bool_),
    "run": np.zeros(size, np.int32),
    "step": np.zeros(size, np.int32),
    "pair": np.full(size, -1, np.int32),
    "source": np.zeros(size, np.int32),
    "stop_reason": np.zeros(size, np.int32),
    "temperature": np.ones(size, np.float32),
  }
  for i, e in enumerate(experiences):
    table["group"][i] = groups.setdefault(e.id.group, len(groups))
    table["valid"][i] = e.num_actions > 0
    table["rewards"][i] = e.reward if e.reward is not None and e.num_actions else 0.0
    table["run"][i], table["step"][i] = e.id.run, e.id.step
    table["source"][i], table["stop_reason"][i] = e.source, e.stop_reason
    table["temperature"][i] = e.temperature
    if pairs is not None:
      table["pair"][i] = pairs[i]
  return table
