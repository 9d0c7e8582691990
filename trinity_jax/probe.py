"""A probe of published weights: the log-probs of one fixed sequence, on both sides.

Checksums say that the bits arrived; the probe says that both sides make the same model of them (the
same architecture, layout and orientation).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trinity_jax.errors import RunFailed
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import transformer
from trinity_jax.models.presets import ModelConfig


@dataclasses.dataclass(frozen=True)
class Probe:
  """How one side evaluates weights.

  Attributes:
    score: (params, tokens i32[T]) -> log-prob f32[T - 1] of each token but the first, in nats.
    tokens: i32[T], the publisher's choice; a reader takes the publisher's.
    tolerance: most that a log-prob may differ between the two sides.
  """

  score: Callable[[Any, np.ndarray], Any]
  tokens: np.ndarray
  tolerance: float = 1e-3

  def record(self, version: int, params: Any) -> dict[str, list]:
    """{"tokens": [T], "logprobs": [T - 1]}, as JSON can hold it.

    Raises:
      RunFailed: a log-prob is not finite.
    """
    logprobs = np.asarray(self.score(params, self.tokens), np.float32)
    if not np.isfinite(logprobs).all():
      raise RunFailed(f"version {version}: the weights give a log-prob that is not finite")
    return {"tokens": self.tokens.tolist(), "logprobs": logprobs.tolist()}

  def check(self, version: int, params: Any, recorded: Mapping[str, list]) -> float:
    """Compares with what the publisher recorded; returns the largest difference.

    Raises:
      RunFailed: it is beyond the tolerance, or nothing was recorded.
    """
    if not recorded:
      raise RunFailed(f"version {version}: it was published without a probe to compare with")
    tokens = np.asarray(recorded["tokens"], np.int32)
    found = np.asarray(self.score(params, tokens), np.float32)
    far = np.abs(found - np.asarray(recorded["logprobs"], np.float32))
    worst = int(far.argmax())
    if not far[worst] <= self.tolerance:
      raise RunFailed(
        f"version {version}: the log-prob of the probe's token {worst + 1} is "
        f"{found[worst]:.6g}, the publisher's {recorded['logprobs'][worst]:.6g}; they may differ "
        f"by {self.tolerance:g}: is the model or its layout another one here?"
      )
    return float(far[worst])


def make_probe(
  config: ModelConfig, launch: LaunchOrder | None = None, *, length: int = 32, seed: int = 0
) -> Probe:
  """A probe of `length` random tokens, evaluated in float32 whatever the weights' dtype.

  Args:
    launch: of the mesh that holds the weights, where other threads use it too.
  """

  def logprobs(params: Any, tokens: jax.Array) -> jax.Array:
    row, positions = tokens[None], jnp.arange(tokens.size, dtype=jnp.int32)[None]
    with jax.default_matmul_precision("highest"):
      hidden = transformer.forward(
        params, config, row, positions, jnp.ones_like(row), dtype=jnp.float32
      )
      scores = jax.nn.log_softmax(transformer.logits(params, config, hidden)[0, :-1], axis=-1)
    return jnp.take_along_axis(scores, tokens[1:, None], axis=-1)[:, 0]

  program = jax.jit(logprobs)
  score = lambda params, tokens: (
    launch(program, params, tokens) if launch else program(params, tokens)
  )
  tokens = np.random.default_rng(seed).integers(0, config.vocab_size, length).astype(np.int32)
  return Probe(score, tokens)
