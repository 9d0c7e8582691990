"""Chunks of active rows in a loop, backward by hand: [T, V] never exists when it is large.

Axes: T rows (tokens), C rows of a chunk, D model width, V vocabulary.

Rows under the mask are compacted first (a stable sort puts them in front) and the loop runs over
ceil(active / C) chunks, a bound known only at run time: masked rows cost nothing. Saved for the
backward are two numbers per row, lse and entropy H; the chunk's logits l are computed again. With
p = exp(l - lse) and cotangents g (of logprob), h (of entropy), z (of lse):

  dl = g (1[v = target] - p) + z p - h p (log p + H)

When [T, V] is small anyway (see `chunk_rows`) there is one chunk, whose logits are kept.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

# A chunk of this many logits (32 MiB in float32) is large enough for matmuls at full rate and small
# beside weight and gradient; a program with no more logits than that keeps them.
CHUNK_LOGITS = 1 << 23
MIN_ROWS = 128


def chunk_rows(num_rows: int, vocabulary: int) -> int:
  """Rows per chunk: all of them when that is at most CHUNK_LOGITS logits."""
  if num_rows * vocabulary <= CHUNK_LOGITS:
    return num_rows
  rows = max(CHUNK_LOGITS // vocabulary, MIN_ROWS)
  return min(num_rows, rows // MIN_ROWS * MIN_ROWS)


def linear_logprob(hidden, weight, targets, mask, temperature, *, softcap, chunk=None):
  """See api.py. `chunk` is the number of rows whose logits exist at a time."""
  hidden, weight, targets = (jnp.asarray(x) for x in (hidden, weight, targets))
  mask = jnp.asarray(mask, bool)
  wide = jnp.promote_types(jnp.promote_types(hidden.dtype, weight.dtype), jnp.float32)
  temperature = jnp.broadcast_to(temperature, mask.shape).astype(wide)
  # Of masked rows nothing is read: temperature 0 and target -1 are fine there.
  temperature = jax.lax.stop_gradient(jnp.where(mask, temperature, 1))
  targets = jnp.where(mask, targets, 0).astype(jnp.int32)
  chunk = chunk or chunk_rows(hidden.shape[0], weight.shape[1])
  if chunk >= hidden.shape[0]:
    return _whole(hidden, weight, targets, mask, temperature, softcap)
  return _chunked(hidden, weight, targets, mask, temperature, softcap, chunk)


# --- one chunk of rows ---------------------------------------------------------------------------


def _wide(x, weight):
  return jnp.promote_types(jnp.promote_types(x.dtype, weight.dtype), jnp.float32)


def _logits(x, weight, temperature, softcap):
  """[C, D], [D, V] -> [C, V] in float32 or wider."""
  logits = jnp.dot(x, weight, preferred_element_type=_wide(x, weight))
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  return logits / temperature[:, None]


def _reduce(logits, targets):
  """-> (logprob, entropy, lse), each [C]; and the probabilities [C, V]."""
  top = jnp.max(logits, axis=-1)
  shifted = logits - top[:, None]
  e = jnp.exp(shifted)
  total = jnp.sum(e, axis=-1)
  mean = jnp.sum(e * shifted, axis=-1) / total
  log_total = jnp.log(total)
  target = jnp.take_along_axis(shifted, targets[:, None], axis=-1)[:, 0]
  return (target - log_total, log_total - mean, top + log_total), e / total[:, None]


def _logits_gradient(p, logits, targets, temperature, entropy, lse, cotangents, softcap):
  """d/d(hidden @ weight), [C, V]. A cotangent may be None: nothing depends on that output."""
  g, h, z = cotangents
  scale = jnp.zeros_like(lse)
  if z is not None:
    scale += z
  if g is not None:
    scale -= g
  d = scale[:, None]
  if h is not None:  # usually a mere metric: then no logarithm is needed
    d = d - h[:, None] * (logits + (entropy - lse)[:, None])
  d = p * d
  if g is not None:
    columns = jax.lax.broadcasted_iota(jnp.int32, d.shape, 1)
    d = d + jnp.where(columns == targets[:, None], g[:, None], 0)
  if softcap is not None:  # d tanh = 1 - tanh^2, and tanh is the capped logit over the cap
    d = d * (1 - jnp.square(logits * (temperature / softcap)[:, None]))
  return d / temperature[:, None]


def _hidden_gradient(d, weight):
  """[C, V], [D, V] -> [C, D]."""
  return jax.lax.dot_general(
    d.astype(weight.dtype), weight, (((1,), (1,)), ((), ())), preferred_element_type=d.dtype
  )


def _weight_gradient(x, d):
  """[C, D], [C, V] -> [D, V]."""
  return jax.lax.dot_general(
    x, d.astype(x.dtype), (((0,), (0,)), ((), ())), preferred_element_type=d.dtype
  )


def _clean(mask, x):
  return jnp.where(mask[:, None], x, jnp.zeros_like(x))


def _given(cotangents):
  """None for outputs that nothing depends on."""
  return [None if isinstance(c, SymbolicZero) else c for c in cotangents]


# --- everything at once ---------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _whole(hidden, weight, targets, mask, temperature, softcap):
  return _whole_forward(hidden, weight, targets, mask, temperature, softcap)[0]


def _whole_forward(hidden, weight, targets, mask, temperature, softcap):
  hidden = _clean(mask, hidden)
  logits = _logits(hidden, weight, temperature, softcap)
  values, p = _reduce(logits, targets)
  out = tuple(jnp.where(mask, x, 0) for x in values)
  # What the backward turns out not to read is dropped by the compiler.
  return out, (hidden, weight, targets, mask, temperature, p, logits, *out[1:])


def _whole_first(*args):
  *primals, softcap = args
  return _whole_forward(*[*(x.value for x in primals), softcap])


def _whole_backward(softcap, saved, cotangents):
  hidden, weight, targets, mask, temperature, p, logits, entropy, lse = saved
  cotangents = [c if c is None else jnp.where(mask, c, 0) for c in _given(cotangents)]
  d = _logits_gradient(p, logits, targets, temperature, entropy, lse, cotangents, softcap)
  d_hidden = _hidden_gradient(d, weight).astype(hidden.dtype)
  d_weight = _weight_gradient(hidden, d).astype(weight.dtype)
  return d_hidden, d_weight, None, None, None


_whole.defvjp(_whole_first, _whole_backward, symbolic_zeros=True)


# --- in chunks ------------------------------------------------------------------------------------


def _order(mask, chunk):
  """Rows under the mask first, padded to whole chunks with T; and the number of live chunks."""
  (count,) = mask.shape
  order = jnp.argsort(~mask, stable=True).astype(jnp.int32)
  active = jnp.sum(mask, dtype=jnp.int32)
  order = jnp.where(jnp.arange(count) < active, order, count)
  order = jnp.pad(order, (0, -count % chunk), constant_values=count)
  return order, (active + chunk - 1) // chunk


def _rows(order, i, chunk, *arrays):
  """The i-th chunk's row numbers, and those rows of `arrays`, 0 beyond the last active one."""
  index = jax.lax.dynamic_slice(order, (i * chunk,), (chunk,))
  return index, *(a.at[index].get(mode="fill", fill_value=0) for a in arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _chunked(hidden, weight, targets, mask, temperature, softcap, chunk):
  return _chunked_forward(hidden, weight, targets, mask, temperature, softcap, chunk)[0]


def _chunked_forward(hidden, weight, targets, mask, temperature, softcap, chunk):
  order, live = _order(mask, chunk)

  def body(i, out):
    index, x, y, t = _rows(order, i, chunk, hidden, targets, temperature)
    t = jnp.where(index < mask.shape[0], t, 1)
    values, _ = _reduce(_logits(x, weight, t, softcap), y)
    return tuple(o.at[index].set(v, mode="drop") for o, v in zip(out, values))

  zeros = jnp.zeros(mask.shape, _wide(hidden, weight))
  out = jax.lax.fori_loop(0, live, body, (zeros, zeros, zeros))
  return out, (hidden, weight, targets, temperature, order, live, *out[1:])


def _chunked_first(*args):
  *primals, softcap, chunk = args
  return _chunked_forward(*[*(x.value for x in primals), softcap, chunk])


def _chunked_backward(softcap, chunk, saved, cotangents):
  hidden, weight, targets, temperature, order, live, entropy, lse = saved
  count = hidden.shape[0]
  wide = _wide(hidden, weight)
  given = _given(cotangents)

  def body(i, gradients):
    d_hidden, d_weight = gradients
    index, x, y, t, e, z = _rows(order, i, chunk, hidden, targets, temperature, entropy, lse)
    c = [c if c is None else _rows(order, i, chunk, c)[1] for c in given]
    t = jnp.where(index < count, t, 1)
    logits = _logits(x, weight, t, softcap)
    p = jnp.exp(logits - z[:, None])
    d = _logits_gradient(p, logits, y, t, e, z, c, softcap)
    d_hidden = d_hidden.at[index].set(_hidden_gradient(d, weight).astype(hidden.dtype), mode="drop")
    return d_hidden, d_weight + _weight_gradient(x, d)

  zeros = (jnp.zeros_like(hidden), jnp.zeros(weight.shape, wide))
  d_hidden, d_weight = jax.lax.fori_loop(0, live, body, zeros)
  return d_hidden, d_weight.astype(weight.dtype), None, None, None


_chunked.defvjp(_chunked_first, _chunked_backward, symbolic_zeros=True)
