"""Policy losses to go through in tests, inputs for them, and one way to run any of them."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from trinity_jax.algorithms import stats
from trinity_jax.algorithms.parts import resolve
from trinity_jax.algorithms.policy_losses import POLICY_LOSSES
from trinity_jax.algorithms.policy_losses.rec import CLIP_MODES, REGULARIZERS, WEIGHTS

B, T = 8, 5
LENGTHS = np.array([5, 0, 3, 1, 4, 2, 5, 4])
TOKENS = ("logprob", "old_logprob", "ref_logprob", "advantages", "is_expert")

# (name, options): every loss, and every option that changes what is computed.
CASES = [
  ("ppo", {}),
  ("ppo", {"clip_high": 0.28, "dual_clip": None}),
  ("ppo", {"fallback_to_policy_gradient": True}),
  ("ppo", {"sequence_masking": True, "delta": 0.01}),
  ("gspo", {}),
  ("gspo", {"clip_low": 0.1, "clip_high": 0.1}),
  ("gspo-token", {"clip_low": 0.1, "clip_high": 0.1}),
  ("gmpo", {}),
  ("gmpo", {"clip_low": 0.05, "clip_high": 0.1}),
  ("sapo", {}),
  ("sapo", {"variant": "trinity"}),
  ("cispo", {}),
  ("cispo", {"clip_low": 0.1, "mask_low": 0.2, "mask_high": 0.1}),
  ("topr", {}),
  ("topr", {"variant": "trinity", "threshold": 0.1}),
  ("opmd", {}),
  ("sppo", {"eps": 0.2}),
  ("rec", {"clip_mode": "ring", "weight": "advantage", "ring_low": 0.3, "ring_high": 0.4}),
  ("rec", {"clip_mode": "gspo-one-side", "weight": "gspo_importance_sampling"}),
  ("importance_sampling", {}),
  ("reinforce", {}),
  ("dppo-tv", {"delta_low": 0.02, "delta_high": 0.03}),
  ("dppo-tv", {"truncate": 1.1}),
  ("dppo-kl", {"delta_low": 0.002, "delta_high": 0.003}),
  ("m2po", {"tau": 0.01}),
  ("m2po", {}),
  ("clip-cov", {"cov_ratio": 1.0, "cov_low": 0.01, "cov_high": 0.2}),
  ("kl-cov", {"cov_ratio": 0.2, "cov_kl_coef": 0.5}),
  ("sft", {}),
  ("sft_is", {}),
  ("sft_phi", {}),
  ("sft_phi", {"cutoff": 0.4}),
  ("mix", {}),
  ("chord", {}),
  ("chord", {"expert": "sft"}),
  ("dpo", {}),
  ("dpo", {"beta": 0.5, "label_smoothing": 0.1}),
  ("dpo", {"nll_coef": 0.7}),
  ("dpo", {"variant": "trinity", "label_smoothing": 0.2}),
]
# Every weight with every clip mode, the regularizers in turn.
REC_CASES = [
  ("rec", {
    "clip_mode": c, "weight": w, "regularizer": r, "regularizer_coef": 0.0 if r == "none" else 0.1,
    "clip_low": 0.15, "ring_low": 0.3, "ring_high": 0.4, "temp": 2.0,
  })
  for (c, w), r in zip(itertools.product(CLIP_MODES, WEIGHTS), itertools.cycle(REGULARIZERS))
]  # fmt: skip
# Compiling dozens of small programs is what takes the time here, not running them.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def title(case) -> str:
  name, options = case
  return " ".join([name, *(f"{k}={v}" for k, v in options.items())])


def part_of(case):
  name, options = case
  return resolve("policy loss", name, POLICY_LOSSES, options)


def draw(seed: int, scale: float, batch: int = B) -> dict[str, np.ndarray]:
  """A step of sequences [batch, T], float64. `scale`: of the log ratios."""
  rng = np.random.default_rng(seed)
  lengths = rng.permutation(LENGTHS) if seed else LENGTHS
  old = -rng.exponential(size=(batch, T))
  # Log-probs are at most 0, so ratios far above 1 need an unlikely old token.
  shift = rng.normal(size=(batch, T)) * scale
  old, logprob = np.minimum(old, -shift), np.minimum(old + shift, 0)
  one = rng.random((batch, 1)) < 0.5  # advantages of a sequence, or token by token
  spread = np.where(one, rng.normal(size=(batch, 1)), rng.normal(size=(batch, T)))
  return {
    "logprob": logprob, "old_logprob": np.minimum(old, 0), "ref_logprob": logprob + 0.3 * shift,
    "advantages": spread * (rng.random((batch, T)) < 0.9),
    "is_expert": np.broadcast_to(rng.random((batch, 1)) < 0.4, (batch, T)).copy(),
    "mask": np.arange(T)[None] < lengths[:, None],
    "rewards": rng.permutation(batch).astype(np.float64),
    "pair_ids": np.array([3, 0, 3, 1, 0, 1, -1, 2], np.int32),  # 2 has no second member
    "valid": np.ones(batch, bool), "cotangent": rng.normal(size=(batch, T)),
    "index": np.broadcast_to(np.arange(batch, dtype=np.int32)[:, None], (batch, T)).copy(),
  }  # fmt: skip


def run(part, arrays):
  """(loss, its gradient under `cotangent`, finished stats) of a whole step at once."""
  arrays = {k: jnp.asarray(v) for k, v in arrays.items()}
  there = _named(arrays)
  there |= part.before_split(prox_logprob=arrays["logprob"], **there)

  def loss(logprob):
    return part(**there | {"logprob": logprob})

  value, vjp, out = jax.vjp(loss, arrays["logprob"], has_aux=True)
  return value, vjp(arrays["cotangent"].astype(value.dtype))[0], stats.finish(out)


def run_split(part, arrays):
  """`run` of [M, B, T] arrays, micro-batch by micro-batch."""
  arrays = {k: jnp.asarray(v) for k, v in arrays.items()}
  there = _named(arrays)
  there |= part.before_split(prox_logprob=arrays["logprob"], **there)
  per_token = [k for k in there if jnp.ndim(there[k]) == 3]

  def micro(x):
    mine, logprob, cotangent = x
    value, vjp, out = jax.vjp(
      lambda y: part(**there | mine | {"logprob": y}), logprob, has_aux=True
    )
    return value, vjp(cotangent.astype(value.dtype))[0], out

  loss, grad, parts = jax.lax.map(
    micro, ({k: there[k] for k in per_token}, arrays["logprob"], arrays["cotangent"])
  )
  split = [jax.tree.map(lambda x, i=i: x[i], parts) for i in range(loss.shape[0])]
  return loss, grad, stats.finish(functools.reduce(stats.merge, split))


def run_all(arrays, cases=CASES):
  """{title: (loss, gradient, stats)}."""
  return {title(case): run(part_of(case), arrays) for case in cases}


run_all_compiled = jit(run_all)


def _named(arrays):
  return {
    **{k: v for k, v in arrays.items() if k not in ("cotangent", "index")},
    "sequence_index": arrays["index"], "num_sequences": arrays["rewards"].shape[0],
    "key": jax.random.key(0),
  }  # fmt: skip


def pack(arrays, order, shape=(3, 2, 9)):
  """Sequences in `order` into rows [M, B, T], pairs in one micro-batch, NaN elsewhere."""
  lengths = arrays["mask"].sum(1)
  tokens = (*TOKENS, "cotangent", "index")
  out = {
    k: np.full(shape, True if arrays[k].dtype == bool else -7 if k == "index" else np.nan,
               arrays[k].dtype)
    for k in tokens
  }  # fmt: skip
  out["mask"] = np.zeros(shape, bool)
  used = np.zeros(shape[:2], int)
  where = {}
  for i in order:
    mates = [j for j in order if arrays["pair_ids"][j] == arrays["pair_ids"][i] >= 0 and j in where]
    micros = [where[mates[0]][0]] if mates else range(shape[0])
    spots = [(m, b) for m in micros for b in range(shape[1])]
    m, b = min((s for s in spots if used[s] + lengths[i] <= shape[2]), key=lambda s: used[s])
    at = slice(used[m, b], used[m, b] + lengths[i])
    where[i] = (m, b, at)
    used[m, b] += lengths[i]
    for k in (*tokens, "mask"):
      out[k][m, b, at] = arrays[k][i, : lengths[i]]
  return out | {k: arrays[k] for k in ("rewards", "pair_ids", "valid")}, where
