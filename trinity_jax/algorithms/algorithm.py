"""`make` turns a row of the table and a config into pure functions: an Algorithm.

A user's own function is named as 'module:function' wherever a config names a piece.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trinity_jax import plugins
from trinity_jax.algorithms import aggregation, blend, stats
from trinity_jax.algorithms.advantages import ADVANTAGES, to_tokens, value_targets
from trinity_jax.algorithms.blend import BLENDS
from trinity_jax.algorithms.corrections import CORRECTIONS, loglinear
from trinity_jax.algorithms.entropy import ENTROPIES
from trinity_jax.algorithms.kl import KLS
from trinity_jax.algorithms.numerics import sequence_sum
from trinity_jax.algorithms.parts import INPUTS, Part, resolve
from trinity_jax.algorithms.policy_losses import POLICY_LOSSES
from trinity_jax.algorithms.table import TABLE, Row
from trinity_jax.config import AlgorithmConfig
from trinity_jax.errors import UserError, suggestion

# Where the ratios of a policy loss come from.
PROXIMALS = ("none", "recompute", "loglinear")
# Log-probs, and what goes with them, of the policy as it is when the step begins.
SCORES = ("prox_logprob", "prox_entropy", "expected_score")


class Algorithm(NamedTuple):
  """Pure functions and what they need. Built by `make`.

  The trainer calls `before_split` on the arrays of the whole step, then `loss` per micro-batch.
  """

  name: str
  advantage: Part
  policy_loss: Part
  kl: Part
  kl_coef: float
  kl_in: str
  entropy: Part
  entropy_coef: float
  aggregation: str
  correction: Part | None
  proximal: str
  blend: Part | None
  data: str
  stale: bool
  flip: bool = False  # the advantages' sign: a control experiment
  prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None

  @property
  def parts(self) -> tuple[Part, ...]:
    """The pieces."""
    every = (self.advantage, self.policy_loss, self.kl, self.entropy, self.correction, self.blend)
    return tuple(p for p in every if p is not None)

  @property
  def inputs(self) -> frozenset[str]:
    """Names of all arrays that some piece reads."""
    own = {"versions"} if self.proximal == "loglinear" else frozenset()
    return frozenset(own).union(*(p.inputs for p in self.parts))

  @property
  def schema(self) -> frozenset[str]:
    """Extras that every experience must bring: required arrays that are none of INPUTS."""
    return frozenset().union(*(p.needs for p in self.parts)) - INPUTS.keys() - {"log_weight"}

  @property
  def per_sequence(self) -> frozenset[str]:
    """Those of `schema` that hold one number per sequence, not one per token."""
    marked = [getattr(p.function, "per_sequence", ()) for p in self.parts]
    return self.schema & frozenset().union(*marked)

  @property
  def supervised(self) -> bool:
    """Whether it learns from given texts: no rollouts, no reward."""
    return self.data != "rollouts"

  @property
  def needs_reference(self) -> bool:
    """Whether log-probs under the reference model are read."""
    return "ref_logprob" in self.inputs

  @property
  def needs_teacher(self) -> bool:
    """Whether log-probs under a teacher model are read."""
    return "teacher_logprob" in self.inputs

  @property
  def needs_critic(self) -> bool:
    """Whether values are read, and so learned."""
    return "values" in self.inputs

  @property
  def needs_greedy(self) -> bool:
    """Whether the first run of each group is sampled greedily, as a baseline."""
    return "baselines" in self.inputs

  @property
  def scores(self) -> tuple[str, ...]:
    """Those of SCORES that are read: then each step begins with a forward pass of its own."""
    return tuple(name for name in SCORES if name in self.inputs)

  @property
  def needs_group(self) -> bool:
    """Whether the advantage compares the runs of one task."""
    return "group_ids" in self.advantage.inputs

  @property
  def uses_ratio(self) -> bool:
    """Whether the loss knows which policy sampled a token (so that data may lag behind)."""
    return "old_logprob" in self.policy_loss.inputs or self.correction is not None

  @property
  def token_level(self) -> bool:
    """Whether the loss of a token depends on that token's numbers alone."""
    across = {"sequence_index", "num_sequences", "pair_ids"}
    in_loss = (self.policy_loss, self.kl, self.entropy, self.correction)
    return not any(across & {*p.required, *p.optional} for p in in_loss if p is not None)

  def before_split(
    self,
    *,
    num_groups: int,
    max_length: float | None,
    kl_coef: jax.Array | float | None = None,
    **arrays: Any,
  ) -> tuple[dict[str, jax.Array], dict[str, stats.Stat]]:
    """What needs the whole step: advantages, token weights (global denominators), companions.

    Args:
      num_groups: static, most groups of a step.
      max_length: the constant length of the aggregation seq-mean-token-sum-norm.
      kl_coef: of the KL penalty in the reward; None means the algorithm's.
      **arrays: of the whole step by the names in parts.INPUTS, plus extras; `mask`,
        `sequence_index`, `num_sequences` and `valid` always.

    Returns:
      ({"advantages", "weights" and the policy loss's companions: X}, stats)
    """
    out: dict[str, stats.Stat] = {}
    mask, index, size = arrays["mask"], arrays["sequence_index"], arrays["num_sequences"]
    valid = arrays["valid"]
    compared = self._runs_as_one(arrays)
    if self.kl_coef and self.kl_in == "reward":
      coef = self.kl_coef if kl_coef is None else kl_coef
      compared, out["kl"] = self._penalised(coef, compared)
      arrays |= {k: compared[k] for k in ("rewards", "token_rewards") if k in compared}
    advantages, found = self.advantage(
      **compared | self._rollouts(compared), num_groups=num_groups
    )
    advantages = -advantages if self.flip else advantages
    advantages = to_tokens(advantages, mask, compared["sequence_index"])
    if self.blend is None:
      weights = aggregation.weights(mask, index, size, self.aggregation, max_length, valid=valid)
    else:
      mu = self.blend(**arrays)
      out["blend/mu"] = stats.mean(mu, jnp.ones((), bool))
      weights = blend.weights(
        mu, mask, index, size, self.aggregation, max_length, valid=valid, experts=arrays["experts"]
      )
    before = self.policy_loss.before_split(**arrays | {"advantages": advantages})
    return {"advantages": advantages, "weights": weights, **before}, {**out, **found}

  def value_targets(
    self, *, kl_coef: jax.Array | float | None = None, **arrays: Any
  ) -> tuple[jax.Array, dict[str, stats.Stat]]:
    """Returns (X: what a critic's values should be, stats) of the whole step; see before_split."""
    if self.kl_coef and self.kl_in == "reward":
      arrays, _ = self._penalised(self.kl_coef if kl_coef is None else kl_coef, arrays)
    names = ("token_rewards", "values", "mask", "sequence_index", "valid")
    options = {k: v for k, v in self.advantage.options.items() if k in ("gamma", "lam")}
    return value_targets(**{k: arrays[k] for k in names}, **options)

  def _runs_as_one(self, arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays as an advantage sees them that compares runs: each run counts once, however many
    sequences it has. Its last one stands for it, all of its tokens belong to that one, and so what
    it gets goes to every token of the run. Advantages that read run_ids see the sequences."""
    leader = arrays.get("leader")
    if leader is None or not self.needs_group or "run_ids" in self.advantage.inputs:
      return arrays
    leads = leader == jnp.arange(leader.shape[0])
    index = leader[jnp.where(arrays["mask"], arrays["sequence_index"], 0)]
    return arrays | {"valid": arrays["valid"] & leads, "sequence_index": index}

  def _rollouts(self, arrays: dict[str, Any]) -> dict[str, Any]:
    """Where experts are blended in, they enter no statistic of the rewards."""
    return {} if self.blend is None else {"valid": arrays["valid"] & ~arrays["experts"]}

  def _penalised(self, coef, arrays: dict[str, Any]) -> tuple[dict[str, Any], stats.Stat]:
    """Rewards less coef times the KL of the policy that sampled against the reference."""
    mask = arrays["mask"]
    kl = jax.lax.stop_gradient(self.kl(**arrays | {"logprob": arrays["old_logprob"]}))
    kl = jnp.where(mask, kl, 0)
    whole = sequence_sum(kl, mask, arrays["sequence_index"], arrays["num_sequences"])
    changed = {"rewards": arrays["rewards"] - coef * whole}
    if arrays.get("token_rewards") is not None:
      changed["token_rewards"] = arrays["token_rewards"] - coef * kl
    return arrays | changed, stats.mean(kl, mask)

  def _ratios(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], jax.Array | None]:
    """(inputs whose old_logprob is the proximal policy's, log of the correction's weights)."""
    old = inputs.get("old_logprob")
    if self.correction is None and self.proximal == "none":
      return inputs, None
    if old is None:
      raise UserError(f"algorithm {self.name!r} reads old_logprob, which was not given")
    current = jax.lax.stop_gradient(inputs["logprob"])
    if self.proximal == "recompute":
      # One update takes the whole batch unless prox_logprob says otherwise.
      proximal = inputs.get("prox_logprob")
      proximal = current if proximal is None else proximal
    elif self.proximal == "loglinear":
      proximal = loglinear(current, old, inputs["versions"], inputs["step"], inputs["mask"])
    else:
      return inputs, current - old
    log_weight = None if self.correction is None else proximal - old
    return inputs | {"old_logprob": proximal}, log_weight

  def token_loss(self, **inputs: Any) -> tuple[jax.Array, dict[str, jax.Array], dict]:
    """Returns (total X, its terms X by name, stats) of a micro-batch, before aggregation.

    `inputs` are arrays by the names in parts.INPUTS plus extras; `mask`, `logprob` always.
    total = correction x policy loss + kl_coef x KL - entropy_coef x entropy.

    Raises:
      UserError: a piece reads an array that was not given, or returned one of another shape.
    """
    mask = inputs["mask"]
    coef = inputs.pop("kl_coef", None)
    behaviour = inputs.get("old_logprob")
    inputs, log_weight = self._ratios(inputs)
    policy, out = policy_terms(self.policy_loss, **inputs)
    if self.correction is not None:
      weight, found = self.correction(**inputs | {"log_weight": log_weight})
      policy, out = weight * policy, out | found
    terms, total = {"pg_loss": policy}, policy
    if self.kl_coef and self.kl_in == "loss":
      kl = self.kl(**inputs | {"old_logprob": behaviour})
      terms["kl_loss"] = (self.kl_coef if coef is None else coef) * kl
      total = total + terms["kl_loss"]
      out["kl"] = stats.mean(kl, mask)
    if inputs.get("entropy") is not None:
      out["entropy"] = stats.mean(inputs["entropy"], mask)
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
  correction_name = config.correction or row.correction
  correction_args = row.correction_args if correction_name == row.correction else {}
  kl_coef = row.kl_coef if config.kl_coef < 0 else config.kl_coef
  kl = resolve("kl", config.kl or row.kl, KLS)
  if kl_coef == 0 or kl.name == "none":  # then no reference is needed either
    kl, kl_coef = resolve("kl", "none", KLS), 0.0
  loss = resolve(
    "policy loss", policy_loss, POLICY_LOSSES, {**policy_loss_args, **config.policy_loss_args}
  )
  correction = None
  if correction_name != "none":
    correction = resolve(
      "correction", correction_name, CORRECTIONS, {**correction_args, **config.correction_args}
    )
  return Algorithm(
    name=config.name,
    advantage=resolve(
      "advantage", advantage, ADVANTAGES, {**advantage_args, **config.advantage_args}
    ),
    policy_loss=loss,
    kl=kl,
    kl_coef=kl_coef,
    kl_in=config.kl_in or row.kl_in,
    entropy=resolve("entropy", config.entropy or row.entropy, ENTROPIES),
    entropy_coef=row.entropy_coef if config.entropy_coef < 0 else config.entropy_coef,
    aggregation=aggregation.check_mode(config.aggregation or row.aggregation),
    correction=correction,
    proximal=_proximal(config, row, loss, correction),
    blend=None if row.blend == "none" else resolve(
      "blend", row.blend, BLENDS, {**row.blend_args, **config.blend_args}
    ),
    data=row.data,
    stale=row.stale,
    flip=config.flip_advantages,
    prepare=row.prepare,
  )


def _proximal(config: AlgorithmConfig, row: Row, loss: Part, correction: Part | None) -> str:
  """A ratio and a correction would count the same difference twice, unless there is a policy
  between the two."""
  named = config.proximal or row.proximal
  if named not in PROXIMALS:
    raise UserError(f"algorithm.proximal = {named!r}: expected one of {', '.join(PROXIMALS)}")
  if correction is not None and named == "none" and "old_logprob" in loss.inputs:
    if config.proximal == "none":
      raise UserError(
        f"algorithm.proximal = 'none' with correction {correction.name!r}: policy loss "
        f"{loss.name!r} has a ratio to the same log-probs already; use 'recompute' or 'loglinear'"
      )
    named = "recompute"
  if named != "none" and any("old_logprob" in c.inputs for c in loss.companions.values()):
    raise UserError(
      f"algorithm.proximal = {named!r}: policy loss {loss.name!r} picks tokens by their ratio to "
      "the policy that sampled; use proximal='none' and no correction"
    )
  return named
