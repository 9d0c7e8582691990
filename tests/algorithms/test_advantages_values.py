"""Every advantage against float64 numpy on plain lists, padded and packed, in batches of steps.

The references below loop over sequences and tokens; they share no code with the package.
"""

from __future__ import annotations

import functools

import algorithm_steps as steps
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trinity_jax.algorithms import advantage, stats
from trinity_jax.algorithms.advantages import ADVANTAGES, to_tokens, value_targets
from trinity_jax.algorithms.parts import resolve

SEEDS = range(6)


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


def compute(part, num_groups, sequences, tokens):
  """(token advantages, finished stats) of one step."""
  arrays = sequences | tokens
  values, out = part(**arrays, num_groups=num_groups, num_sequences=sequences["valid"].shape[0])
  return to_tokens(values, tokens["mask"], tokens["sequence_index"]), stats.finish(out)


def test_every_advantage_has_a_case():
  assert {name for name, *_ in CASES} == ADVANTAGES.keys()


@functools.cache
def layouts():
  """(steps, stacked sequences, then per layout its stacked arrays and places).

  The last step has no valid sequence and no action token.
  """
  all_steps = [steps.random_step(seed) for seed in SEEDS]
  all_steps[-1].sequences["valid"][:] = False
  all_steps[-1].action = [np.zeros(len(a), bool) for a in all_steps[-1].action]
  stack = lambda dicts: {k: np.stack([d[k] for d in dicts]) for k in dicts[0]}
  out = [all_steps, stack([s.sequences for s in all_steps])]
  for layout in (steps.packed, steps.padded):
    arrays, places = zip(*(layout(s) for s in all_steps))
    out.append((stack(arrays), places))
  return out


@pytest.mark.parametrize(
  "name, reference, options", CASES, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(CASES)]
)
def test_values(name, reference, options):
  all_steps, sequences, *arrangements = layouts()
  part = resolve("advantage", name, ADVANTAGES, options)
  f = jax.jit(
    jax.vmap(functools.partial(compute, part, all_steps[0].num_groups)),
    compiler_options={"xla_backend_optimization_level": 0},  # compile time is all there is
  )
  single = lambda d: {k: v.astype(np.float32) if v.dtype == float else v for k, v in d.items()}
  first = (name, reference, options) == next(c for c in CASES if c[0] == name)
  by_token = bool({*steps.TOKEN_NAMES, "mask"} & part.inputs)
  for tokens, places in arrangements if first and by_token else arrangements[:1]:
    with jax.enable_x64(True):
      got, out = f(sequences, tokens)
      assert got.dtype == jnp.float64
    assert all(np.isfinite(x).all() for x in out.values()), out
    np.testing.assert_array_equal(np.asarray(got)[~tokens["mask"]], 0)
    for s, step in enumerate(all_steps):
      expected = reference(step, **options)
      for i, (want, have) in enumerate(zip(expected, steps.gather(got[s], places[s], step))):
        want = np.broadcast_to(want, have.shape)
        np.testing.assert_allclose(have, want, rtol=1e-11, atol=1e-11, err_msg=f"{s}, {i}")
  if first:
    near, _ = f(single(sequences), single(tokens))
    assert near.dtype == jnp.float32
    np.testing.assert_allclose(near, got, rtol=2e-5, atol=2e-5)


