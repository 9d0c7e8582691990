"""Policy losses: one number per token, to be minimised.

A loss names the arrays it reads as positional parameters and its hyper-parameters as keyword-only
ones. All token arrays have one shape X ([B, T] of packed or padded rows), float, read only where
`mask` (bool X) is True. It returns `(loss X, stats)` where `stats` is `dict[str, stats.Stat]`; both
are 0 (or do not count) where `mask` is False. Averaging is not its business: see aggregation.py.

A loss sees one micro-batch: sums over a sequence are fine, statistics over several are not. Those
come from companions that see the whole step (selective.py; parts.whole_step).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trinity_jax.algorithms.policy_losses.clipped import (
  gmpo,
  gspo,
  gspo_token,
  ppo,
  ppo_sequence_mask,
  sapo,
)
from trinity_jax.algorithms.policy_losses.common import MAX_LOG_RATIO, ratio_stats
from trinity_jax.algorithms.policy_losses.gradient import (
  cispo,
  dppo_kl,
  dppo_tv,
  importance_sampling,
  opmd,
  reinforce,
  sppo,
  topr,
  topr_token,
)
from trinity_jax.algorithms.policy_losses.preference import dpo, dpo_summed
from trinity_jax.algorithms.policy_losses.rec import rec
from trinity_jax.algorithms.policy_losses.selective import clip_cov, kl_cov, m2po
from trinity_jax.algorithms.policy_losses.supervised import chord, mix, sft, sft_is, sft_phi

__all__ = [
  "MAX_LOG_RATIO",
  "POLICY_LOSSES",
  "chord",
  "cispo",
  "clip_cov",
  "dpo",
  "dpo_summed",
  "dppo_kl",
  "dppo_tv",
  "gmpo",
  "gspo",
  "gspo_token",
  "importance_sampling",
  "kl_cov",
  "m2po",
  "mix",
  "opmd",
  "ppo",
  "ppo_sequence_mask",
  "ratio_stats",
  "rec",
  "reinforce",
  "sapo",
  "sft",
  "sft_is",
  "sft_phi",
  "sppo",
  "topr",
  "topr_token",
]

POLICY_LOSSES: dict[str, Callable[..., Any]] = {
  "ppo": ppo,
  "gspo": gspo,
  "gspo-token": gspo_token,
  "gmpo": gmpo,
  "sapo": sapo,
  "cispo": cispo,
  "topr": topr,
  "opmd": opmd,
  "sppo": sppo,
  "rec": rec,
  "importance_sampling": importance_sampling,
  "reinforce": reinforce,
  "dppo-tv": dppo_tv,
  "dppo-kl": dppo_kl,
  "m2po": m2po,
  "clip-cov": clip_cov,
  "kl-cov": kl_cov,
  "sft": sft,
  "sft_is": sft_is,
  "sft_phi": sft_phi,
  "mix": mix,
  "chord": chord,
  "dpo": dpo,
}
