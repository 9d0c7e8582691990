"""The table of algorithms, and `make`, which turns a row and a config into pure functions.

Adding an algorithm is one function (in advantages.py, policy_losses.py or kl.py, with its line in
that file's registry) and one row of TABLE. A user's own function is named as 'module:function'
wherever a config names a piece.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trinity_jax import plugins
from trinity_jax.algorithms import aggregation, stats
from trinity_jax.algorithms.advantages import ADVANTAGES
from trinity_jax.algorithms.entropy import ENTROPIES
from trinity_jax.algorithms.kl import KLS
from trinity_jax.algorithms.parts import INPUTS, Part, resolve
from trinity_jax.algorithms.policy_losses import POLICY_LOSSES
from trinity_jax.config import AlgorithmConfig
from trinity_jax.errors import UserError, suggestion


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of TABLE: names of the pieces, their defaults, and what the documentation says."""

  formula: str
  paper: str
  advantage: str = "constant"
  policy_loss: str = "ppo"
  kl: str = "none"
  kl_coef: float = 0.0
  entropy: str = "default"
  entropy_coef: float = 0.0
  aggregation: str = "token-mean"
  advantage_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  policy_loss_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  supervised: bool = False  # learns from demonstrations: no rollouts, no reward
  prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None


TABLE: dict[str, Row] = {
  "sft": Row(
    formula="-log p(token)",
    paper="maximum likelihood",
    policy_loss="sft",
    supervised=True,
  ),
  "grpo": Row(
    formula="max(-A r, -A clip(r, 1-l, 1+h)), A = (reward - group mean) / group std",
    paper="arXiv 2402.03300",
    advantage="grpo",
    kl="k2",
    kl_coef=0.001,
  ),
}


class Algorithm(NamedTuple):
  """Pure functions and what they need. Built by `make`.

  The trainer calls `prepare` and `advantage` on the arrays of the whole step, `aggregation.weights`
  with the mode `aggregation`, then `loss` per micro-batch.
  """

  name: str
  advantage: Part
  policy_loss: Part
  kl: Part
  kl_coef: float
  entropy: Part
  entropy_coef: float
  aggregation: str
  supervised: bool
  prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None

  @property
  def inputs(self) -> frozenset[str]:
    """Names of all arrays that some piece reads."""
    return frozenset().union(
      self.advantage.inputs, self.policy_loss.inputs, self.kl.inputs, self.entropy.inputs
    )

  @property
  def schema(self) -> frozenset[str]:
    """Extras that every experience must bring: required arrays that are none of INPUTS."""
    required = frozenset().union(
      self.advantage.required, self.policy_loss.required, self.kl.required, self.entropy.required
    )
    return required - INPUTS.keys()

  @property
  def needs_reference(self) -> bool:
    """Whether log-probs under the reference model are read."""
    return "ref_logprob" in self.inputs

  @property
  def needs_group(self) -> bool:
    """Whether the advantage compares the runs of one task."""
    return "group_ids" in self.advantage.inputs

  @property
  def uses_ratio(self) -> bool:
    """Whether the policy loss knows which policy sampled a token (so that data may lag behind)."""
    return "old_logprob" in self.policy_loss.inputs

  def token_loss(self, **inputs: Any) -> tuple[jax.Array, dict[str, jax.Array], dict]:
    """Returns (total X, its terms X by name, stats) of a micro-batch, before aggregation.

    `inputs` are arrays by the names in parts.INPUTS plus extras; `mask`, `logprob` always.
    total = policy loss + kl_coef * KL - entropy_coef * entropy.

    Raises:
      UserError: a piece reads an array that was not given, or returned one of another shape.
    """
    policy, out = policy_terms(self.policy_loss, **inputs)
    terms, total = {"pg_loss": policy}, policy
    if self.kl_coef:
      kl = self.kl(**inputs)
      terms["kl_loss"] = self.kl_coef * kl
      total = total + terms["kl_loss"]
      out["kl"] = stats.mean(kl, inputs["mask"])
    if inputs.get("entropy") is not None:
      out["entropy"] = stats.mean(inputs["entropy"], inputs["mask"])
    if self.entropy_coef:
      terms["entropy_loss"] = -self.entropy_coef * self.entropy(**inputs)
      total = total + terms["entropy_loss"]
    return total, terms, out

  def loss(self, weights: jax.Array, **inputs: Any) -> tuple[jax.Array, dict[str, stats.Stat]]:
    """Returns (sum of weights * token loss, stats): this micro-batch's share of the step's loss.

    `weights` (X) come from `aggregation.weights` over the whole step, so shares simply add up.
    """
    total, terms, out = self.token_loss(**inputs)
    loss = jnp.sum(weights * total)
    out["loss"] = stats.total(loss)
    for name, term in terms.items():
      out[name] = stats.total(weights * term)
    return loss, out


