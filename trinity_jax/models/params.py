"""The decoder's parameters: `abstract` is the one source of shapes, axes, initialisers, HF names.

Axes: L layers, V vocabulary, D model width, H query heads, K kv heads, A head dim, F mlp width.
Parameters are nested dicts of arrays; everything of a layer is stacked on a leading axis L.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from trinity_jax.errors import UserError
from trinity_jax.models.presets import ModelConfig

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """One leaf. A leaf of the pytrees that `abstract` returns."""

  shape: tuple[int, ...]
  axes: tuple[str, ...]  # logical axis per dimension
  init: str | float  # "ones", "zeros" or the standard deviation of a normal distribution
  hf_name: str  # with {layer} where the leaf stacks one tensor per layer
  transposed: bool = False  # the HF tensor is [out, in], ours [in, out]

  @property
  def stacked(self) -> bool:
    return self.axes[0] == "layers"

  @property
  def hf_shape(self) -> tuple[int, ...]:
    """Shape of (each of) the HF tensor(s)."""
    shape = self.shape[1:] if self.stacked else self.shape
    return shape[::-1] if self.transposed else shape


def abstract(config: ModelConfig) -> Params:
  """Returns the nested dict of `ParamSpec` that the parameters of `config` mirror."""
  V, D = config.vocab_size, config.hidden_size
  out: Params = {
    # Small, so that the first layer's output is not drowned; tied logits then start near uniform.
    "embed": ParamSpec((V, D), ("vocab", "embed"), 0.02, "model.embed_tokens.weight"),
    "layers": _abstract_layers(config),
    "final_norm": ParamSpec((D,), ("norm",), "ones", "model.norm.weight"),
  }
  if not config.tie_word_embeddings:
    out["lm_head"] = ParamSpec((D, V), ("embed", "vocab"), 0.02, "lm_head.weight", True)
  return out


def _abstract_layers(config: ModelConfig) -> Params:
  L, D, F, A = config.num_layers, config.hidden_size, config.intermediate_size, config.head_dim
  Q, KV = config.num_heads * A, config.num_kv_heads * A
  prefix = "model.layers.{layer}."

  def matrix(rows: int, cols: int, axes: tuple[str, str], name: str, residual: bool = False):
    # Fan-in scaling; what is added to the residual stream is damped by its 2 L additions.
    std = rows**-0.5 / (math.sqrt(2 * L) if residual else 1.0)
    return ParamSpec((L, rows, cols), ("layers", *axes), std, f"{prefix}{name}.weight", True)

  def vector(size: int, axis: str, init: str, name: str):
    return ParamSpec((L, size), ("layers", axis), init, prefix + name)

  out = {
    "attn_norm": vector(D, "norm", "ones", "input_layernorm.weight"),
    "wq": matrix(D, Q, ("embed", "heads"), "self_attn.q_proj"),
    "wk": matrix(D, KV, ("embed", "kv_heads"), "self_attn.k_proj"),
    "wv": matrix(D, KV, ("embed", "kv_heads"), "self_attn.v_proj"),
    "wo": matrix(Q, D, ("heads", "embed"), "self_attn.o_proj", residual=True),
    "mlp_norm": vector(D, "norm", "ones", "post_attention_layernorm.weight"),
    "w_gate": matrix(D, F, ("embed", "mlp"), "mlp.gate_proj"),
    "w_up": matrix(D, F, ("embed", "mlp"), "mlp.up_proj"),
    "w_down": matrix(F, D, ("mlp", "embed"), "mlp.down_proj", residual=True),
  }
  if config.qkv_bias:
    out["bq"] = vector(Q, "heads", "zeros", "self_attn.q_proj.bias")
    out["bk"] = vector(KV, "kv_heads", "zeros", "self_attn.k_proj.bias")
    out["bv"] = vector(KV, "kv_heads", "zeros", "self_attn.v_proj.bias")
  if config.qk_norm:
    out["q_norm"] = vector(A, "norm", "ones", "self_attn.q_norm.weight")
    out["k_norm"] = vector(A, "norm", "ones", "self_attn.k_norm.weight")
  return out


def init(key: jax.Array, config: ModelConfig, dtype: Any = jnp.float32) -> Params:
  """Returns random parameters; jit-able.

  A leaf's key depends on its name alone, so that adding a leaf leaves the others as they were.
  Normal values are drawn in fp32 and then cast.
  """

  def leaf(path, spec: ParamSpec) -> jax.Array:
    if spec.init == "ones":
      return jnp.ones(spec.shape, dtype)
    if spec.init == "zeros":
      return jnp.zeros(spec.shape, dtype)
    assert not isinstance(spec.init, str), spec
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return (spec.init * jax.random.normal(own, spec.shape, jnp.float32)).astype(dtype)

  return jax.tree_util.tree_map_with_path(leaf, abstract(config))


def output_weight(params: Params, config: ModelConfig) -> jax.Array:
  """Returns the output matrix [D, V]: a transposed view of `embed` when tied."""
  return params["embed"].T if config.tie_word_embeddings else params["lm_head"]


def check(params: Params, config: ModelConfig) -> None:
  """Raises UserError naming every leaf that is missing, unexpected or of another shape."""

  def flat(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="."): x.shape for p, x in leaves}

  want, have = flat(abstract(config)), flat(params)
  problems = [f"missing {n} {want[n]}" for n in want if n not in have]
  problems += [f"unexpected {n} {have[n]}" for n in have if n not in want]
  problems += [
    f"{n} is {have[n]}, expected {want[n]}" for n in want if n in have and have[n] != want[n]
  ]
  if problems:
    raise UserError(f"parameters do not fit the model config: {'; '.join(problems)}")
