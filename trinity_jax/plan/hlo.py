"""The text of a compiled program (HLO) as computations of instructions.

`Compiled.cost_analysis()` counts the body of a loop once, and says nothing of what crosses the
links; the text has everything. It is read as XLA of jax 0.10 writes it for CPU, GPU and TPU.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from trinity_jax.errors import UserError

_BITS = {
  "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32,
  "u32": 32, "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64,
  "c128": 128, "token": 0, "opaque": 0,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_START = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")


class Shape(NamedTuple):
  """One array: its element type, dimensions, and memory space (0 = the device's main memory)."""

  dtype: str
  dims: tuple[int, ...]
  space: int = 0

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    bits = 8 if self.dtype.startswith("f8") else _BITS[self.dtype]
    return -(-self.size * bits // 8)


class Instruction(NamedTuple):
  """One line.

  Attributes:
    shapes: of its result; several where it is a tuple.
    operands: names within the computation.
    literal: what stands in the parentheses (of a constant its value).
    attributes: everything behind them.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  literal: str
  attributes: str

  def called(self, key: str) -> str:
    """The computation that an attribute such as `body` names; "" without it."""
    found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
    return found[1] if found else ""

  def numbers(self, key: str) -> tuple[int, ...]:
    """An attribute such as lhs_contracting_dims={1,2}."""
    found = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.attributes)
    return tuple(map(int, filter(None, found[1].split(",")))) if found else ()

  @property
  def op_name(self) -> str:
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""


class Computation(NamedTuple):
  instructions: dict[str, Instruction]
  root: str

  def users(self, name: str) -> list[Instruction]:
    return [i for i in self.instructions.values() if name in i.operands]


class Module(NamedTuple):
  computations: dict[str, Computation]
  entry: str


def parse(text: str) -> Module:
  """Reads the text of `Compiled.as_text()`.

  Raises:
    UserError: a line that is not understood.
  """
  computations: dict[str, Computation] = {}
  entry, name, root, lines = "", "", "", []
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      name, lines = header[2], []
      entry = name if header[1] else entry
    elif name and (line.rstrip() == "}" or line.startswith("}, execution_thread")):
      instructions = [_instruction(x) for x in lines]
      root = next((i.name for i, x in zip(instructions, lines) if _START.match(x)[1]), "")  # type: ignore[index]
      computations[name] = Computation({i.name: i for i in instructions}, root)
      name = ""
    elif name and _START.match(line):
      lines.append(line)
    elif name and lines:
      lines[-1] += line  # an attribute that spans lines
  if not entry:
    raise UserError("a compiled program's text has no ENTRY: this version of jax writes it anew")
  return Module(computations, entry)


def _instruction(line: str) -> Instruction:
  found = _START.match(line)
  assert found is not None
  rest = line[found.end() :]
  end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
  shapes = shapes_of(rest[:end])
  opcode, _, rest = rest[end:].lstrip().partition("(")
  close = _closing("(" + rest, 0) - 2
  literal, attributes = rest[:close], rest[close + 1 :]
  operands = tuple(re.findall(r"%([\w.\-]+)", literal)) if opcode != "constant" else ()
  return Instruction(found[2], opcode, shapes, operands, literal, attributes)


def _closing(text: str, start: int) -> int:
  """Behind the parenthesis that closes the one at `start`."""
  depth = 0
  for found in re.finditer(r"[()]", text[start:]):
    depth += 1 if found[0] == "(" else -1
    if not depth:
      return start + found.end()
  raise UserError(f"a compiled program's text has an open parenthesis: {text[:80]!r}")


def shapes_of(text: str) -> tuple[Shape, ...]:
  """The arrays of a type, such as (f32[2,3]{1,0:S(1)}, s32[])."""
  out = []
  for dtype, dims, layout in _ARRAY.findall(text):
    if dtype in _BITS or dtype.startswith("f8"):
      space = re.search(r"S\((\d+)\)", layout)
      sizes = tuple(int(n) for n in dims.split(",") if n)
      out.append(Shape(dtype, sizes, int(space[1]) if space else 0))
  return tuple(out)


def braces(attributes: str, key: str) -> str:
  """What stands in the braces of an attribute such as window={size=2}."""
  found = re.search(rf"{key}=\{{([^}}]*)\}}", attributes)
  return found[1] if found else ""
