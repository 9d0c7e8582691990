"""An identity that compiles only for given platforms.

Which platform a program is for is known when it is lowered and not when it is traced: that is what
lets a TPU's program be compiled on a machine without one. So this is where a kernel that was named
for the wrong platform can be refused.
"""

from __future__ import annotations

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from ..errors import CannotRun

_only = Primitive("linear_logprob_only_on")


def only_on(platforms: tuple[str, ...], message: str, x: jax.Array) -> jax.Array:
  """Returns x; lowering for a platform outside `platforms` raises CannotRun(message)."""
  return _only.bind(x, platforms=platforms, message=message)


def _lower(ctx, x, *, platforms, message):
  asked = tuple(ctx.platforms or ctx.module_context.platforms)
  wrong = [p for p in asked if p not in platforms]
  if wrong:
    raise CannotRun(f"{message}, not on {', '.join(wrong)}")
  return [x]


def _batch(args, dims, **params):
  return _only.bind(*args, **params), dims[0]


_only.def_impl(lambda x, **params: jax.jit(lambda x: _only.bind(x, **params))(x))
_only.def_abstract_eval(lambda x, **params: x)
batching.primitive_batchers[_only] = _batch
mlir.register_lowering(_only, _lower)
