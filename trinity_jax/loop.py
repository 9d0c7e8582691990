"""The loop of a stage: experiences in, a train step, what it published, measured and saved."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

import jax

from trinity_jax import build
from trinity_jax.control import shuffled_rewards
from trinity_jax.errors import RunFailed
from trinity_jax.experience import Experience
from trinity_jax.following import PATIENCE, tell, tell_end
from trinity_jax.monitor.progress import samples
from trinity_jax.monitor.summary import peak_rss_mb, rss_mb
from trinity_jax.preemption import Preempted
from trinity_jax.source import Source
from trinity_jax.stage import Stage
from trinity_jax.stage_result import StageResult, write_stage_result
from trinity_jax.watchdog import Watchdog

WARMUP_STEPS = 2  # steps after which a compilation counts as unexpected


def run_stage(*args, **kwargs) -> StageResult:
  """Builds and runs a stage; returns its result and marks it finished in stage.json."""
  start = time.monotonic()
  stage = Stage(*args, **kwargs)
  result = run(stage)
  if stage.world.leader:
    write_stage_result(stage.directory / "stage.json", result, time.monotonic() - start)
  jax.clear_caches()
  return result


def run(stage: Stage) -> StageResult:
  """Trains to total_steps, evaluates, saves the model."""
  c, total = stage.config, stage.config.trainer.total_steps
  stage.compiles.mark_cold()
  with contextlib.ExitStack() as stack:
    stack.callback(stage.checkpoints.close)
    stack.callback(stage.writers.close)
    if stage.buffer is not None:
      stack.callback(build.close_buffer, stage.buffer)
    _publish(stage, stage.start)
    stage.trainer.warmup()
    source = stack.enter_context(stage.source())
    stack.enter_context(_watchdog(stage, source.fail))
    stack.enter_context(stage.preemption.telling(lambda: source.fail(Preempted())))
    warm_at = min(stage.start + WARMUP_STEPS, total)
    if not stage.start:
      _evaluate_texts(stage, 0)
    stage.timeline.step()  # set-up belongs to no step
    for step in range(stage.start + 1, total + 1):
      experiences = _sample(stage, source)
      _train(stage, step, experiences, source)
      if step == warm_at:
        stage.compiles.mark_warm()
    if not stage.world.agree(_finish(stage, source), PATIENCE * c.sync.timeout):
      raise _preempted(stage)
    stage.world.meet(f"end of {c.name}", PATIENCE * c.sync.timeout)
  stage.compiles.mark_cold()  # saving may compile; no step does
  model = ""
  if c.trainer.save_hf != "never":
    model = str(stage.save_model())
  return StageResult(c.name, model, stage.resumed)


def _sample(stage: Stage, source: Source) -> list[Experience]:
  """The next step's experiences; when the run is asked to end, saves it and raises Preempted."""
  with stage.timeline.span("wait_for_batch"):
    found = _read(stage, source) if stage.world.leader else source.sample()
  if found is not None:
    return found
  step = stage.trainer.step_number
  if stage.world.agree(stage.checkpoints.latest_step()) != step:
    stage.save(step)
  raise _preempted(stage)


def _finish(stage: Stage, source: Source) -> bool:
  """Waits for what still runs after the last step; False when the run is asked to end meanwhile."""
  try:
    if stage.publisher is not None:
      stage.publisher.finish()
    source.finish()
  except RunFailed:
    if not stage.preemption.requested:
      raise
    return False
  return True


def _read(stage: Stage, source: Source) -> list[Experience] | None:
  """What the source has for the next step, told to all; None when the run is asked to end."""
  try:
    found = None if stage.preemption.requested else source.sample()
  except RunFailed:
    if not stage.preemption.requested:
      raise
    found = None
  if found is None:
    tell_end(stage.world)
  else:
    tell(stage.world, found)
  return found


def _preempted(stage: Stage) -> Preempted:
  step = stage.checkpoints.latest_step()
  return Preempted(f"asked to end; step {step} is saved, the same command continues the run")


def _watchdog(stage: Stage, fail: Callable[[RunFailed], None]) -> Watchdog:
  return Watchdog(
    stage.timeline, stage.config.monitor.stall, stage.directory / "stalled.txt", fail
  )


def _publish(stage: Stage, step: int) -> None:
  with stage.timeline.span("publish"):
    stage.synchronizer.publish(step, stage.trainer.state.params)
    if stage.publisher is not None:
      stage.publisher.publish(step, stage.synchronizer.params(step))


def _train(stage: Stage, step: int, experiences: Sequence[Experience], source: Source) -> None:
  c, total = stage.config, stage.config.trainer.total_steps
  if c.algorithm.shuffle_rewards:
    experiences = shuffled_rewards(experiences, c.seed, step)
  with stage.timeline.span("train"):
    try:
      metrics = stage.trainer.step(experiences)
    except RunFailed:
      if stage.world.leader:
        stage.trainer.save_last_batch(stage.directory / "bad_batch")
      raise
  if stage.world.agree(_publishes(stage, step)):
    _publish(stage, step)
  metrics |= source.metrics(experiences)
  metrics |= _machine_metrics(stage, experiences)
  stage.writers.write(step, metrics)
  stage.progress.update(step, total, metrics, samples(experiences, c.monitor.samples))
  _evaluate_texts(stage, step)
  if step % c.trainer.save_interval == 0 or step == total:
    with stage.timeline.span("checkpoint"):
      stage.save(step)


def _publishes(stage: Stage, step: int) -> bool:
  if step == stage.config.trainer.total_steps:
    return True
  if stage.offline:  # only evaluation looks
    return bool(stage.config.eval.interval) and step % stage.config.eval.interval == 0
  return stage.schedule.publishes(step, stage.synchronizer.take_request())


def _evaluate_texts(stage: Stage, step: int) -> None:
  """The loss of the held-out texts, at the steps of evaluation and at the end."""
  e = stage.config.eval
  last = step == stage.config.trainer.total_steps
  due = last or (e.interval and step % e.interval == 0 and (step or e.on_start))
  if not stage.texts or not due:
    return
  with stage.timeline.span("eval"):
    metrics = stage.trainer.held_out_loss(
      stage.given(stage.algorithm.data, stage.texts, step)
    )
  stage.writers.write(step, metrics)
  stage.progress.update(step, stage.config.trainer.total_steps, metrics, [])


def _machine_metrics(stage: Stage, experiences: Sequence[Experience]) -> dict[str, float]:
  """Wall-time split, throughput, memory, compilations."""
  times = stage.timeline.step()
  trained = sum(len(e.tokens) for e in experiences)
  out = {**times, **stage.compiles.metrics(), "memory/peak_rss_mb": peak_rss_mb()}
  now = rss_mb()
  if now is not None:
    out["memory/rss_mb"] = now
  if times["time/step"]:
    out["throughput/tokens_per_s"] = trained / times["time/step"]
    out["throughput/tokens_per_s_per_chip"] = out["throughput/tokens_per_s"] / stage.mesh.size
  if times["time/train"]:
    out["throughput/train_tokens_per_s"] = trained / times["time/train"]
  return out
