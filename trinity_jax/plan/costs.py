"""FLOPs, memory traffic and collective traffic of a compiled program, per device, loops included.

Counted are the FLOPs of matrix products (what a data sheet's peak speaks of), the bytes that
instructions read from and write to main memory, and the bytes a device sends over its links. A
loop counts its body times its trips; where these are decided while the program runs, as often as
`dynamic` says.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

import numpy as np

from trinity_jax.plan.hlo import Computation, Instruction, Module, Shape, braces, parse
from trinity_jax.plan.products import flops_of

COLLECTIVES = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
  "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota",
  "partition-id", "replica-id", "optimization-barrier", "add-dependency", "domain",
}  # fmt: skip
_WINDOWS = {"dynamic-slice", "slice", "gather"}  # read as much as they return
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # in place; where the update stands


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective, as often as it runs.

  Attributes:
    sent: bytes that each device sends in all runs, by a ring's algorithm.
    largest: elements of its result.
    group: numbers of the devices of one group that exchange; of a permutation the two that are
      furthest apart.
    overlaps: whether the program goes on while it runs.
  """

  kind: str
  sent: float
  largest: int
  group: tuple[int, ...]
  overlaps: bool
  count: float = 1.0
  op_name: str = ""

  @property
  def devices(self) -> int:
    return len(self.group)


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one device. `unknown`: kernels whose work is not counted."""

  flops: float = 0.0
  bytes: float = 0.0
  collectives: tuple[Collective, ...] = ()
  unknown: frozenset[str] = frozenset()

  def __add__(self, other: Cost) -> Cost:
    return Cost(
      self.flops + other.flops,
      self.bytes + other.bytes,
      self.collectives + other.collectives,
      self.unknown | other.unknown,
    )

  def __mul__(self, times: float) -> Cost:
    repeated = tuple(
      dataclasses.replace(c, sent=c.sent * times, count=c.count * times) for c in self.collectives
    )
    return Cost(self.flops * times, self.bytes * times, repeated, self.unknown)

  def sent(self) -> dict[str, float]:
    """Bytes by kind of collective."""
    out: dict[str, float] = {}
    for c in self.collectives:
      out[c.kind] = out.get(c.kind, 0.0) + c.sent
    return out


def cost(text: str, dynamic: Sequence[float] = ()) -> Cost:
  """Sums over a compiled program's text.

  Args:
    dynamic: trips of loops whose bound is not in the text: of the outermost ones, of those inside
      them, and so on; 1 beyond.
  """
  return _Sum(parse(text), dynamic).entry()


class _Sum:
  def __init__(self, module: Module, dynamic: Sequence[float]):
    self.module, self.dynamic = module, dynamic
    self._known: dict[tuple[str, int, bool], Cost] = {}

  def entry(self) -> Cost:
    return self.of(self.module.entry)

  def of(self, name: str, depth: int = 0, fused: bool = False) -> Cost:
    """Of a computation; depth: dynamic loops around it; fused: its values never reach memory."""
    key = (name, depth, fused)
    if key not in self._known:
      computation = self.module.computations[name]
      parts = (self._one(i, computation, depth, fused) for i in computation.instructions.values())
      self._known[key] = sum(parts, Cost())
    return self._known[key]

  def _one(self, i: Instruction, where: Computation, depth: int, fused: bool) -> Cost:
    operands = [_shapes(where, name) for name in i.operands]
    if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")):
      return Cost()
    kind = i.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
      found = self._collective(i, kind, operands)
      if kind == "all-reduce" and self._puts(where, i.operands[0]):
        found = dataclasses.replace(found, kind="all-gather")
      return Cost(collectives=(found,))
    if i.opcode == "while":
      return self._loop(i, where, depth)
    if i.opcode == "conditional":
      names = re.findall(r"%([\w.\-]+)", braces(i.attributes, "branch_computations"))
      names = names or [i.called("true_computation"), i.called("false_computation")]
      branches = [self.of(n, depth, fused) for n in names]
      return max(branches, key=lambda c: (c.flops, c.bytes))
    if i.opcode == "call":
      return self.of(i.called("to_apply"), depth, fused)
    if i.opcode == "async-start":
      return _overlapping(self.of(i.called("calls"), depth, fused))
    body = self._body(i, operands) if i.opcode == "custom-call" else ""
    if body:
      return self.of(body, depth, fused)
    if i.opcode == "fusion":
      return self._fusion(i, operands, depth, fused)
    flops, unknown = flops_of(i, operands)
    return Cost(flops, 0.0 if fused else _traffic(i, operands), (), unknown)

  def _loop(self, i: Instruction, where: Computation, depth: int) -> Cost:
    trips = self._trips(i, where)
    inside = depth
    if trips is None:
      trips = self.dynamic[depth] if depth < len(self.dynamic) else 1
      inside += 1
    return (self.of(i.called("body"), inside) + self.of(i.called("condition"), inside)) * trips

  def _trips(self, i: Instruction, where: Computation) -> int | None:
    """As XLA says, or from `counter < constant` and how the counter goes up; None: traced."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.attributes)
    if known:
      return int(known[1])
    condition = self.module.computations[i.called("condition")]
    root = condition.instructions[condition.root]
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
      return None
    counter, bound = (condition.instructions[n] for n in root.operands)
    if bound.opcode != "constant" or counter.opcode != "get-tuple-element":
      return None
    index = re.search(r"index=(\d+)", counter.attributes)
    start = where.instructions[i.operands[0]]
    if start.opcode == "tuple" and index:
      first = where.instructions[start.operands[int(index[1])]]
      while first.opcode in ("copy", "bitcast"):
        first = where.instructions[first.operands[0]]
      begin = int(first.literal) if first.opcode == "constant" else 0
    else:
      begin = 0
    step = self._stride(self.module.computations[i.called("body")], int(index[1]) if index else 0)
    return max(0, -(-(int(bound.literal) - begin) // step))

  def _stride(self, body: Computation, index: int) -> int:
    """By how much a loop's counter goes up: XLA joins iterations."""
    root = body.instructions[body.root]
    if root.opcode != "tuple":
      return 1
    top, inside = body.instructions[root.operands[index]], body
    while top.opcode in ("copy", "bitcast", "fusion"):
      if top.opcode == "fusion":
        inside = self.module.computations[top.called("calls")]
        top = inside.instructions[inside.root]
      else:
        top = inside.instructions[top.operands[0]]
    if top.opcode != "add":
      return 1
    steps = [inside.instructions[n] for n in top.operands if n in inside.instructions]
    return next((max(1, int(x.literal)) for x in steps if x.opcode == "constant"), 1)

  def _body(self, i: Instruction, operands) -> str:
    """What a custom call computes, where that is in the text: libtpu's words for SparseCores.

    A computation of other operands is a comparison or a sum that the call makes use of.
    """
    name = re.match(r"%([\w.\-]+)\}", i.attributes.partition("called_computations={")[2])
    if not name:
      return ""
    inside = self.module.computations[name[1]].instructions.values()
    given = {int(x.literal): x.shapes for x in inside if x.opcode == "parameter"}
    same = len(given) == len(operands) and all(
      [(s.dtype, s.dims) for s in given[n]] == [(s.dtype, s.dims) for s in shapes]
      for n, shapes in enumerate(operands)
    )
    return name[1] if same else ""

  # --- collectives -------------------------------------------------------------------------------

  def _collective(self, i: Instruction, kind: str, operands) -> Collective:
    given = [s for shapes in operands for s in shapes]
    # What a -start returns holds its operands too.
    out = i.shapes if not i.opcode.endswith("-start") else i.shapes[len(given) :] or i.shapes
    size = sum(s.bytes for s in out if s.dims)
    if kind == "reduce-scatter":
      size = sum(s.bytes for s in given)
    if kind == "all-reduce":
      size = sum(s.bytes for s in given)
    group = _group(i)
    share = (len(group) - 1) / len(group) if kind != "collective-permute" else 1.0
    times = 2.0 if kind == "all-reduce" else 1.0
    overlaps = i.opcode.endswith("-start") and '"is_sync":true' not in i.attributes
    largest = max((s.size for s in out), default=0)
    return Collective(kind, times * share * size, largest, group, overlaps, 1.0, i.op_name)

  def _puts(self, where: Computation, name: str) -> bool:
    """Whether an all-reduce's operand is zeros with the device's own part put into them: so XLA
    gathers over many devices, at an all-reduce's price."""
    found = where.instructions.get(name)
    while found and found.opcode in ("bitcast", "copy", "copy-done", "copy-start", "fusion"):
      if found.opcode == "fusion":
        where = self.module.computations[found.called("calls")]
        found = where.instructions[where.root]
      else:
        found = where.instructions.get(found.operands[0])
    return found is not None and found.opcode == "dynamic-update-slice"

  # --- fusions -----------------------------------------------------------------------------------

  def _fusion(self, i: Instruction, operands, depth: int, fused: bool) -> Cost:
    name = i.called("calls")
    inner = self.of(name, depth, fused=True)
    targets = {
      x.attributes.partition('custom_call_target="')[2].partition('"')[0]
      for x in self.module.computations[name].instructions.values()
      if x.opcode == "custom-call"
    }
    collectives = inner.collectives
    if "AsyncCollectiveStart" in targets:  # goes on inside the fusions that follow
      collectives = _overlapping(inner).collectives
    elif "AsyncCollectiveDone" in targets or self._continues(name):
      collectives = ()
    elif name.startswith("all-reduce-scatter"):
      collectives = tuple(_scattered(c) for c in collectives)
    moved = 0.0 if fused else self._fusion_traffic(i, name, operands)
    return Cost(inner.flops, moved, collectives, inner.unknown)

  def _continues(self, name: str) -> bool:
    """Whether the collective in this fusion was started in another one."""
    chains = [
      i for i in self.module.computations[name].instructions.values() if "chain_id" in i.attributes
    ]
    return bool(chains)

  def _fusion_traffic(self, i: Instruction, name: str, operands) -> float:
    inside = self.module.computations[name]
    parameters = {
      int(x.literal): x.name for x in inside.instructions.values() if x.opcode == "parameter"
    }
    read = sum(
      _read(inside, parameters[n], shape)
      for n, shapes in enumerate(operands) if n in parameters for shape in shapes
      if shape.space == 0
    )  # fmt: skip
    return read + _written(inside, inside.root, i.shapes)


def _overlapping(c: Cost) -> Cost:
  return dataclasses.replace(
    c, collectives=tuple(dataclasses.replace(x, overlaps=True) for x in c.collectives)
  )


def _scattered(c: Collective) -> Collective:
  return dataclasses.replace(
    c, kind="reduce-scatter", sent=c.sent / 2, largest=c.largest // max(1, c.devices)
  )


def _group(i: Instruction) -> tuple[int, ...]:
  """The devices of one group of a collective, by their numbers in the program."""
  pairs = re.search(r"source_target_pairs=\{([^}]*\}(?:,\{[^}]*\})*)\}", i.attributes)
  if pairs:
    found = [tuple(map(int, pair)) for pair in re.findall(r"(\d+),(\d+)", pairs[1])]
    return max(found, key=lambda pair: abs(pair[0] - pair[1]))
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", i.attributes)
  if mesh:
    sizes = {k: int(n) for k, n in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    strides, stride = {}, math.prod(sizes.values())
    for name, size in sizes.items():
      strides[name] = stride = stride // size
    group = np.zeros(1, np.int64)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[2]):
      size, stride = sizes[name], strides[name]
      if part:  # the second of what the axis is made of: `before` x part x the rest
        stride *= size // (int(before) * int(part))
        size = int(part)
      group = (group[:, None] + stride * np.arange(size)).reshape(-1)
    return tuple(map(int, group))
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", i.attributes)
  if listed:
    return tuple(map(int, listed[1].split(",")))
  counted = re.search(
    r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", i.attributes
  )
  if not counted:
    return (0,)
  dims = [int(n) for n in counted[3].split(",")]
  order = [int(n) for n in counted[4].split(",")] if counted[4] else range(len(dims))
  numbers = np.arange(math.prod(dims)).reshape(dims).transpose(order)
  return tuple(map(int, numbers.reshape(int(counted[1]), int(counted[2]))[0]))


# --- memory traffic -------------------------------------------------------------------------------


def _shapes(where: Computation, name: str) -> tuple[Shape, ...]:
  found = where.instructions.get(name)
  return found.shapes if found else ()


def _main(shapes) -> int:
  return sum(s.bytes for s in shapes if s.space == 0)


def _traffic(i: Instruction, operands) -> float:
  if i.opcode in _WINDOWS:
    return 2.0 * _main(i.shapes)
  if i.opcode in _UPDATES:
    return 2.0 * _main(operands[_UPDATES[i.opcode]])
  if i.opcode in ("copy-start", "slice-start"):  # (target, source, ...), or source first
    target, source = i.shapes[0], operands[0][0]
    size = min(target.bytes, source.bytes, i.shapes[1].bytes)
    return float(size * sum(s.space == 0 for s in _ends(i, operands)))
  if i.opcode == "custom-call" and "AllocateBuffer" in i.attributes:
    return 0.0
  return float(_main(i.shapes) + sum(map(_main, operands)))


def _ends(i: Instruction, operands) -> tuple[Shape, Shape]:
  """Target and source of an asynchronous copy."""
  source = operands[0][0]
  other = next((s for s in i.shapes[:2] if s.space != source.space), i.shapes[0])
  return other, source


def _read(inside: Computation, name: str, shape: Shape) -> float:
  """Bytes that a fusion reads of one operand."""
  users = inside.users(name)
  while len(users) == 1 and users[0].opcode == "bitcast":
    name = users[0].name
    users = inside.users(name)
  parts = 0.0
  for user in users:
    if user.opcode in _WINDOWS and user.operands[0] == name:
      parts += sum(s.bytes for s in user.shapes)
    elif user.opcode in _UPDATES and user.operands[0] == name:
      pass  # in place
    elif user.opcode != "tuple" and not _carries(user):  # these only hand it on
      return float(shape.bytes)
  return min(parts, float(shape.bytes)) if users else 0.0


def _carries(i: Instruction) -> bool:
  """Whether it is part of a collective that goes on across fusions: traffic of links."""
  return i.opcode.removesuffix("-start") in COLLECTIVES or "AsyncCollective" in i.attributes


def _written(inside: Computation, root: str, shapes: Sequence[Shape]) -> float:
  """Bytes that a fusion writes: of what is updated in place, the update."""
  top = inside.instructions[root]
  if top.opcode == "tuple":
    parts = [(name, inside.instructions[name].shapes) for name in top.operands]
    flat = list(itertools.chain.from_iterable(s for _, s in parts))
    if len(flat) == len(shapes):
      out, at = 0.0, 0
      for name, own in parts:
        out += _written(inside, name, shapes[at : at + len(own)])
        at += len(own)
      return out
  while top.opcode in ("bitcast", "copy", "get-tuple-element"):
    top = inside.instructions[top.operands[0]]
  if top.opcode == "parameter" or _carries(top):
    return 0.0
  if top.opcode in _UPDATES and shapes and shapes[0].space == 0:
    return float(sum(s.bytes for s in _shapes(inside, top.operands[_UPDATES[top.opcode]])))
  return float(_main(shapes))
