"""The run's configuration: `base_config()` for the Python files in configs/, `resolve()` to check.

Keys are declared in config_schema.py, once. `base_config()` gives an `ml_collections.ConfigDict`;
`resolve()` checks such a dict and freezes it into dataclasses. Nothing here imports jax.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from trinity_jax.config_keys import defaults, walk
from trinity_jax.config_schema import (
  AlgorithmConfig,
  BufferConfig,
  Config,
  EvalConfig,
  ExplorerConfig,
  MeshConfig,
  ModelConfig,
  MonitorConfig,
  OptimizerConfig,
  SamplerConfig,
  SyncConfig,
  TasksetConfig,
  TrainerConfig,
)
from trinity_jax.errors import UserError, suggestion

__all__ = [
  "AlgorithmConfig",
  "BufferConfig",
  "Config",
  "EvalConfig",
  "ExplorerConfig",
  "MeshConfig",
  "ModelConfig",
  "MonitorConfig",
  "OptimizerConfig",
  "SamplerConfig",
  "SyncConfig",
  "TasksetConfig",
  "TrainerConfig",
  "base_config",
  "defaults",
  "resolve",
  "stage_configs",
  "taskset_config",
  "walk",
]


def _plain(node) -> Any:
  """Recursively ConfigDict -> dict, list -> tuple."""
  if hasattr(node, "to_dict"):
    node = node.to_dict()
  if isinstance(node, dict):
    return {k: _plain(v) for k, v in node.items()}
  if isinstance(node, (list, tuple)):
    return tuple(_plain(v) for v in node)
  return node


def base_config() -> Any:
  """Returns an `ml_collections.ConfigDict` with every key at its default, to be changed in place.

  Values can be set, also through `--config.a.b=value`; a name that does not exist is refused with
  a suggestion. Keys that hold arguments for something else (`model.tiny`, `taskset.generate_args`,
  `algorithm.policy_loss_args`, ...) take any name: whoever gets the arguments checks them.
  `launch/main.py --mode=keys` prints all keys with their meaning.
  """
  import ml_collections

  config = ml_collections.ConfigDict(defaults())
  config.lock()
  for path, _, default in walk():
    if isinstance(default, dict):
      node: Any = config
      for part in path.split("."):
        node = node[part]
      node.unlock()
  return config


def _check_leaf(path: str, value: Any, hint: Any, meta) -> Any:
  kind = typing.get_origin(hint) or hint
  if kind is types.UnionType:
    kind = object
  ok = isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool))
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value, ok = float(value), True
  if not ok:
    raise UserError(
      f"config.{path} = {value!r}: expected {kind.__name__}, got {type(value).__name__}; "
      f"set --config.{path}=... to a {kind.__name__} ({meta['doc']})"
    )
  for i, item in enumerate(typing.cast(tuple, value) if meta["each"] else ()):
    if not isinstance(item, meta["each"]) or (meta["each"] is int and (item is True or item < 1)):
      raise UserError(
        f"config.{path}[{i}] = {item!r}: expected "
        f"{'a positive int' if meta['each'] is int else meta['each'].__name__} ({meta['doc']})"
      )
  if meta["choices"] and value not in meta["choices"]:
    raise UserError(
      f"config.{path} = {value!r}: expected one of {', '.join(map(repr, meta['choices']))}"
      + (suggestion(value, meta["choices"]) if isinstance(value, str) and value else "")
    )
  low, high, above = meta["low"], meta["high"], meta["above"]
  if low is not None and not value >= low:
    raise UserError(f"config.{path} = {value!r}: must be at least {low} ({meta['doc']})")
  if above is not None and not value > above:
    raise UserError(f"config.{path} = {value!r}: must be above {above} ({meta['doc']})")
  if high is not None and not value <= high:
    raise UserError(f"config.{path} = {value!r}: must be at most {high} ({meta['doc']})")
  return value


def _build(cls, values: dict[str, Any], prefix: str = ""):
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for name in values:
    if name not in fields:
      raise UserError(f"config.{prefix}{name}: unknown key{suggestion(name, fields)}")
  hints = typing.get_type_hints(cls)
  out = {}
  for name, value in values.items():
    hint = hints[name]
    if dataclasses.is_dataclass(hint):
      if not isinstance(value, dict):
        raise UserError(f"config.{prefix}{name} = {value!r}: expected a group of keys")
      out[name] = _build(hint, value, f"{prefix}{name}.")
    else:
      out[name] = _check_leaf(prefix + name, value, hint, fields[name].metadata)
  return cls(**out)


def taskset_config(values: dict[str, Any], where: str) -> TasksetConfig:
  """Checks one dict of TasksetConfig keys (an entry of eval.tasksets)."""
  return _build(TasksetConfig, _plain(values), where + ".")


def resolve(config: Any) -> Config:
  """Checks a ConfigDict (or nested dict) and freezes it.

  Raises:
    UserError: an unknown key, a wrong type, a value out of its limits, or keys that contradict
      each other; names key, value, limit and fix.
  """
  out = _build(Config, _plain(config))
  _check_together(out)
  for stage in stage_configs(out)[:-1]:
    if stage.trainer.save_hf == "never":
      raise UserError(
        f"stage {stage.name!r}: config.trainer.save_hf = 'never', but the next stage starts from "
        "its model; use 'last'"
      )
  return out


def _merge(tree: dict, override: dict, cls: Any, where: str = "") -> dict:
  """Overrides keys of the group `cls` (None: free-form arguments); 'a.b' reaches down."""
  hints = typing.get_type_hints(cls) if cls else {}
  out = dict(tree)
  for name, value in override.items():
    head, _, rest = name.partition(".")
    if cls and head not in hints:
      raise UserError(f"config.{where}{head}: unknown key{suggestion(head, hints)}")
    value = {rest: value} if rest else value
    group = dataclasses.is_dataclass(hints.get(head))
    reaches = group or (
      rest and isinstance(out.get(head, {}), dict) and hints.get(head) in (None, dict)
    )
    if reaches and isinstance(value, dict):
      value = _merge(out.get(head, {}), value, hints[head] if group else None, f"{where}{head}.")
    out[head] = value
  return out


def stage_configs(config: Config) -> list[Config]:
  """Returns one complete config per stage, or [config] when there are no stages."""
  if not config.stages:
    return [config]
  base = {**dataclasses.asdict(config), "stages": ()}
  stages, seen = [], set()
  for i, override in enumerate(config.stages):
    override = dict(override)
    name = override.pop("name", "")
    if not isinstance(name, str) or not name or "/" in name or name in seen:
      raise UserError(
        f"config.stages[{i}].name = {name!r}: expected a name of its own without '/'; it becomes "
        "a folder of the workdir"
      )
    seen.add(name)
    try:
      if wrong := sorted({"stages", "mode"} & override.keys()):
        raise UserError(f"config.{wrong[0]} belongs to the whole run; set it outside of stages")
      stage = _build(Config, _plain(_merge(base, {**override, "name": name}, Config)))
      _check_together(stage)
    except UserError as e:
      raise UserError(f"stage {name!r}: {e}") from e
    stages.append(stage)
  return stages


def _check_together(c: Config) -> None:
  """Keys that contradict each other."""
  if c.stages:
    return
  if not c.model.path and not c.model.tiny:
    raise UserError(
      "config.model.path is empty: give a Hugging Face folder, or config.model.tiny "
      "(for example {'hidden': 64, 'layers': 2}) for a new random model"
    )
  if not (c.taskset.path or c.taskset.generate):
    raise UserError("config.taskset.path is empty: give a JSONL file, or config.taskset.generate")
  longest = c.sampler.max_prompt_length + c.sampler.max_response_length
  whole = f"{longest} tokens (sampler.max_prompt_length + max_response_length)"
  chunk = min(c.sampler.max_prompt_length, c.sampler.prefill_chunk)
  for name, lengths, needed, what in (
    ("trainer.row_lengths", c.trainer.row_lengths, longest, whole),
    ("sampler.cache_buckets", c.sampler.cache_buckets, longest, whole),
    ("sampler.prompt_buckets", c.sampler.prompt_buckets, chunk,
     f"{chunk} tokens (the smaller of sampler.max_prompt_length and prefill_chunk)"),
  ):  # fmt: skip
    if lengths and max(lengths) < needed:
      raise UserError(f"config.{name} = {lengths}: the longest must hold {what}; add {needed}")
  if not c.sampler.prefill_batches:
    raise UserError("config.sampler.prefill_batches = (): give at least one number, such as (8,)")
  for name in ("kl_coef", "entropy_coef"):
    if -1 < (value := getattr(c.algorithm, name)) < 0:
      raise UserError(
        f"config.algorithm.{name} = {value}: expected 0 or more, or -1 for the table's value"
      )
  if c.sampler.temperature == 0 and c.explorer.group_size > 1:
    raise UserError(
      "config.sampler.temperature = 0.0: greedy runs of a group are all equal and teach nothing; "
      "use a temperature above 0 or explorer.group_size=1"
    )
  if c.sampler.top_p < 1 or c.sampler.top_k:
    raise UserError(
      f"config.sampler.top_p = {c.sampler.top_p}, top_k = {c.sampler.top_k}: the trainer's "
      "log-probs are those of the whole distribution, so truncated rollouts would be off-policy; "
      "use top_p=1.0 and top_k=0 for training (evaluation is free to differ)"
    )
  _check_pace(c)
  per_step = c.explorer.batch_size * c.explorer.group_size
  if c.trainer.batch_size and c.trainer.batch_size % c.explorer.group_size:
    raise UserError(
      f"config.trainer.batch_size = {c.trainer.batch_size}: must be a multiple of "
      f"explorer.group_size = {c.explorer.group_size}, so that groups stay whole"
    )
  if c.buffer.capacity and c.buffer.capacity < max(c.trainer.batch_size, per_step):
    raise UserError(
      f"config.buffer.capacity = {c.buffer.capacity}: must hold one step of "
      f"{max(c.trainer.batch_size, per_step)} experiences"
    )
  for i, t in enumerate(c.eval.tasksets):
    taskset_config(t, f"eval.tasksets[{i}]")


def _check_pace(c: Config) -> None:
  """Keys that need rollouts which may depend on the clock, or one process for all."""
  free = {
    "sync.style": (c.sync.style, "fixed"),
    "explorer.over_rollout": (c.explorer.over_rollout, 0.0),
    "explorer.timeout_ratio": (c.explorer.timeout_ratio, 0.0),
    "buffer.priority": (c.buffer.priority, ""),
    "buffer.max_uses": (c.buffer.max_uses, 1),
  }
  for name, (value, plain) in free.items():
    if c.explorer.deterministic and value != plain:
      raise UserError(
        f"config.{name} = {value!r}: what a step trains on would depend on the clock, which "
        "explorer.deterministic = True excludes; set explorer.deterministic=False"
      )
  if c.sampler.release and (
    c.mode not in ("both", "check", "plan") or c.sampler.devices or not c.explorer.deterministic
    or c.sync.interval + c.sync.offset > 1
  ):  # fmt: skip
    raise UserError(
      "config.sampler.release = True: rollouts never rest while the trainer works unless they are "
      "on-policy and share its devices; use sync.interval=1, sync.offset=0, sampler.devices=0 and "
      "explorer.deterministic=True, or sampler.release=False"
    )
  if c.sync.style == "explorer_driven" and c.mode in ("explore", "train"):
    raise UserError(
      f"config.sync.style = 'explorer_driven': explorers can ask for weights in --mode=both only, "
      f"not in {c.mode}; use trainer_driven"
    )
