"""The decoder as pure functions of (params, config, tokens).

Axes: B rows, T row length, S slots, L layers, V vocabulary, D model width, H query heads, K kv
heads, A head dim, F mlp width.

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
from trinity_jax.models.sharding import constrain, gather_after

__all__ = [
  "ParamSpec",
  "Params",
  "abstract",
  "check",
  "forward",
  "init",
  "logits",
  "output_weight",
  "take_tokens",
  "unstack",
  "with_cache",
]

# (q [..., H, A], k [..., K, A], v [..., K, A]) after rotation -> mixed [..., H, A]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

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
  if remat != "none" and remat not in _REMAT:
    raise UserError(f"remat = {remat!r}, expected one of {['none', *_REMAT]}")
  cos, sin = rope.tables(config, positions)
  rows = ("batch", "sequence")
  x = _embed(params, tokens, dtype, ("replicas", "sequence"), rows)
  attend = functools.partial(
    ops.attention, positions=positions, segment_ids=segment_ids, window=config.sliding_window
  )

  def body(x, weights):
    x = _block(weights, config, x, cos, sin, attend)
    return constrain(x, (*rows, None)), None

  if remat != "none":
    body = jax.checkpoint(body, policy=_REMAT[remat], prevent_cse=False)
  x, _ = lax.scan(body, x, params["layers"], unroll=unroll or 1)
  return _rms_norm(x, params["final_norm"], config)


def unstack(params: Params, config: ModelConfig) -> Params:
  """The layout `with_cache` takes: params["layers"] as a tuple of one dict per layer.

  Slices of a stacked array would be copied out in every decode step.
  """
  layers = tuple(
    jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(config.num_layers)
  )
  return {**params, "layers": layers}


def with_cache(
  params: Params,  # of `unstack`
  config: ModelConfig,
  tokens: jax.Array,  # i32[..., T or S]
  positions: jax.Array,  # i32, like tokens
  attend: Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array],
  *,
  last: jax.Array | None = None,
  dtype: Any = None,
) -> jax.Array:
  """Hidden states of tokens whose past lives in a cache -> tokens.shape + [D].

  Args:
    attend: (layer, q [..., H, A], k [..., K, A], v [..., K, A]) after rotation -> mixed
      [..., H, A]; stores k and v and looks at what it has stored.
    last: i32[P], with tokens [P, T]: only the hidden states at these places are wanted -> [P, 1,
      D]. The last layer then computes keys and values of every token, and nothing else of the
      others; its q is [P, 1, H, A].
  """
  cos, sin = rope.tables(config, positions)
  rest = (None,) * (tokens.ndim - 1)
  x = _embed(params, tokens, dtype, ("slot_replicas", *rest), ("slots", *rest))
  layers = list(params["layers"])
  for i in range(len(layers)):
    if i + 1 < len(layers):  # so that its weights travel while this layer computes
      layers[i + 1], x = gather_after(layers[i + 1], x)
    wanted = last if i == len(layers) - 1 else None
    x = _block(layers[i], config, x, cos, sin, functools.partial(attend, i), wanted)
  return _rms_norm(x, params["final_norm"], config)


def logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
  """hidden [..., D] -> fp32 logits [..., V]; accumulated in fp32 whatever the compute dtype."""
  with jax.named_scope("logits"):
    weight = output_weight(params, config).astype(hidden.dtype)
    return ops.linear(hidden, weight, out_dtype=jnp.float32)


def _embed(
  params: Params,
  tokens: jax.Array,
  dtype: Any,
  replicas: tuple[str | None, ...],
  rows: tuple[str | None, ...],
) -> jax.Array:
  """[..., D]. replicas, rows: logical axes of tokens while the table is looked up, and after."""
  with jax.named_scope("embed"):
    # Each device looks its part of the width up for all rows; only then are the rows parted. So
    # tokens and their vectors travel, not the table and its gradient, which are far larger.
    table = constrain(params["embed"], ("vocab", "embed"))
    x = table[constrain(tokens, replicas)].astype(dtype or table.dtype)
    return constrain(constrain(x, (*replicas, "embed")), (*rows, None))


def _block(
  weights: Params,
  config: ModelConfig,
  x: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
  attend: Attend,
  wanted: jax.Array | None = None,
) -> jax.Array:
  """One layer of x [..., D] with rotary tables [..., A / 2]: attention, then the gated MLP.

  wanted: i32[P], with x [P, T, D]: the result is [P, 1, D], of these tokens only.
  """
  with jax.named_scope("attention"):
    y = _rms_norm(x, weights["attn_norm"], config)
    k, v = _heads(weights, config, y, "k"), _heads(weights, config, y, "v")
    k = rope.rotate(k, cos, sin)
    if wanted is not None:
      x, y, cos, sin = (take_tokens(a, wanted) for a in (x, y, cos, sin))
    q = rope.rotate(_heads(weights, config, y, "q"), cos, sin)
    mixed = attend(q, k, v)
    x = x + ops.linear(mixed.reshape(*x.shape[:-1], -1), weights["wo"].astype(x.dtype))
  with jax.named_scope("mlp"):
    y = _rms_norm(x, weights["mlp_norm"], config)
    gate = ops.linear(y, weights["w_gate"].astype(x.dtype))
    up = ops.linear(y, weights["w_up"].astype(x.dtype))
    x = x + ops.linear(jax.nn.silu(gate) * up, weights["w_down"].astype(x.dtype))
  return x


def take_tokens(x: jax.Array, index: jax.Array) -> jax.Array:
  """x [P, T, ...] at index i32[P] -> [P, 1, ...]."""
  return jnp.take_along_axis(x, index.reshape((-1,) + (1,) * (x.ndim - 1)), axis=1)


def _heads(weights: Params, config: ModelConfig, y: jax.Array, name: str) -> jax.Array:
  """q, k or v of y [..., D] -> [..., H or K, A], biased and normalised, not yet rotated."""
  count = config.num_heads if name == "q" else config.num_kv_heads
  out = ops.linear(y, weights[f"w{name}"].astype(y.dtype))
  if config.qkv_bias:
    bias = weights[f"b{name}"].astype(y.dtype)
    out = out + bias.reshape((1,) * (out.ndim - 1) + bias.shape)
  out = out.reshape(*y.shape[:-1], count, config.head_dim)
  if config.qk_norm and name != "v":
    out = _rms_norm(out, weights[f"{name}_norm"], config)
  return out


def _rms_norm(x: jax.Array, weight: jax.Array, config: ModelConfig) -> jax.Array:
  """x / sqrt(mean(x²) + eps) * weight over the last axis, in fp32, cast back."""
  y = x.astype(jnp.float32)
  y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.rms_norm_eps)
  weight = weight.astype(jnp.float32)
  return (y * weight.reshape((1,) * (x.ndim - 1) + weight.shape)).astype(x.dtype)
