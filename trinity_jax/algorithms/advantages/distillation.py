"""Distillation on the student's own tokens: the teacher's opinion of each is its advantage.

All arrays X; s = log-prob under the student that sampled, t = under the teacher.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from trinity_jax.algorithms import options, stats
from trinity_jax.algorithms.advantages.common import advantage_stats
from trinity_jax.algorithms.numerics import clamp, masked


def on_policy_distill(
  old_logprob: jax.Array, teacher_logprob: jax.Array, mask: jax.Array, *, coef: float = 1.0
) -> tuple[jax.Array, dict[str, stats.Stat]]:
  """coef (t - s): policy gradient of the divergence KL(student || teacher) (arXiv 2306.13649)."""
  s, t = masked(mask, old_logprob, teacher_logprob)
  advantages = coef * (t - s)
  return advantages, {
    "teacher_kl": stats.mean(s - t, mask), **advantage_stats(advantages, mask)
  }  # fmt: skip


def jsd(
  old_logprob: jax.Array,
  teacher_logprob: jax.Array,
  mask: jax.Array,
  *,
  beta: float = 0.5,
  coef: float = 1.0,
  variant: str = "gradient",
) -> tuple[jax.Array, dict[str, stats.Stat]]:
  """Towards the least generalised Jensen-Shannon divergence (arXiv 2306.13649).

  JSD = beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student.
  With M = log m = logsumexp(t + log beta, s + log(1 - beta)) at the sampled token:

  "gradient": coef (1 - beta) (M - s). E[A grad s] over the student's tokens is exactly -coef times
    the gradient of JSD: the teacher's half of JSD enters through its derivative, as an expectation
    over the student. At beta = 0 and 1, where JSD vanishes, that of its limits JSD / beta =
    KL(teacher || student): coef (e^(t - s) - 1), and JSD / (1 - beta) = KL(student || teacher):
    coef (t - s). Exponents are clamped to 20.
  "trinity": -coef (beta (t - M) + (1 - beta) (s - M)), at beta = 0 coef (t - s) and at beta = 1
    coef (s - t), as released in Trinity-RFT. It takes teacher terms as if the teacher had sampled,
    is never negative for 0 < beta < 1, and moves away from the teacher at beta = 1.
  """
  options.choice("variant", variant, ("gradient", "trinity"))
  options.number("beta", beta, 0.0, 1.0 + 1e-9)
  s, t = masked(mask, old_logprob, teacher_logprob)
  if beta in (0, 1):
    mixture = s if beta == 0 else t
  else:
    mixture = jnp.logaddexp(t + math.log(beta), s + math.log1p(-beta))
  if variant == "trinity":
    inner = beta * (t - mixture) + (1 - beta) * (s - mixture)
    advantages = -coef * ((s - t) if beta == 0 else (t - s) if beta == 1 else inner)
  elif beta == 0:
    advantages = coef * jnp.expm1(clamp(t - s, -20.0, 20.0))
  elif beta == 1:
    advantages = coef * (t - s)
  else:
    advantages = coef * (1 - beta) * (mixture - s)
  # logaddexp of two zeros is not 0 where masked.
  (advantages,) = masked(mask, advantages)
  return advantages, {
    "teacher_kl": stats.mean(s - t, mask), **advantage_stats(advantages, mask)
  }  # fmt: skip
