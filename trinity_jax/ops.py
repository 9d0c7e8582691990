"""The one door to kernels/: picks an implementation per platform, or the one named.

Axes: B rows, T row length, S slots, C cache length, H query heads, K kv heads, A head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trinity_jax.errors import UserError, suggestion

try:
  from trinity_jax.kernels.attention import (  # pyright: ignore[reportMissingImports]
    cached as _cached,
  )
  from trinity_jax.kernels.attention import (  # pyright: ignore[reportMissingImports]
    cudnn as _attention_cudnn,
  )
  from trinity_jax.kernels.attention import (  # pyright: ignore[reportMissingImports]
    reference as _attention_reference,
  )
  from trinity_jax.kernels.attention import (  # pyright: ignore[reportMissingImports]
    shards as _shards,
  )
  from trinity_jax.kernels.attention import (  # pyright: ignore[reportMissingImports]
    splash_tpu as _attention_splash,
  )
  from trinity_jax.kernels.attention import (  # pyright: ignore[reportMissingImports]
    xla as _attention_xla,
  )
  from trinity_jax.kernels.attention.cached import (  # pyright: ignore[reportMissingImports]
    Segment,
    quantize,
  )
  from trinity_jax.kernels.errors import CannotRun  # pyright: ignore[reportMissingImports]
  from trinity_jax.kernels.linear_logprob import (  # pyright: ignore[reportMissingImports]
    api as _linear_logprob,
  )
  from trinity_jax.kernels.linear_logprob.platform import (  # pyright: ignore[reportMissingImports]
    only_on as _only_on,
  )
except ModuleNotFoundError as error:
  raise ImportError(
    "trinity_jax.kernels is not importable: a bare clone does not run; `pip install -e .` first"
  ) from error


__all__ = [
  "Segment",
  "attention",
  "decode_attention",
  "expected_score",
  "extend_attention",
  "linear",
  "linear_logprob",
  "linear_logprob_loss",
  "quantize",
]

_ATTENTION = {
  "reference": _attention_reference.attention,
  "xla": _attention_xla.attention,
  "splash": _attention_splash.attention,
  "cudnn": _attention_cudnn.attention,
}
# Where an implementation runs, and why it cannot serve operands of some shapes and dtypes.
_ATTENTION_LIMITS = {
  "splash": (("tpu",), _attention_splash.unsupported),
  "cudnn": (("cuda",), _attention_cudnn.unsupported),
}


def _pick(op: str, table: Mapping[str, Callable[..., Any]], name: str | None, default: str):
  """Returns the named implementation, or the default when none is named; never a substitute."""
  name = default if name is None else name
  if name not in table:
    raise UserError(f"{op}: implementation {name!r} does not exist{suggestion(name, table)}")
  return table[name]


def linear(x: jax.Array, w: jax.Array, *, out_dtype: Any = None) -> jax.Array:
  """x [..., D] @ w [D, F] -> [..., F] in `out_dtype` (None = x's); accumulates in fp32 or wider.

  Leading axes are folded, so that the product is one large 2-D matmul; not where the mesh in
  context splits rows and the places in them, which only one of them would survive. x and w share a
  dtype, and so do their gradients. Reverse-mode only.
  """
  out = _product(x if _splits_places() else x.reshape(-1, x.shape[-1]), w)
  return out.astype(out_dtype or x.dtype).reshape(*x.shape[:-1], w.shape[-1])


@jax.custom_vjp
def _product(x: jax.Array, w: jax.Array) -> jax.Array:
  """x [..., D] @ w [D, F] -> [..., F] in fp32 or wider."""
  return _contract(x, w, (x.ndim - 1,), (0,))


def _product_backward(saved, g):
  x, w = saved
  # As autodiff would multiply 16-bit operands: in their dtype, accumulating wider.
  g = g.astype(x.dtype)
  on_cpu = _weight_gradient_cpu if x.ndim == 2 else _weight_gradient
  dw = jax.lax.platform_dependent(x, g, cpu=on_cpu, default=_weight_gradient)
  return _contract(g, w, (g.ndim - 1,), (1,)).astype(x.dtype), dw.astype(w.dtype)


_product.defvjp(lambda x, w: (_product(x, w), (x, w)), _product_backward)


def _weight_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
  """[..., D], [..., F] -> [D, F]."""
  axes = tuple(range(x.ndim - 1))
  return _contract(x, g, axes, axes)


def _weight_gradient_cpu(x: jax.Array, g: jax.Array) -> jax.Array:
  # XLA:CPU multiplies by a transposed left side at 60 to 80 % of the rate of a plain product. The
  # barriers make it transpose x itself, once, and not inline there what x was computed from.
  x, g = jax.lax.optimization_barrier((x, g))
  return _contract(jax.lax.optimization_barrier(x.T), g, (1,), (0,))


def _contract(
  a: jax.Array, b: jax.Array, axes_a: tuple[int, ...], axes_b: tuple[int, ...]
) -> jax.Array:
  wide = jnp.promote_types(a.dtype, jnp.float32)
  dimensions = ((axes_a, axes_b), ((), ()))
  return jax.lax.dot_general(a, b, dimensions, preferred_element_type=wide)


def _splits_places() -> bool:
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.shape.get(_shards.PLACE_AXIS, 1) > 1


def attention(
  q: jax.Array,  # [B, T, H, A]
  k: jax.Array,  # [B, T, K, A]
  v: jax.Array,  # [B, T, K, A]
  *,
  positions: jax.Array,  # i32[B, T]
  segment_ids: jax.Array,  # i32[B, T]
  window: int | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Causal attention within each segment -> [B, T, H, A]; padding (segment 0) is finite, unused.

  With a window, a key is seen while 0 <= its age in positions < window. Implementations:

  "splash": the default on TPU where the shapes allow (row length a multiple of 128 on each device,
    head dim one of 8 up to 256; bfloat16 or float32), split over the mesh in context. Goes by
    places in the row: a segment's tokens must be consecutive, with positions that count up by one.
  "cudnn": GPU, by name only; row length even, head dim as above; bfloat16 or float16.
  "xla": the default elsewhere. "reference".

  Raises:
    UserError: the named implementation does not exist.
    CannotRun: it cannot run here (which for the platform is known when the program is compiled).
  """
  args = (q, k, v, positions, segment_ids)
  if implementation is None and _attention_splash.unsupported(q, k) is None:
    run = lambda name: (
      lambda q, k, v, positions, segment_ids: _ATTENTION[name](
        q, k, v, positions=positions, segment_ids=segment_ids, window=window
      )
    )
    return jax.lax.platform_dependent(*args, tpu=run("splash"), default=run("xla"))
  name = "xla" if implementation is None else implementation
  run = _pick("attention", _ATTENTION, name, name)
  if name in _ATTENTION_LIMITS:
    platforms, unsupported = _ATTENTION_LIMITS[name]
    reason = unsupported(q, k)
    if reason:
      raise CannotRun(f"attention: implementation {name!r} cannot run: {reason}")
    text = f"attention: implementation {name!r} runs on {', '.join(platforms)}"
    segment_ids = _only_on(platforms, text, jnp.asarray(segment_ids))
  return run(q, k, v, positions=positions, segment_ids=segment_ids, window=window)


def decode_attention(
  q: jax.Array,  # [S, H, A]
  segments: Sequence[Segment],
  positions: jax.Array,  # i32[S]
  *,
  window: int | None = None,
) -> jax.Array:
  """One query per slot against cache entries 0..positions[s] of its slot -> [S, H, A]."""
  return _cached.decode(q, segments, positions, window)


def extend_attention(
  q: jax.Array,  # [P, T, H, A]
  segments: Sequence[Segment],
  slots: jax.Array,  # i32[P]
  positions: jax.Array,  # i32[P, T]
  needed: jax.Array,  # i32[]
  *,
  window: int | None = None,
) -> jax.Array:
  """A chunk of each row against cache entries 0..position of the row's slot -> [P, T, H, A].

  Blocks of entries that begin at or beyond `needed` (traced) are not read.
  """
  return _cached.extend(q, segments, slots, positions, needed, window)


def linear_logprob(
  hidden: jax.Array,  # [T, D]
  weight: jax.Array,  # [D, V]
  targets: jax.Array,  # i32[T]
  mask: jax.Array,  # bool[T]
  temperature: jax.Array | float = 1.0,  # scalar or [T]
  *,
  softcap: float | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Log-prob of targets, entropy, logsumexp under softmax(softcap(hidden @ weight) / temperature).

  Each [T], float32 or wider. Rows where `mask` is False are not read, give 0 and get no gradient.
  Differentiable in hidden and weight. Under a mesh in context (jax.set_mesh) rows are split over
  data, fsdp and context, the vocabulary over tensor. [T, V] is held only where it is small.
  Implementations: "pallas_tpu" (the default on TPU), "xla" (the default elsewhere), "reference".

  Raises:
    UserError: the named implementation does not exist.
    CannotRun: it cannot run here.
    ValueError: shapes do not fit.
  """
  _named("linear_logprob", implementation)
  return _linear_logprob.linear_logprob(
    hidden, weight, targets, mask, temperature, softcap=softcap, implementation=implementation
  )


def linear_logprob_loss(
  hidden: jax.Array,  # [T, D]
  weight: jax.Array,  # [D, V]
  targets: jax.Array,  # i32[T]
  mask: jax.Array,  # bool[T]
  temperature: jax.Array | float,  # scalar or [T]
  token_loss: Callable[..., jax.Array],
  arrays: Any,
  *,
  softcap: float | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
  """The sum over masked-in rows of token_loss(logprob[C], entropy[C], arrays of [C, ...]) -> [C].

  For a loss of each token by itself; `arrays` is a pytree of [T, ...] that comes to token_loss
  some rows at a time. Differentiating it takes a quarter fewer products than going through
  `linear_logprob`, since each token's gradient is known with its log-prob.

  Returns:
    (loss, (logprob, entropy, lse) as linear_logprob). Only the loss is differentiable, in hidden
    and weight.
  """
  _named("linear_logprob_loss", implementation)
  return _linear_logprob.linear_logprob_loss(
    hidden, weight, targets, mask, temperature, token_loss, arrays, softcap=softcap,
    implementation=implementation,
  )  # fmt: skip


def expected_score(
  hidden: jax.Array,  # [T, D]
  weight: jax.Array,  # [D, V]
  mask: jax.Array,  # bool[T]
  temperature: jax.Array | float = 1.0,  # scalar or [T]
) -> jax.Array:
  """sum_v p_v^2 (H + log p_v) [T] under p = softmax(hidden @ weight / temperature), no gradient."""
  return _linear_logprob.expected_score(hidden, weight, mask, temperature)


def _named(op: str, name: str | None) -> None:
  if name is not None and name not in _linear_logprob.IMPLEMENTATIONS:
    known = suggestion(name, _linear_logprob.IMPLEMENTATIONS)
    raise UserError(f"{op}: implementation {name!r} does not exist{known}")
