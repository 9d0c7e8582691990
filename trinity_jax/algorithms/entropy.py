"""Which tokens' entropy the bonus counts. Per token, any shape X, 0 where `mask` is False."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from trinity_jax.algorithms.numerics import masked


def default(entropy: jax.Array, mask: jax.Array) -> jax.Array:
  """The entropy (nats) of the policy's distribution at every action token."""
  return masked(mask, entropy)[0]


def none(mask: jax.Array) -> jax.Array:
  """0: no bonus."""
  return jnp.zeros(jnp.shape(mask))


def mix(entropy: jax.Array, mask: jax.Array, is_expert: jax.Array) -> jax.Array:
  """`default` at the tokens that the policy wrote itself, 0 at an expert's."""
  return masked(jnp.asarray(mask, bool) & ~jnp.asarray(is_expert, bool), entropy)[0]


ENTROPIES = {"default": default, "none": none, "mix": mix}
