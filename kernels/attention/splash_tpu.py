"""JAX's own block-sparse attention kernel for TPU ("splash"), on packed rows.

Blocks that are wholly in the future, or wholly outside the window, are not visited. Axes: B rows,
T row length, H query heads, K kv heads, A head dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from ..errors import CannotRun
from .shards import shards_of

LANES = 128
BLOCKS = (512, 384, 256, 128)  # of queries and of keys: the largest that divides T
MAX_HEAD_DIM = 256


def unsupported(q: Any, k: Any) -> str | None:
  """Why these operands cannot be served, or None. Looks at shapes and dtypes only.

  T must be a multiple of 128, the head dim a multiple of 8 up to 256, the dtype bfloat16 or
  float32, and K must divide H.
  """
  _, T, H, A = q.shape
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    return f"dtype is {q.dtype}, expected bfloat16 or float32"
  if T == 0 or T % LANES:
    return f"row length is {T}, expected a multiple of {LANES}"
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
  interpret: bool = False,
) -> jax.Array:  # [B, T, H, A]
  """See reference.attention. O(B H T) memory beside its operands.

  The kernel goes by places in the row, not by `positions`: the tokens of a segment must lie one
  after the other, with positions that count up by one, as packing leaves them.

  On a mesh in context, rows go over data and fsdp and heads over tensor, where they divide.

  Raises:
    CannotRun: operands that `unsupported` names.
  """
  del positions
  reason = unsupported(q, k)
  if reason:
    raise CannotRun(f"attention: implementation 'splash' cannot run: {reason}")

  def rows(q, k, v, segment_ids):
    run = _kernel(q.shape[1], q.shape[2], window, interpret)
    q = (q * (q.shape[-1] ** -0.5)).swapaxes(1, 2)
    one = lambda q, k, v, s: run(q, k, v, splash.SegmentIds(s, s))
    out: Any = jax.vmap(one)(q, k.swapaxes(1, 2), v.swapaxes(1, 2), segment_ids)
    return out.swapaxes(1, 2)

  return shards_of(q.shape, k.shape).map(rows)(q, k, v, segment_ids.astype(jnp.int32))


def _kernel(T: int, H: int, window: int | None, interpret: bool):
  if window is None:
    mask = masks.CausalMask((T, T))
  else:
    mask = masks.LocalMask((T, T), (min(window, T) - 1, 0), 0)  # keys back, keys ahead
  block = next(b for b in BLOCKS if T % b == 0)
  sizes = splash.BlockSizes(
    block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block,
    block_kv_dq=block,
  )  # fmt: skip
  return splash.make_splash_mha(
    masks.MultiHeadMask([mask] * H), block_sizes=sizes, head_shards=1, q_seq_shards=1,
    interpret=interpret,
  )  # fmt: skip
