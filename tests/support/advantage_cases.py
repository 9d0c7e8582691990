"""Every advantage once more: float64 numpy, loops over sequences and tokens, no code in common.

CASES holds (name, reference, options); reference(step, **options) gives one number per sequence or
one array of action tokens per sequence.
"""

from __future__ import annotations

import algorithm_steps as steps
import numpy as np


def groups_of(step, key=lambda i, s: s["group_ids"][i], of=None):
  """Lists of the valid sequences with the same key."""
  out = {}
  for i in np.flatnonzero(step.sequences["valid"] if of is None else of):
    out.setdefault(key(i, step.sequences), []).append(i)
  return list(out.values())


def normalised(r, eps=1e-6, std=True, deviation=None):
  """(r - mean) / (std + eps), alone: mean 0, std 1, all equal: 0."""
  r = np.asarray(r, np.float64)
  if len(r) > 1 and (r == r[0]).all():
    return np.zeros(len(r))
  own = r.std(ddof=1) if len(r) > 1 else 1.0
  scale = (own if deviation is None else deviation) + eps if std else 1.0
  return (r - (r.mean() if len(r) > 1 else 0.0)) / scale


def per_sequence(function):
  """function(step, members, rewards of members) -> their advantages."""

  def reference(step, **options):
    out = np.zeros(step.count)
    for members in groups_of(step):
      out[members] = function(step, members, step.sequences["rewards"][members], **options)
    return out

  return reference


def grpo(step, std_level="group", std_threshold=None, duplicate_experiences=False,
         rank_penalty=0.0, std=True):  # fmt: skip
  valid = step.sequences["valid"]
  rewards = step.sequences["rewards"].copy()
  old = [x.mean() if len(x) else 0.0 for x in steps.actions(step, "old_logprob")]
  for g in groups_of(step):
    for i in g:
      rank = sum(old[j] < old[i] for j in g)
      rewards[i] = rewards[i] * (1 - rank_penalty * rank / len(g))
  batch = None
  if std_level == "batch":
    batch = rewards[valid].std(ddof=1) if valid.sum() > 1 else 1.0
  out, signal = np.zeros(step.count), 0
  for g in groups_of(step):
    r = rewards[g]
    if len(g) > 1 and (r == r[0]).all():
      continue
    if std_threshold is not None and (len(g) == 1 or r.std(ddof=1) <= std_threshold):
      continue
    out[g] = normalised(r, std=std, deviation=batch)
    signal += len(g)
  return out * (valid.sum() / max(signal, 1)) if duplicate_experiences else out


@per_sequence
def rloo(step, members, r):
  if len(r) == 1:
    return r
  return [x - (r.sum() - x) / (len(r) - 1) for x in r]


@per_sequence
def opmd(step, members, r, baseline="mean", tau=1.0):
  if len(r) == 1:
    return r
  return r - (r.mean() if baseline == "mean" else tau * np.log(np.exp(r / tau).mean()))


@per_sequence
def asymre(step, members, r, shift=-0.1):
  return r if len(r) == 1 else r - (r.mean() + shift)


@per_sequence
def rec(step, members, r, std=False):
  if len(r) == 1:
    return r / (1 + 1e-6) if std else r
  return (r - r.mean()) / (r.std() + 1e-6) if std else r - r.mean()


@per_sequence
def maxrl(step, members, r):
  return (r - r.mean()) / r.mean() if r.mean() > 0 else 0 * r


@per_sequence
def opo(step, members, r):
  if len(r) == 1:
    return r
  length = np.array([step.action[i].sum() for i in members])
  # No token, no matter: then every advantage of the group is masked.
  return r - (length * r).sum() / length.sum() if length.sum() else r - r.mean()


@per_sequence
def raft(step, members, r, threshold=None):
  return r == r.max() if threshold is None else r > threshold


def of_valid(function):
  def reference(step, **options):
    s = step.sequences
    clean = {k: np.where(s["valid"], v, 0) for k, v in s.items()}
    return np.where(s["valid"], function(clean), 0)

  return reference


