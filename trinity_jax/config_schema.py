"""Every configuration key once: name, type, default, meaning, limits. Nothing here imports jax."""

from __future__ import annotations

import dataclasses
from typing import Any


def key(default: Any, doc: str, *, low=None, high=None, choices=None, above=None, each=None) -> Any:
  """A config key.

  Args:
    default: its value unless set; gives the type.
    doc: its meaning in one sentence.
    low, high: inclusive limits. above: exclusive lower limit. choices: allowed values.
    each: type of a tuple's items; ints must be positive.
  """
  meta = dict(doc=doc, low=low, high=high, choices=choices, above=above, each=each)
  if isinstance(default, dict):
    return dataclasses.field(default_factory=lambda: dict(default), metadata=meta)
  if dataclasses.is_dataclass(default):
    return dataclasses.field(default_factory=lambda: default, metadata=meta)
  return dataclasses.field(default=default, metadata=meta)


MODES = ("both", "explore", "train", "bench", "serve", "debug", "check", "plan")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  path: str = key(
    "", "Hugging Face folder to start from; empty with `tiny` set makes a random one."
  )
  tiny: dict = key(
    {}, "Arguments of write_tiny_checkpoint (hidden, layers, ...) for a new tiny model."
  )
  dtype: str = key("float32", "Dtype of activations.", choices=("float32", "bfloat16"))
  param_dtype: str = key("float32", "Dtype of trained parameters.", choices=("float32", "bfloat16"))
  rollout_dtype: str = key(
    "", "Dtype of the sampler's copy; empty means `dtype`.", choices=("", "float32", "bfloat16")
  )
  remat: str = key("none", "What backward recomputes.", choices=("none", "dots", "full"))
  unroll: int = key(
    0, "Layers per scan iteration; 0 means all (fastest), 1 compiles fastest.", low=0
  )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  data: int = key(-1, "Devices over which rows are split; -1 means all that remain.", low=-1)
  fsdp: int = key(1, "Devices over which rows and parameters are split.", low=-1)
  context: int = key(
    1, "Devices over which the tokens of a row are split (in the sampler: slots); for long rows.",
    low=1,
  )  # fmt: skip
  tensor: int = key(1, "Devices over which heads, mlp and vocabulary are split.", low=-1)
  cpu_devices: int = key(
    0,
    "As how many devices to run on a CPU, best as many as cores: XLA runs much of a decode step on "
    "one thread a device. 0 leaves it to JAX (one).",
    low=0,
  )


