"""Model configurations: what the HF `config.json` says, reduced to what the decoder needs.

A `ModelConfig` is frozen and hashable, so it can be a static argument of `jax.jit`. This module
imports neither jax nor transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trinity_jax.errors import UserError, suggestion

FAMILIES = ("qwen2", "qwen3", "llama", "mistral")

_ARCHITECTURES = {
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
}

# Keys of a rope entry by type: (required, optional). The names are those of transformers.
_ROPE_KEYS = {
  "linear": (("factor",), ()),
  "llama3": (
    ("factor", "low_freq_factor", "high_freq_factor"),
    ("original_max_position_embeddings",),
  ),
  "yarn": (
    ("factor",),
    ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
     "mscale_all_dim", "truncate"),
  ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched; `kind` is linear, llama3 or yarn.

  Lengths are in tokens, factors are dimensionless. Fields that a kind does not use stay None.
  """

  kind: str
  factor: float
  original_max_position_embeddings: int | None = None
  low_freq_factor: float | None = None
  high_freq_factor: float | None = None
  attention_factor: float | None = None
  beta_fast: float | None = None
  beta_slow: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool | None = None

  def to_hf(self) -> dict[str, Any]:
    """Returns the entry of `rope_parameters`, without theta."""
    fields = dataclasses.asdict(self)
    kind = fields.pop("kind")
    return {"rope_type": kind, **{k: v for k, v in fields.items() if v is not None}}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """One decoder. Sizes count elements; ids are token ids; `sliding_window` counts tokens."""

  family: str
  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  intermediate_size: int
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  rms_norm_eps: float = 1e-6
  tie_word_embeddings: bool = False
  qkv_bias: bool = False
  qk_norm: bool = False
  sliding_window: int | None = None
  max_position_embeddings: int = 32768
  bos_token_id: int | None = None
  eos_token_ids: tuple[int, ...] = ()
  pad_token_id: int | None = None

  def __post_init__(self):
    if self.family not in FAMILIES:
      raise UserError(f"model family {self.family!r} is not supported; known: {FAMILIES}")
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads",
                 "head_dim", "intermediate_size", "max_position_embeddings"):  # fmt: skip
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"model config: {name} = {value!r}, expected a positive integer")
    if self.num_heads % self.num_kv_heads:
      raise UserError(
        f"model config: num_heads = {self.num_heads} is not a multiple of "
        f"num_kv_heads = {self.num_kv_heads}"
      )
    if self.head_dim % 2:
      raise UserError(f"model config: head_dim = {self.head_dim} must be even (rotary pairs)")
    if self.sliding_window is not None and self.sliding_window < 1:
      raise UserError(f"model config: sliding_window = {self.sliding_window}, expected >= 1")
    if self.qkv_bias != (self.family == "qwen2") or self.qk_norm != (self.family == "qwen3"):
      raise UserError(
        f"model config: family {self.family} with qkv_bias={self.qkv_bias}, qk_norm={self.qk_norm}"
        " is not a published architecture; qkv_bias belongs to qwen2, qk_norm to qwen3"
      )

  @staticmethod
  def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Reads the content of a `config.json` (transformers 5, or older `rope_theta` form).

    Raises:
      UserError: an unsupported model type or feature, or a missing or malformed key.
    """
    return _from_hf(config)

  def to_hf(self) -> dict[str, Any]:
    """Returns the content of a transformers 5 `config.json`."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if self.rope_scaling is not None:
      rope = self.rope_scaling.to_hf()
    out: dict[str, Any] = {
      "architectures": [_ARCHITECTURES[self.family]],
      "model_type": self.family,
      "vocab_size": self.vocab_size,
      "hidden_size": self.hidden_size,
      "intermediate_size": self.intermediate_size,
      "num_hidden_layers": self.num_layers,
      "num_attention_heads": self.num_heads,
      "num_key_value_heads": self.num_kv_heads,
      "head_dim": self.head_dim,
      "hidden_act": "silu",
      "max_position_embeddings": self.max_position_embeddings,
      "rms_norm_eps": self.rms_norm_eps,
      "tie_word_embeddings": self.tie_word_embeddings,
      "rope_parameters": {**rope, "rope_theta": self.rope_theta},
      "attention_dropout": 0.0,
      "bos_token_id": self.bos_token_id,
      "eos_token_id": _one_or_list(self.eos_token_ids),
      "pad_token_id": self.pad_token_id,
    }
    if self.family in ("qwen2", "qwen3"):
      out["use_sliding_window"] = self.sliding_window is not None
      out["max_window_layers"] = 0 if self.sliding_window is not None else self.num_layers
    if self.family != "llama":
      out["sliding_window"] = self.sliding_window
    if self.family in ("llama", "qwen3"):
      out["attention_bias"] = False
    if self.family == "llama":
      out["mlp_bias"] = False
    return out

  def num_params(self) -> int:
    """Number of parameters; a tied output matrix is counted once."""
    d, a = self.hidden_size, self.head_dim
    q, kv = self.num_heads * a, self.num_kv_heads * a
    layer = 2 * d + 2 * d * q + 2 * d * kv + 3 * d * self.intermediate_size
    layer += (q + 2 * kv) * self.qkv_bias + 2 * a * self.qk_norm
    embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
    return self.num_layers * layer + embeddings + d


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
  if not ids:
    return None
  return ids[0] if len(ids) == 1 else list(ids)