def runs_of(step):
  out = groups_of(step, lambda i, s: (s["group_ids"][i], s["run_ids"][i]))
  return [sorted(run, key=lambda i: step.sequences["step_ids"][i]) for run in out]


def step_wise_grpo(step, step_norm=False, std_level="group", std_threshold=None):
  s, runs, out = step.sequences, runs_of(step), np.zeros(step.count)
  last = {tuple(run): s["rewards"][run[-1]] for run in runs}
  every = np.array(list(last.values()))
  batch = None if std_level == "group" else every.std(ddof=1) if len(every) > 1 else 1.0
  for g in range(step.num_groups):
    mine = [run for run in runs if s["group_ids"][run[0]] == g]
    r = np.array([last[tuple(run)] for run in mine])
    if std_threshold is not None and (len(r) < 2 or r.std(ddof=1) <= std_threshold):
      continue
    for run, score in zip(mine, normalised(r, deviation=batch) if mine else []):
      out[run] = score / (len(run) if step_norm else 1)
  return out


def gigpo(step, omega=1.0, gamma=1.0, norm="none"):
  s, runs = step.sequences, runs_of(step)
  out, later = np.zeros(step.count), np.zeros(step.count)
  for g in range(step.num_groups):
    mine = [run for run in runs if s["group_ids"][run[0]] == g]
    totals = [s["step_rewards"][run].sum() for run in mine]
    for run, score in zip(mine, normalised(totals, std=norm == "std") if mine else []):
      out[run] = score
  for run in runs:
    for a, i in enumerate(run):
      later[i] = sum(gamma ** (b - a) * s["step_rewards"][run[b]] for b in range(a, len(run)))
  anchors = groups_of(
    step, lambda i, s: (s["group_ids"][i], s["state_ids"][i]), s["valid"] & (s["state_ids"] >= 0)
  )
  for members in anchors:
    if len(members) > 1:
      out[members] += omega * normalised(later[members], std=norm == "std")
  return out


def whitened(step, lists):
  """Whitens lists of token arrays over the valid sequences."""
  valid = step.sequences["valid"]
  every = np.concatenate([x for x, v in zip(lists, valid) if v] + [np.zeros(0)])
  if len(every) < 2 or (every == every[0]).all():
    return [np.zeros(len(x)) for x in lists]
  scale = np.sqrt(every.var(ddof=1) + 1e-8)
  return [(x - every.mean()) / scale if v else 0 * x for x, v in zip(lists, valid)]


def estimate(r, v, gamma, lam):
  """GAE of one sequence, token by token from its end."""
  out, advantage, after = np.zeros(len(r)), 0.0, 0.0
  for t in reversed(range(len(r))):
    advantage = r[t] + gamma * after - v[t] + gamma * lam * advantage
    out[t], after = advantage, v[t]
  return out


def gae(step, gamma=1.0, lam=1.0, whitening=True):
  lists = [
    estimate(r, v, gamma, lam)
    for r, v in zip(steps.actions(step, "token_rewards"), steps.actions(step, "values"))
  ]
  if whitening:
    return whitened(step, lists)
  return [x if ok else 0 * x for x, ok in zip(lists, step.sequences["valid"])]


def reinforce_plus_plus(step, gamma=1.0):
  zero = lambda x: np.zeros(len(x))
  rewards = steps.actions(step, "token_rewards")
  return whitened(step, [estimate(r, zero(r), gamma, 1.0) for r in rewards])


def reinforce_plus_plus_baseline(step):
  plain = rec(step)
  return whitened(step, [np.full(a.sum(), x) for x, a in zip(plain, step.action)])


def distill(step, coef=1.0):
  s, t = steps.actions(step, "old_logprob"), steps.actions(step, "teacher_logprob")
  return [coef * (y - x) for x, y in zip(s, t)]


def jsd(step, beta=0.5, coef=1.0, variant="gradient"):
  out = []
  for s, t in zip(steps.actions(step, "old_logprob"), steps.actions(step, "teacher_logprob")):
    m = np.log(beta * np.exp(t) + (1 - beta) * np.exp(s))
    if variant == "trinity":
      x = (
        -(beta * (t - m) + (1 - beta) * (s - m)) if 0 < beta < 1 else t - s if beta == 0 else s - t
      )
    else:
      x = (1 - beta) * (m - s) if 0 < beta < 1 else np.exp(t - s) - 1 if beta == 0 else t - s
    out.append(coef * x)
  return out


