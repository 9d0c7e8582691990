"""The decoder as pure functions of (params, config, tokens).

Axes: B rows, T row length, S slots, P prompts, C cache length, L layers, V vocabulary, D model
width, H query heads, K kv heads, A head dim, F mlp width.

Norms, rotary angles, softmax and logits are fp32; everything else is in the compute dtype (that of
the parameters unless `dtype` says otherwise). One block serves training, prefill and decoding: what
differs is the function it is given to attend with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from trinity_jax import ops
from trinity_jax.errors import UserError
from trinity_jax.models import rope
from trinity_jax.models.params import Params, ParamSpec, abstract, check, init, output_weight
from trinity_jax.models.presets import ModelConfig
from trinity_jax.models.sharding import constrain

__all__ = [
  "ParamSpec",
  "Params",
  "abstract",
  "check",
  "decode",
  "forward",
  "init",
  "logits",
  "output_weight",
  "prefill",
]

# (q [..., H, A], k [..., K, A], v [..., K, A]) after rotation -> (mixed [..., H, A], what to keep)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]

_REMAT = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def forward(
  params: Params,
  config: ModelConfig,
  tokens: jax.Array,  # i32[B, T]
  positions: jax.Array,  # i32[B, T], from 0 in each segment
  segment_ids: jax.Array,  # i32[B, T], 0 = padding
  *,
  dtype: Any = None,
  remat: str = "none",
  unroll: int | None = None,
) -> jax.Array:
  """Returns hidden [B, T, D] after the final norm.

  Args:
    dtype: compute dtype; None = that of the parameters.
    remat: "none", "dots" (keep matmul outputs only) or "full" (keep layer inputs only).
    unroll: layers per iteration of the layer scan; None = 1. Larger compiles longer and, on a CPU,
      runs faster; the result is the same.

  Raises:
    UserError: unknown `remat`.
  """
  attend = functools.partial(_attend_row, config, positions, segment_ids)
  hidden, _ = _scan_layers(params, config, tokens, positions, attend, dtype, remat, unroll)
  return hidden


def prefill(
  params: Params,
  config: ModelConfig,
  tokens: jax.Array,  # i32[P, T]
  lengths: jax.Array,  # i32[P]
  *,
  dtype: Any = None,
  unroll: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (hidden [P, D] of each prompt's last token, k [L, P, K, T, A], v likewise).

  k is rotated. Entries at and beyond a prompt's length mean nothing.
  """
  P, T = tokens.shape
  positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (P, T))
  segment_ids = (positions < lengths[:, None]).astype(jnp.int32)

  def attend(q, k, v):
    mixed, _ = _attend_row(config, positions, segment_ids, q, k, v)
    return mixed, (k.swapaxes(1, 2), v.swapaxes(1, 2))

  hidden, (k, v) = _scan_layers(params, config, tokens, positions, attend, dtype, "none", unroll)
  last = jnp.maximum(lengths - 1, 0)[:, None, None]
  return jnp.take_along_axis(hidden, last, axis=1)[:, 0], k, v


def decode(
  params: Params,
  config: ModelConfig,
  tokens: jax.Array,  # i32[S]
  positions: jax.Array,  # i32[S]
  k: jax.Array,  # [L, S, K, C, A]
  v: jax.Array,  # [L, S, K, C, A]
  *,
  live: int,
  dtype: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """One token per slot. Returns (hidden [S, D], k, v) with the new entries at `positions`.

  Slot s attends to its entries 0..positions[s]; `live` (static) bounds what is read, so positions
  must be below it. An entry at or beyond C is dropped, not wrapped. The cache is carried through
  the layer loop and updated in place when the caller donates it.
  """
  if not 0 < live <= k.shape[3]:
    raise UserError(f"decode: live = {live}, expected 1..{k.shape[3]} (the cache length)")
  cos, sin = rope.tables(config, positions)
  x = _embed(params, tokens, dtype)
  stacked = params["layers"]

  def body(layer, carry):
    x, k, v = carry
    weights = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, layer, 0, False), stacked)

    def attend(q, new_k, new_v):
      with jax.named_scope("cache"):
        own_k = _write_entry(k, layer, positions, new_k)
        own_v = _write_entry(v, layer, positions, new_v)
        mixed = ops.decode_attention(
          q, own_k, own_v, layer=layer, live=live, positions=positions,
          window=config.sliding_window,
        )  # fmt: skip
      return mixed, (own_k, own_v)

    x, (k, v) = _block(weights, config, x, cos, sin, attend)
    return x, k, v

  x, k, v = lax.fori_loop(0, config.num_layers, body, (x, k, v))
  return _rms_norm(x, params["final_norm"], config), k, v


def logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
  """hidden [..., D] -> fp32 logits [..., V]; accumulated in fp32 whatever the compute dtype."""
  with jax.named_scope("logits"):
    weight = output_weight(params, config).astype(hidden.dtype)
    return ops.linear(hidden, weight, out_dtype=jnp.float32)


def _scan_layers(
  params: Params,
  config: ModelConfig,
  tokens: jax.Array,
  positions: jax.Array,
  attend: Attend,
  dtype: Any,
  remat: str,
  unroll: int | None,
) -> tuple[jax.Array, Any]:
  """Embeds, runs all layers, normalises; returns (hidden [B, T, D], kept values stacked on L)."""
  if remat != "none" and remat not in _REMAT:
    raise UserError(f"remat = {remat!r}, expected one of {['none', *_REMAT]}")
  cos, sin = rope.tables(config, positions)
  x = constrain(_embed(params, tokens, dtype), ("batch", None, None))

  def body(x, weights):
    x, kept = _block(weights, config, x, cos, sin, attend)
    return constrain(x, ("batch", None, None)), kept

  if remat != "none":
    body = jax.checkpoint(body, policy=_REMAT[remat], prevent_cse=False)
  x, kept = lax.scan(body, x, params["layers"], unroll=unroll or 1)
  return _rms_norm(x, params["final_norm"], config), kept


def _embed(params: Params, tokens: jax.Array, dtype: Any) -> jax.Array:
  with jax.named_scope("embed"):
    # Rows are gathered by the batch's devices, so the width must not be split over them.
    table = constrain(params["embed"], ("vocab", "whole"))
    return table[tokens].astype(dtype or table.dtype)


def _block(
  weights: Params,
  config: ModelConfig,
  x: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
  attend: Attend,
) -> tuple[jax.Array, Any]:
  """One layer of x [..., D] with rotary tables [..., A / 2]: attention, then the gated MLP."""
  with jax.named_scope("attention"):
    y = _rms_norm(x, weights["attn_norm"], config)
    q, k, v = _project(weights, config, y)
    mixed, kept = attend(rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v)
    x = x + ops.linear(mixed.reshape(*x.shape[:-1], -1), weights["wo"].astype(x.dtype))
  with jax.named_scope("mlp"):
    y = _rms_norm(x, weights["mlp_norm"], config)
    gate = ops.linear(y, weights["w_gate"].astype(x.dtype))
    up = ops.linear(y, weights["w_up"].astype(x.dtype))
    x = x + ops.linear(jax.nn.silu(gate) * up, weights["w_down"].astype(x.dtype))
  return x, kept


def _project(weights: Params, config: ModelConfig, y: jax.Array):
  """y [..., D] -> q [..., H, A], k and v [..., K, A], biased and normalised, not yet rotated."""

  def heads(name: str, count: int) -> jax.Array:
    out = ops.linear(y, weights[f"w{name}"].astype(y.dtype))
    if config.qkv_bias:
      bias = weights[f"b{name}"].astype(y.dtype)
      out = out + bias.reshape((1,) * (out.ndim - 1) + bias.shape)
    return out.reshape(*y.shape[:-1], count, config.head_dim)

  q, k = heads("q", config.num_heads), heads("k", config.num_kv_heads)
  v = heads("v", config.num_kv_heads)
  if config.qk_norm:
    q, k = _rms_norm(q, weights["q_norm"], config), _rms_norm(k, weights["k_norm"], config)
  return q, k, v


def _rms_norm(x: jax.Array, weight: jax.Array, config: ModelConfig) -> jax.Array:
  """x / sqrt(mean(x²) + eps) * weight over the last axis, in fp32, cast back."""
  y = x.astype(jnp.float32)
  y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.rms_norm_eps)
  weight = weight.astype(jnp.float32)
  return (y * weight.reshape((1,) * (x.ndim - 1) + weight.shape)).astype(x.dtype)


def _attend_row(config, positions, segment_ids, q, k, v):
  mixed = ops.attention(
    q, k, v, positions=positions, segment_ids=segment_ids, window=config.sliding_window
  )
  return mixed, None


def _write_entry(cache: jax.Array, layer: jax.Array, positions: jax.Array, new: jax.Array):
  """cache [L, S, K, C, A] with new [S, K, A] at [layer, s, :, positions[s]]."""
  S, K = new.shape[:2]
  slot, head = jnp.arange(S)[:, None], jnp.arange(K)[None, :]
  at = cache.at[layer, slot, head, positions[:, None]]
  return at.set(new.astype(cache.dtype), mode="drop", unique_indices=True)
