"""Maximum likelihood and its reweighted forms; expert tokens among the policy's own."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from trinity_jax.algorithms import stats
from trinity_jax.algorithms.numerics import clamp, masked
from trinity_jax.algorithms.policy_losses.clipped import ppo
from trinity_jax.algorithms.policy_losses.common import POSITIVE, Loss, check, check_choice

_sg = jax.lax.stop_gradient


def sft(logprob: jax.Array, mask: jax.Array) -> Loss:
  """-logprob: maximum likelihood of the tokens under `mask`."""
  (logprob,) = masked(mask, logprob)
  return -logprob, {"nll": stats.mean(-logprob, mask)}


def sft_is(logprob: jax.Array, mask: jax.Array) -> Loss:
  """-sg(p) logprob, p = e^logprob: its gradient is that of -p, so unlikely tokens count little.

  Also known as dynamic fine-tuning: DFT, arXiv 2508.05629.
  """
  (logprob,) = masked(mask, logprob)
  weight = jnp.exp(_sg(logprob))
  return -weight * logprob, {
    "nll": stats.mean(-logprob, mask), "sft/weight": stats.mean(weight, mask),
  }  # fmt: skip


def sft_phi(logprob: jax.Array, mask: jax.Array, *, cutoff: float = 1.0) -> Loss:
  """-sg(p (1 - p)) min(logprob, log cutoff): what is certain or hopeless counts least.

  The token-wise weight phi of CHORD, arXiv 2508.11408.

  Args:
    logprob: of the policy being trained (differentiated).
    mask: bool, True at the tokens to learn.
    cutoff: tokens more likely than this have no gradient; 1 for none.

  Raises:
    UserError: cutoff outside (0, 1].
  """
  check("cutoff", cutoff, POSITIVE, 1.0 + 1e-9)
  (logprob,) = masked(mask, logprob)
  p = jnp.exp(_sg(logprob))
  weight = -p * jnp.expm1(_sg(logprob))
  log_cutoff: Any = math.log(cutoff) if isinstance(cutoff, (int, float)) else jnp.log(cutoff)
  return -weight * clamp(logprob, -jnp.inf, log_cutoff), {
    "nll": stats.mean(-logprob, mask), "sft/weight": stats.mean(weight, mask),
  }  # fmt: skip


def _joined(expert, logprob, old_logprob, advantages, mask, is_expert, options) -> Loss:
  mask, is_expert = jnp.asarray(mask, bool), jnp.asarray(is_expert, bool)
  # Each is 0 where its own mask is False.
  taught, of_experts = expert(logprob, mask & is_expert)
  explored, of_policy = ppo(logprob, old_logprob, advantages, mask & ~is_expert, **options)
  return taught + explored, {
    **of_policy, **{f"expert/{k}": v for k, v in of_experts.items()},
    "expert/tokens": stats.mean(is_expert, mask),
  }  # fmt: skip


def mix(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  is_expert: jax.Array,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float | None = 3.0,
) -> Loss:
  """`sft` where an expert wrote the token, `ppo` elsewhere: MIX of Trinity-RFT, arXiv 2505.17826.

  The share of the two in the step's loss is the algorithm's `blend`, not this function's.

  Args:
    logprob, old_logprob, advantages, mask: see ppo; old_logprob and advantages are not read at
      expert tokens.
    is_expert: bool X.
    clip_low, clip_high, dual_clip: see ppo.

  Raises:
    UserError: a hyper-parameter outside its range.
  """
  options = dict(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
  return _joined(sft, logprob, old_logprob, advantages, mask, is_expert, options)


def chord(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  is_expert: jax.Array,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float | None = 3.0,
  expert: str = "sft_phi",
  cutoff: float = 1.0,
) -> Loss:
  """`mix` with `sft_phi` at the experts' tokens: CHORD, arXiv 2508.11408.

  Args:
    logprob, old_logprob, advantages, mask, is_expert, clip_low, clip_high, dual_clip: see mix.
    expert: "sft_phi" (CHORD-phi) or "sft" (CHORD-mu, whose share mu is the algorithm's `blend`).
    cutoff: of sft_phi.

  Raises:
    UserError: a hyper-parameter outside its range.
  """
  check_choice("expert", expert, ("sft_phi", "sft"))
  options = dict(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
  taught = sft if expert == "sft" else lambda x, m: sft_phi(x, m, cutoff=cutoff)
  return _joined(taught, logprob, old_logprob, advantages, mask, is_expert, options)
