"""Rotary position embeddings: default, linear, llama3 (Llama 3.1) and yarn (arXiv:2309.00071).

Axes: T positions, A head dim. Angles are fp32 whatever the compute dtype: bfloat16 rounds
position 257 to 256.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from trinity_jax.models.presets import ModelConfig, RopeScaling


def frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
  """Returns (radians per position f32[A / 2], scale of cos and sin).

  Each step is rounded to fp32 as transformers does: at position 30000 one unit in the last place
  of a frequency already turns the angle by 0.002.
  """
  dim = config.head_dim
  exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
  period = np.power(np.float64(config.rope_theta), exponent.astype(np.float64)).astype(np.float32)
  scaling = config.rope_scaling
  if scaling is None:
    return np.float32(1) / period, 1.0
  if scaling.kind == "linear":
    return np.float32(1) / period / np.float32(scaling.factor), 1.0
  if scaling.kind == "llama3":
    return _llama3(np.float32(1) / period, scaling), 1.0
  return _yarn(period, scaling, config)


def _llama3(inv_freq: np.ndarray, scaling: RopeScaling) -> np.ndarray:
  """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
  assert scaling.low_freq_factor and scaling.high_freq_factor
  length = scaling.original_max_position_embeddings
  assert length is not None
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  factor = np.float32(scaling.factor)
  wavelength = np.float32(2 * math.pi) / inv_freq
  smooth = (np.float32(length) / wavelength - np.float32(low)) / np.float32(high - low)
  between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
  out = np.where(wavelength > np.float32(length / low), inv_freq / factor, inv_freq)
  medium = (wavelength >= np.float32(length / high)) & (wavelength <= np.float32(length / low))
  return np.where(medium, between, out).astype(np.float32)


def _yarn(period: np.ndarray, scaling: RopeScaling, config: ModelConfig):
  """Interpolates slow dimensions, keeps fast ones, ramps between; scales attention by mscale."""
  dim, theta, factor = config.head_dim, config.rope_theta, scaling.factor
  length = scaling.original_max_position_embeddings
  assert length is not None

  def dimension(rotations: float) -> float:
    return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

  low = dimension(scaling.beta_fast or 32)
  high = dimension(scaling.beta_slow or 1)
  if scaling.truncate is None or scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  high = high + 0.001 if low == high else high
  ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
  keep = 1 - np.clip(ramp, 0, 1)
  extrapolated = np.float32(1) / period
  interpolated = np.float32(1) / (np.float32(factor) * period)
  inv_freq = interpolated * (1 - keep) + extrapolated * keep
  return inv_freq.astype(np.float32), _yarn_attention_factor(scaling)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
  def mscale(weight: float) -> float:
    return 0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

  if scaling.attention_factor is not None:
    return scaling.attention_factor
  if scaling.mscale and scaling.mscale_all_dim:
    return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
  return mscale(1.0)


def tables(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
  """positions i32[...] -> (cos, sin) f32[..., A / 2], exact for positions below 2**24."""
  inv_freq, scale = frequencies(config)
  inv_freq = inv_freq.reshape((1,) * positions.ndim + inv_freq.shape)
  angles = positions[..., None].astype(jnp.float32) * inv_freq
  return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates x[..., H, A] by tables [..., A / 2]; pairs are (i, i + A / 2), arithmetic in fp32."""
  # Over whole heads, because XLA:CPU does not vectorise the halves when it fuses them onwards.
  cos = jnp.concatenate([cos, cos], axis=-1)[..., None, :]
  sin = jnp.concatenate([-sin, sin], axis=-1)[..., None, :]
  y = x.astype(jnp.float32)
  return (y * cos + jnp.roll(y, x.shape[-1] // 2, axis=-1) * sin).astype(x.dtype)
