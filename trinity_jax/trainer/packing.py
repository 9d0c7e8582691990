"""Experiences -> a `Batch` of declared shape, in numpy.

Axis letters: M micro-batches, B rows per micro-batch, T row length, N sequences, L one sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from trinity_jax.algorithms.algorithm import Algorithm
from trinity_jax.config import Config
from trinity_jax.errors import UserError
from trinity_jax.experience import Batch, Experience
from trinity_jax.trainer.extras import NO_EXTRAS, Extras


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


def pack_spec(config: Config, algorithm: Algorithm) -> PackSpec:
  """The declared shapes of a config, of one update; rows are those of all devices together.

  Where no row length is named, it is the longest possible, up to a multiple of mesh.context.
  """
  longest = config.sampler.max_prompt_length + config.sampler.max_response_length
  if algorithm.data == "preferences":
    longest *= 2  # a pair shares a row
  longest += -longest % config.mesh.context
  sequences = config.trainer.batch_size or config.explorer.batch_size * config.explorer.group_size
  if not algorithm.supervised:
    sequences *= config.explorer.max_logs
  if algorithm.blend is not None:
    sequences += config.experts.batch_size
  return PackSpec(
    row_lengths=tuple(sorted(config.trainer.row_lengths)) or (longest,),
    rows=config.trainer.rows_per_micro,
    sequences=sequences // config.trainer.minibatches,
  )


def assign_rows(
  lengths: Sequence[int], row_length: int, together: Sequence[int] | None = None
) -> list[list[int]]:
  """First-fit decreasing: returns rows as lists of sequence numbers.

  Deterministic (ties keep the order given). Sequences of length 0 get no place. Sequences with
  equal numbers in `together` (-1: none) share a row, in the order given.
  """
  units = _units(lengths, together)
  sizes = [sum(lengths[i] for i in unit) for unit in units]
  order = sorted((u for u, n in enumerate(sizes) if n), key=lambda u: (-sizes[u], units[u]))
  rows: list[list[int]] = []
  free: list[int] = []
  first_open = 0  # rows before it are full for even the shortest
  shortest = min((n for n in sizes if n), default=0)
  for u in order:
    need = sizes[u]
    if need > row_length:
      what = f"sequence {units[u][0]} has" if len(units[u]) == 1 else f"pair {units[u]} has"
      raise UserError(f"{what} {need} tokens, more than the row length {row_length}")
    members = [i for i in units[u] if lengths[i]]
    while first_open < len(free) and free[first_open] < shortest:
      first_open += 1
    for r in range(first_open, len(free)):
      if free[r] >= need:
        rows[r] += members
        free[r] -= need
        break
    else:
      rows.append(members)
      free.append(row_length - need)
  return rows


def _units(lengths: Sequence[int], together: Sequence[int] | None) -> list[list[int]]:
  """Sequences that share a row, as lists."""
  if together is None:
    return [[i] for i in range(len(lengths))]
  units: dict[Any, list[int]] = {}
  for i, number in enumerate(together):
    units.setdefault(("alone", i) if number < 0 else number, []).append(i)
  return list(units.values())


def choose_row_length(
  lengths: Sequence[int], spec: PackSpec, together: Sequence[int] | None = None
) -> tuple[int, list[list[int]]]:
  """Picks the declared T with the least padded work (micro-batches x T; ties: the shorter rows,
  whose attention is cheaper) and the rows it gives."""
  units = _units(lengths, together)
  longest = max((sum(lengths[i] for i in unit) for unit in units), default=0)
  fitting = [t for t in sorted(spec.row_lengths) if t >= longest]
  if not fitting:
    what = "an experience" if together is None else "a preference pair"
    raise UserError(
      f"{what} of {longest} tokens does not fit trainer.row_lengths={spec.row_lengths}; "
      f"add a length of at least {longest}"
    )
  plans = [(t, assign_rows(lengths, t, together)) for t in fitting]
  return min(plans, key=lambda p: (-(-len(p[1]) // spec.rows) * p[0], p[0]))


def pack(
  experiences: Sequence[Experience],
  spec: PackSpec,
  pairs: Sequence[int] | None = None,
  extras: Extras = NO_EXTRAS,
) -> Batch:
  """Packs experiences into one `Batch` of numpy arrays.

  Args:
    experiences: at most spec.sequences; failed ones (no tokens) only fill their [N] entries.
    spec: declared shapes.
    pairs: pair number of each experience (preference data), -1 where there is none; the members of
      a pair share a row, so that no split parts them.
    extras: which arrays besides the fixed ones the algorithm reads.

  Returns:
    Batch with numpy leaves; ref_logprobs and what extras call filled are zeros.

  Raises:
    UserError: too many experiences, one longer than every row length, or one whose first token
      is an action (nothing precedes it, so it has no log-prob).
  """
  if len(experiences) > spec.sequences:
    raise UserError(
      f"{len(experiences)} experiences in one step, but there is room for {spec.sequences}: runs x "
      "explorer.max_logs, or trainer.batch_size"
    )
  for e in experiences:
    if len(e.tokens) and e.action_mask[0]:
      raise UserError(f"experience {e.id}: its first token is an action; give it a prompt token")
  row_length, rows = choose_row_length([len(e.tokens) for e in experiences], spec, pairs)
  shape = (spec.micros * spec.rows, row_length)
  fields: dict[str, Any] = {
    "tokens": np.zeros(shape, np.int32),
    "positions": np.zeros(shape, np.int32),
    "segment_ids": np.zeros(shape, np.int32),
    "action_mask": np.zeros(shape, np.bool_),
    "logprobs": np.zeros(shape, np.float32),
    "versions": np.full(shape, -1, np.int32),
    "ref_logprobs": np.zeros(shape, np.float32),
    "sequence_index": np.zeros(shape, np.int32),
  }
  more = {name: np.zeros(shape, np.float32) for name in (*extras.tokens, *extras.filled)}
  for r, members in enumerate(rows):
    start = 0
    for segment, i in enumerate(members, 1):
      e = experiences[i]
      at = np.s_[r, start : start + len(e.tokens)]
      for name in ("tokens", "action_mask", "logprobs", "versions"):
        fields[name][at] = getattr(e, name)
      for name, read in extras.tokens.items():
        more[name][at] = read(e)
      fields["positions"][at] = np.arange(len(e.tokens))
      fields["segment_ids"][at] = segment
      fields["sequence_index"][at] = i
      start += len(e.tokens)
  micro_shape = (spec.micros, spec.rows, row_length)
  fields = {k: v.reshape(micro_shape) for k, v in fields.items()}
  more = {k: v.reshape(micro_shape) for k, v in more.items()}
  more |= {k: read(experiences, spec.sequences) for k, read in extras.sequences.items()}
  return Batch(
    **fields,
    extras=more,
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
    "leader": leaders(experiences, size),
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


def leaders(experiences: Sequence[Experience], size: int) -> np.ndarray:
  """i32[size]: of each sequence, the last one of its run that has action tokens (else itself)."""
  out = np.arange(size, dtype=np.int32)
  last: dict[tuple[int, int, int], tuple[int, int]] = {}
  for i, e in enumerate(experiences):
    if e.num_actions:
      last[e.id[:3]] = max(last.get(e.id[:3], (-1, i)), (e.id.step, i))
  for i, e in enumerate(experiences):
    if e.num_actions:
      out[i] = last[e.id[:3]][1]
  return out
