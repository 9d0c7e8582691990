"""The catalogue of metric names, and the reductions that make them.

Every name that a run logs is documented here; a test compares. A name may hold places in braces,
each of which stands for one path segment: `rewards/{fn}/mean` documents `rewards/math/mean`.
Names without a prefix (`entropy`, `ppo_kl`, `frac_reward_zero_std`, ...) are the ones that people
who train with other RL libraries already know.

Families made by `reduce_metrics` carry `/mean`, `/min`, `/max` and `/std` (population).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from trinity_jax.monitor.files import as_number

STATS = ("mean", "min", "max", "std")


@dataclasses.dataclass(frozen=True)
class Metric:
  """One documented name: `unit` as printed, `meaning` in a sentence, `source` = who computes it."""

  name: str
  unit: str
  meaning: str
  source: str


# One line each: name | unit | meaning. A trailing * stands for the family /mean /min /max /std.
_TEXT: dict[str, str] = {
  "run": """
    stage | index | position of the stage in the config's `stages`
    epoch | epochs | how often the taskset has been gone through
    policy_version | version | version of the parameters after this step
    monitor/write_failures | count | rows that a metrics writer failed to write, so far
    compile/count | count | XLA compilations so far (a persistent-cache load counts too)
    compile/seconds | s | time spent in them so far
    compile/after_warmup | count | compilations since the warm-up ended; expected 0
    memory/rss_mb | MB | resident memory of this process
    memory/peak_rss_mb | MB | its peak so far
    memory/hbm_peak_gb | GB | peak device memory, worst device
  """,
  "explorer": """
    reward* | reward | total reward of the rollouts of this step, before shaping
    reward_used* | reward | what the advantage saw, after shaping and penalties
    reward/{env} | reward | mean reward of one environment or task type
    rewards/{fn}* | reward | one reward function
    rollout/count | rollouts | rollouts finished for this step
    rollout/empty | fraction | rollouts without a trainable token
    rollout/errored | fraction | rollouts that ended in an error
    rollout/logs | logs | token logs per rollout
    rollout/logs_dropped | logs | token logs of this step beyond explorer.max_logs, not trained on
    error/{type}/count | count | errors of one exception type
    stop/{reason} | fraction | rollouts that ended for this reason
    prompt_length* | tokens | prompt tokens per rollout
    response_length* | tokens | tokens written by the policy per rollout
    response_length_terminated* | tokens | the same, over rollouts that ended by themselves
    clip_ratio | fraction | rollouts cut at the length limit; alarm above 0.05
    no_eos_ratio | fraction | rollouts whose last token is no stop token
    aborted_ratio | fraction | rollouts given up (timeout, shutdown)
    num_turns* | turns | assistant turns per rollout
    tool_call_counts* | calls | tool calls per rollout
    tool_failure_rate | fraction | tool calls that failed
    observation_token_share | fraction | tokens that the policy did not write, prompts excluded
    reward_latency* | s | wall time of one reward call
    grader/{verdict} | count | verdicts of the math grader in this step, its failures included
    env/timeouts | count | environment calls that ran into their deadline
    env/retries | count | environment calls that were repeated
    event_loop_lag/p99 | s | delay of the explorer's event loop
    workflow/{metric}* | as reported | a metric that a workflow attached to its experiences
  """,
  "eval": """
    eval/accuracy | fraction | greedy accuracy on the main held-out set
    eval/{taskset}/accuracy | fraction | greedy accuracy on one held-out set
    eval/{taskset}/avg@{k} | reward | mean reward over k samples per task
    eval/{taskset}/pass@{k} | fraction | tasks for which at least one of k samples has accuracy 1
    eval/{taskset}/{metric}/{stat} | as reported | another metric of one held-out set
    eval/count | tasks | tasks evaluated
  """,
  "buffer": """
    frac_reward_zero_std | fraction | groups whose rewards are all equal: no gradient from them
    groups_zero_std | groups | their number
    groups_of_one | groups | groups with one valid run, which have nothing to compare with
    group/count | groups | groups of this step
    group/solve_all | fraction | groups in which every run got the full reward
    group/solve_none | fraction | groups in which no run got any reward
    group/filtered | groups | groups that an operator dropped
    group/effective_batch_size | experiences | experiences with a non-zero advantage
    group/refill_count | count | extra explorer rounds needed to fill the step
    experience/count | experiences | experiences trained on
    queue/depth | groups | complete groups waiting
    queue/in_flight | rollouts | rollouts being generated
    queue/carried_over | experiences | experiences that did not fit this step and wait for the next
    staleness* | versions | trainer version minus the version that wrote a token
    staleness/worst | versions | largest staleness seen so far
    staleness/mixed_tokens | fraction | tokens sampled in a context of several versions
    staleness/masked_tokens | tokens | action tokens left out so far for their staleness
    queue/dropped_groups | groups | groups dropped so far: every token too stale, or short
    queue/short_groups | groups | those with fewer good runs than explorer.min_runs, this process's
    queue/regenerated | groups | groups sampled again after a restart, equal to what was stored
    queue/regenerated_otherwise | groups | the same, but not equal
    stale_dropped | experiences | experiences dropped for their staleness
    trajectory_spans* | versions | distinct policy versions inside one trajectory
    partial_ratio | fraction | trajectories with more than one policy version
    max_partial_span | versions | most versions inside one trajectory
  """,
  "trainer": """
    loss | nats | what the optimizer minimised
    loss/nan_count | count | updates skipped so far for a non-finite loss or gradient
    nonfinite_steps | steps | non-finite updates in a row; the run stops at a limit
    pg_loss | nats | policy-gradient part of the loss
    kl_loss | nats | KL part of the loss, with its coefficient
    entropy_loss | nats | entropy part of the loss, with its coefficient
    sft_loss | nats/token | negative log-likelihood of the demonstrations
    nll | nats/token | negative log-likelihood of the tokens trained on, whatever their weight
    token_accuracy | fraction | demonstration tokens that are the policy's argmax
    entropy | nats/token | entropy of the policy
    ppo_kl | nats/token | k1 estimate of KL(behaviour, policy)
    ppo_kl_k3 | nats/token | k3 estimate of the same
    kl | nats/token | KL to the reference policy, estimator as configured
    pg_clipfrac | fraction | tokens whose gradient the clip removed
    pg_clipfrac_high | fraction | of these, at the upper bound
    pg_clipfrac_low | fraction | of these, at the lower bound
    pg_clipfrac_dual | fraction | tokens at the dual-clip bound
    ratio* | ratio | policy / behaviour probability per token
    advantages* | advantage | advantage per token trained on
    returns* | reward | return per token trained on
    pg_masked | fraction | tokens that the loss left out
    pg_sequence_masked | fraction | tokens of sequences that the loss left out
    sequence_ratio/mean | ratio | of whole sequences, as the loss has it
    sequence_ratio/max | ratio | its largest
    dppo/masked | fraction | tokens outside of the trust region and on their way out
    dppo/masked_high | fraction | of these, upwards
    dppo/masked_low | fraction | of these, downwards
    m2po/masked | fraction | tokens left out so that the second moment stays below its bound
    m2po/second_moment | nats^2 | mean squared log ratio of the tokens kept
    cov/selected | fraction | tokens picked for their covariance of log-prob and advantage
    cov/distance | nats | mean |log ratio| of these
    rec/weight | ratio | mean weight of a token
    sapo/slope | ratio | mean slope of the soft gate
    topr/weight | ratio | mean tapered weight of negative sequences
    topr/weight_min | ratio | its smallest
    sft/weight | 1 | mean weight of a demonstration's token
    expert/tokens | tokens | experts' tokens among those trained on
    dpo/accuracy | fraction | pairs whose chosen response has gained more than the rejected one
    dpo/margin | nats | beta x (log p/ref of chosen - that of rejected)
    dpo/chosen | nats | beta x log p/ref of chosen responses
    dpo/rejected | nats | beta x log p/ref of rejected responses
    dpo/pairs | pairs | pairs of this step
    dpo/unpaired | sequences | sequences without a partner; they teach nothing
    correction/ess | fraction | effective sample size of the weights / tokens
    correction/k1 | nats/token | k1 KL of the policy that sampled against the proximal one
    correction/k3 | nats/token | k3 of the same
    correction/rejected | fraction | tokens whose weight is 0
    correction/truncated | fraction | tokens whose weight was capped
    correction/weight_max | ratio | largest weight
    correction/weight_mean | ratio | mean weight
    anchored | fraction | sequences that share their environment state with another (GiGPO)
    entropy_clip/dropped | fraction | tokens dropped for what they would do to the entropy
    entropy_clip/dropped_negative | fraction | of tokens with a negative advantage
    teacher_kl | nats/token | KL of the policy that sampled against the teacher
    critic/returns_mean | reward | what the critic learns to say, mean over tokens
    critic/values_mean | reward | what it said, mean over tokens
    critic/explained_variance | fraction | 1 - variance of (returns - values) / variance of returns
    vf_explained_var | fraction | the same after the update's own values
    dropped | fraction | sequences dropped by the advantage
    selected | fraction | sequences learned from (RAFT)
    eval/loss | nats | loss of the held-out texts (supervised training)
    kl_coef | 1 | weight of the KL penalty, where it is adapted
    blend/mu | fraction | the experts' share of the loss in mixed training
    vf_loss | reward^2 | loss of the critic
    vf_clipfrac | fraction | tokens whose value loss is clipped
    critic/grad_norm | norm | gradient norm of the critic before clipping
    grad_norm | norm | global gradient norm before clipping
    update_norm | norm | global norm of the parameter update
    param_norm | norm | global norm of the parameters
    lr | 1 | learning rate of this update
    logprob_diff* | nats | |trainer's minus sampler's log-prob|, same parameters, per token
    logprob_diff/p999 | nats | 99.9th percentile (nearest rank) of the same
    mismatch/k1 | nats/token | k1 KL between sampler and trainer under the same parameters
    mismatch/k3 | nats/token | k3 of the same
    mismatch/chi2 | 1 | chi-square of the same
    mismatch/pearson | 1 | correlation of the two probabilities
    mismatch/is_mean | ratio | mean importance weight; expected 1
    mismatch/is_std | ratio | its standard deviation
    mismatch/is_max | ratio | its maximum
    mismatch/ess | fraction | effective sample size / tokens
    mismatch/frac_truncated | fraction | tokens whose weight was truncated or masked
    mismatch/ppl_ratio | ratio | training / rollout perplexity
    packing/efficiency | fraction | tokens that are no padding, of the rows computed
    packing/rows | rows | rows computed in this step
    packing/micro_batches | count | live micro-batches of this step
    global_seqlen/minmax_diff | tokens | heaviest minus lightest device
    throughput/train_tokens_per_s | tokens/s | tokens trained on / time in `train`
    throughput/tokens_per_s | tokens/s | tokens trained on / wall time of the step
    throughput/tokens_per_s_per_chip | tokens/s | the same per device
    perf/mfu/actor | fraction | model FLOP/s in `train` / the devices' peak
    timing_per_token_ms/{phase} | ms | wall time of a phase per token it handled
  """,
  "sampler": """
    throughput/gen_tokens_per_s | tokens/s | tokens sampled / time in `prefill` and `decode`
    throughput/gen_tokens_per_s_per_chip | tokens/s | the same per device
    perf/mfu/actor_infer | fraction | model FLOP/s while sampling / the devices' peak
    sampler/running | requests | requests in slots
    sampler/waiting | requests | requests waiting for a slot
    sampler/slot_occupancy | fraction | busy slots, mean over decode steps
    sampler/kv_cache_use | fraction | cache entries in use
    mixed_tokens* | tokens | per run, sampled in a context that another version had computed
    sampler/prefix_cache_hit_rate | fraction | prompt tokens that needed no prefill
    sampler/host_share | fraction | the sampler thread's own time / its time with work to do
    sampler/roofline | fraction | decode time that measured matmul and copy rates allow / real
    sampler/decode_steps | count | decode steps of this step
  """,
  "timeline": """
    time/step | s | wall time since the previous step
    time/{category} | s | wall time in which some thread was in this category
    time_split/{category} | % | share of the step's wall time; all of them sum to 100
    trainer/idle_ratio | fraction | wall time in which nobody trained, published or checkpointed
    rollout/idle_ratio | fraction | wall time in which nobody sampled, stepped or graded
  """,
}


def _build() -> dict[str, Metric]:
  out: dict[str, Metric] = {}
  for source, text in _TEXT.items():
    for line in text.strip().splitlines():
      # maxsplit: a meaning may contain "|x|".
      name, unit, meaning = (part.strip() for part in line.split(" | ", 2))
      names = [f"{name[:-1]}/{stat}" for stat in STATS] if name.endswith("*") else [name]
      for full in names:
        prefix = f"{full.rsplit('/', 1)[1]} of: " if name.endswith("*") else ""
        assert full not in out, f"metric {full!r} is documented twice"
        out[full] = Metric(full, unit, prefix + meaning, source)
  return out


CATALOGUE: Mapping[str, Metric] = _build()


@functools.cache
def _patterns() -> tuple[tuple[re.Pattern[str], Metric], ...]:
  found = []
  for name, metric in CATALOGUE.items():
    if "{" in name:
      parts = re.split(r"\{\w+\}", name)
      found.append((re.compile("[^/]+".join(re.escape(p) for p in parts)), metric))
  return tuple(found)


def lookup(name: str) -> Metric | None:
  """Returns the documentation of a logged name, or None; exact names win over patterns."""
  if name in CATALOGUE:
    return CATALOGUE[name] if "{" not in name else None
  return next((m for pattern, m in _patterns() if pattern.fullmatch(name)), None)


def undocumented(names: Iterable[str]) -> list[str]:
  """Returns the names that the catalogue does not know, sorted (`step`, `time`: no metrics)."""
  return sorted(n for n in set(names) - {"step", "time"} if lookup(n) is None)


def render_table() -> str:
  """Returns the catalogue as a markdown table, for the documentation."""
  rows = ["| name | unit | meaning | source |", "|---|---|---|---|"]
  for m in CATALOGUE.values():
    meaning = m.meaning.replace("|", "\\|")
    rows.append(f"| `{m.name}` | {m.unit} | {meaning} | {m.source} |")
  return "\n".join(rows) + "\n"


# --- reductions ----------------------------------------------------------------------------------


def stats(values: Any, name: str, which: Sequence[str] = STATS) -> dict[str, float]:
  """Returns `{name/mean, name/min, name/max, name/std}` of a flat or nested array.

  Computed in float64; std is the population's (ddof 0). NaN and infinity are not hidden: they
  propagate. No values gives an empty dict: a metric that was not measured is not logged.

  Raises:
    ValueError: an unknown statistic.
  """
  known = {"mean": np.mean, "min": np.min, "max": np.max, "std": np.std, "sum": np.sum}
  unknown = [w for w in which if w not in known]
  if unknown:
    raise ValueError(f"unknown statistic {unknown[0]!r} for {name!r}; known: {', '.join(known)}")
  array = np.asarray(values, np.float64).reshape(-1)
  if not array.size:
    return {}
  with np.errstate(invalid="ignore"):  # inf - inf in std: NaN is the answer
    return {f"{name}/{w}": float(known[w](array)) for w in which}


def reduce_metrics(
  rows: Iterable[Mapping[str, Any]], prefix: str = "", which: Sequence[str] = STATS
) -> dict[str, float]:
  """Reduces per-experience metrics to one flat dict.

  A key may end in `:mean`, `:sum`, `:min`, `:max`, `:std` or `:last`, which gives that one number
  under the key without its suffix (`:mean` and a plain key give the family `which`). A key is
  reduced over the rows that have it; None counts as absent.

  Raises:
    ValueError: an unknown suffix, or two keys that end in the same name.
    TypeError: a value that is no number.
  """
  columns: dict[str, list[float]] = {}
  for row in rows:
    for key, value in row.items():
      if value is not None:
        columns.setdefault(key, []).append(float(as_number(key, value)))
  out: dict[str, float] = {}
  for key, values in columns.items():
    base, _, suffix = key.partition(":")
    name = f"{prefix}/{base}" if prefix else base
    if suffix in ("", "mean"):
      new = stats(values, name, which)
    elif suffix == "last":
      new = {name: values[-1]}
    elif suffix in ("sum", "min", "max", "std"):
      new = {name: stats(values, name, (suffix,))[f"{name}/{suffix}"]}
    else:
      raise ValueError(f"metric {key!r}: unknown suffix {suffix!r}; "
                       "known: mean, sum, min, max, std, last")
    clash = new.keys() & out.keys()
    if clash:
      raise ValueError(f"metric {key!r} gives {sorted(clash)[0]!r}, which another key gave already")
    out.update(new)
  return out


def percentile(values: Any, percent: float | str) -> float:
  """Returns the nearest-rank percentile: the smallest value with at least percent % at or below it.

  Exact: an element of `values`, no interpolation, rank ceil(N percent / 100) in rational
  arithmetic (99.9 is read as 999/1000, not as its nearest binary float). NaN anywhere gives NaN.

  Raises:
    ValueError: no values, or a percent outside [0, 100].
  """
  share = Fraction(str(percent)) / 100
  array = np.asarray(values).reshape(-1)
  if not array.size:
    raise ValueError(f"percentile {percent} of no values")
  if not 0 <= share <= 1:
    raise ValueError(f"percent is {percent}, expected 0 to 100")
  if np.isnan(array).any():
    return math.nan
  rank = max(math.ceil(share * array.size), 1)
  return float(np.partition(array, rank - 1)[rank - 1])


def tail(values: Any, name: str, percents: Sequence[float | str] = (99.9,)) -> dict[str, float]:
  """Returns `{name/p999: ...}` for percents (99.9,), digits without the dot; {} of no values."""
  if not np.size(values):
    return {}
  return {f"{name}/p{str(p).replace('.', '')}": percentile(values, p) for p in percents}