def policy_terms(part: Part, **inputs: Any) -> tuple[jax.Array, dict[str, stats.Stat]]:
  """Calls a policy loss; raises UserError where inputs or results break the rules."""
  shape = jnp.shape(inputs["mask"])
  for name in ("logprob", "old_logprob", "ref_logprob", "entropy", "advantages"):
    if inputs.get(name) is not None and jnp.shape(inputs[name]) != shape:
      raise UserError(f"{name} has shape {jnp.shape(inputs[name])}, expected mask's {shape}")
  result = part(**inputs)
  if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
    raise UserError(f"policy loss {part.name!r} must return (loss per token, dict of stats)")
  loss, out = result
  if jnp.shape(loss) != shape:
    raise UserError(
      f"policy loss {part.name!r} returned shape {jnp.shape(loss)}, expected one number per token "
      f"{shape}; averaging is the aggregation's part"
    )
  bad = [k for k, v in out.items() if not isinstance(v, stats.Stat)]
  if bad:
    raise UserError(
      f"policy loss {part.name!r}: metric {bad[0]!r} is no Stat; make it with stats.mean(x, mask), "
      "stats.maximum or stats.total, so that it can be merged over micro-batches"
    )
  return loss, dict(out)


def find_row(name: str) -> Row:
  """Returns the row of TABLE, or what the function 'module:function' returns (a Row)."""
  if name in TABLE:
    return TABLE[name]
  if ":" not in name:
    raise UserError(
      f"algorithm {name!r} does not exist{suggestion(name, TABLE)} (or name a function that "
      "returns a Row as 'module:function')"
    )
  row = plugins.load(name, "algorithm")()
  if not isinstance(row, Row):
    raise UserError(f"algorithm {name!r} returned {type(row).__name__}, expected a Row")
  return row


def make(config: AlgorithmConfig | str, **changes: Any) -> Algorithm:
  """Builds an algorithm from `config.algorithm`, or from a name and keys of AlgorithmConfig.

  Keys left at their defaults ("" and -1) take the table's values; `*_args` are added to the
  table's. `make("grpo", kl_coef=0.0, policy_loss_args={"clip_high": 0.28})` is DAPO's loss.

  Raises:
    UserError: unknown algorithm, piece, key, option or aggregation.
  """
  if isinstance(config, str):
    known = [f.name for f in dataclasses.fields(AlgorithmConfig)]
    for key in changes:
      if key not in known:
        raise UserError(f"algorithm has no key {key!r}{suggestion(key, known)}")
    config = AlgorithmConfig(name=config, **changes)
  row = find_row(config.name)
  advantage = config.advantage or row.advantage
  policy_loss = config.policy_loss or row.policy_loss
  # A row's own options belong to the row's own function.
  advantage_args = row.advantage_args if advantage == row.advantage else {}
  policy_loss_args = row.policy_loss_args if policy_loss == row.policy_loss else {}
  kl_coef = row.kl_coef if config.kl_coef < 0 else config.kl_coef
  kl = resolve("kl", config.kl or row.kl, KLS)
  if kl_coef == 0 or kl.name == "none":  # then no reference is needed either
    kl, kl_coef = resolve("kl", "none", KLS), 0.0
  return Algorithm(
    name=config.name,
    advantage=resolve(
      "advantage", advantage, ADVANTAGES, {**advantage_args, **config.advantage_args}
    ),
    policy_loss=resolve(
      "policy loss", policy_loss, POLICY_LOSSES, {**policy_loss_args, **config.policy_loss_args}
    ),
    kl=kl,
    kl_coef=kl_coef,
    entropy=resolve("entropy", row.entropy, ENTROPIES),
    entropy_coef=row.entropy_coef if config.entropy_coef < 0 else config.entropy_coef,
    aggregation=aggregation.check_mode(config.aggregation or row.aggregation),
    supervised=row.supervised,
    prepare=row.prepare,
  )


def render_table() -> str:
  """Returns TABLE as markdown: name, formula, pieces, what it needs, default options, paper."""
  titles = "name,loss per token,advantage,policy loss,KL,aggregation,needs,options,paper".split(",")
  lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
  for name, row in TABLE.items():
    a = make(name)
    needs = [
      word
      for word, needed in (
        ("demonstrations", a.supervised),
        ("groups", a.needs_group),
        ("reference", a.needs_reference),
      )
      if needed
    ] + sorted(a.schema)
    kl = f"{a.kl_coef:g} x {a.kl.name}" if a.kl_coef else "none"
    options = ", ".join(_options(a.advantage) + _options(a.policy_loss))
    lines.append(
      f"| {name} | {row.formula} | {a.advantage.name} | {a.policy_loss.name} | {kl} "
      f"| {a.aggregation} | {', '.join(needs) or 'rewards'} | {options or '-'} | {row.paper} |"
    )
  return "\n".join(lines) + "\n"


def _options(part: Part) -> list[str]:
  parameters = inspect.signature(part.function).parameters.values()
  return [
    f"{p.name}={part.options.get(p.name, p.default)}"
    for p in parameters
    if p.kind is p.KEYWORD_ONLY
  ]
