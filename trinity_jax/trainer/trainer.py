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
from trinity_jax.models import transformer
from trinity_jax.monitor import metrics as metric
from trinity_jax.trainer import step as train
from trinity_jax.trainer.optimizer import learning_rate, make_optimizer
from trinity_jax.trainer.packing import PackSpec, pack
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
    policy: train.Policy,
    params: Any,
    mesh: Mesh,
    launch: LaunchOrder,
    published: Callable[[int], Any] = lambda version: None,
  ):
    self.config, self.algorithm, self.policy, self.mesh = config, algorithm, policy, mesh
    self.spec = pack_spec(config)
    self._launch = launch
    self._published = published
    self._num_groups = self.spec.sequences
    specs = transformer.abstract(policy.config)
    self._optimizer = make_optimizer(config.optimizer, config.trainer.total_steps, specs)
    self._rate: Any = learning_rate(config.optimizer, config.trainer.total_steps)
    shardings = jax.tree.map(lambda p: p.sharding, params)
    self._reference = None
    if algorithm.needs_reference:
      copy = jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=shardings)
      self._reference = launch(copy, params)
    self.state = init_state(params, self._optimizer, mesh)
    self._shardings = jax.tree.map(lambda x: x.sharding, self.state)
    self._steps: dict[int, Any] = {}
    self._scores: dict[int, Any] = {}
    self.last_batch: Sequence[Experience] = ()

  @property
  def step_number(self) -> int:
    """Optimizer steps taken, which is also the version of the parameters."""
    return int(self.state.step)

  def warmup(self) -> None:
    """Compiles every declared row length, so that no step compiles."""
    for length in self.spec.row_lengths:
      batch = pack([], dataclasses.replace(self.spec, row_lengths=(length,)))
      self._programs(batch)
    if self._lagging:
      self._as_trained  # noqa: B018  compiled on first use

  def _programs(self, batch: Batch) -> tuple[Any, Any]:
    """(train step, score) for the batch's row length; compiled on first use."""
    length = batch.tokens.shape[-1]
    if length not in self._steps:
      shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), batch)
      state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.state)
      compiled = train.compile_step(
        self.mesh,
        self._shardings,
        batch,
        policy=self.policy,
        algorithm=self.algorithm,
        optimizer=self._optimizer,
        num_groups=self._num_groups,
        max_response=self.config.sampler.max_response_length,
      )
      with jax.set_mesh(self.mesh):  # for the layout hints inside the model
        self._steps[length] = compiled.lower(state, shapes).compile()
      scoring = jax.jit(
        lambda params, batch: train.score(params, self.policy, batch),
        in_shardings=(self._shardings.params, train.batch_shardings(batch, self.mesh)),
        out_shardings=jax.sharding.NamedSharding(self.mesh, train.ROWS),
      )
      if self._needs_score:
        with jax.set_mesh(self.mesh):
          self._scores[length] = scoring.lower(state.params, shapes).compile()
    return self._steps[length], self._scores.get(length)

  @property
  def _lagging(self) -> bool:
    """Whether a batch may hold tokens of older versions."""
    sync = self.config.sync
    return sync.interval + sync.offset > 1 and not self.algorithm.supervised

  @property
  def _needs_score(self) -> bool:
    return self._reference is not None or self._lagging

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
      RunFailed: max_nonfinite non-finite steps in a row, or log-probs of sampler and trainer that
        differ by more than trainer.logprob_limit.
    """
    self.last_batch = experiences
    packed = pack(experiences, self.spec)
    batch = jax.device_put(packed, train.batch_shardings(packed, self.mesh))
    program, score = self._programs(packed)
    if self._reference is not None:
      batch = dataclasses.replace(batch, ref_logprobs=self._launch(score, self._reference, batch))
    older = self._older_logprobs(packed, batch, score)
    version = self.step_number
    rate = float(self._rate(version - int(self.state.skipped)))  # optax counts updates
    self.state, out = self._launch(program, self.state, batch)
    # One transfer: the small outputs of the step.
    values, logprobs, advantages = jax.device_get(
      (out["metrics"], out["logprobs"], out["advantages"])
    )
    metrics = {k: float(v) for k, v in values.items()}
    metrics |= {"lr": rate, "policy_version": version + 1}
    metrics |= packing_metrics(packed)
    if not self.algorithm.supervised:
      metrics |= mismatch(packed, {version: logprobs, **older})
      effective = np.unique(packed.sequence_index[packed.action_mask & (advantages != 0)]).size
      metrics["group/effective_batch_size"] = effective
    self._check(metrics)
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
        out[int(version)] = np.asarray(self._launch(score, params, batch))
    return out

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


def pack_spec(config: Config) -> PackSpec:
  """The declared shapes of a config; rows are those of all devices together."""
  longest = config.sampler.max_prompt_length + config.sampler.max_response_length
  sequences = config.trainer.batch_size or config.explorer.batch_size * config.explorer.group_size
  return PackSpec(
    row_lengths=tuple(sorted(config.trainer.row_lengths)) or (longest,),
    rows=config.trainer.rows_per_micro,
    sequences=sequences,
  )


def packing_metrics(batch: Batch) -> dict[str, float]:
  """How full the computed rows were."""
  micros = int(batch.num_micro)
  live = batch.segment_ids[:micros] > 0
  return {
    "packing/efficiency": float(live.mean()) if live.size else 0.0,
    "packing/rows": int(live.any(axis=-1).sum()),
    "packing/micro_batches": micros,
  }


def mismatch(batch: Batch, logprobs: dict[int, np.ndarray]) -> dict[str, float]:
  """Sampler against trainer: both log-probs of a token under the version that sampled it.

  Args:
    batch: packed (numpy).
    logprobs: version -> the trainer's f32[M, B, T].

  Returns:
    logprob_diff/* over tokens whose version is among `logprobs`, k1, k3 and ESS of the implied
    importance weights; staleness/* over all sampled tokens.
  """
  trainer, known = np.zeros_like(batch.logprobs), np.zeros_like(batch.action_mask)
  for version, values in logprobs.items():
    here = batch.action_mask & (batch.versions == version)
    trainer[here], known = values[here], known | here
  out = {}
  if known.any():
    difference = trainer[known].astype(np.float64) - batch.logprobs[known]
    ratio = np.exp(np.clip(difference, -20, 20))
    out |= metric.stats(np.abs(difference), "logprob_diff", ("mean", "max"))
    out |= metric.tail(np.abs(difference), "logprob_diff")
    out |= {
      "mismatch/k1": float(-difference.mean()),
      "mismatch/k3": float((ratio - 1 - difference).mean()),
      "mismatch/ess": float(ratio.sum() ** 2 / (ratio**2).sum() / ratio.size),
    }
  sampled = batch.action_mask & (batch.versions >= 0)
  if sampled.any():
    newest = max(logprobs)
    out |= metric.stats(newest - batch.versions[sampled], "staleness", ("mean", "max"))
  return out
