"""Every policy loss against a float64 computation of its formula in torch, row by row."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import CASES, REC_CASES, draw, jit, run_all, run_all_compiled, title

F64 = torch.float64


class Step:
  """The arrays of a padded step as torch tensors; what is masked is 0."""

  def __init__(self, arrays):
    m = arrays["mask"]
    self.m = torch.tensor(m)
    self.lp = torch.tensor(np.where(m, arrays["logprob"], 0), requires_grad=True)
    self.old, self.ref, self.a = (
      torch.tensor(np.where(m, arrays[k], 0)) for k in ("old_logprob", "ref_logprob", "advantages")
    )
    self.d = self.lp - self.old
    self.lr = self.d.clamp(-20, 20)
    self.r = self.lr.exp()
    self.expert = torch.tensor(arrays["is_expert"])
    self.rewards, self.pair_ids = arrays["rewards"], arrays["pair_ids"]
    self.n = self.m.sum(1, keepdim=True).clamp(min=1)

  def mean(self, x):
    return (x * self.m).sum(1, keepdim=True) / self.n


def ppo(s, clip_low=0.2, clip_high=0.2, dual_clip=3.0, fallback_to_policy_gradient=False,
        sequence_masking=False, delta=0.1):  # fmt: skip
  r = (s.lp - s.lp.detach()).exp() if fallback_to_policy_gradient else s.r
  loss = torch.maximum(-s.a * r, -s.a * r.clamp(1 - clip_low, 1 + clip_high))
  if dual_clip:
    loss = torch.where(s.a < 0, torch.minimum(loss, -s.a * dual_clip), loss)
  if sequence_masking:
    loss = loss * ~((s.a < 0) & (s.mean(-s.lr) > delta))
  return loss


def clipped(s, ratio, low, high):
  return torch.maximum(-s.a * ratio, -s.a * ratio.clamp(1 - low, 1 + high))


def gspo(s, clip_low=3e-4, clip_high=4e-4):
  return clipped(s, s.mean(s.d).clamp(-20, 20).exp().expand_as(s.a), clip_low, clip_high)


def gspo_token(s, clip_low=3e-4, clip_high=4e-4):
  x = (s.lp - s.lp.detach() + s.mean(s.d).detach()).clamp(-20, 20)
  return clipped(s, x.exp(), clip_low, clip_high)


def gmpo(s, clip_low=0.4, clip_high=0.4):
  # The paper's form: minimum of sgn(A) x and its clipped value, times sgn(A).
  sign = s.a.sign()
  x = sign * torch.minimum(sign * s.d, sign * s.d.clamp(-clip_low, clip_high))
  x = torch.where(s.a == 0, s.d, x)
  return -s.a * s.mean(x).clamp(-20, 20).exp()


def sapo(s, tau_pos=1.0, tau_neg=1.05, variant="paper"):
  tau = tau_neg + (tau_pos - tau_neg) * (s.a > 0).to(F64)
  f = torch.sigmoid(tau * (s.r - 1)) * 4 / tau
  return -s.a * f if variant == "paper" else -s.a * f.detach() * s.lp


def cispo(s, clip_low=1.0, clip_high=0.28, mask_low=None, mask_high=None):
  loss = -s.a * s.r.detach().clamp(1 - clip_low, 1 + clip_high) * s.lp
  if mask_low is not None:
    loss = loss * ~((s.a < 0) & (s.r < 1 - mask_low)) * ~((s.a > 0) & (s.r > 1 + mask_high))
  return loss


def topr(s, threshold=0.0, variant="paper"):
  d = s.lr if variant == "trinity" else (s.d * s.m).sum(1, keepdim=True)
  return -s.a * torch.where(s.a <= threshold, d.detach().exp().clamp(0, 1), 1.0) * s.lp


def sppo(s, eps=0.3):
  return -s.a * s.lr * ((s.r >= 1 / (1 + eps)) & (s.r <= 1 + eps))


def rec(s, clip_mode="none", clip_low=0.2, clip_high=0.2, ring_low=0.6, ring_high=2.0,
        weight="none", temp=1.0, regularizer="none", regularizer_coef=0.0):  # fmt: skip
  r, q = s.r.detach(), s.mean(s.d.detach()).clamp(-20, 20).exp().expand_as(s.r)
  up, down, zero = s.a > 0, s.a < 0, s.a == 0
  keep = {
    "none": torch.ones_like(r, dtype=torch.bool),
    "two-side": (r >= 1 - clip_low) & (r <= 1 + clip_high),
    "one-side": up & (r <= 1 + clip_high) | down & (r >= 1 - clip_low) | zero,
    "gspo-one-side": up & (q <= 1 + clip_high) | down & (q >= 1 - clip_low) | zero,
    "ring": (r >= 1 - clip_low) & (r <= 1 + clip_high)
    | (s.a >= 0) & (r <= 1 - ring_low) | (s.a <= 0) & (r >= 1 + ring_high),
  }[clip_mode]  # fmt: skip
  factor = {"none": 1.0, "importance_sampling": r, "gspo_importance_sampling": q,
            "advantage": (s.a / temp).exp()}[weight]  # fmt: skip
  loss = -s.a * factor * s.lp * keep
  if regularizer == "k2":
    loss = loss + regularizer_coef * s.lr**2
  if regularizer == "forward-kl":
    loss = loss - regularizer_coef * s.lp
  return loss


def dppo(s, keep, truncate):
  if truncate is None:
    return -s.a * s.r * keep
  weight = s.r.detach().clamp(max=truncate)
  # Value of A min(r, c), gradient of A sg(min(r, c)) log p.
  return -s.a * weight * keep * (1 + s.lr - s.lr.detach())


def dppo_tv(s, delta_low=0.15, delta_high=0.15, truncate=None):
  change = (s.lp.exp() - s.old.exp()).detach()
  keep = torch.where(s.a > 0, change <= delta_high, change >= -delta_low)
  return dppo(s, keep, truncate)


def dppo_kl(s, delta_low=0.05, delta_high=0.05, truncate=None):
  p, q = s.lp.detach().exp(), s.old.exp()
  keep = torch.ones_like(s.a, dtype=torch.bool)
  for i in np.ndindex(*s.a.shape):
    pi, qi = p[i].item(), q[i].item()
    kl = 0.0 if pi == qi else qi * (s.old[i] - s.lp[i]).item()
    if pi != qi and qi < 1:
      kl += (1 - qi) * (np.log1p(-qi) - (np.log1p(-pi) if pi < 1 else -np.inf))
    if s.a[i] > 0 and pi > qi and kl > delta_high or s.a[i] < 0 and pi < qi and kl > delta_low:
      keep[i] = False
  return dppo(s, keep, truncate)


def m2po(s, tau=0.04):
  squares = sorted(
    (s.lr[i].item() ** 2, i)
    for i in zip(*np.nonzero(s.m.numpy()))
    if s.a[i] * s.d[i] > 0
  )  # fmt: skip
  keep = torch.ones_like(s.a)
  total = 0.0
  for count, (square, i) in enumerate(squares, 1):
    total += square
    if total / count > tau:  # the mean only grows
      keep[i] = 0
  return -s.a * s.r * keep


def covariance(s):
  lp, m = s.lp.detach(), s.m
  return (s.a - s.a[m].mean()) * (lp - lp[m].mean())


def clip_cov(s, cov_ratio, cov_low, cov_high, clip_low=0.2, clip_high=0.2):
  assert cov_ratio == 1  # all that may be drawn
  plain, bounded = -s.a * s.r, -s.a * s.r.clamp(1 - clip_low, 1 + clip_high)
  cov = covariance(s)
  drawn = (cov > cov_low) & (cov < cov_high) & ~(bounded > plain)
  return torch.maximum(plain, bounded) * ~drawn


def kl_cov(s, cov_ratio, cov_kl_coef):
  cov = torch.where(s.m, covariance(s), -torch.inf)
  count = max(int(cov_ratio * s.m.sum()), 1)
  top = torch.zeros(cov.numel(), dtype=F64)
  order = cov.reshape(-1).sort(descending=True, stable=True).indices  # of equals the first
  top[order[:count]] = 1
  return -s.a * s.r + cov_kl_coef * s.lr.abs() * top.reshape(cov.shape)


def sft_phi(s, cutoff=1.0):
  p = s.lp.detach().exp()
  return -p * (1 - p) * s.lp.clamp(max=np.log(cutoff))


def chord(s, expert="sft_phi"):
  return torch.where(s.expert, sft_phi(s) if expert == "sft_phi" else -s.lp, ppo(s))


def dpo(s, beta=0.1, label_smoothing=0.0, nll_coef=0.0, variant="paper"):
  gain = ((s.lp - s.ref) * s.m).sum(1)
  pairs = []
  for i, j in ((i, j) for i in range(len(gain)) for j in range(len(gain))):
    if s.pair_ids[i] == s.pair_ids[j] >= 0 and s.rewards[i] > s.rewards[j]:
      pairs.append((i, j, gain[i] - gain[j]))
  total = sum(d for *_, d in pairs).detach()
  out = torch.zeros_like(s.a)
  for i, j, d in pairs:
    x = beta * (d if variant == "paper" else total + len(pairs) * (d - d.detach()))
    f = torch.nn.functional.logsigmoid
    loss = -f(x) * (1 - label_smoothing) - f(-x) * label_smoothing
    loss = loss - nll_coef * (s.lp * s.m)[i].sum() / s.m[i].sum().clamp(min=1)
    out = out + loss * torch.tensor([[k in (i, j)] for k in range(len(gain))]).to(F64)
  return out


TORCH = {
  "ppo": ppo, "gspo": gspo, "gspo-token": gspo_token, "gmpo": gmpo, "sapo": sapo, "cispo": cispo,
  "topr": topr, "opmd": lambda s: -s.a * s.lp / 2, "sppo": sppo, "rec": rec,
  "importance_sampling": lambda s: -s.a * s.r, "reinforce": lambda s: -s.a * s.lp,
  "dppo-tv": dppo_tv, "dppo-kl": dppo_kl, "m2po": m2po, "clip-cov": clip_cov, "kl-cov": kl_cov,
  "sft": lambda s: -s.lp, "sft_is": lambda s: -s.lp.detach().exp() * s.lp, "sft_phi": sft_phi,
  "mix": lambda s: torch.where(s.expert, -s.lp, ppo(s)), "chord": chord, "dpo": dpo,
}  # fmt: skip


def compare(arrays, results, cases):
  for case in cases:
    loss, grad, out = results[title(case)]
    s = Step(arrays)
    expected = TORCH[case[0]](s, **case[1]) * s.m
    (expected * torch.tensor(arrays["cotangent"])).sum().backward()
    for what, got, want in (("loss", loss, expected.detach()), ("gradient", grad, s.lp.grad)):
      np.testing.assert_allclose(
        got, want, rtol=1e-10, atol=1e-13, err_msg=f"{what} of {title(case)}"
      )
    assert all(np.isfinite(x) for x in out.values()), title(case)


# Log ratios within every bound; across the bounds; of hundreds.
@pytest.mark.parametrize("seed,scale", [(0, 0.01), (1, 0.3), (2, 0.3), (3, 1.0), (4, 400.0)])
def test_value_and_gradient(seed, scale):
  arrays = draw(seed, scale)
  with jax.enable_x64(True):
    results = run_all_compiled(arrays)
  compare(arrays, results, CASES)


def test_rec_in_every_combination():
  compiled = jit(functools.partial(run_all, cases=REC_CASES))
  for seed, scale in ((1, 0.3), (3, 1.0)):
    arrays = draw(seed, scale)
    with jax.enable_x64(True):
      results = compiled(arrays)
    compare(arrays, results, REC_CASES)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.integers(0, 9999), st.sampled_from([0.0, 0.05, 0.3, 3.0, 1000.0]), st.booleans())
def test_property(seed, scale, sparse):
  arrays = draw(seed + 100, scale)
  if sparse:  # also sequences without a token, and of one; tokens that are not next to each other
    arrays["mask"] &= np.random.default_rng(seed).random(arrays["mask"].shape) < 0.4
  with jax.enable_x64(True):
    results = run_all_compiled(arrays)
  # With one token or none, what covaries is rounding.
  compare(arrays, results, [c for c in CASES if arrays["mask"].sum() > 2 or "cov" not in c[0]])
