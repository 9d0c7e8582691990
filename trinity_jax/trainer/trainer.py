"""The host side of training: experiences in, one optimizer step, metrics out.

    trainer = Trainer(...)
    metrics = trainer.step(experiences)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from trinity_jax.algorithms.algorithm import Algorithm
from trinity_jax.config import Config
from trinity_jax.errors import RunFailed
from trinity_jax.experience import Batch, Experience
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.placement import fetch, place
from trinity_jax.tasks.demonstrations import PER_TASK
from trinity_jax.trainer import step as train
from trinity_jax.trainer.critic import make_critic
from trinity_jax.trainer.extras import extras_of
from trinity_jax.trainer.frozen import frozen_models
from trinity_jax.trainer.minibatches import joined, minibatches
from trinity_jax.trainer.mismatch import mismatch, mixed_tokens, packing_metrics
from trinity_jax.trainer.optimizer import learning_rate
from trinity_jax.trainer.packing import pack, pack_spec
from trinity_jax.trainer.programs import OUTPUTS, Programs, compile_programs, make_parts
from trinity_jax.trainer.scoring import Policy
from trinity_jax.trainer.state import TrainState, init_state


class Trainer:
  """Owns the train state and the compiled steps.

  Args:
    config: of this run or stage.
    algorithm: from algorithms.algorithm.make.
    policy: how to evaluate the model.
    params: sharded parameters of step 0; the trainer takes them over (they are donated).
    mesh, launch: where programs run and who may start them.
    published: version -> params as published, or None; for log-probs of older versions.
  """

  def __init__(
    self,
    config: Config,
    algorithm: Algorithm,
    policy: Policy,
    params: Any,
    mesh: Mesh,
    launch: LaunchOrder,
    published: Callable[[int], Any] = lambda version: None,
  ):
    self.config, self.algorithm, self.policy, self.mesh = config, algorithm, policy, mesh
    self.spec = pack_spec(config, algorithm)
    self._launch = launch
    self._published = published
    self._updates = config.trainer.minibatches
    self._rate: Any = learning_rate(config.optimizer, config.trainer.total_steps)
    self._frozen = frozen_models(config, algorithm, policy, params, mesh, launch)
    critic, critic_state = None, None
    if algorithm.needs_critic:
      critic, critic_state = make_critic(config, policy, params, mesh)
    self._parts = make_parts(config, algorithm, policy, mesh, self._frozen, critic)
    self._scores, self._lagging = self._parts.scores, self._parts.lagging
    self._extras = extras_of(
      algorithm, teacher="teacher_logprob" in self._frozen, scores=self._scores
    )
    self.state = init_state(
      params, self._parts.optimizer, mesh, algorithm.kl_coef,
      offload=config.trainer.offload == "optimizer",
    )  # fmt: skip
    self.state = dataclasses.replace(self.state, critic=critic_state)
    self._shardings = jax.tree.map(lambda x: x.sharding, self.state)
    self._programs: dict[int, Programs] = {}
    self.last_batch: Sequence[Experience] = ()

  @property
  def step_number(self) -> int:
    """Optimizer steps taken, which is also the version of the parameters."""
    return int(self.state.step)

  def warmup(self) -> None:
    """Compiles every declared row length, so that no step compiles."""
    for length in self.spec.row_lengths:
      spec = dataclasses.replace(self.spec, row_lengths=(length,))
      self._compiled(pack([], spec, extras=self._extras))
    if self._lagging:
      self._as_trained  # noqa: B018  compiled on first use

  def _compiled(self, batch: Batch) -> Programs:
    """The programs of the batch's row length; compiled on first use."""
    length = batch.tokens.shape[-1]
    if length not in self._programs:
      self._programs[length] = compile_programs(self._parts, self.state, batch)
    return self._programs[length]

  @functools.cached_property
  def _as_trained(self):
    """Published parameters (rollout dtype) -> the dtypes and shardings `score` is compiled for."""
    model = self.config.model
    published = jnp.dtype(model.rollout_dtype or model.dtype)
    dtypes = jax.tree.map(lambda x: x.dtype, self.state.params)
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, published, sharding=x.sharding), self.state.params
    )
    cast = jax.jit(
      lambda params: jax.tree.map(jnp.astype, params, dtypes),
      out_shardings=self._shardings.params,
    )
    return cast.lower(shapes).compile()

  def step(self, experiences: Sequence[Experience]) -> dict[str, float]:
    """Trains on one step's experiences.

    Returns:
      Metrics under the names of monitor.metrics.

    Raises:
      UserError: an experience that does not fit the declared shapes.
      RunFailed: max_nonfinite non-finite updates in a row, or log-probs of sampler and trainer that
        differ by more than trainer.logprob_limit.
    """
    self.last_batch = experiences
    version = self.step_number
    rate = self._learning_rate(version)
    # Whatever compares with the policy as the step begins is computed before its first update.
    prepared = [self._prepared(part) for part in minibatches(experiences, self._updates)]
    found = []
    for i, (packed, batch, programs, known, mixed) in enumerate(prepared):
      last = np.int32(i + 1 == len(prepared))
      found.append(self._update(packed, batch, programs, known, mixed, version, last))
    metrics = joined(found)
    metrics |= {"lr": rate, "policy_version": version + 1}
    self._check(metrics)
    return metrics

  def _learning_rate(self, version: int) -> float:
    """Of the next update: the schedule counts updates that were applied."""
    waited = min(version, self.config.critic.warmup) if self.algorithm.needs_critic else 0
    applied = (version - waited) * self._updates - int(self.state.skipped)
    return float(self._rate(applied // self._updates))

  def _prepared(self, experiences: Sequence[Experience]):
    """(packed batch, the same on the devices with every score filled in, programs, log-probs of
    the trained model by version, which tokens have a mixed context)."""
    pairs = [e.id.task for e in experiences] if self.algorithm.data == "preferences" else None
    packed = pack(experiences, self.spec, pairs, self._extras)
    batch = place(packed, train.batch_shardings(packed, self.mesh))
    programs = self._compiled(packed)
    filled: dict[str, Any] = {}
    for name, model in self._frozen.items():
      filled[name] = self._launch(programs.frozen[name], model.params, batch)["logprob"]
    known = self._older_logprobs(packed, batch, programs.logprobs)
    if programs.scores is not None:
      scores = self._launch(programs.scores, self.state.params, batch)
      filled |= {name: scores[OUTPUTS[name]] for name in self._scores}
      if "logprob" in scores:
        known[self.step_number] = fetch(scores["logprob"], self._launch)
    if programs.values is not None:
      filled["values"] = self._launch(programs.values, self.state.critic.params, batch)
    reference = filled.pop("ref_logprob", batch.ref_logprobs)
    batch = dataclasses.replace(
      batch, ref_logprobs=reference, extras=batch.extras | filled
    )
    return packed, batch, programs, known, mixed_tokens(packed, experiences)

  def _update(self, packed, batch, programs, known, mixed, version, last) -> dict[str, float]:
    """One update of critic and policy; returns its metrics."""
    metrics: dict[str, float] = {}
    critic_state = self.state.critic
    if programs.critic is not None:
      critic_state, values = self._launch(
        programs.critic, critic_state, batch, self.state.kl_coef
      )
      metrics |= {k: float(v) for k, v in fetch(values).items()}
    state = dataclasses.replace(self.state, critic=None)
    state, out = self._launch(programs.step, state, batch, last)
    self.state = dataclasses.replace(state, critic=critic_state)
    # One transfer: the small outputs of the step.
    values, logprobs, advantages = fetch(
      (out["metrics"], out["logprobs"], out["advantages"]), self._launch
    )
    metrics |= {k: float(v) for k, v in values.items()}
    metrics |= packing_metrics(packed)
    if not self.algorithm.supervised:
      metrics |= mismatch(packed, {version: logprobs, **known}, mixed)
      effective = np.unique(packed.sequence_index[packed.action_mask & (advantages != 0)]).size
      metrics["group/effective_batch_size"] = effective
    return metrics

  def _older_logprobs(self, packed: Batch, batch: Batch, score) -> dict[int, np.ndarray]:
    """Log-probs under each older version in the batch that is still published."""
    if self.algorithm.supervised:
      return {}
    versions = np.unique(packed.versions[packed.action_mask])
    out = {}
    for version in versions[versions != self.step_number]:
      params = self._published(int(version))
      if params is not None and score is not None:
        params = self._launch(self._as_trained, params)
        found = self._launch(score, params, batch)["logprob"]
        out[int(version)] = fetch(found, self._launch)
    return out

  def held_out_loss(self, experiences: Sequence[Experience]) -> dict[str, float]:
    """The algorithm's loss of experiences that are not learned from, as {"eval/loss": ...}."""
    pairs = PER_TASK.get(self.algorithm.data, 1)
    most = self.spec.sequences // pairs * pairs
    total = weight = 0.0
    for i in range(0, len(experiences), most):
      packed, batch, programs, *_ = self._prepared(experiences[i : i + most])
      metrics = self._launch(programs.held_out, self.state.params, batch)
      by_token = self.algorithm.aggregation == "token-mean"
      size = float(packed.num_tokens if by_token else packed.num_sequences)
      total, weight = total + size * float(metrics["loss"]), weight + size
    return {"eval/loss": total / weight}

  def _check(self, metrics: dict[str, float]) -> None:
    limit = self.config.trainer.logprob_limit
    worst = metrics.get("logprob_diff/max", 0.0)
    if limit and worst > limit:
      raise RunFailed(
        f"step {self.step_number}: a sampled token's log-prob differs by {worst:.3g} between "
        f"sampler and trainer (same parameters), more than trainer.logprob_limit = {limit}"
      )
    bad = metrics["nonfinite_steps"]
    if bad >= self.config.trainer.max_nonfinite:
      raise RunFailed(
        f"step {self.step_number}: loss {metrics['loss']} and gradient norm "
        f"{metrics['grad_norm']} were not finite for {bad:.0f} steps in a row "
        "(trainer.max_nonfinite); the last batch is saved in the run's folder bad_batch/"
      )

  def save_last_batch(self, directory: Path) -> None:
    """Writes the last step's experiences, one file each, to look into what went wrong."""
    directory.mkdir(parents=True, exist_ok=True)
    for e in self.last_batch:
      name = str(e.id).replace("/", "-")
      (directory / f"{name}.safetensors").write_bytes(e.to_bytes())

  def load_state(self, state: TrainState) -> None:
    """Continues from a restored state (same shapes and shardings)."""
    self.state = state
