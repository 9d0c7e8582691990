"""What every policy loss must do whatever its formula: masks, layouts, precision, devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import (
  CASES,
  TOKENS,
  draw,
  jit,
  pack,
  part_of,
  run_all,
  run_all_compiled,
  run_split,
  title,
)

from trinity_jax.algorithms.policy_losses import POLICY_LOSSES

TITLES = [title(case) for case in CASES]
# One case of each function, for what compiles everything once more.
SHORT = [
  case for i, case in enumerate(CASES)
  if part_of(case).function not in {part_of(c).function for c in CASES[:i]}
]  # fmt: skip
run_short = functools.partial(run_all, cases=SHORT)


@jit
def everything_split(arrays):
  return {title(case): run_split(part_of(case), arrays) for case in CASES}


@functools.cache
def base():
  """Inputs (scale 0.3: across the bounds) and all results of them, float64."""
  arrays = draw(1, 0.3)
  with jax.enable_x64(True):
    return arrays, jax.tree.map(np.asarray, run_all_compiled(arrays))


def same(got, expected, rtol=0.0, atol=0.0, names=TITLES):
  for name in names:
    for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(expected[name]), strict=True):
      np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=name)


def test_every_loss_has_a_case():
  assert {name for name, _ in CASES} == POLICY_LOSSES.keys()


def test_every_case_does_something():
  _, results = base()
  for name, (loss, grad, out) in results.items():
    assert np.any(loss) and np.any(grad) and out, name
  different = {
    str(np.round(loss, 9)) + str(np.round(grad, 9)) for loss, grad, _ in results.values()
  }
  # gspo and m2po at their defaults aside, no option is without effect.
  assert len(different) >= len(TITLES) - 2


def test_masked_tokens_have_no_loss_and_no_gradient():
  arrays, results = base()
  for name, (loss, grad, _) in results.items():
    assert not np.any(loss[~arrays["mask"]]) and not np.any(grad[~arrays["mask"]]), name


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_what_is_masked_leaks_nowhere(bad):
  arrays, results = base()
  poisoned = dict(arrays)
  for k in TOKENS:
    if arrays[k].dtype != bool:
      poisoned[k] = np.where(arrays["mask"], arrays[k], bad)
  poisoned["index"] = np.where(arrays["mask"], arrays["index"], -(2**31))
  poisoned["is_expert"] = np.where(arrays["mask"], arrays["is_expert"], ~arrays["is_expert"])
  with jax.enable_x64(True):
    got = run_all_compiled(poisoned)
  same(got, results)  # to the last bit


def test_nothing_but_masked_tokens():
  arrays, _ = base()
  with jax.enable_x64(True):
    got = run_all_compiled(arrays | {"mask": np.zeros_like(arrays["mask"])})
  for name, (loss, grad, out) in got.items():
    assert not np.any(loss) and not np.any(grad), name
    assert all(np.isfinite(x) for x in out.values()), name


def test_extreme_ratios_stay_finite():
  with jax.enable_x64(True):
    for seed in range(3):
      for name, result in run_all_compiled(draw(seed, 1000.0)).items():
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(result)), name
  single = {k: v.astype(np.float32) if v.dtype == float else v for k, v in draw(5, 1000.0).items()}
  for name, result in run_all_compiled(single).items():
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(result)), name


@pytest.mark.parametrize("order", [[6, 2, 7, 4, 1, 0, 5, 3]])
def test_packed_and_split_equals_padded(order):
  arrays, results = base()
  packed, where = pack(arrays, order)
  with jax.enable_x64(True):
    got = everything_split(packed)
  for name, (loss, grad, out) in got.items():
    for got_x, padded in (
      (np.asarray(loss), results[name][0]),
      (np.asarray(grad), results[name][1]),
    ):
      for i, (m, b, at) in where.items():
        np.testing.assert_allclose(
          got_x[m, b, at], padded[i, : at.stop - at.start], rtol=1e-12, atol=1e-14, err_msg=name
        )
      assert not np.any(got_x[~packed["mask"]]), name
    assert out.keys() == results[name][2].keys()
    for k, v in results[name][2].items():
      np.testing.assert_allclose(out[k], v, rtol=1e-12, atol=1e-14, err_msg=f"{name}: {k}")


def test_jit_equals_eager():
  arrays, results = base()
  with jax.enable_x64(True):
    eager = run_all(arrays, CASES[::7])
  same(eager, results, rtol=1e-12, atol=1e-14, names=eager)


def test_vmap_equals_a_loop():
  steps = [draw(seed, 0.3) for seed in (1, 2, 3)]
  with jax.enable_x64(True):
    loop = [run_all_compiled(step) for step in steps]
    stacked = {k: jnp.stack([s[k] for s in steps]) for k in steps[0]}
    batched = jit(jax.vmap(run_short))(stacked)
  for i, expected in enumerate(loop):
    same(
      jax.tree.map(lambda x, i=i: x[i], batched), expected, rtol=1e-12, atol=1e-14, names=batched
    )


def test_float32_agrees_with_float64():
  # Bounds in hundredths and continuous random inputs: no decision hangs on a rounding.
  arrays, results = base()
  single = {k: v.astype(np.float32) if v.dtype == float else v for k, v in arrays.items()}
  got = run_all_compiled(single)
  assert all(loss.dtype == jnp.float32 for loss, *_ in got.values())
  same(got, results, rtol=2e-4, atol=2e-5, names=[n for n in TITLES if n != "gspo"])
  same(got, results, rtol=2e-3, atol=2e-3, names=["gspo"])


def test_eight_devices_equal_one():
  arrays, results = base()
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  with jax.enable_x64(True):
    got = jit(run_short)(jax.device_put(arrays, rows))
  same(got, results, rtol=1e-12, atol=1e-14, names=got)
