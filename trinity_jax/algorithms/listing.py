"""The table of algorithms and their pieces as markdown, for the README."""

from __future__ import annotations

import inspect

from trinity_jax.algorithms.advantages import ADVANTAGES
from trinity_jax.algorithms.algorithm import make
from trinity_jax.algorithms.blend import BLENDS
from trinity_jax.algorithms.corrections import CORRECTIONS
from trinity_jax.algorithms.entropy import ENTROPIES
from trinity_jax.algorithms.kl import KLS
from trinity_jax.algorithms.policy_losses import POLICY_LOSSES
from trinity_jax.algorithms.table import TABLE


def render_table() -> str:
  """Returns TABLE as markdown: name, formula, pieces, what it needs, options it sets, paper."""
  titles = "name,loss per token,advantage,policy loss,KL,aggregation,needs,sets,paper".split(",")
  lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
  for name, row in TABLE.items():
    a = make(name)
    needs = [
      word
      for word, needed in (
        (a.data, a.supervised),
        ("groups", a.needs_group),
        ("reference", a.needs_reference),
        ("teacher", a.needs_teacher),
        ("critic", a.needs_critic),
        ("greedy run", a.needs_greedy),
        ("demonstrations beside rollouts", a.blend is not None),
        ("a forward pass before the step", bool(a.scores)),
      )
      if needed
    ] + sorted(a.schema)
    kl = f"{a.kl_coef:g} x {a.kl.name} in the {a.kl_in}" if a.kl_coef else "none"
    sets = {**row.advantage_args, **row.policy_loss_args, **row.correction_args}
    if a.correction is not None:
      sets |= {"correction": a.correction.name, "proximal": a.proximal}
    lines.append(
      f"| {name} | {row.formula} | {a.advantage.name} | {a.policy_loss.name} | {kl} "
      f"| {a.aggregation} | {', '.join(needs) or 'rewards'} "
      f"| {', '.join(f'{k}={v}' for k, v in sets.items()) or '-'} | {row.paper} |"
    )
  return "\n".join(lines) + "\n"


def render_pieces() -> str:
  """Returns every piece as markdown: its kind, its name, its options with their defaults."""
  lines = ["| kind | name | options |", "|---|---|---|"]
  for kind, registry in (
    ("advantage", ADVANTAGES),
    ("policy loss", POLICY_LOSSES),
    ("correction", CORRECTIONS),
    ("kl", KLS),
    ("entropy", ENTROPIES),
    ("blend", BLENDS),
  ):
    for name, function in registry.items():
      parameters = inspect.signature(function).parameters.values()
      options = [f"{p.name}={p.default}" for p in parameters if p.kind is p.KEYWORD_ONLY]
      lines.append(f"| {kind} | {name} | {', '.join(options) or '-'} |")
  return "\n".join(lines) + "\n"
