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


TABLE: dict[str, Row] = {
  "sft": Row(
    formula="-log p(token)",
    paper="maximum likelihood",
    policy_loss="sft",
    data="demonstrations",
  ),
  "grpo": Row(
    formula="max(-A r, -A clip(r, 1-l, 1+h)), A = (reward - group mean) / group std",
    paper="arXiv 2402.03300",
    advantage="grpo",
    kl="k2",
    kl_coef=0.001,
  ),
}
