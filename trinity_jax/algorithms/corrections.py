"""Off-policy corrections: weights for tokens that another policy or another program sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trinity_jax.algorithms.numerics import masked


def loglinear(
  logprob: jax.Array, old_logprob: jax.Array, versions: jax.Array, step: jax.Array, mask: jax.Array
) -> jax.Array:
  """Log-probs of a policy between the one that sampled and the current one (A-3PO, 2512.06547).

  log prox = old + (1 - 1/d) (sg(logprob) - old) for tokens of staleness d = step - version >= 1;
  sg(logprob) for d = 0. All arrays X.
  """
  logprob, old_logprob = masked(mask, logprob, old_logprob)
  staleness = jnp.maximum(step - versions, 0)
  share = jnp.where(staleness > 0, 1 - 1 / jnp.maximum(staleness, 1), 1)
  current = jax.lax.stop_gradient(logprob)
  return old_logprob + share.astype(current.dtype) * (current - old_logprob)


CORRECTIONS: dict[str, Callable[..., Any]] = {}