def _from_hf(hf: Mapping[str, Any]) -> ModelConfig:
  family = hf.get("model_type")
  if family not in FAMILIES:
    hint = suggestion(str(family), FAMILIES)
    raise UserError(
      f"config.json: model_type = {family!r} is not supported{hint} (supported: "
      f"{', '.join(FAMILIES)})"
    )
  _refuse_unsupported(hf, family)
  num_heads = _integer(hf, "num_attention_heads")
  hidden_size = _integer(hf, "hidden_size")
  theta, scaling = _rope(hf)
  kv_default = 8 if family == "mistral" else num_heads
  default_head_dim = 128 if family == "qwen3" else hidden_size // num_heads
  eos = hf.get("eos_token_id")
  return ModelConfig(
    family=family,
    vocab_size=_integer(hf, "vocab_size"),
    hidden_size=hidden_size,
    num_layers=_integer(hf, "num_hidden_layers"),
    num_heads=num_heads,
    num_kv_heads=_integer(hf, "num_key_value_heads", kv_default),
    head_dim=_integer(hf, "head_dim", default_head_dim),
    intermediate_size=_integer(hf, "intermediate_size"),
    rope_theta=theta,
    rope_scaling=scaling,
    rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
    tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
    qkv_bias=family == "qwen2",
    qk_norm=family == "qwen3",
    sliding_window=_sliding_window(hf, family),
    max_position_embeddings=_integer(hf, "max_position_embeddings"),
    bos_token_id=hf.get("bos_token_id"),
    eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    pad_token_id=hf.get("pad_token_id"),
  )