def test_gae_by_hand():
  # One row: action, observation, action of sequence 0; padding; action of sequence 1.
  mask = jnp.array([[True, False, True, False, True]])
  index = jnp.array([[0, 0, 0, 7, 1]])
  rewards = jnp.array([[0.0, jnp.nan, 1.0, jnp.inf, 3.0]])
  values = jnp.array([[0.5, jnp.nan, 0.25, jnp.inf, 2.0]])
  # Last tokens: 1 - 0.25 = 0.75 and 3 - 2 = 1. The first token's next one is the third:
  # delta = 0 + 0.5 * 0.25 - 0.5 = -0.375, A = -0.375 + 0.5 * 0.5 * 0.75 = -0.1875.
  gae = resolve("advantage", "gae", ADVANTAGES, {"gamma": 0.5, "lam": 0.5, "whitening": False})
  arrays = {"token_rewards": rewards, "values": values, "mask": mask, "sequence_index": index}
  got, _ = jax.jit(lambda a: gae(**a))(arrays)
  np.testing.assert_allclose(got, [[-0.1875, 0, 0.75, 0, 1]], atol=1e-7)
  returns, out = jax.jit(lambda a: value_targets(**a, gamma=0.5, lam=0.5))(arrays)
  np.testing.assert_allclose(returns, [[0.3125, 0, 1, 0, 3]], atol=1e-7)
  out = stats.finish(out)
  np.testing.assert_allclose(out["critic/returns_mean"], 4.3125 / 3, rtol=1e-6)
  error, target = np.array([-0.1875, 0.75, 1]), np.array([0.3125, 1, 3])
  np.testing.assert_allclose(
    out["critic/explained_variance"], 1 - error.var() / target.var(), rtol=1e-5
  )


def test_gae_does_not_see_what_lies_between_or_beside():
  """Observations inserted between actions, and other sequences in the row, change nothing."""
  rng = np.random.default_rng(0)
  r, v = rng.normal(size=6), rng.normal(size=6)
  part = resolve("advantage", "gae", ADVANTAGES, {"gamma": 0.9, "lam": 0.7, "whitening": False})
  gae = jax.jit(lambda **arrays: part(**arrays))
  with jax.enable_x64(True):
    plain, _ = gae(
      token_rewards=r[None], values=v[None], mask=np.ones((1, 6), bool),
      sequence_index=np.zeros((1, 6), int),
    )  # fmt: skip
    np.testing.assert_allclose(plain[0], estimate(r, v, 0.9, 0.7), rtol=1e-12)
    at = np.array([2, 3, 7, 8, 9, 12])  # action tokens among observations, neighbours before, after
    wide = lambda x, fill: np.put_along_axis(w := np.full(16, fill), at, x, 0) or w[None]
    mask = wide(np.ones(6, bool), False)
    mask[0, [0, 14]] = True
    index = np.full((1, 16), 5)
    index[0, 2:13], index[0, 14] = 1, 0
    got, _ = gae(token_rewards=wide(r, 3.0), values=wide(v, -2.0), mask=mask, sequence_index=index)
  np.testing.assert_allclose(got[0, at], plain[0], rtol=1e-12)


def test_whitening_of_equal_values_is_exactly_zero():
  f = resolve("advantage", "reinforce++", ADVANTAGES)
  mask = np.ones((3, 7), bool)
  rewards = np.zeros((3, 7), np.float32)
  rewards[:, -1] = 0.1
  index = np.broadcast_to(np.arange(3)[:, None], (3, 7))
  got, _ = jax.jit(lambda r: f(token_rewards=r, mask=mask, sequence_index=index))(rewards)
  np.testing.assert_array_equal(got, np.zeros((3, 7)))


def test_notebook_form():
  mask = np.array([[1, 1, 0], [0, 1, 1]], bool)
  arrays = {"token_rewards": np.array([[0.0, 1, 9], [9, 0, 0]]), "values": np.zeros((2, 3))}
  got = jax.jit(functools.partial(advantage("gae", whitening=False), mask=mask))(**arrays)
  np.testing.assert_allclose(got, [[1, 1, 0], [0, 0, 0]])
  old = np.array([[-1.0, -1, 0], [0, -2, -2]])
  grpo = functools.partial(advantage("grpo", rank_penalty=0.5, std=False), mask=mask)
  got = jax.jit(grpo)(rewards=np.ones(2), group_ids=np.zeros(2), old_logprob=old)
  # The likelier one keeps 1 - 0.5 / 2 = 0.75 of its reward: mean 0.875.
  np.testing.assert_allclose(got, [[-0.125, -0.125, 0], [0, 0.125, 0.125]])
