"""Parts from a config."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from trinity_jax.algorithms.algorithm import Algorithm
from trinity_jax.buffer.bell import ThreadBell
from trinity_jax.buffer.replay import ReplayBuffer
from trinity_jax.buffer.store import open_store
from trinity_jax.config import Config, taskset_config
from trinity_jax.distributed import Channel
from trinity_jax.errors import UserError
from trinity_jax.experience import Experience, Task
from trinity_jax.explorer.explorer import Explorer, Versions, tasks_per_batch
from trinity_jax.explorer.grading import grading
from trinity_jax.explorer.rewards import make_reward
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import params as params_lib
from trinity_jax.models import sharding
from trinity_jax.models.presets import ModelConfig
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.sampler import roofline
from trinity_jax.sampler.cache import aligned, buckets
from trinity_jax.sampler.engine import EngineSpec
from trinity_jax.sampler.pool import SamplerPool
from trinity_jax.sampler.programs import Programs, shards_of
from trinity_jax.sampler.remote import RemoteSampler
from trinity_jax.sampler.rollout_engine import RolloutEngine
from trinity_jax.sampler.scheduler import Sampler
from trinity_jax.schedule import Schedule, make_schedule
from trinity_jax.tasks.demonstrations import PER_TASK, REQUIRED
from trinity_jax.tasks.taskset import Taskset, load_taskset
from trinity_jax.trainer.scoring import Policy


def policy_of(config: Config, model: ModelConfig) -> Policy:
  """How train steps evaluate the model."""
  m = config.model
  return Policy(model, jnp.dtype(m.dtype), m.remat, m.unroll or model.num_layers)


def make_programs(
  config: Config,
  model: ModelConfig,
  mesh: Mesh,
  layout: Any,
  launch: LaunchOrder,
  source: LaunchOrder | None = None,
) -> Programs:
  """The sampler programs a config declares.

  Args:
    layout: shardings of the parameters on `mesh`.
    source: launch order of the mesh that publishes, where it is another one.
  """
  s = config.sampler
  cache = s.max_prompt_length + s.max_response_length
  spec = EngineSpec(
    model,
    s.slots,
    aligned(buckets(cache, s.cache_buckets, smallest=256)),
    s.max_response_length,
    jnp.dtype(config.model.rollout_dtype or config.model.dtype),
    jnp.dtype(s.cache_dtype) if s.cache_dtype else None,
  )
  chunk = min(s.max_prompt_length, s.prefill_chunk)
  return Programs(
    spec,
    mesh,
    layout,
    launch,
    source=source,
    scores=s.scores,
    prompt_lengths=buckets(chunk, s.prompt_buckets, smallest=64),
    prompt_counts=tuple(
      sorted({min(n, max(1, s.slots // shards_of(mesh))) for n in s.prefill_batches})
    ),
  )


def kept_versions(schedule: Schedule) -> int:
  """Published versions to keep: those of every rollout on its way, where it is known which."""
  return schedule.max_lag + 1 if schedule.style == "fixed" else 2


def make_buffer(config: Config, schedule: Schedule, directory: Path, start: int) -> ReplayBuffer:
  """The replay buffer of a stage; it owns its store, see `close_buffer`.

  Args:
    start: trainer steps done: where an empty store begins.

  Raises:
    UserError: storage that cannot be had, or that other processes could not see.
  """
  b, e = config.buffer, config.explorer
  if b.url == "memory" and config.mode != "both":
    raise UserError(
      f"config.buffer.url = 'memory': --mode={config.mode} shares the buffer with other processes; "
      "use sqlite or a postgresql:// address"
    )
  tasks = tasks_per_batch(config)
  ahead = tasks * e.group_size * e.max_logs * (schedule.max_steps_ahead + 1)
  return ReplayBuffer(
    open_store(
      b.url,
      directory,
      durability=b.durability,
      shared=config.mode != "both",
      namespace=f"{b.namespace}_{config.name}" if b.namespace else "",
    ),
    capacity=b.capacity or ahead,
    order="priority" if b.priority else "id" if e.deterministic else "ready",
    tasks_per_step=tasks,
    max_staleness=schedule.max_lag,
    max_uses=b.max_uses,
    cool_down=b.cool_down,
    priority=b.priority or None,
    priority_args=b.priority_args,
    seed=config.seed,
    first_batch=start + 1,
    keep=b.keep,
    min_runs=e.min_runs,
  )


def close_buffer(buffer: ReplayBuffer) -> None:
  """Ends its threads and closes its store."""
  buffer.close()
  buffer.store.close()


class Meshes(NamedTuple):
  """Who computes where."""

  train: Mesh
  rollout: tuple[Mesh, ...]  # one per sampler; (train,) when they share it

  @property
  def shared(self) -> bool:
    """Whether samplers use devices of the training mesh."""
    return not set(self.train.devices.flat).isdisjoint(self.rollout[0].devices.flat)


def make_meshes(config: Config, devices: Sequence[Any] | None = None) -> Meshes:
  """Splits the devices into a training mesh and the samplers' meshes.

  Raises:
    UserError: devices that cannot be split so.
  """
  if devices is None:
    _use_cpu_devices(config.mesh.cpu_devices)
  devices = list(jax.devices() if devices is None else devices)
  s, m = config.sampler, config.mesh
  own = s.devices
  if own >= len(devices):
    raise UserError(
      f"config.sampler.devices = {own}: there are {len(devices)} devices, and training needs some"
    )
  mine = devices[: len(devices) - own]
  train = sharding.make_mesh(m.data, m.fsdp, m.tensor, mine, context=m.context)
  here = [d for d in devices if d.process_index == jax.process_index()]
  if len(here) < len(devices):
    return Meshes(train, (_local_rollout(config, here),))
  if not own and s.replicas == 1:
    if s.tensor not in (0, m.tensor):
      raise UserError(
        f"config.sampler.tensor = {s.tensor}: the sampler shares the training mesh, whose "
        f"mesh.tensor is {m.tensor}; set sampler.devices or sampler.replicas, or leave it at 0"
      )
    return Meshes(train, (train,))
  rollout = devices[-own:] if own else list(train.devices.flat)
  each, rest = divmod(len(rollout), s.replicas)
  if rest or not each:
    raise UserError(
      f"config.sampler.replicas = {s.replicas}: must divide the samplers' {len(rollout)} devices"
    )
  parts = [rollout[i : i + each] for i in range(0, len(rollout), each)]
  return Meshes(train, tuple(sharding.make_mesh(-1, 1, s.tensor or each, p) for p in parts))


def make_sampling_meshes(config: Config, report: Callable[[str], None]) -> Meshes:
  """Where only sampling is done: the trainer's layout, where the devices here can have it.

  An explorer's machine is rarely like the trainer's. Else all devices are the sampler's, by
  config.sampler.tensor (1 unless set), and `report` is told.

  Raises:
    UserError: config.sampler.tensor does not divide the devices.
  """
  _use_cpu_devices(config.mesh.cpu_devices)  # whose errors are no matter of the layout
  try:
    return make_meshes(config)
  except UserError as e:
    devices, tensor = jax.devices(), config.sampler.tensor or 1
    if len(devices) % tensor:
      raise UserError(
        f"config.sampler.tensor = {tensor}: must divide the {len(devices)} devices of this process"
      ) from e
    mesh = sharding.make_mesh(-1, 1, tensor, devices)
    report(f"the trainer's layout is not for this machine ({e}): sampling on {dict(mesh.shape)}")
    return Meshes(mesh, (mesh,))


def _local_rollout(config: Config, devices: Sequence[Any]) -> Mesh:
  """The sampler's mesh where several processes train: the devices of its own process.

  Raises:
    UserError: samplers with devices of their own.
  """
  s = config.sampler
  if s.devices or s.replicas > 1:
    raise UserError(
      f"config.sampler.devices = {s.devices}, replicas = {s.replicas}: where several processes "
      "train, each samples with the devices it trains with; leave them at 0 and 1, or sample in "
      "processes of their own (--mode=explore)"
    )
  return sharding.make_mesh(-1, 1, s.tensor or min(config.mesh.tensor, len(devices)), devices)


def _use_cpu_devices(count: int) -> None:
  """Takes effect before the first use of a device, and on a CPU only.

  Raises:
    UserError: devices are in use already, and they are others.
  """
  if not count:
    return
  with contextlib.suppress(RuntimeError):  # in use: looked at below
    jax.config.update("jax_num_cpu_devices", count)
  found = jax.local_devices()
  if found[0].platform == "cpu" and len(found) != count:
    raise UserError(
      f"config.mesh.cpu_devices = {count}: JAX runs as {len(found)} CPU devices already; set it "
      "before JAX is used, and not together with --xla_force_host_platform_device_count"
    )


def make_engine(
  config: Config,
  model: ModelConfig,
  meshes: Meshes,
  launch: LaunchOrder,
  span: Callable[[str], contextlib.AbstractContextManager] = lambda _: contextlib.nullcontext(),
  tokenizer_dir: Path | None = None,
  others: Sequence[Channel] = (),
) -> RolloutEngine:
  """What samples for the explorer, its programs compiled.

  Args:
    launch: of the training mesh.
    tokenizer_dir: goes with weights that are given to a remote server.
    others: to the processes whose samplers this one asks too.

  Raises:
    UserError: a remote engine's arguments are wrong.
  """
  s = config.sampler
  if s.engine == "openai":
    from trinity_jax.sampler.openai import OpenAIEngine

    given = {
      "vocab_size": model.vocab_size,
      "max_prompt": s.max_prompt_length,
      "max_response": s.max_response_length,
      "model_config": model,
      "tokenizer_dir": tokenizer_dir,
    }
    try:
      engine = OpenAIEngine(**{**given, **s.engine_args})
    except TypeError as e:  # an argument that does not exist or is missing
      raise UserError(f"config.sampler.engine_args = {dict(s.engine_args)!r}: {e}") from e
    engine.check_sampling(s.temperature, s.top_p, s.top_k)
    if config.eval.tasksets:
      engine.check_sampling(config.eval.temperature)
    return engine
  dtype = jnp.dtype(config.model.rollout_dtype or config.model.dtype)
  published = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params_lib.abstract(model)
  )
  samplers = []
  for mesh in meshes.rollout:
    layout = sharding.param_shardings(model, mesh)
    own = launch if meshes.shared else LaunchOrder(mesh)
    programs = make_programs(config, model, mesh, layout, own, source=launch)
    programs.warmup(published)
    samplers.append(
      Sampler(
        programs,
        steps_per_dispatch=s.steps_per_dispatch,
        refill_fraction=s.refill_fraction,
        deterministic=config.explorer.deterministic,
        on_swap=s.on_swap,
        span=span,
        rates=roofline.measure(programs.spec, s.slots // programs.shards, mesh.local_devices),
      )
    )
  remote = [RemoteSampler(channel, samplers[0].spec) for channel in others]
  return samplers[0] if len(samplers + remote) == 1 else SamplerPool([*samplers, *remote])


def make_explorer(
  config: Config,
  algorithm: Algorithm,
  *,
  engine: RolloutEngine,
  tokenizer: Tokenizer,
  versions: Versions,
  buffer: ReplayBuffer | None,
  bell: ThreadBell,
  taskset: Taskset | None,
  span: Callable[[str], contextlib.AbstractContextManager],
  on_eval: Callable[[int, dict[str, float], list[Experience]], None],
  evaluated: Container[int] = (),
) -> Explorer:
  """The explorer of a stage; see Explorer for the arguments."""
  grade = None
  if not algorithm.supervised:
    reward = make_reward(
      config.taskset.reward, config.taskset.reward_args, workers=config.explorer.reward_workers
    )
    grade = grading(reward)
  return Explorer(
    config,
    engine=engine,
    tokenizer=tokenizer,
    schedule=make_schedule(config.sync),
    versions=versions,
    buffer=buffer,
    bell=bell,
    taskset=taskset,
    held_out=[held_out_taskset(config, i) for i in range(len(config.eval.tasksets))],
    grade=grade,
    span=span,
    on_eval=on_eval,
    greedy_first=algorithm.needs_greedy,
    evaluated=evaluated,
  )


def held_out_taskset(config: Config, index: int):
  """(config, all tasks, grade) of one evaluation taskset."""
  own = taskset_config(config.eval.tasksets[index], f"eval.tasksets[{index}]")
  reward = make_reward(own.reward, own.reward_args, workers=config.explorer.reward_workers)
  tasks = load_taskset(own, seed=config.seed, is_eval=True, require=("truth",)).tasks
  return own, tasks, grading(reward)


def training_taskset(config: Config, algorithm: Algorithm) -> Taskset:
  """What the algorithm trains on, at its start."""
  if algorithm.data == "text" and not config.taskset.text_key:
    raise UserError(
      f"config.taskset.text_key is empty: algorithm {algorithm.name!r} learns from plain text; "
      "name the field that holds it"
    )
  return load_taskset(config.taskset, seed=config.seed, require=REQUIRED[algorithm.data])


def tasks_per_step(config: Config, algorithm: Algorithm) -> int:
  """Tasks of the training taskset that one step uses up."""
  if not algorithm.supervised:
    return config.explorer.batch_size
  per_task = PER_TASK[algorithm.data]
  experiences = (
    config.trainer.batch_size or config.explorer.batch_size * config.explorer.group_size
  )
  if experiences % per_task:
    raise UserError(
      f"config.trainer.batch_size = {experiences}: counts both members of a pair; use an even "
      "number"
    )
  return experiences // per_task


def expert_taskset(config: Config, algorithm: Algorithm) -> Taskset | None:
  """Demonstrations beside the rollouts; None for algorithms that do not mix."""
  c = config.experts
  if algorithm.blend is None:
    if c.batch_size:
      raise UserError(
        f"config.experts.batch_size = {c.batch_size}: algorithm {algorithm.name!r} does not mix "
        "demonstrations with rollouts; use one that does (mix, chord), or 0"
      )
    return None
  if not c.batch_size or not c.taskset:
    raise UserError(
      f"config.experts.taskset and config.experts.batch_size: algorithm {algorithm.name!r} mixes "
      "demonstrations with rollouts; say where they are and how many a step takes"
    )
  own = taskset_config(c.taskset, "experts.taskset")
  return load_taskset(own, seed=config.seed, require=REQUIRED["demonstrations"])


def held_out_texts(config: Config, algorithm: Algorithm) -> Sequence[Task]:
  """Texts whose loss is evaluated in supervised training; () when the config names none."""
  if not config.eval.texts:
    return ()
  if not algorithm.supervised:
    raise UserError(
      f"config.eval.texts: algorithm {algorithm.name!r} learns from rollouts; evaluate it on "
      "config.eval.tasksets"
    )
  own = taskset_config(config.eval.texts, "eval.texts")
  return load_taskset(own, seed=config.seed, is_eval=True, require=REQUIRED[algorithm.data]).tasks