def _integer(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
  value = hf.get(key)
  value = default if value is None else value
  if isinstance(value, bool) or not isinstance(value, int):
    raise UserError(f"config.json: {key} = {value!r}, expected an integer")
  return value


def _refuse_unsupported(hf: Mapping[str, Any], family: str) -> None:
  """Features that would change the result if they were ignored are errors."""
  for key, fine in (
    ("hidden_act", ("silu",)),
    ("attention_bias", (False, None) if family != "qwen2" else (False, True, None)),
    ("mlp_bias", (False, None)),
    ("partial_rotary_factor", (1.0, None)),
    ("quantization_config", (None,)),
  ):
    if hf.get(key, fine[0]) not in fine:
      raise UserError(
        f"config.json: {key} = {hf[key]!r} is not supported for {family}; expected {fine[0]!r}"
      )


def _sliding_window(hf: Mapping[str, Any], family: str) -> int | None:
  """One window for all layers, or None; a model that mixes both kinds is refused."""
  if family == "llama":
    return None
  window = hf.get("sliding_window", 4096 if family == "mistral" else None)
  if family == "mistral" or window is None:
    return window
  if not hf.get("use_sliding_window", False):
    return None
  num_layers = _integer(hf, "num_hidden_layers")
  first = _integer(hf, "max_window_layers", 28)
  kinds = hf.get("layer_types") or [
    "sliding_attention" if i >= first else "full_attention" for i in range(num_layers)
  ]
  if len(set(kinds)) > 1:
    raise UserError(
      "config.json: layers with and without a sliding window in one model are not supported"
      f" (max_window_layers = {first} of {num_layers}); set use_sliding_window to false"
    )
  return window if kinds[0] == "sliding_attention" else None


def _rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
  """Returns theta and the scaling from `rope_parameters`, or `rope_scaling` + `rope_theta`."""
  entry = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
  kind = entry.pop("rope_type", None) or entry.pop("type", None) or "default"
  entry.pop("type", None)
  theta = entry.pop("rope_theta", None)
  theta = hf.get("rope_theta") if theta is None else theta
  theta = 10_000.0 if theta is None else theta
  if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 1:
    raise UserError(f"config.json: rope_theta = {theta!r}, expected a number above 1")
  if entry.pop("partial_rotary_factor", 1.0) not in (1.0, None):
    raise UserError("config.json: partial_rotary_factor other than 1 is not supported")
  if kind == "default":
    return float(theta), None
  if kind not in _ROPE_KEYS:
    known = ("default", *_ROPE_KEYS)
    raise UserError(f"config.json: rope type {kind!r} is not supported{suggestion(kind, known)}")
  required, optional = _ROPE_KEYS[kind]
  missing = [k for k in required if entry.get(k) is None]
  unknown = [k for k in entry if k not in required + optional]
  if missing or unknown:
    raise UserError(f"config.json: rope type {kind}: missing {missing}, unknown {unknown}")
  if kind in ("llama3", "yarn"):
    fallback = hf.get("original_max_position_embeddings") or hf.get("max_position_embeddings")
    entry.setdefault("original_max_position_embeddings", fallback)
  return float(theta), RopeScaling(kind=kind, **entry)


def _qwen25(
  d: int, layers: int, heads: int, kv: int, f: int, vocab: int, tied: bool
) -> ModelConfig:
  return ModelConfig(
    "qwen2", vocab, d, layers, heads, kv, d // heads, f, rope_theta=1e6, tie_word_embeddings=tied,
    qkv_bias=True, max_position_embeddings=32768, bos_token_id=151643,
    eos_token_ids=(151645, 151643), pad_token_id=151643,
  )  # fmt: skip


def _qwen3(d: int, layers: int, heads: int, f: int, tied: bool) -> ModelConfig:
  return ModelConfig(
    "qwen3", 151936, d, layers, heads, 8, 128, f, rope_theta=1e6, tie_word_embeddings=tied,
    qk_norm=True, max_position_embeddings=40960, bos_token_id=151643,
    eos_token_ids=(151645, 151643), pad_token_id=151643,
  )  # fmt: skip


def _llama3(
  d: int, layers: int, heads: int, head_dim: int, f: int, factor: float, tied: bool
) -> ModelConfig:
  return ModelConfig(
    "llama", 128256, d, layers, heads, 8, head_dim, f, rope_theta=5e5,
    rope_scaling=RopeScaling("llama3", factor, 8192, 1.0, 4.0), rms_norm_eps=1e-5,
    tie_word_embeddings=tied, max_position_embeddings=131072, bos_token_id=128000,
    eos_token_ids=(128001, 128008, 128009),
  )  # fmt: skip


# Published instruction-tuned configurations (Mistral: v0.1, the one with a sliding window).
PRESETS: dict[str, ModelConfig] = {
  "Qwen2.5-0.5B": _qwen25(896, 24, 14, 2, 4864, 151936, True),
  "Qwen2.5-1.5B": _qwen25(1536, 28, 12, 2, 8960, 151936, True),
  "Qwen2.5-7B": _qwen25(3584, 28, 28, 4, 18944, 152064, False),
  "Qwen3-0.6B": _qwen3(1024, 28, 16, 3072, True),
  "Qwen3-1.7B": _qwen3(2048, 28, 16, 6144, True),
  "Qwen3-8B": _qwen3(4096, 36, 32, 12288, False),
  "Llama-3.1-8B": _llama3(4096, 32, 32, 128, 14336, 8.0, False),
  "Llama-3.1-70B": _llama3(8192, 80, 64, 128, 28672, 8.0, False),
  "Llama-3.2-1B": _llama3(2048, 16, 32, 64, 8192, 32.0, True),
  "Mistral-7B": ModelConfig(
    "mistral", 32000, 4096, 32, 32, 8, 128, 14336, rms_norm_eps=1e-5, sliding_window=4096,
    max_position_embeddings=32768, bos_token_id=1, eos_token_ids=(2,),
  ),
}  # fmt: skip
