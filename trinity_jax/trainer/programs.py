"""The programs of a training step, compiled ahead of time for one row length."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trinity_jax.algorithms.algorithm import SCORES, Algorithm
from trinity_jax.config import Config
from trinity_jax.experience import Batch
from trinity_jax.models import transformer
from trinity_jax.schedule import make_schedule
from trinity_jax.trainer import step as train
from trinity_jax.trainer.critic import Critic, compile_critic
from trinity_jax.trainer.frozen import Frozen
from trinity_jax.trainer.optimizer import make_optimizer
from trinity_jax.trainer.packing import pack_spec
from trinity_jax.trainer.scoring import Policy, score
from trinity_jax.trainer.state import TrainState

# What scoring.score calls algorithm.SCORES.
OUTPUTS = {"prox_logprob": "logprob", "prox_entropy": "entropy", "expected_score": "expected_score"}


class Parts(NamedTuple):
  """What the programs are made of.

  Attributes:
    frozen: models beside the policy, by the array that each gives.
    scores: those of algorithm.SCORES that are computed before a step's first update.
    lagging: whether batches may hold tokens of older versions.
    num_groups: most groups of an update.
  """

  config: Config
  algorithm: Algorithm
  policy: Policy
  mesh: Mesh
  optimizer: optax.GradientTransformation
  frozen: Mapping[str, Frozen]
  critic: Critic | None
  scores: tuple[str, ...]
  lagging: bool
  num_groups: int


class Programs(NamedTuple):
  """Compiled; None where the algorithm has no use for it.

  Attributes:
    step: (state without critic, batch, advance) -> (state, outputs), see train.train_step.
    scores: (params, batch) -> Parts.scores by their OUTPUTS names.
    logprobs: (params, batch) -> {"logprob"}, for older versions.
    frozen: array -> (that model's params, batch) -> {"logprob"}.
    values: (critic params, batch) -> values.
    critic: (critic state, batch, kl_coef) -> (critic state, metrics).
    held_out: (params, batch) -> metrics.
  """

  step: Any
  scores: Any
  logprobs: Any
  frozen: dict[str, Any]
  values: Any
  critic: Any
  held_out: Any


def make_parts(
  config: Config,
  algorithm: Algorithm,
  policy: Policy,
  mesh: Mesh,
  frozen: Mapping[str, Frozen],
  critic: Critic | None,
) -> Parts:
  """What a config declares, around the models beside the policy."""
  updates = config.trainer.minibatches
  scores = tuple(
    name for name in SCORES
    # Later updates of a step change the policy that its first ones were compared with.
    if name in algorithm.scores or (name == "prox_logprob" and updates > 1)
  )  # fmt: skip
  specs = transformer.abstract(policy.config)
  optimizer = make_optimizer(config.optimizer, config.trainer.total_steps, specs, updates)
  lagging = make_schedule(config.sync).max_lag > 0 and not algorithm.supervised
  groups = pack_spec(config, algorithm).sequences
  return Parts(
    config, algorithm, policy, mesh, optimizer, frozen, critic, scores, lagging, groups
  )


def lower_step(parts: Parts, state: TrainState, batch: Batch) -> jax.stages.Lowered:
  """The train step for the shapes of `state` (without critic) and `batch`."""
  c, bare = parts.config, dataclasses.replace(state, critic=None)
  step = train.compile_step(
    parts.mesh,
    jax.tree.map(lambda x: x.sharding, bare),
    batch,
    **_fixed(parts),
    optimizer=parts.optimizer,
    seed=c.seed,
    frozen_steps=c.critic.warmup if parts.critic else 0,
    kl_target=c.algorithm.kl_target,
    kl_horizon=c.algorithm.kl_horizon,
    offload=c.trainer.offload == "optimizer",
  )
  number = jax.ShapeDtypeStruct((), np.int32)
  with jax.set_mesh(parts.mesh):  # for the layout hints inside the model
    return step.lower(jax.tree.map(_shape, bare), jax.tree.map(_shape, batch), number)


def _fixed(parts: Parts) -> dict[str, Any]:
  """Static keywords that the step shares with the evaluation of held-out texts."""
  return dict(
    policy=parts.policy,
    algorithm=parts.algorithm,
    num_groups=parts.num_groups,
    max_response=parts.config.sampler.max_response_length,
  )


def compile_programs(parts: Parts, state: TrainState, batch: Batch) -> Programs:
  """Compiles for the shapes of `state` and `batch`; both may be arrays or shapes with shardings."""
  mesh, shapes = parts.mesh, jax.tree.map(_shape, batch)
  shardings = jax.tree.map(lambda x: x.sharding, state.params)

  def compiled(f, *args):
    with jax.set_mesh(mesh):  # for the layout hints inside the model
      return f.lower(*args).compile()

  scoring = functools.cache(functools.partial(_scoring, mesh, batch, compiled))
  own = _Like(state.params)
  outputs = tuple(OUTPUTS[name] for name in parts.scores)
  values, critic = _critic(parts, state, batch, compiled)
  held_out = None
  if parts.config.eval.texts:
    held_out = jax.jit(
      functools.partial(train.held_out, **_fixed(parts)),
      in_shardings=(shardings, train.batch_shardings(batch, mesh)),
      out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    held_out = compiled(held_out, own.shapes, shapes)
  return Programs(
    step=lower_step(parts, state, batch).compile(),
    scores=scoring(parts.policy, outputs, own) if outputs else None,
    logprobs=scoring(parts.policy, ("logprob",), own) if parts.lagging else None,
    frozen={k: scoring(m.policy, ("logprob",), _Like(m.params)) for k, m in parts.frozen.items()},
    values=values,
    critic=critic,
    held_out=held_out,
  )


def _scoring(mesh: Mesh, batch: Batch, compiled, policy: Policy, outputs: tuple[str, ...], like):
  """`score` under parameters like these; a reference of the policy's shapes shares its program."""
  f = jax.jit(
    lambda params, batch: score(params, policy, batch, outputs),
    in_shardings=(like.shardings, train.batch_shardings(batch, mesh)),
    out_shardings=NamedSharding(mesh, train.ROWS),
  )
  return compiled(f, like.shapes, jax.tree.map(_shape, batch))


def _critic(parts: Parts, state: TrainState, batch: Batch, compiled):
  """(values, critic step), or (None, None)."""
  if parts.critic is None:
    return None, None
  values, step = compile_critic(
    parts.mesh,
    jax.tree.map(lambda x: x.sharding, state.critic),
    batch,
    policy=parts.critic.policy,
    algorithm=parts.algorithm,
    optimizer=parts.critic.optimizer,
    num_groups=parts.num_groups,
    clip=parts.config.critic.clip,
    offload=parts.config.trainer.offload == "optimizer",
  )
  critic, shapes = jax.tree.map(_shape, state.critic), jax.tree.map(_shape, batch)
  return (
    compiled(values, critic.params, shapes),
    compiled(step, critic, shapes, _shape(state.kl_coef)),
  )


class _Like:
  """Shapes, dtypes and shardings of parameters, as a cache's key."""

  def __init__(self, params: Any):
    self.shapes = jax.tree.map(_shape, params)
    self.shardings = jax.tree.map(lambda x: x.sharding, params)
    leaves, tree = jax.tree.flatten(params)
    self._key = (tree, *((x.shape, str(x.dtype), x.sharding) for x in leaves))

  def __hash__(self) -> int:
    return hash(self._key)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Like) and self._key == other._key


def _shape(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(np.shape(x), x.dtype)
