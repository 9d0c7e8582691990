"""The table of algorithms: one row names the pieces of an objective and their defaults.

Adding an algorithm is one function (in advantages/, policy_losses/, kl.py or corrections.py, with
its line in that registry) and one row here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

# What an algorithm learns from.
DATA = ("rollouts", "demonstrations", "text", "preferences")


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of TABLE: names of the pieces, their defaults, and what the documentation says.

  Attributes:
    formula, paper: for people.
    advantage, policy_loss, kl, entropy, aggregation, correction: names in the registries.
    kl_in: "loss" or "reward", where the KL penalty goes.
    proximal: "none" (ratios are against the policy that sampled), "recompute" or "loglinear".
    data: one of DATA.
    blend: "none", or how the share of the experts' loss follows the steps (mixed training).
    stale: whether the loss is meant for data of older policies although it reads no ratio.
    prepare: optional hook on the dict of the step's arrays, before anything else.
  """

  formula: str
  paper: str
  advantage: str = "constant"
  policy_loss: str = "ppo"
  kl: str = "none"
  kl_coef: float = 0.0
  kl_in: str = "loss"
  entropy: str = "default"
  entropy_coef: float = 0.0
  aggregation: str = "token-mean"
  correction: str = "none"
  proximal: str = "none"
  advantage_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  policy_loss_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  correction_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  data: str = "rollouts"
  blend: str = "none"
  blend_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  stale: bool = False
  prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None

  @property
  def supervised(self) -> bool:
    """Whether it learns from given texts: no rollouts, no reward."""
    return self.data != "rollouts"


def _row(formula: str, paper: str, advantage: str, policy_loss: str = "ppo", **more: Any) -> Row:
  """A row that learns from rollouts."""
  return Row(formula, paper, advantage, policy_loss, **more)


# A KL term in the loss, as Trinity-RFT's defaults have it for most algorithms.
_KL: dict[str, Any] = {"kl": "k2", "kl_coef": 0.001}
_BY_SEQUENCE = "seq-mean-token-mean"
_CLIP = "max(-A r, -A clip(r, 1-l, 1+h))"
_GROUP = "A = (reward - group mean) / group std"

