"""Every algorithm of the table, whole: how a step is split changes neither loss nor gradient.

Log-probs are given, not computed by a model; what the model's split does is test_splits.py's.
Axis letters: M micro-batches, B rows, T row length, N sequences.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from trinity_jax.algorithms import TABLE, make, stats

N, MOST = 12, 6
SHAPE = (4, 4, 13)  # one shape for all layouts: up to 16 rows
# The members of a pair (0 and 1, 2 and 3, ...) stay in one micro-batch.
LENGTHS = np.array([5, 0, 3, 6, 4, 2, 5, 1, 6, 6, 3, 2])
LAYOUTS = {
  "one a row": ([[i] for i in range(N)], 4),
  "packed": ([[0, 2], [3, 1], [4, 5, 6], [7], [8, 9], [10, 11]], 2),
  "packed, reversed": ([[11, 10], [9, 8], [7, 6, 5], [4], [3, 2], [1, 0]], 2),
  "two micro-batches": ([[3, 2], [10, 11], [5, 4], [0, 1], [8, 9], [6, 7]], 3),
}


def experiences(seed=0):
  """Arrays of N sequences: per token [N, MOST] and per sequence [N]."""
  rng = np.random.default_rng(seed)
  noise = lambda scale=0.3: scale * rng.normal(size=(N, MOST))
  old = -np.abs(noise(1.5)) - 0.1
  tokens = {
    "logprob": np.minimum(old + noise(0.5), -1e-3), "old_logprob": old,
    "ref_logprob": old + noise(), "teacher_logprob": np.minimum(old + noise(), -1e-3),
    "entropy": np.abs(noise(1.0)), "values": noise(), "expected_score": noise(0.1),
    "token_rewards": noise(),
    "versions": rng.integers(3, 6, (N, MOST)),
  }  # fmt: skip
  tokens["prox_logprob"], tokens["prox_entropy"] = tokens["logprob"], tokens["entropy"]
  sequences = {
    "rewards": rng.permutation(N) * 0.25, "group_ids": np.arange(N) // 4,
    "run_ids": np.arange(N) // 2 % 2, "step_ids": np.arange(N) % 2,
    "pair_ids": np.arange(N) // 2, "state_ids": np.arange(N) % 3,
    "step_rewards": rng.normal(size=N), "valid": LENGTHS > 0,
    "experts": np.arange(N) >= 8, "baselines": rng.normal(size=N),
  }  # fmt: skip
  return tokens, sequences


def laid_out(tokens, rows, per_micro, fill):
  """[N, MOST] arrays as rows of SHAPE; also mask and sequence_index. Elsewhere stands `fill`."""
  out = {k: np.full(SHAPE, fill if v.dtype.kind == "f" else -1, v.dtype) for k, v in tokens.items()}
  mask, index = np.zeros(SHAPE, bool), np.zeros(SHAPE, np.int32)
  for r, members in enumerate(rows):
    m, b, at = r // per_micro, r % per_micro, 0
    for i in members:
      where = np.s_[m, b, at : at + LENGTHS[i]]
      for k, v in tokens.items():
        out[k][where] = v[i, : LENGTHS[i]]
      mask[where], index[where] = True, i
      at += LENGTHS[i] + (at == 0)  # a gap after the first: a prompt
  return out, mask, index


def gathered(x, mask, index):
  """Back to [N, MOST], 0 elsewhere."""
  out = np.zeros((N, MOST))
  for i in range(N):
    found = np.asarray(x)[mask & (index == i)]
    out[i, : len(found)] = found
  return out


def step(algorithm, tokens, mask, index, sequences):
  """What a trainer does, without a model: loss, gradient per token, advantages, metrics."""
  arrays = {
    **tokens, **sequences, "mask": mask, "sequence_index": index, "num_sequences": N,
    "is_expert": sequences["experts"][index] & mask, "step": jnp.asarray(5),
    "key": jax.random.key(0),
  }  # fmt: skip
  whole = {k: v for k, v in arrays.items() if k not in ("logprob", "entropy")}
  before, out = algorithm.before_split(num_groups=N, max_length=20, **whole)
  x = {k: v for k, v in (arrays | before).items() if jnp.shape(v) == SHAPE}
  fixed = {k: v for k, v in arrays.items() if k not in x}

  def micro(logprob, m):
    own = {k: v[m] for k, v in x.items() if k != "logprob"}
    return algorithm.loss(**fixed | own, logprob=logprob)

  def body(m, carry):
    loss, grads, merged = carry
    (value, new), grad = jax.value_and_grad(micro, has_aux=True)(x["logprob"][m], m)
    return loss + value, grads.at[m].set(grad), stats.merge(merged, new)

  shapes = jax.eval_shape(lambda: micro(x["logprob"][0], 0)[1])
  zero = (jnp.zeros((), x["logprob"].dtype), jnp.zeros_like(x["logprob"]), stats.neutral(shapes))
  loss, grads, merged = jax.lax.fori_loop(0, mask.shape[0], body, zero)
  return loss, grads, before["advantages"], stats.finish({**out, **merged})


OPTIONS = {"xla_backend_optimization_level": 0}  # what is compared are our splits


@functools.cache
def program(name):
  algorithm = make(name, entropy_coef=0.01)
  return jax.jit(functools.partial(step, algorithm), compiler_options=OPTIONS)


def run(name, layout, dtype, place=lambda x: x):
  tokens, sequences = experiences()
  rows, per_micro = LAYOUTS[layout]
  tokens, mask, index = laid_out(tokens, rows, per_micro, np.nan)
  cast = lambda x: x.astype(dtype) if x.dtype.kind == "f" else x
  tokens = {k: place(cast(v)) for k, v in tokens.items()}
  sequences = {k: jnp.asarray(cast(v)) for k, v in sequences.items()}
  out = program(name)(tokens, place(mask), place(index), sequences)
  loss, grad, advantages, metrics = jax.device_get(out)
  assert np.isfinite(loss) and np.isfinite(grad).all()
  return loss, gathered(grad, mask, index), gathered(advantages, mask, index), metrics


def compare(a, b, rtol):
  loss, grad, advantages, metrics = a
  for x, y in ((b[1], grad), (b[2], advantages)):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max())
  scale = np.abs(grad).sum() + abs(loss)  # losses may cancel out; their parts do not
  assert abs(b[0] - loss) <= rtol * scale
  assert b[3].keys() == metrics.keys()
  for k in metrics:
    np.testing.assert_allclose(b[3][k], metrics[k], rtol=10 * rtol, atol=10 * rtol, err_msg=k)


@pytest.mark.parametrize("name", TABLE)
def test_no_split_changes_a_step(name):
  with jax.enable_x64(True):
    first, *others = (run(name, layout, np.float64) for layout in LAYOUTS)
    assert np.any(first[1])
    for other in others:
      compare(first, other, 1e-12)


DEVICES = ("grpo", "ppo", "gspo", "m2po", "clip_cov", "clipv", "dpo", "mix_chord", "a3po", "gigpo")


@pytest.mark.parametrize(
  "name", [n if n in DEVICES else pytest.param(n, marks=pytest.mark.slow) for n in TABLE]
)
def test_eight_devices_equal_one(name):
  mesh = jax.make_mesh((4, 2), ("data", "other"), axis_types=(AxisType.Auto,) * 2)
  rows = NamedSharding(mesh, PartitionSpec(None, "data"))
  one = run(name, "packed", np.float32)
  many = run(name, "two micro-batches", np.float32, lambda x: jax.device_put(x, rows))
  compare(one, many, 2e-6)
