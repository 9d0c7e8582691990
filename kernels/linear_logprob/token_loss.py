"""A loss of each token by itself, differentiated with respect to the token's log-prob."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Literal


class TokenLoss(NamedTuple):
  """token_loss(logprob[C], entropy[C], arrays) -> [C]; arrays: a pytree of [C, ...] and scalars."""

  f: Callable[..., jax.Array]
  uses_entropy: bool

  def __call__(self, logprob, entropy, arrays) -> jax.Array:
    return self.f(logprob, entropy, arrays).astype(logprob.dtype)

  def gradients(self, active, logprob, entropy, arrays):
    """-> (losses, d/d logprob, d/d entropy or None where it is not used), 0 where not active."""
    f = lambda logprob, entropy: self(logprob, entropy, arrays)
    losses, pull = jax.vjp(f, logprob, entropy)
    g, h = pull(jnp.ones_like(losses))
    losses, g, h = (jnp.where(active, x, 0) for x in (losses, g, h))
    return losses, g, h if self.uses_entropy else None


def token_loss_of(f: Callable[..., jax.Array], dtype: Any, count: int, arrays: Any) -> TokenLoss:
  """Checks f on `count` tokens (shapes only) and finds out whether it reads the entropy.

  Raises:
    ValueError: f does not give one loss per token, or captures an array of the trace around it.
  """
  row = jax.ShapeDtypeStruct((count,), dtype)
  of = lambda a: jax.ShapeDtypeStruct((count, *a.shape[1:]) if a.ndim else (), a.dtype)
  # A function of its own: what f captured in an earlier trace must not come from a cache.
  trace = jax.make_jaxpr(lambda *args: f(*args), return_shape=True)
  traced, out = trace(row, row, jax.tree.map(of, arrays))
  if getattr(out, "shape", None) != (count,):
    raise ValueError(f"token_loss gives {out} for {count} tokens, expected one loss per token")
  for x in traced.consts:
    if isinstance(x, Tracer):
      raise ValueError(
        f"token_loss captures a traced array of shape {x.shape}: pass it in `arrays` (a scalar as"
        " it is), for token_loss runs inside of loops and shards"
      )
  return TokenLoss(f, _uses_second(traced))


def _uses_second(traced: ClosedJaxpr) -> bool:
  """Whether the result depends on the second argument."""
  needed = {v for v in traced.jaxpr.outvars if not isinstance(v, Literal)}
  for eqn in reversed(traced.jaxpr.eqns):
    if needed & set(eqn.outvars):
      needed |= {v for v in eqn.invars if not isinstance(v, Literal)}
  return traced.jaxpr.invars[1] in needed