TABLE: dict[str, Row] = {
  # --- ratios that are clipped -------------------------------------------------------------------
  "ppo": _row(
    f"{_CLIP}, A = GAE over action tokens, whitened", "arXiv 1707.06347", "gae", **_KL
  ),
  "grpo": _row(f"{_CLIP}, {_GROUP}", "arXiv 2402.03300", "grpo", **_KL),
  "dapo": _row(
    f"{_CLIP}, h > l, {_GROUP}", "arXiv 2503.14476", "grpo",
    policy_loss_args={"clip_low": 0.2, "clip_high": 0.28},
  ),
  "dr_grpo": _row(
    f"{_CLIP} / constant length, A = reward - group mean", "arXiv 2503.20783", "grpo",
    advantage_args={"std": False}, aggregation="seq-mean-token-sum-norm",
  ),
  "reinforceplusplus": _row(
    f"{_CLIP}, A = discounted returns less KL, whitened over the step", "arXiv 2501.03262",
    "reinforce++", kl="k1", kl_coef=0.001, kl_in="reward",
  ),
  "reinforceplusplus_baseline": _row(
    f"{_CLIP}, A = reward - group mean, whitened over the step", "arXiv 2501.03262",
    "reinforce++_baseline", **_KL,
  ),
  "rloo": _row(f"{_CLIP}, A = reward - mean of the others", "arXiv 2402.14740", "rloo", **_KL),
  "remax": _row(f"{_CLIP}, A = reward - greedy run's reward", "arXiv 2310.10505", "remax", **_KL),
  "opo": _row(
    f"{_CLIP}, A = reward - length-weighted group mean", "arXiv 2505.23585", "opo"
  ),
  "maxrl": _row(f"{_CLIP}, A = (reward - group mean) / group mean", "arXiv 2602.02710", "maxrl"),
  "multi_step_grpo": _row(
    f"{_CLIP}, A of the last turn's reward, for all turns", "Trinity-RFT, arXiv 2505.17826",
    "step_wise_grpo", **_KL,
  ),
  "gigpo": _row(
    f"{_CLIP}, A = episode's + omega x that among equal states", "arXiv 2505.10978", "gigpo",
    **_KL,
  ),
  "gspo": _row(
    f"clip of s = (sequence ratio)^(1/length), {_GROUP}", "arXiv 2507.18071", "grpo", "gspo",
    aggregation=_BY_SEQUENCE, **_KL,
  ),
  "gspo_token": _row(
    f"clip of sg(s) p / sg(p), {_GROUP}", "arXiv 2507.18071", "grpo", "gspo-token",
    aggregation=_BY_SEQUENCE, **_KL,
  ),
  "gmpo": _row(
    f"geometric mean of clipped token ratios, {_GROUP}", "arXiv 2507.20673", "grpo", "gmpo",
    aggregation=_BY_SEQUENCE, **_KL,
  ),
  "sapo": _row(
    f"-A 4/tau sigmoid(tau (r - 1)), {_GROUP}", "arXiv 2511.20347", "grpo", "sapo",
    aggregation=_BY_SEQUENCE, **_KL,
  ),
  "dppo_tv": _row(
    f"-A r unless TV(p, old) > delta and growing, {_GROUP}", "arXiv 2602.04879", "grpo", "dppo-tv"
  ),
  "dppo_kl": _row(
    f"-A r unless KL(old, p) > delta and growing, {_GROUP}", "arXiv 2602.04879", "grpo", "dppo-kl"
  ),
  "m2po": _row(
    f"-A r where the mean of (log r)^2 stays below tau, {_GROUP}", "arXiv 2510.01161", "grpo",
    "m2po",
  ),
  "clip_cov": _row(
    f"{_CLIP}, no gradient at some tokens of high covariance", "arXiv 2505.22617", "grpo",
    "clip-cov",
  ),
  "kl_cov": _row(
    "-A r + c KL at the tokens of highest covariance", "arXiv 2505.22617", "grpo", "kl-cov"
  ),
  "clipb": _row(
    f"{_CLIP}, A = 0 where A < 0 and S - E[S] < -mu std, S = p (H + log p)", "arXiv 2602.03392",
    "clipb", **_KL,
  ),
  "clipv": _row(
    f"{_CLIP}, A = 0 where A < 0 and E_p[S] - S > mu std", "arXiv 2602.03392", "clipv", **_KL
  ),
  # --- weights, or no ratio at all ---------------------------------------------------------------
  "reinforce": _row("-A log p, A = reward", "Williams 1992", "reinforce", "reinforce"),
  "importance_sampling": _row(
    f"-A r, {_GROUP}", "textbook importance sampling", "grpo", "importance_sampling"
  ),
  "cispo": _row(
    f"-A sg(clip(r, 1-l, 1+h)) log p, {_GROUP}", "arXiv 2506.13585", "grpo", "cispo", **_KL
  ),
  "topr": _row(
    "-sg(R^[A<=0] clipped to [0, 1]) A log p, A = reward, R = sequence ratio", "arXiv 2503.14286",
    "reinforce", "topr", **_KL,
  ),
  "opmd": _row(
    "-A log p / (1 + tau), A = reward - group mean", "arXiv 2505.17826", "opmd", "opmd",
    stale=True, **_KL,
  ),
  "asymre": _row(
    "-A log p / (1 + tau), A = reward - (group mean + shift)", "arXiv 2506.20520", "asymre",
    "opmd", stale=True,
  ),
  "sppo": _row(
    "-A log r within 1/(1+eps) <= r <= 1+eps", "arXiv 2108.05828", "opmd", "sppo"
  ),
  "rec": _row("-A log p where r is in range", "arXiv 2509.24203", "rec", "rec"),
  "raft": _row("-log p of the best answers", "arXiv 2304.06767", "raft", "reinforce", stale=True),
  # --- data that lags behind, or that another program sampled -------------------------------------
  "tis": _row(
    f"-min(p/old, C) A log p, {_GROUP}", "Yao et al. 2025, truncated importance sampling", "grpo",
    "reinforce", correction="token_tis",
  ),
  "icepop": _row(
    f"{_CLIP} x (p/old where in [low, high], else 0), {_GROUP}", "Ling team 2025, IcePop", "grpo",
    correction="icepop", proximal="recompute",
  ),
  "decoupled_ppo": _row(
    f"min(prox/old, C) x clip of p/prox, {_GROUP}", "arXiv 2505.24298", "grpo",
    correction="token_tis", proximal="recompute",
  ),
  "a3po": _row(
    f"min(prox/old, C) x clip of p/prox, prox between old and p, {_GROUP}", "arXiv 2512.06547",
    "grpo", correction="token_tis", proximal="loglinear",
  ),
  # --- a teacher, experts, given texts -----------------------------------------------------------
  "on_policy_distill": _row(
    f"{_CLIP}, A = log teacher - log old", "Thinking Machines 2025, on-policy distillation",
    "on_policy_distill",
  ),
  "jsd": _row(f"{_CLIP}, A from the Jensen-Shannon divergence", "arXiv 2306.13649", "jsd"),
  "mix": _row(
    "(1 - mu) GRPO on rollouts + mu SFT on experts", "arXiv 2505.17826", "grpo", "mix",
    blend="constant", **_KL,
  ),
  "mix_chord": _row(
    "(1 - mu) GRPO on rollouts + mu phi-weighted SFT on experts, mu by step", "arXiv 2508.11408",
    "grpo", "chord", blend="chord", **_KL,
  ),
  "sft": Row("-log p(token)", "maximum likelihood", policy_loss="sft", data="demonstrations"),
  "sft_is": Row("-sg(p) log p", "arXiv 2508.05629", policy_loss="sft_is", data="demonstrations"),
  "sft_phi": Row(
    "-sg(p (1 - p)) log p", "arXiv 2508.11408", policy_loss="sft_phi", data="demonstrations"
  ),
  "cpt": Row("-log p(token) of plain text", "maximum likelihood", policy_loss="sft", data="text"),
  "dpo": Row(
    "-log sigmoid(beta (log p/ref of chosen - that of rejected))", "arXiv 2305.18290",
    policy_loss="dpo", aggregation=_BY_SEQUENCE, data="preferences",
  ),
}