@dataclasses.dataclass(frozen=True)
class TasksetConfig:
  name: str = key("train", "Name in metrics and logs.")
  path: str = key("", "JSONL file, one task a row.")
  generate: str = key("", "Instead of `path`: 'module:function' that returns rows.")
  generate_args: dict = key({}, "Keyword arguments of `generate`.")
  prompt_key: str = key("prompt", "Field that holds the prompt text.")
  messages_key: str = key("", "Field that holds chat messages; wins over prompt_key.")
  response_key: str = key("response", "Field that holds a demonstration (supervised training).")
  chosen_key: str = key("chosen", "Field that holds the better response of a preference pair.")
  rejected_key: str = key("rejected", "Field that holds the worse one.")
  text_key: str = key("", "Field that holds plain text (continued pre-training); no prompt then.")
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
  run_timeout: float = key(
    1800.0, "Seconds one run may take, its time in the sampler not counted.", above=0
  )
  max_retries: int = key(1, "How often a run that raised is tried again.", low=0)
  retry_on: tuple = key(
    (), "Names of the exceptions that are tried again, those derived from them included; () all."
  )
  quarantine: int = key(
    3,
    "A task whose groups failed whole so often in a row is not run any more by this process; its "
    "groups are empty. 0 never.",
    low=0,
  )
  max_failed_steps: int = key(
    3, "Steps in a row in which every run failed before the program stops.", low=1
  )
  max_logs: int = key(
    1,
    "Token logs of a run that are trained on, the latest ones: a run has several when it begins "
    "further dialogues or rewrites one. A train step has room for batch_size x group_size x "
    "max_logs sequences.",
    low=1,
  )
  min_runs: int = key(
    0,
    "Runs of a group that must not fail: with fewer the group is dropped and another one sampled "
    "in its place. 0 keeps every group, failed runs being empty.",
    low=0,
  )
  reward_workers: int = key(2, "Processes that grade answers.", low=1)
  environment_processes: int = key(
    64,
    "Environments at once that live in processes of their own (own_process); episodes beyond that "
    "wait for one, and their time runs.",
    low=1,
  )
  environment_deadline: float = key(
    300.0,
    "Seconds that such an environment may take to be made, to reset or to step before its process "
    "is killed.",
    above=0,
  )
  environment_memory: int = key(
    0, "MiB that such an environment may allocate (Linux); 0 any.", low=0
  )
  name: str = key("explorer", "Name of this explorer among several.")
  over_rollout: float = key(
    0.0,
    "Share of tasks started beyond batch_size, so that no step waits for its slowest; those are "
    "carried over to later steps while sync.max_staleness allows it.",
    low=0.0,
  )
  timeout_ratio: float = key(
    0.0,
    "Limits a run to so many times the mean time of completed ones, that in the sampler not "
    "counted (1 s at least, run_timeout at most); 0 never.",
    low=0.0,
  )
  deterministic: bool = key(
    True,
    "Admission to the sampler waits for every run that may still ask, "
    "and a step trains on its own groups, so that resumes are exact; False admits as requests come "
    "and trains on the groups that are ready.",
  )


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  engine: str = key(
    "native", "Who samples; openai is a remote server.", choices=("native", "openai")
  )
  engine_args: dict = key(
    {}, "Keyword arguments of a remote engine (base_url, model, dialect ...)."
  )
  devices: int = key(
    0, "Devices the samplers have for themselves, the last ones; 0 shares the training mesh.", low=0
  )
  replicas: int = key(1, "Independent samplers, each on an equal part of the devices.", low=1)
  tensor: int = key(0, "Tensor-parallel size of a sampler of its own devices; 0 means all.", low=0)
  slots: int = key(64, "Sequences decoded at once by each sampler.", low=1)
  max_prompt_length: int = key(
    1024, "Longest prompt in tokens; longer ones are refused by name.", low=1
  )
  max_response_length: int = key(1024, "Most tokens sampled per response.", low=1)
  prompt_buckets: tuple = key(
    (),
    "Chunk lengths prefills are compiled for; empty means powers of two from 64 to "
    "prefill_chunk. Longer prompts take several.",
    each=int,
  )
  prefill_chunk: int = key(1024, "Longest chunk of one prefill.", low=1)
  prefill_batches: tuple = key(
    (1, 8), "Prompts per prefill that programs are compiled for.", each=int
  )
  cache_buckets: tuple = key(
    (), "Live cache lengths decode is compiled for; empty means powers of two from 256.", each=int
  )
  cache_dtype: str = key(
    "",
    "Dtype of the key/value cache; empty means the sampler's. int8 is scaled per entry and head.",
    choices=("", "float32", "bfloat16", "int8"),
  )
  steps_per_dispatch: int = key(32, "Most decode steps per dispatch.", low=1)
  refill_fraction: float = key(
    0.125,
    "A dispatch returns when this share of the slots is free and requests wait.",
    low=0.0,
    high=1.0,
  )
  on_swap: str = key(
    "keep",
    "What becomes of sequences under way when weights change: decode on with the old cache (tokens "
    "are flagged), compute the cache again, or let them end first.",
    choices=("keep", "recompute", "drain"),
  )
  release: bool = key(
    False,
    "Free the sampler's cache and weights while the trainer works (on-policy runs that share the "
    "devices): the peak is that of the larger phase, not of both.",
  )
  scores: bool = key(
    False, "Compile what model.logprobs(tokens) needs: one more program for each of a few lengths."
  )
  temperature: float = key(1.0, "Temperature of training rollouts.", low=0.0)
  top_p: float = key(
    1.0, "Nucleus; training needs the whole distribution, 1.", above=0.0, high=1.0
  )
  top_k: int = key(0, "Candidates of each token; training needs all, 0.", low=0)


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
  name: str = key("grpo", "Row of the algorithm table, or 'module:function'.")
  advantage: str = key("", "Advantage; empty means the table's.")
  advantage_args: dict = key({}, "Keyword arguments of the advantage.")
  policy_loss: str = key("", "Policy loss; empty means the table's.")
  policy_loss_args: dict = key(
    {}, "Keyword arguments of the policy loss (clip_low, clip_high, ...)."
  )
  kl: str = key("", "KL estimator against the reference; empty means the table's.")
  kl_coef: float = key(-1.0, "Weight of the KL term; -1 means the table's.", low=-1.0)
  kl_in: str = key(
    "", "Where the KL penalty goes; empty means the table's.", choices=("", "loss", "reward")
  )
  kl_target: float = key(
    0.0, "KL per token that kl_coef is adapted to; 0 keeps kl_coef fixed.", low=0.0
  )
  kl_horizon: int = key(10000, "Sequences over which an adaptive kl_coef moves.", low=1)
  entropy: str = key("", "Tokens whose entropy the bonus counts; empty means the table's.")
  entropy_coef: float = key(-1.0, "Weight of the entropy bonus; -1 means the table's.", low=-1.0)
  aggregation: str = key(
    "",
    "How token losses are averaged; empty means the table's.",
    choices=(
      "",
      "token-mean",
      "seq-mean-token-sum",
      "seq-mean-token-mean",
      "seq-mean-token-sum-norm",
      "token-sum",
    ),
  )
  correction: str = key(
    "", "Weights for data that another policy or another program sampled; empty means the table's."
  )
  correction_args: dict = key({}, "Keyword arguments of the correction (cap, low, high, ...).")
  proximal: str = key(
    "",
    "What ratios are against: none is the policy that sampled, recompute the one at the start of "
    "the step, loglinear a point between them. Empty means the table's; with a correction and a "
    "loss that has a ratio, recompute.",
    choices=("", "none", "recompute", "loglinear"),
  )
  blend_args: dict = key({}, "Keyword arguments of mixed training's share of experts (mu, ...).")
  reference: str = key(
    "", "Hugging Face folder of the reference model; empty means the stage's first weights."
  )
  teacher: str = key("", "Hugging Face folder of the teacher model (distillation).")
  offload: bool = key(
    False, "Keep reference and teacher in host memory and move them to the devices when used."
  )
  flip_advantages: bool = key(False, "Control experiment: every advantage with its sign turned.")
  shuffle_rewards: bool = key(False, "Control experiment: permute rewards within each step.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  learning_rate: float = key(1e-6, "Peak learning rate.", above=0.0)
  schedule: str = key("constant", "Shape after warm-up.", choices=("constant", "cosine", "linear"))
  warmup_steps: int = key(0, "Steps of linear warm-up.", low=0)
  min_ratio: float = key(
    0.0, "Final learning rate over the peak (cosine, linear).", low=0.0, high=1.0
  )
  beta1: float = key(0.9, "Adam's first decay.", low=0.0, high=1.0)
  beta2: float = key(0.999, "Adam's second decay.", low=0.0, high=1.0)
  eps: float = key(1e-8, "Adam's epsilon.", above=0.0)
  weight_decay: float = key(
    0.0, "Decoupled weight decay of matrices (not norms and biases).", low=0.0
  )
  clip_norm: float = key(1.0, "Global gradient norm limit.", above=0.0)
  name: str = key("adamw", "Optimizer.", choices=("adamw", "sgd"))


@dataclasses.dataclass(frozen=True)
class CriticConfig:
  path: str = key("", "Hugging Face folder it starts from; empty means the policy's.")
  learning_rate: float = key(1e-5, "Peak learning rate; the rest as for the policy.", above=0.0)
  clip: float = key(0.2, "How far a value may move per step before its loss is clipped.", above=0.0)
  warmup: int = key(0, "First steps in which only the critic learns.", low=0)


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
  taskset: dict = key({}, "Taskset (dict of `taskset` keys) of the demonstrations.")
  batch_size: int = key(0, "Demonstrations per optimizer step beside the rollouts.", low=0)


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
  total_steps: int = key(100, "Optimizer steps of the run or stage.", low=1)
  batch_size: int = key(
    0, "Experiences per step; 0 means tasks x runs of one explorer step.", low=0
  )
  row_lengths: tuple = key(
    (), "Row lengths steps are compiled for; empty means the longest possible.", each=int
  )
  minibatches: int = key(
    1, "Updates per batch, each on an equal part of its groups; a step is a batch.", low=1
  )
  rows_per_micro: int = key(8, "Rows per micro-batch (over all devices).", low=1)
  offload: str = key(
    "none", "What is in host memory between updates: 'optimizer', the moments (also the critic's).",
    choices=("none", "optimizer"),
  )  # fmt: skip
  save_interval: int = key(50, "Steps between checkpoints.", low=1)
  keep: int = key(2, "Checkpoints kept (the best by held-out accuracy besides).", low=1)
  save_hf: str = key(
    "last", "When to write a Hugging Face folder.", choices=("last", "always", "never")
  )
  max_nonfinite: int = key(
    3, "Steps in a row with a non-finite gradient before the run stops.", low=1
  )
  logprob_limit: float = key(
    0.0, "Stop when sampler and trainer log-probs differ by more; 0 never.", low=0.0
  )


@dataclasses.dataclass(frozen=True)
class SyncConfig:
  style: str = key(
    "fixed",
    "Who decides when the explorer changes its weights: fixed takes exactly the version of the "
    "timeline; trainer_driven the newest there is at each explorer step; explorer_driven asks for "
    "one every sync.interval explorer steps; fully_async takes each as it comes, mid-rollout.",
    choices=("fixed", "trainer_driven", "explorer_driven", "fully_async"),
  )
  interval: int = key(1, "Trainer steps between weight publications.", low=1)
  offset: int = key(0, "Steps the explorer runs ahead of the trainer.", low=0)
  max_staleness: int = key(
    -1,
    "Most trainer steps between the policy that sampled a token and the one it trains: bounds how "
    "far explorers run ahead, and older tokens are left out. -1 is the style's own.",
    low=-1,
  )
  allow_uncorrected: bool = key(
    False, "Let an objective without ratio or correction learn from data of older versions."
  )
  timeout: float = key(
    3600.0, "Seconds to wait for a version or a batch before the run fails.", above=0
  )


@dataclasses.dataclass(frozen=True)
class BufferConfig:
  url: str = key(
    "sqlite",
    "Where experiences are kept: sqlite (a file in the run's folder), memory (lost with the "
    "process; its groups are sampled again), or postgresql://user@host/database.",
  )
  durability: str = key(
    "process",
    "What accepted experiences survive in SQLite: the kill of every process, or a power cut too "
    "(each transaction is synced to the disk).",
    choices=("process", "power"),
  )
  namespace: str = key(
    "",
    "First part of the PostgreSQL schema's name, which every process of the run must give alike; "
    "empty: a name of the run's own, kept in its folder.",
  )
  keep: bool = key(
    False, "Keep what has been trained on, so that the run can be replayed (buffer.replay)."
  )
  replay: str = key(
    "", "Folder of a recorded run's stage: train on its experiences in their order, sample nothing."
  )
  max_uses: int = key(1, "How often a group may be trained on.", low=1)
  cool_down: int = key(0, "Trainer steps before a group may be used again.", low=0)
  priority: str = key(
    "", "Which groups first: linear_decay, decay_limit_randomization or 'module:function'; empty "
    "means the oldest."
  )
  priority_args: dict = key({}, "Keyword arguments of the priority.")
  lease: float = key(
    30.0, "Seconds after which the work of an explorer that shows no sign of life is given to "
    "another.", above=0
  )
  capacity: int = key(
    0,
    "Most experiences held; a full buffer holds the explorer back. 0 means "
    "(sync.offset + sync.interval + 1) steps.",
    low=0,
  )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  tasksets: tuple = key(
    (), "Tasksets (dicts of `taskset` keys) evaluated on held-out tasks.", each=dict
  )
  interval: int = key(0, "Steps between evaluations; 0 means only at the end.", low=0)
  on_start: bool = key(True, "Evaluate before the first step.")
  texts: dict = key(
    {},
    "Supervised training: taskset (dict of `taskset` keys) of held-out texts of the same kind; "
    "their loss is evaluated.",
  )
  temperature: float = key(0.0, "0 is greedy.", low=0.0)
  runs: int = key(1, "Runs per held-out task.", low=1)
  first: bool = key(True, "Evaluation requests are admitted before waiting training rollouts.")


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
  tensorboard: bool = key(True, "Write TensorBoard events.")
  wandb: str = key("", "W&B project; empty means off (extra [wandb]).")
  mlflow: str = key("", "MLflow tracking URI; empty means off (extra [mlflow]).")
  progress: str = key("auto", "Live view.", choices=("auto", "live", "plain", "none"))
  samples: int = key(2, "Rollouts shown per step.", low=0)
  stall: float = key(
    7200.0,
    "Seconds without any progress after which the run names who holds it up and stops.",
    above=0,
  )


@dataclasses.dataclass(frozen=True)
class ServerConfig:
  host: str = key("127.0.0.1", "Address that the server listens on; the default is this machine.")
  port: int = key(0, "Port; 0 takes a free one and prints it.", low=0)
  model: str = key("policy", "Name under which the policy is served.")
  max_body: int = key(8 * 2**20, "Largest request, in bytes.", low=1)
  rate: float = key(0.0, "Requests a second that a bearer token may make; 0 any.", low=0.0)
  deadline: float = key(600.0, "Seconds after which a request is given up.", above=0)
  record: bool = key(
    False,
    "serve: sessions (header x-session-id) become training data of the run in --workdir, which a "
    "process with --mode=train trains, and whose weights are served as they come.",
  )
  session_timeout: float = key(
    3600.0, "Seconds without a request after which such a session is dropped.", above=0
  )
  max_sessions: int = key(1024, "Such sessions open at once, or waiting for their reward.", low=1)
  certificate: str = key("", "PEM file; the server speaks TLS with it and its private_key.")
  private_key: str = key("", "PEM file.")


@dataclasses.dataclass(frozen=True)
class Config:
  name: str = key("run", "Name of the run.")
  mode: str = key(
    "both",
    "What this process does: both; explore and train, in processes of their own; bench evaluates "
    "every checkpoint; serve answers requests; debug runs one task; check and plan run nothing.",
    choices=MODES,
  )
  seed: int = key(0, "Seed of everything random.", low=0)
  model: ModelConfig = key(ModelConfig(), "The policy.")
  mesh: MeshConfig = key(MeshConfig(), "Devices.")
  taskset: TasksetConfig = key(TasksetConfig(), "Training tasks.")
  explorer: ExplorerConfig = key(ExplorerConfig(), "Rollouts.")
  sampler: SamplerConfig = key(SamplerConfig(), "Token generation.")
  algorithm: AlgorithmConfig = key(AlgorithmConfig(), "Objective.")
  optimizer: OptimizerConfig = key(OptimizerConfig(), "Optimizer.")
  critic: CriticConfig = key(CriticConfig(), "Value model, for algorithms that have one.")
  experts: ExpertsConfig = key(ExpertsConfig(), "Demonstrations of mixed training.")
  trainer: TrainerConfig = key(TrainerConfig(), "Optimizer steps and checkpoints.")
  sync: SyncConfig = key(SyncConfig(), "Who waits for whom.")
  buffer: BufferConfig = key(BufferConfig(), "Replay buffer.")
  eval: EvalConfig = key(EvalConfig(), "Held-out evaluation.")
  monitor: MonitorConfig = key(MonitorConfig(), "Metrics and progress.")
  server: ServerConfig = key(ServerConfig(), "OpenAI-compatible server.")
  stages: tuple = key(
    (),
    "Stages run one after the other: dicts with 'name' and keys to override "
    "('trainer.total_steps' or nested); each starts from the previous one's model.",
    each=dict,
  )
