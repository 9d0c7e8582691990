"""Numbers about rollouts and evaluations, under the names of monitor.metrics."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trinity_jax.experience import Experience, StopReason
from trinity_jax.monitor.metrics import reduce_metrics, stats

_OWN = ("run_seconds", "environment_seconds", "retries", "logs", "logs_dropped")  # not for curves
_OF_LOGS = ("prompt_length", "response_length", "num_turns", "mixed_tokens")  # others: of runs


def accuracy(experience: Experience) -> float:
  """The component named accuracy (at least 0), else the first one; 0 for a failed run."""
  rewards = {k: v for k, v in experience.metrics.items() if k.startswith("rewards/")}
  if "rewards/accuracy" in rewards:  # some rewards say -1 where the answer is wrong
    return max(rewards["rewards/accuracy"], 0.0)
  return next(iter(rewards.values()), 0.0)


def eval_metrics(
  name: str, groups: Sequence[Sequence[Experience]], *, main: bool
) -> dict[str, float]:
  """Accuracy (mean over tasks and runs), pass@k and mean reward of one held-out set.

  A run has solved its task when its accuracy is 1: points for the form of an answer solve nothing.
  """
  scores = np.array([[accuracy(e) for e in group] for group in groups])
  runs = scores.shape[1]
  out = {
    f"eval/{name}/accuracy": float(scores.mean()),
    f"eval/{name}/avg@{runs}": float(
      np.mean([[e.reward or 0.0 for e in group] for group in groups])
    ),
  }
  if runs > 1:
    out[f"eval/{name}/pass@{runs}"] = float((scores.max(axis=1) >= 1 - 1e-6).mean())
  if main:
    out["eval/accuracy"] = out[f"eval/{name}/accuracy"]
  return out


def of_runs(experiences: Sequence[Experience]) -> list[Experience]:
  """The last experience of each run, in the order of the runs' first."""
  last: dict[tuple[int, int, int], Experience] = {}
  for e in experiences:
    known = last.setdefault(e.id[:3], e)
    if e.id.step > known.id.step:
      last[e.id[:3]] = e
  return list(last.values())


def rollout_metrics(experiences: Sequence[Experience], group_size: int) -> dict[str, float]:
  """What the rollouts of one step were like, under the names of monitor.metrics.

  Shares and rewards are those of runs, which their last experiences stand for.
  """
  runs = of_runs(experiences)
  n = len(runs)
  good = [e for e in runs if e.num_actions]
  rewards = [e.reward for e in good if e.reward is not None]
  out = stats(rewards, "reward") if rewards else {}
  reasons = collections.Counter(e.stop_reason.name.lower() for e in runs)
  out |= {f"stop/{k}": v / n for k, v in reasons.items()}
  out |= {
    "rollout/count": n,
    "rollout/empty": 1 - len(good) / n,
    "rollout/errored": sum(e.stop_reason is StopReason.ERROR for e in runs) / n,
    "rollout/logs": sum(e.metrics.get("logs", 0) for e in runs) / n,
    "rollout/logs_dropped": sum(e.metrics.get("logs_dropped", 0) for e in runs),
    "clip_ratio": sum(e.stop_reason is StopReason.LENGTH for e in runs) / n,
    "aborted_ratio": sum(
      e.stop_reason in (StopReason.TIMEOUT, StopReason.ABORTED) for e in runs
    )
    / n,
  }
  errors = collections.Counter(e.info.get("type", "unknown") for e in runs
                               if e.stop_reason is StopReason.ERROR)  # fmt: skip
  out |= {f"error/{k}/count": v for k, v in errors.items()}
  if good:
    several = [len(set(e.versions[e.action_mask].tolist())) > 1 for e in good]
    out["partial_ratio"] = float(np.mean(several))
  out |= group_metrics(experiences, group_size)
  components: list[Mapping[str, Any]] = [
    {k: v for k, v in e.metrics.items() if k not in (*_OWN, *_OF_LOGS)} for e in good
  ]
  components += [
    {k: v for k, v in e.metrics.items() if k in _OF_LOGS} for e in experiences if e.num_actions
  ]
  return out | reduce_metrics(components)


def group_metrics(experiences: Sequence[Experience], group_size: int) -> dict[str, float]:
  """Share of groups whose runs do not differ in reward, all solved, none solved."""
  groups: dict[tuple[int, int], list[float]] = {}
  for e in of_runs(experiences):
    if e.num_actions and e.reward is not None:
      groups.setdefault(e.id.group, []).append(e.reward)
  if not groups or group_size == 1:
    return {}
  flat = [len(set(g)) == 1 for g in groups.values()]
  best = max(max(g) for g in groups.values())
  return {
    "group/count": len(groups),
    "frac_reward_zero_std": float(np.mean(flat)),
    "group/solve_all": float(np.mean([min(g) >= max(best, 1e-9) for g in groups.values()])),
    "group/solve_none": float(np.mean([max(g) <= 0 for g in groups.values()])),
  }
