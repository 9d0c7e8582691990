"""A tiny decoder with compiled sampler programs, and the full forward pass to compare with."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import sharding, transformer
from trinity_jax.models.presets import ModelConfig
from trinity_jax.sampler.engine import EngineSpec, Requests
from trinity_jax.sampler.programs import Programs
from trinity_jax.sampler.request import Completion, Request

MODEL = ModelConfig("qwen3", 64, 32, 2, 4, 2, 16, 48, qk_norm=True, tie_word_embeddings=True)
SPEC = EngineSpec(MODEL, slots=4, live_lengths=(64, 128), max_response=40)


class TinyEngine:
  """Programs on one device.

  Attributes:
    params: three policies, placed for the programs.
    programs: warm.
  """

  def __init__(self):
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    layout = sharding.param_shardings(MODEL, mesh)
    self.programs = Programs(
      SPEC, mesh, layout, LaunchOrder(mesh), prompt_lengths=(8, 32), prompt_counts=(4,)
    )
    make = jax.jit(functools.partial(transformer.init, config=MODEL))
    self.params = [jax.device_put(_sharpened(make, i), layout) for i in range(3)]
    self.programs.warmup(self.params[0])
    self._scores = jax.jit(_scores)

  def score(self, params: Any, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Log-probs of the response, by one forward pass over everything."""
    n, m = len(prompt), len(response)
    tokens = np.zeros(SPEC.cache_length + 1, np.int32)
    tokens[: n + m] = np.concatenate([prompt, response])
    return np.asarray(self._scores(params, tokens))[n - 1 : n + m - 1]

  def replay(self, requests: list[Request], swaps: list[tuple[int, int, Any]]) -> list[Completion]:
    """Samples one request per slot by hand: no scheduler, every swap at its place.

    Args:
      swaps: (tokens, version, params): from its n-th token on, every sequence is sampled by these,
        on the cache as it is. The first is (0, ...). Sequences must not end before the last.
    """
    p, S = self.programs, SPEC.slots
    state, asked = p.init_state(), Requests.empty(S)
    weights = [p.prepare(params) for _, _, params in swaps]
    tokens, counts = np.zeros((S, 32), np.int32), np.zeros(S, np.int32)
    for i, r in enumerate(requests):
      tokens[i, : len(r.tokens)], counts[i] = r.tokens, len(r.tokens)
      asked.key[i], asked.limit[i] = r.key, r.limit
    used = np.arange(S) < len(requests)
    slots = np.where(used, np.arange(S), -1).astype(np.int32)
    state, logits = p.extend(weights[0], state, tokens, np.zeros(S, np.int32), counts, slots)
    state = p.start(state, logits, slots, counts, asked, swaps[0][1])
    ends = [n for n, _, _ in swaps[1:]] + [SPEC.max_response]
    done = 1
    for (_, version, _), prepared, end in zip(swaps, weights, ends):
      if end > done:
        state, _ = p.generate(prepared, state, version, end - done, S, SPEC.cache_length)
        done = end
    s = jax.device_get(
      (state.tokens, state.logprobs, state.versions, state.generated, state.stop_reason)
    )
    cut = lambda x, i: x[i, : s[3][i]]
    return [
      Completion(cut(s[0], i), cut(s[1], i), cut(s[2], i), np.zeros(s[3][i], bool), s[4][i])
      for i in range(len(requests))
    ]


def _sharpened(make: Any, seed: int) -> Any:
  """Far from uniform, so that policies differ clearly."""
  leaves, treedef = jax.tree.flatten(jax.device_get(make(jax.random.key(seed))))
  rng = np.random.default_rng(seed)
  return treedef.unflatten([(x + rng.normal(0, 0.3, x.shape)).astype(np.float32) for x in leaves])


def _scores(params, tokens):
  row, positions = tokens[None], jnp.arange(len(tokens), dtype=jnp.int32)[None]
  hidden = transformer.forward(params, MODEL, row, positions, jnp.ones_like(row))
  logprobs = jax.nn.log_softmax(transformer.logits(params, MODEL, hidden)[0], axis=-1)
  return jnp.take_along_axis(logprobs[:-1], tokens[1:, None], axis=-1)[:, 0]
