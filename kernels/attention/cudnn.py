"""cuDNN's fused attention through jax.nn, for GPUs, on packed rows.

The segments go in as a mask [B, 1, T, T], which jax turns into a bias in the operands' dtype: the
scores [B, H, T, T] are never held, but this one array is quadratic in T. Axes: B rows, T row
length, H query heads, K kv heads, A head dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ..errors import CannotRun
from .shards import shards_of

MAX_HEAD_DIM = 256  # 128 before the Hopper generation


def unsupported(q: Any, k: Any) -> str | None:
  """Why these operands cannot be served, or None. Looks at shapes and dtypes only.

  The dtype must be bfloat16 or float16, T even, the head dim a multiple of 8 up to 256 (128 before
  the Hopper generation), and K must divide H.
  """
  _, T, H, A = q.shape
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"dtype is {q.dtype}, expected bfloat16 or float16"
  if T % 2:
    return f"row length is {T}, expected an even one"
  if A % 8 or A > MAX_HEAD_DIM:
    return f"head dim is {A}, expected a multiple of 8 up to {MAX_HEAD_DIM}"
  if H % k.shape[2]:
    return f"{H} query heads are no multiple of {k.shape[2]} kv heads"
  return None


def attention(
  q: jax.Array,  # [B, T, H, A]
  k: jax.Array,  # [B, T, K, A]
  v: jax.Array,  # [B, T, K, A]
  *,
  positions: jax.Array,  # i32[B, T]
  segment_ids: jax.Array,  # i32[B, T]
  window: int | None = None,
) -> jax.Array:  # [B, T, H, A]
  """See reference.attention. On a mesh in context it is split as splash_tpu's is.

  Raises:
    CannotRun: operands that `unsupported` names, or no cuDNN on this machine: jax asks for its
      version while it traces, so this cannot be compiled ahead on a machine without one.
  """
  reason = unsupported(q, k)
  if reason:
    raise CannotRun(f"attention: implementation 'cudnn' cannot run: {reason}")

  def rows(q, k, v, at_queries, at_keys):
    (positions, segments), (key_positions, key_segments) = at_queries, at_keys
    age = positions[:, :, None] - key_positions[:, None, :]
    seen = (segments[:, :, None] == key_segments[:, None, :]) & (age >= 0)
    if window is not None:
      seen &= age < window
    return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], implementation="cudnn")

  try:
    return shards_of(q.shape, k.shape).run(rows, q, k, v, (positions, segment_ids))
  except RuntimeError as error:
    if "cudnn" not in str(error).lower():
      raise
    message = "attention: implementation 'cudnn' cannot run: no cuDNN on this machine"
    raise CannotRun(message) from error
