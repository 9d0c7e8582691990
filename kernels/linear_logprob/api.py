"""Log-prob of given next tokens under softmax(hidden @ weight), without keeping [T, V]."""

from __future__ import annotations

import jax

from . import reference, xla

IMPLEMENTATIONS = {"reference": reference.linear_logprob, "xla": xla.linear_logprob}
DEFAULT = "xla"


def linear_logprob(
  hidden: jax.Array,  # [T, D]
  weight: jax.Array,  # [D, V]
  targets: jax.Array,  # i32[T]
  mask: jax.Array,  # bool[T]
  temperature: jax.Array | float = 1.0,  # scalar or [T]
  *,
  softcap: float | None = None,
  implementation: str = DEFAULT,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (logprob, entropy, lse), each [T], float32 (float64 where the inputs are).

  logits = softcap(hidden @ weight) / temperature, accumulated in float32 or wider;
  softcap(l) = softcap * tanh(l / softcap), or l when None. Entropy is in nats.

  Rows where `mask` is False are not read (NaN, target -1 and temperature 0 are fine there), give 0
  and receive no gradient. Differentiable in hidden and weight; temperature counts as a constant.

  Raises:
    ValueError: shapes that do not fit, an unknown implementation, a softcap that is not positive.
  """
  if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[0]:
    raise ValueError(f"hidden {hidden.shape} and weight {weight.shape}: expected [T, D] and [D, V]")
  for name, x in (("targets", targets), ("mask", mask)):
    if x.shape != hidden.shape[:1]:
      raise ValueError(f"{name} has shape {x.shape}, expected [T] = {hidden.shape[:1]}")
  if jax.numpy.shape(temperature) not in ((), hidden.shape[:1]):
    raise ValueError(
      f"temperature has shape {jax.numpy.shape(temperature)}, expected a scalar or [T]"
    )
  if softcap is not None and not softcap > 0:
    raise ValueError(f"softcap is {softcap!r}, expected a positive number or None")
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"linear_logprob: implementation {implementation!r} does not exist; "
      f"known: {', '.join(IMPLEMENTATIONS)}"
    )
  run = IMPLEMENTATIONS[implementation]
  return run(hidden, weight, targets, mask, temperature, softcap=softcap)
