"""FLOPs of the matrix products in one instruction, those of our own Pallas kernels included."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from trinity_jax.plan.hlo import Instruction, Shape, braces


def flops_of(i: Instruction, operands: list[tuple[Shape, ...]]) -> tuple[float, frozenset[str]]:
  """FLOPs of one instruction's matrix products, and the custom call whose FLOPs are not known."""
  if i.opcode == "dot":
    left = operands[0][0].dims
    summed = math.prod(left[a] for a in i.numbers("lhs_contracting_dims"))
    return 2.0 * i.shapes[0].size * summed, frozenset()
  if i.opcode == "convolution":
    return _convolution(i, operands[0][0], operands[1][0]), frozenset()
  if i.opcode == "custom-call":
    target = re.search(r'custom_call_target="([^"]*)"', i.attributes)
    return _custom_call(i, target[1] if target else "", operands)
  return 0.0, frozenset()


def _convolution(i: Instruction, left: Shape, right: Shape) -> float:
  """2 x products that are no padding: TPU writes matrix products as convolutions."""
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
  assert labels is not None, i.attributes[:200]
  lhs, rhs, out = labels.groups()
  window = dict(re.findall(r"(\w+)=([\w\-x]+)", braces(i.attributes, "window")))
  total = 2.0 * i.shapes[0].dims[out.index("b")] * i.shapes[0].dims[out.index("f")]
  total *= right.dims[rhs.index("i")]
  for d in range(sum(c.isdigit() for c in lhs)):
    n, k = left.dims[lhs.index(str(d))], right.dims[rhs.index(str(d))]
    low = int(window["pad"].split("x")[d].split("_")[0]) if "pad" in window else 0
    stride, spread, holes = (
      int(window[key].split("x")[d]) if key in window else 1
      for key in ("stride", "rhs_dilate", "lhs_dilate")
    )
    total *= _overlap(i.shapes[0].dims[out.index(str(d))], n, k, low, stride, spread, holes)
  groups = re.search(r"batch_group_count=(\d+)", i.attributes)
  return total / (int(groups[1]) if groups else 1)


def _overlap(out: int, n: int, k: int, low: int, stride: int, spread: int, holes: int) -> int:
  """Pairs (output place, kernel place) that meet an input and no padding."""
  if k == 1 and low == 0 and holes == 1:
    return out
  found = 0
  for kernel in range(k):
    at = kernel * spread - low
    if holes == 1:
      first, last = max(0, -(at // stride)), min(out - 1, (n - 1 - at) // stride)
      found += max(0, last - first + 1)
    else:
      places = (o * stride + at for o in range(out))
      found += sum(0 <= p <= (n - 1) * holes and p % holes == 0 for p in places)
  return found


def _custom_call(i: Instruction, target: str, operands) -> tuple[float, frozenset[str]]:
  if target.startswith(("__cublas", "__cudnn$conv")):
    dims = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.attributes)
    if dims:
      axes = [int(x) for x in re.findall(r"\d+", dims[1])]
      return 2.0 * i.shapes[0].size * math.prod(operands[0][0].dims[a] for a in axes), frozenset()
  if target == "tpu_custom_call":
    for prefix, flops in _KERNELS.items():
      if i.name.startswith(prefix):
        return flops([s[0] for s in operands if s]), frozenset()
    return 0.0, frozenset({re.sub(r"\.\d+$", "", i.name)})
  return 0.0, frozenset()


def _head(products: int) -> Callable[[list[Shape]], float]:
  """`products` matrix products [T, D] x [D, V] of kernels/linear_logprob, every row being live."""

  def flops(operands: list[Shape]) -> float:
    hidden, weight = operands[-2:]
    return 2.0 * products * hidden.dims[0] * weight.size

  return flops


def _splash(products: int) -> Callable[[list[Shape]], float]:
  """`products` of [T, A] x [A, S] per head, where S keys are not in the future.

  With T = S places that is half of them. Of a row that is split over the mesh these are the last T
  of S queries: the device that has the most to do, for which the others wait.
  """

  def flops(operands: list[Shape]) -> float:
    # [H, T, A], and rows before it where a device has more than one.
    q, k = [s for s in operands if len(s.dims) > 2 and s.dtype in ("bf16", "f32")][:2]
    T, S = q.dims[-2], k.dims[-2]
    return float(products * q.size * (2 * S - T))

  return flops


# Pallas kernels, by name: their programs are opaque.
_KERNELS: dict[str, Callable[[list[Shape]], float]] = {
  "linear_logprob_forward": _head(1),
  "linear_logprob_d_weight": _head(2),
  "linear_logprob_d_hidden": _head(2),
  "splash_mha_fwd": _splash(2),
  "splash_mha_dkv": _splash(4),
  "splash_mha_dq": _splash(3),
}
