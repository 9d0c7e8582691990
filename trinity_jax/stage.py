"""The parts of one stage of a run, wired; what it leaves: checkpoints and a model.

Threads: the trainer is the caller's; sampler and explorer have one each. A thread that dies ends
the stage with its own error; every wait has a deadline.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from trinity_jax import build
from trinity_jax.algorithms.algorithm import make as make_algorithm
from trinity_jax.buffer.bell import ThreadBell
from trinity_jax.config import Config
from trinity_jax.config_checks import check_lag, check_rows
from trinity_jax.distributed import ALONE, World
from trinity_jax.errors import UserError
from trinity_jax.experience import Experience, ExperienceId, Task
from trinity_jax.explorer.evaluation import is_due
from trinity_jax.exploring import announce
from trinity_jax.following import Followed
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import hf, sharding
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.monitor.compiles import CompileCounter
from trinity_jax.monitor.progress import Progress, samples
from trinity_jax.monitor.timeline import Timeline
from trinity_jax.monitor.writers import FILE, Writers, make_writers, read_jsonl
from trinity_jax.placement import to_local
from trinity_jax.preemption import Preemption
from trinity_jax.probe import make_probe
from trinity_jax.publishing import SnapshotPublisher
from trinity_jax.sampler.rollout_engine import RolloutEngine
from trinity_jax.sampler.scheduler import Sampler
from trinity_jax.schedule import make_schedule
from trinity_jax.source import Demonstrations, Recording, Rollouts, Source
from trinity_jax.synchronizer import Synchronizer
from trinity_jax.tasks.demonstrations import given
from trinity_jax.trainer.checkpoint import Checkpointer, changed_terms, terms_of_exactness
from trinity_jax.trainer.trainer import Trainer


class Stage:
  """The parts of one stage, wired.

  Args:
    config: of this stage (no `stages` of its own).
    directory: its folder: metrics.jsonl, checkpoints/, hf/.
    model_path: Hugging Face folder it starts from.
    compiles, timeline, progress, preemption, world: the run's.
  """

  def __init__(
    self,
    config: Config,
    directory: Path,
    model_path: Path,
    compiles: CompileCounter,
    timeline: Timeline,
    progress: Progress,
    preemption: Preemption,
    world: World = ALONE,
  ):
    self.preemption, self.world = preemption, world
    self.config, self.directory, self.model_path = config, directory, model_path
    self.compiles, self.timeline, self.progress = compiles, timeline, progress
    self.algorithm = make_algorithm(config.algorithm)
    self.schedule = make_schedule(config.sync)
    self.meshes = build.make_meshes(config)
    self.mesh = self.meshes.train
    check_rows(config, self.mesh)
    self.launch = LaunchOrder(self.mesh)
    self.tokenizer = Tokenizer.load(model_path)
    self.taskset = build.training_taskset(config, self.algorithm)
    self.experts = build.expert_taskset(config, self.algorithm)
    self.texts = build.held_out_texts(config, self.algorithm)
    self.model = hf.load_config(model_path)
    check_lag(config, self.algorithm)

    layout = sharding.param_shardings(self.model, self.mesh)
    params, _ = hf.load(model_path, dtype=jnp.dtype(config.model.param_dtype), shardings=layout)
    self.checkpoints = Checkpointer(directory / "checkpoints", config.trainer.keep, world)
    self.buffer = None
    self._followed: Followed | None = None
    if not self.offline and world.leader:
      saved = self.checkpoints.latest_step() or 0
      self.buffer = build.make_buffer(config, self.schedule, directory, saved)
    self.bell = self.buffer.bell if self.buffer is not None else ThreadBell()
    self.synchronizer = self._make_synchronizer(layout)
    self.publisher = self._make_publisher()
    self.trainer = Trainer(
      config,
      self.algorithm,
      build.policy_of(config, self.model),
      params,
      self.mesh,
      self.launch,
      self.synchronizer.recent,
    )
    self.resumed = self._resume()
    if self.buffer is not None:
      self.buffer.restore(self.start)
      if config.mode == "both":
        self.buffer.release(config.explorer.name)
    self.writers = Writers([])
    if world.leader:
      self.writers = make_writers(
        config, directory, resume_step=self.start if self.resumed else -1, report=progress.message
      )
    self._evaluated = {
      row["step"]: row["eval/accuracy"]
      for row in (read_jsonl(directory / FILE) if world.leader else ())
      if "eval/accuracy" in row
    }
    for version, score in self._evaluated.items():
      self.checkpoints.offer_best(version, score)  # a kill may have come in between

  def _make_synchronizer(self, layout: Any) -> Synchronizer:
    return Synchronizer(
      layout,
      jnp.dtype(self.config.model.rollout_dtype or self.config.model.dtype),
      self.launch,
      keep=build.kept_versions(self.schedule),
      timeout=self.config.sync.timeout,
      bell=self.bell,
      pinned=self._awaits_evaluation,
      localize=self._localize,
    )

  def _make_publisher(self) -> SnapshotPublisher | None:
    """Where explorers are processes of their own: what brings them the weights."""
    if self.offline or self.config.mode != "train":
      return None
    publisher = SnapshotPublisher(
      self.directory / "weights",
      keep=build.kept_versions(self.schedule),
      bell=self.bell,
      probe=make_probe(self.model, self.launch),
      launch=self.launch,
      world=self.world,
    )
    if self.world.leader:
      announce(self.directory, self.model_path)
    return publisher

  @property
  def offline(self) -> bool:
    """Whether all it trains on is there before it begins."""
    return self.algorithm.supervised or bool(self.config.buffer.replay)

  @property
  def start(self) -> int:
    """Trainer steps done before this process began."""
    return self._start

  @property
  def explores(self) -> bool:
    """Whether a sampler runs beside the trainer: to explore, or to evaluate what is trained."""
    c = self.config
    return bool(c.eval.tasksets) if self.offline else c.mode != "train"

  @property
  def _samples(self) -> bool:
    """Whether this process has a sampler where any has: a remote server is asked by one only."""
    return self.world.leader or self.config.sampler.engine != "openai"

  def _localize(self, params: Any) -> Any:
    """Published parameters on this process's own devices, where there are several processes."""
    if self.world.count == 1 or not self.explores:
      return params
    rollout = self.meshes.rollout[0]
    to = sharding.param_shardings(self.model, rollout) if self._samples else None
    return to_local(params, to, self.launch)

  def _resume(self) -> bool:
    """Restores the newest checkpoint, if there is one. Returns whether there was."""
    self._start = 0
    step = self.world.agree(self.checkpoints.latest_step())
    if step is None:
      return False
    state, meta = self.checkpoints.restore(step, self.trainer.state)
    if meta["seed"] != self.config.seed:
      raise UserError(
        f"{self.directory}: its checkpoint was made with seed {meta['seed']}, this run has "
        f"config.seed = {self.config.seed}; use that seed or another --workdir"
      )
    self.trainer.load_state(state)
    self.taskset.restore(meta["taskset"])
    if self.experts is not None:
      self.experts.restore(meta["experts"])
    self._start = step
    changed = changed_terms(meta["terms"], terms_of_exactness(self.mesh))
    if changed:
      self.progress.message(
        f"resuming step {step}; no longer bit-exact, because {'; '.join(changed)}"
      )
    if self.schedule.max_lag:
      self.progress.message(
        f"resuming step {step}; groups that were on their way are sampled again by version {step}"
      )
    return True

  def given(
    self, data: str, tasks: Sequence[Task], step: int, first: int = 0
  ) -> list[Experience]:
    """Given texts as experiences of a step; the tasks are numbered from `first`."""
    return [
      e
      for i, task in enumerate(tasks, first)
      for e in given(data, task, self.tokenizer, ExperienceId(step, i, 0, 0), self.config.sampler)
    ]

  def save(self, step: int) -> None:
    meta = {
      "step": step,
      "version": step,
      "seed": self.config.seed,
      "taskset": self._cursor_after(step),
      "experts": None if self.experts is None else self.experts.state(),
      "terms": terms_of_exactness(self.mesh),
    }
    was_warm = self.compiles.warm
    self.compiles.mark_cold()  # on several devices Orbax cuts replicas with programs of its own
    self.checkpoints.save(step, self.trainer.state, meta)
    if self.buffer is not None:
      self.buffer.commit(step)
    if self.config.trainer.save_hf == "always":
      self.save_model()
    if was_warm:
      self.compiles.mark_warm()

  def _cursor_after(self, step: int) -> dict[str, Any]:
    """Where the taskset stands when the groups of `step` have been taken (the explorer may be
    ahead; what it has read beyond is read again)."""
    return {**self.taskset.state(), "position": step * self.tasks_per_step}

  @property
  def tasks_per_step(self) -> int:
    return build.tasks_per_step(self.config, self.algorithm)

  def save_model(self) -> Path:
    """Writes the current parameters as a Hugging Face folder."""
    path = self.directory / "hf"
    hf.save(path, self.trainer.state.params, self.model, self.model_path, launch=self.launch)
    return path

  def _awaits_evaluation(self, version: int) -> bool:
    """Whether a version is still to be evaluated with the sampler of this process."""
    c = self.config
    if not (self.explores and c.eval.tasksets and is_due(c.eval, version)):
      return False
    if self._followed is not None:
      return self._followed.may_need(version)
    exact = c.mode == "both" and not self.offline and c.explorer.deterministic
    return exact and version not in self._evaluated

  def on_eval(self, version: int, metrics: dict[str, float], shown: list[Experience]) -> None:
    """Books an evaluation (called from the explorer's thread)."""
    self.writers.write(version, metrics)
    self.progress.update(version, self.config.trainer.total_steps, metrics, samples(shown, 2))
    if "eval/accuracy" in metrics:
      self._evaluated[version] = metrics["eval/accuracy"]
      self.checkpoints.offer_best(version, metrics["eval/accuracy"])

  # --- where experiences come from ---------------------------------------------------------------

  @contextlib.contextmanager
  def source(self) -> Iterator[Source]:
    """Starts the threads that experiences come from; stops and joins them whatever happens."""
    engine = self._make_engine() if self.explores else None
    source = self._make_source(engine)
    if engine is not None:
      engine.start()
      source.start()
    try:
      yield source
    except BaseException as error:  # wakes the threads that wait, then goes on up
      source.fail(error)
      raise
    finally:
      source.close()
      if engine is not None:
        engine.close()

  def _make_engine(self) -> RolloutEngine | None:
    """This process's sampler; the leader's is all of them."""
    if not self._samples:
      return None
    others = range(1, self.world.count) if self.world.leader else ()
    return build.make_engine(
      self.config,
      self.model,
      self.meshes,
      self.launch,
      self.timeline.span,
      self.model_path,
      [self.world.channel(i) for i in others],
    )

  def _make_source(self, engine: RolloutEngine | None) -> Source:
    if not self.world.leader:
      assert engine is None or isinstance(engine, Sampler)
      self._followed = Followed(self, engine)
      return self._followed
    explorer = None
    if engine is not None:
      explorer = build.make_explorer(
        self.config,
        self.algorithm,
        engine=engine,
        tokenizer=self.tokenizer,
        versions=self.synchronizer,
        buffer=self.buffer,
        bell=self.bell,
        taskset=self.taskset,
        span=self.timeline.span,
        on_eval=self.on_eval,
        evaluated=self._evaluated,
      )
    kind = Demonstrations if self.algorithm.supervised else Recording if self.offline else Rollouts
    return kind(self, explorer, engine, self.buffer)
