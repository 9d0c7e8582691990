"""Every configuration key once: name, type, default, meaning, limits.

`base_config()` gives an `ml_collections.ConfigDict` for the Python files in `configs/`;
`resolve()` checks such a dict and freezes it into the dataclasses below. Nothing here imports jax.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from trinity_jax.errors import UserError, suggestion


def key(default: Any, doc: str, *, low=None, high=None, choices=None, above=None):
  """A config key: default value, one-sentence meaning, inclusive limits or allowed values."""
  meta = {"doc": doc, "low": low, "high": high, "choices": choices, "above": above}
  if dataclasses.is_dataclass(default) or isinstance(default, (dict, list)):
    return dataclasses.field(default_factory=lambda: default, metadata=meta)
  return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  path: str = key("", "Hugging Face folder to start from; empty with `tiny` set makes a random one.")
  tiny: dict = key({}, "Arguments of write_tiny_checkpoint (hidden, layers, ...) for a new tiny model.")
  dtype: str = key("float32", "Dtype of activations.", choices=("float32", "bfloat16"))
  param_dtype: str = key("float32", "Dtype of trained parameters.", choices=("float32", "bfloat16"))
  rollout_dtype: str = key("", "Dtype of the sampler's copy; empty means `dtype`.",
                           choices=("", "float32", "bfloat16"))
  remat: str = key("none", "What backward recomputes.", choices=("none", "dots", "full"))
  unroll: int = key(0, "Layers per scan iteration; 0 means all (fastest), 1 compiles fastest.", low=0)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  data: int = key(-1, "Devices over which rows are split; -1 means all that remain.", low=-1)
  fsdp: int = key(1, "Devices over which rows and parameters are split.", low=-1)
  tensor: int = key(1, "Devices over which heads, mlp and vocabulary are split.", low=-1)


@dataclasses.dataclass(frozen=True)
class TasksetConfig:
  name: str = key("train", "Name in metrics and logs.")
  path: str = key("", "JSONL file, one task a row.")
  generate: str = key("", "Instead of `path`: 'module:function' that returns rows.")
  generate_args: dict = key({}, "Keyword arguments of `generate`.")
  prompt_key: str = key("prompt", "Field that holds the prompt text.")
  messages_key: str = key("", "Field that holds chat messages; wins over prompt_key.")
  response_key: str = key("response", "Field that holds a demonstration (supervised training).")
  truth_key: str = key("answer", "Field that the reward function compares with.")
  system_prompt: str = key("", "System message put before every prompt.")
  workflow: str = key("single_turn", "Workflow name or 'module:function'.")
  reward: str = key("math", "Reward name, 'module:function', or several joined by '+'.")
  reward_args: dict = key({}, "Keyword arguments of the reward (weights for several).")
  selector: str = key("shuffle", "Order of tasks.", choices=("sequential", "shuffle"))
  limit: int = key(0, "Use the first so many rows; 0 means all.", low=0)


@dataclasses.dataclass(frozen=True)
class ExplorerConfig:
  batch_size: int = key(8, "Tasks per explorer step.", low=1)
  group_size: int = key(8, "Runs per task.", low=1)
  run_timeout: float = key(1800.0, "Seconds one run may take before it is cancelled.", above=0)
  max_retries: int = key(1, "How often a run that raised is tried again.", low=0)
  reward_workers: int = key(2, "Processes that grade answers.", low=1)
  deterministic: bool = key(True, "Admission to the sampler waits for every run that may still ask, "
                            "so that resumes are exact; False admits as requests come.")


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  slots: int = key(64, "Sequences decoded at once.", low=1)
  max_prompt_length: int = key(1024, "Longest prompt in tokens; longer ones are refused by name.", low=1)
  max_response_length: int = key(1024, "Most tokens sampled per response.", low=1)
  prompt_buckets: tuple = key((), "Prompt lengths programs are compiled for; empty means powers of two.")
  prefill_batches: tuple = key((1, 8), "Prompts per prefill that programs are compiled for.")
  cache_buckets: tuple = key((), "Live cache lengths decode is compiled for; empty means powers of two.")
  steps_per_dispatch: int = key(32, "Most decode steps per dispatch.", low=1)
  refill_fraction: float = key(0.125, "A dispatch returns when this share of the slots is free and "
                               "requests wait.", low=0.0, high=1.0)
  temperature: float = key(1.0, "Temperature of training rollouts.", low=0.0)
  top_p: float = key(1.0, "Nucleus of training rollouts; below 1 needs a correction.", above=0.0, high=1.0)
  top_k: int = key(0, "Candidates of training rollouts; 0 means all.", low=0)


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
  name: str = key("grpo", "Row of the algorithm table, or 'module:function'.")
  advantage: str = key("", "Advantage; empty means the table's.")
  advantage_args: dict = key({}, "Keyword arguments of the advantage.")
  policy_loss: str = key("", "Policy loss; empty means the table's.")
  policy_loss_args: dict = key({}, "Keyword arguments of the policy loss (clip_low, clip_high, ...).")
  kl: str = key("", "KL estimator against the reference; empty means the table's.")
  kl_coef: float = key(-1.0, "Weight of the KL term; -1 means the table's.", low=-1.0)
  entropy_coef: float = key(-1.0, "Weight of the entropy bonus; -1 means the table's.", low=-1.0)
  aggregation: str = key("", "How token losses are averaged; empty means the table's.",
                         choices=("", "token-mean", "seq-mean-token-sum", "seq-mean-token-mean",
                                  "seq-mean-token-sum-norm", "token-sum"))
  shuffle_rewards: bool = key(False, "Control experiment: permute rewards within each step.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  learning_rate: float = key(1e-6, "Peak learning rate.", above=0.0)
  schedule: str = key("constant", "Shape after warm-up.", choices=("constant", "cosine", "linear"))
  warmup_steps: int = key(0, "Steps of linear warm-up.", low=0)
  min_ratio: float = key(0.0, "Final learning rate over the peak (cosine, linear).", low=0.0, high=1.0)
  beta1: float = key(0.9, "Adam's first decay.", low=0.0, high=1.0)
  beta2: float = key(0.999, "Adam's second decay.", low=0.0, high=1.0)
  eps: float = key(1e-8, "Adam's epsilon.", above=0.0)
  weight_decay: float = key(0.0, "Decoupled weight decay of matrices (not norms and biases).", low=0.0)
  clip_norm: float = key(1.0, "Global gradient norm limit.", above=0.0)
  name: str = key("adamw", "Optimizer.", choices=("adamw", "sgd"))


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
  total_steps: int = key(100, "Optimizer steps of the run or stage.", low=1)
  batch_size: int = key(0, "Experiences per step; 0 means tasks x runs of one explorer step.", low=0)
  row_lengths: tuple = key((), "Row lengths steps are compiled for; empty means the longest possible.")
  rows_per_micro: int = key(8, "Rows per micro-batch (over all devices).", low=1)
  save_interval: int = key(50, "Steps between checkpoints.", low=1)
  keep: int = key(2, "Checkpoints kept (the best by held-out accuracy besides).", low=1)
  save_hf: str = key("last", "When to write a Hugging Face folder.", choices=("last", "always", "never"))
  max_nonfinite: int = key(3, "Steps in a row with a non-finite gradient before the run stops.", low=1)
  logprob_limit: float = key(0.0, "Stop when sampler and trainer log-probs differ by more; 0 never.", low=0.0)


@dataclasses.dataclass(frozen=True)
class SyncConfig:
  interval: int = key(1, "Trainer steps between weight publications.", low=1)
  offset: int = key(0, "Steps the explorer runs ahead of the trainer.", low=0)
  timeout: float = key(3600.0, "Seconds to wait for a version or a batch before the run fails.", above=0)


@dataclasses.dataclass(frozen=True)
class BufferConfig:
  capacity: int = key(0, "Most experiences held; a full buffer holds the explorer back. 0 means "
                      "(sync.offset + sync.interval + 1) steps.", low=0)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  tasksets: tuple = key((), "Tasksets (dicts of TasksetConfig keys) evaluated on held-out tasks.")
  interval: int = key(0, "Steps between evaluations; 0 means only at the end.", low=0)
  on_start: bool = key(True, "Evaluate before the first step.")
  temperature: float = key(0.0, "0 is greedy.", low=0.0)
  runs: int = key(1, "Runs per held-out task.", low=1)


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
  tensorboard: bool = key(True, "Write TensorBoard events.")
  wandb: str = key("", "W&B project; empty means off (extra [wandb]).")
  mlflow: str = key("", "MLflow tracking URI; empty means off (extra [mlflow]).")
  progress: str = key("auto", "Live view.", choices=("auto", "live", "plain", "none"))
  samples: int = key(2, "Rollouts shown per step.", low=0)


@dataclasses.dataclass(frozen=True)
class Config:
  name: str = key("run", "Name of the run.")
  mode: str = key("both", "What this process does.", choices=("both", "train", "check"))
  seed: int = key(0, "Seed of everything random.", low=0)
  model: ModelConfig = key(ModelConfig(), "The policy.")
  mesh: MeshConfig = key(MeshConfig(), "Devices.")
  taskset: TasksetConfig = key(TasksetConfig(), "Training tasks.")
  explorer: ExplorerConfig = key(ExplorerConfig(), "Rollouts.")
  sampler: SamplerConfig = key(SamplerConfig(), "Token generation.")
  algorithm: AlgorithmConfig = key(AlgorithmConfig(), "Objective.")
  optimizer: OptimizerConfig = key(OptimizerConfig(), "Optimizer.")
  trainer: TrainerConfig = key(TrainerConfig(), "Optimizer steps and checkpoints.")
  sync: SyncConfig = key(SyncConfig(), "Who waits for whom.")
  buffer: BufferConfig = key(BufferConfig(), "Replay buffer.")
  eval: EvalConfig = key(EvalConfig(), "Held-out evaluation.")
  monitor: MonitorConfig = key(MonitorConfig(), "Metrics and progress.")
  stages: tuple = key((), "Stages run one after the other: dicts with 'name' and keys to override "
                      "('trainer.total_steps' or nested); each starts from the previous one's model.")


# --- from ConfigDict to frozen dataclasses -------------------------------------------------------


def _plain(node) -> Any:
  """Recursively ConfigDict -> dict, list -> tuple."""
  if hasattr(node, "to_dict"):
    node = node.to_dict()
  if isinstance(node, dict):
    return {k: _plain(v) for k, v in node.items()}
  if isinstance(node, (list, tuple)):
    return tuple(_plain(v) for v in node)
  return node


def _defaults(cls) -> dict[str, Any]:
  out = {}
  for f in dataclasses.fields(cls):
    default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
    out[f.name] = _defaults(type(default)) if dataclasses.is_dataclass(default) else default
  return out


def base_config():
  """Returns every key with its default as an unlocked-for-values, locked-for-keys ConfigDict."""
  import ml_collections

  def build(tree):
    out = ml_collections.ConfigDict()
    for k, v in tree.items():
      out[k] = ml_collections.ConfigDict(dict(v)) if isinstance(v, dict) else v
      if isinstance(v, dict) and v:
        out[k] = build(v)
    return out

  config = build(_defaults(Config))
  config.lock()
  for path, _, default in walk():
    if isinstance(default, dict):  # free-form arguments take any key
      node = config
      for part in path.split("."):
        node = node[part]
      node.unlock()
  return config


def walk(cls=Config, prefix: str = ""):
  """Yields (dotted path, metadata, default) of every leaf key."""
  for f in dataclasses.fields(cls):
    default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
    if dataclasses.is_dataclass(default):
      yield from walk(type(default), f"{prefix}{f.name}.")
    else:
      yield f"{prefix}{f.name}", f.metadata, default


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
  values = _plain(config)
  out = _build(Config, values)
  _check_together(out)
  for stage in stage_configs(out):
    _check_together(stage)
  return out


def _merge(tree: dict, override: dict, where: str) -> dict:
  """Overrides leaves of nested dicts; 'a.b' reaches down like nesting does."""
  out = dict(tree)
  for name, value in override.items():
    head, _, rest = name.partition(".")
    if rest:
      value = {rest: value}
    if head not in out:
      raise UserError(f"config.{where}{head}: unknown key{suggestion(head, out)}")
    is_group = dataclasses.is_dataclass(typing.get_type_hints(Config).get(head)) and not where
    if isinstance(out[head], dict) and isinstance(value, dict) and (is_group or rest):
      out[head] = _merge(out[head], value, f"{where}{head}.")
    else:
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
    if not name or "/" in name or name in seen:
      raise UserError(
        f"config.stages[{i}].name = {name!r}: expected a unique name without '/'"
      )
    seen.add(name)
    stages.append(_build(Config, _plain(_merge(base, {**override, "name": name}, ""))))
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
  if c.mode == "both" and not (c.taskset.path or c.taskset.generate):
    raise UserError("config.taskset.path is empty: give a JSONL file, or config.taskset.generate")
  longest = c.sampler.max_prompt_length + c.sampler.max_response_length
  for i, n in enumerate(c.trainer.row_lengths):
    if not isinstance(n, int) or n < 1:
      raise UserError(f"config.trainer.row_lengths[{i}] = {n!r}: expected a positive int")
  if c.trainer.row_lengths and max(c.trainer.row_lengths) < longest:
    raise UserError(
      f"config.trainer.row_lengths = {c.trainer.row_lengths}: the longest row must hold "
      f"{longest} tokens (sampler.max_prompt_length + max_response_length); add {longest}"
    )
  if c.sampler.temperature == 0 and c.explorer.group_size > 1:
    raise UserError(
      "config.sampler.temperature = 0.0: greedy runs of a group are all equal and teach nothing; "
      "use a temperature above 0 or explorer.group_size=1"
    )
  if c.sampler.top_p < 1 or c.sampler.top_k:
    raise UserError(
      f"config.sampler.top_p = {c.sampler.top_p}, top_k = {c.sampler.top_k}: the trainer's "
      "log-probs are those of the whole distribution, so truncated rollouts would be off-policy "
      "without a correction; use top_p=1.0 and top_k=0 for training (evaluation is free to differ)"
    )
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
