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
from jax.sharding import NamedSharding, PartitionSpec

from ..errors import CannotRun
from .shards import shards_of

LANES = 128
BLOCKS = (512, 384, 256, 128)  # of queries and of keys: the largest that divides T
MAX_HEAD_DIM = 256


def unsupported(q: Any, k: Any) -> str | None:
  """Why these operands cannot be served, or None. Looks at shapes and dtypes only.

  T must be a multiple of 128 (of each device, where the mesh in context splits it), the head dim
  one of 8 up to 256, the dtype bfloat16 or float32, and K must divide H.
  """
  _, T, H, A = q.shape
  lanes = LANES * shards_of(q.shape, k.shape).parts
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    return f"dtype is {q.dtype}, expected bfloat16 or float32"
  if T == 0 or T % lanes:
    return f"row length is {T}, expected a multiple of {lanes}"
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

  On a mesh in context, rows go over data and fsdp, places over context and heads over tensor, where
  they divide.

  Raises:
    CannotRun: operands that `unsupported` names.
  """
  del positions
  reason = unsupported(q, k)
  if reason:
    raise CannotRun(f"attention: implementation 'splash' cannot run: {reason}")

  shards = shards_of(q.shape, k.shape)
  heads = q.shape[2] // (shards.mesh.shape[shards.heads] if shards.heads else 1)
  kernel = _kernel(q.shape[1], heads, window, shards.parts, interpret)
  spec: Any = ()
  if shards.mesh is not None:
    spec = kernel.manual_sharding_spec(
      NamedSharding(shards.mesh, PartitionSpec(None, shards.places))
    )

  def rows(q, k, v, at_queries, at_keys, kernel):
    q = (q * (q.shape[-1] ** -0.5)).swapaxes(1, 2)
    one = lambda q, k, v, s, t: kernel(q, k, v, splash.SegmentIds(s, t))
    out: Any = jax.vmap(one)(q, k.swapaxes(1, 2), v.swapaxes(1, 2), *at_queries, *at_keys)
    return out.swapaxes(1, 2)

  return shards.run(rows, q, k, v, (segment_ids.astype(jnp.int32),), (kernel,), (spec,))


def _kernel(T: int, H: int, window: int | None, parts: int, interpret: bool):
  """For H heads of a device; its arrays are those of all `parts` devices that share a row."""
  if window is None:
    mask = masks.CausalMask((T, T))
  else:
    mask = masks.LocalMask((T, T), (min(window, T) - 1, 0), 0)  # keys back, keys ahead
  q, kv = (next(b for b in BLOCKS if n % b == 0) for n in (T // parts, T))
  sizes = splash.BlockSizes(
    block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv
  )
  return splash.make_splash_mha(
    masks.MultiHeadMask([mask] * H), block_sizes=sizes, head_shards=1, q_seq_shards=parts,
    interpret=interpret,
  )  # fmt: skip
