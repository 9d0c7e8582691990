"""ops.linear: value and both gradients against float64 products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from trinity_jax import ops
from trinity_jax.models.sharding import make_mesh

D, F = 24, 40


def _arrays(shape, dtype=np.float32, seed=0):
  """x, w and the output's cotangent, rounded to `dtype`."""
  rng = np.random.default_rng(seed)
  draw = lambda *s: jnp.asarray(rng.standard_normal(s), dtype)
  return draw(*shape, D), draw(D, F), draw(*shape, F)


def _run(x, w, g, **kwargs):
  out, pull = jax.vjp(lambda x, w: ops.linear(x, w, **kwargs), x, w)
  return out, *pull(g)


def _expected(x, w, g):
  x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
  dw = x.reshape(-1, D).T @ g.reshape(-1, F)
  return x @ w, g @ w.T, dw


def _check(got, args, tolerance):
  for name, a, b in zip(("y", "dx", "dw"), got, _expected(*args), strict=True):
    assert a.shape == b.shape, name
    error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
    assert error <= tolerance, (name, error)


@pytest.mark.parametrize("shape", [(16,), (4, 6), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("jit", [False, True])
def test_value_and_gradients(shape, jit):
  args = _arrays(shape)
  got = (jax.jit(_run) if jit else _run)(*args)
  assert {a.dtype for a in got} == {jnp.dtype("float32")}
  _check(got, args, 3e-7)


def test_bfloat16_accumulates_wider():
  x, w, g = _arrays((4, 64), jnp.bfloat16)
  got = jax.jit(_run)(x, w, g)
  assert {a.dtype for a in got} == {jnp.dtype("bfloat16")}
  _check(got, (x, w, g), 4e-3)  # one rounding of each result
  wide = ops.linear(x, w, out_dtype=jnp.float32)
  assert wide.dtype == jnp.float32
  np.testing.assert_allclose(wide, _expected(x, w, g)[0], rtol=1e-5, atol=1e-5)


def test_wide_output_of_bfloat16_has_bfloat16_gradients():
  x, w, g = _arrays((4, 64), jnp.bfloat16)
  out, dx, dw = _run(x, w, g.astype(jnp.float32), out_dtype=jnp.float32)
  assert (out.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
  _check((out, dx, dw), (x, w, g), 4e-3)


def test_vmap():
  args = [jnp.stack(a) for a in zip(*(_arrays((6,), seed=s) for s in range(3)), strict=True)]
  got = jax.vmap(_run)(*args)
  for i in range(3):
    _check([a[i] for a in got], [a[i] for a in args], 3e-7)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 2)], ids=str)
def test_sharded(sizes):
  args = _arrays((8, 6))
  mesh = make_mesh(*sizes)
  rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, None))
  weight = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
  outs = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
  run = jax.jit(_run, in_shardings=(rows, weight, outs), out_shardings=(outs, rows, weight))
  _check(run(*args), args, 3e-7)


def test_float64():
  with jax.enable_x64(True):
    args = _arrays((4, 6), np.float64)
    got = _run(*args)
    assert {a.dtype for a in got} == {jnp.dtype("float64")}
    _check(got, args, 1e-14)


@pytest.mark.parametrize("platform, transposes", [("cpu", 1), ("tpu", 0), ("cuda", 0)])
def test_only_the_cpu_transposes_explicitly(platform, transposes):
  text = jax.jit(_run).trace(*_arrays((16,))).lower(lowering_platforms=(platform,)).as_text()
  assert text.count("stablehlo.dot_general") == 3
  assert text.count("stablehlo.transpose") == transposes