def entropy_signal(step):
  pairs = zip(steps.actions(step, "prox_logprob"), steps.actions(step, "prox_entropy"))
  return [np.exp(x) * (h + x) for x, h in pairs]


def valid_tokens(step, lists):
  return np.concatenate([x for x, v in zip(lists, step.sequences["valid"]) if v] + [np.zeros(0)])


def clipb(step, mu=2.5):
  a, signal = grpo(step), entropy_signal(step)
  every = valid_tokens(step, signal)
  low = every.mean() - mu * every.std() if len(every) else 0.0
  return [np.where((a[i] < 0) & (s < low), 0, a[i]) for i, s in enumerate(signal)]


def clipv(step, mu=8.5, max_frac=1e-4):
  a = grpo(step)
  far = [e - s for e, s in zip(steps.actions(step, "expected_score"), entropy_signal(step))]
  every = valid_tokens(step, far)
  if not len(every):
    return far
  bad = [
    (a[i] < 0) & (x > mu * every.std()) & step.sequences["valid"][i] for i, x in enumerate(far)
  ]
  worst = sorted((x for xs, b in zip(far, bad) for x in xs[b]), reverse=True)
  most = max(int(max_frac * len(every)), 1)
  limit = worst[most - 1] if len(worst) > most else -np.inf
  return [np.where(b & (x >= limit), 0, a[i]) for i, (x, b) in enumerate(zip(far, bad))]


CASES = [
  ("grpo", grpo, {}),
  ("grpo", grpo, {"std_level": "batch"}),
  ("grpo", grpo, {"duplicate_experiences": True, "std_threshold": 0.3}),
  ("grpo", grpo, {"rank_penalty": 0.3, "duplicate_experiences": True}),
  ("step_wise_grpo", step_wise_grpo, {"step_norm": True}),
  ("step_wise_grpo", step_wise_grpo, {"std_level": "batch", "std_threshold": 0.3}),
  ("gigpo", gigpo, {"gamma": 0.9, "omega": 0.5}),
  ("gigpo", gigpo, {"norm": "std"}),
  ("gae", gae, {"gamma": 0.9, "lam": 0.8}),
  ("ppo", gae, {"whitening": False, "lam": 0.95}),
  ("reinforce++", reinforce_plus_plus, {"gamma": 0.9}),
  ("reinforceplusplus", reinforce_plus_plus, {}),
  ("reinforce++_baseline", reinforce_plus_plus_baseline, {}),
  ("rloo", rloo, {}),
  ("reinforce", of_valid(lambda s: s["rewards"]), {}),
  ("remax", of_valid(lambda s: s["rewards"] - s["baselines"]), {}),
  ("opmd", opmd, {}),
  ("opmd", opmd, {"baseline": "logavgexp", "tau": 0.1}),
  ("asymre", asymre, {"shift": -0.2}),
  ("rec", rec, {}),
  ("rec", rec, {"std": True}),
  ("on_policy_distill", distill, {"coef": 0.5}),
  ("jsd", jsd, {"beta": 0.3}),
  ("jsd", jsd, {"beta": 0.0}),
  ("jsd", jsd, {"beta": 1.0, "coef": 2.0}),
  ("jsd", jsd, {"variant": "trinity"}),
  ("jsd", jsd, {"variant": "trinity", "beta": 1.0}),
  ("jsd", jsd, {"variant": "trinity", "beta": 0.0}),
  ("clipb", clipb, {"mu": 0.7}),
  ("clipv", clipv, {"mu": 0.3, "max_frac": 0.1}),
  ("clipv", clipv, {"mu": 0.3}),
  ("maxrl", maxrl, {}),
  ("opo", opo, {}),
  ("raft", raft, {}),
  ("raft", raft, {"threshold": 0.4}),
  ("constant", of_valid(lambda s: 2.0), {"value": 2.0}),
]
