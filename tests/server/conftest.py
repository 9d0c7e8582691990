"""A tiny policy behind the OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trinity_jax.experience import ExperienceId
from trinity_jax.explorer.workflow import Model, SamplingParams
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import hf, sharding, transformer
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.sampler.engine import EngineSpec
from trinity_jax.sampler.programs import Programs
from trinity_jax.sampler.scheduler import Sampler
from trinity_jax.server.serve import serve

PROMPT, RESPONSE, WAIT = 480, 32, 60


class Served:
  """A compiled engine, and servers over samplers of it."""

  max_prompt, max_response = PROMPT, RESPONSE

  def __init__(self, folder):
    path = hf.write_tiny_checkpoint(
      folder / "model", hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, intermediate=32
    )
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    layout = sharding.param_shardings(hf.load_config(path), mesh)
    self.params, model = hf.load(path, dtype=jnp.float32, shardings=layout)
    self.config = model
    self.tokenizer = Tokenizer.load(path)
    spec = EngineSpec(model, 8, live_lengths=(PROMPT + RESPONSE,), max_response=RESPONSE)
    self.programs = Programs(
      spec, mesh, layout, LaunchOrder(mesh), prompt_lengths=(PROMPT,), prompt_counts=(8,)
    )
    self.programs.warmup(self.params)

  @contextlib.contextmanager
  def sampler(self, on_swap="keep", steps=2):
    sampler = Sampler(
      self.programs,
      steps_per_dispatch=steps,
      refill_fraction=0.2,
      deterministic=False,
      on_swap=on_swap,
    )
    sampler.start()
    sampler.set_params(0, self.params)
    try:
      yield sampler
      assert sampler.error is None
    finally:
      sampler.close()

  @contextlib.contextmanager
  def server(self, on_swap="keep", **kwargs):
    """(sampler, server); afterwards no request may be left in the sampler."""
    with self.sampler(on_swap) as sampler:
      server = serve(
        sampler, self.tokenizer, max_prompt=PROMPT, max_response=RESPONSE, **kwargs
      ).start()
      try:
        yield sampler, server
        self.wait_until_free(sampler)
        assert sampler._busy == 0
      finally:
        server.close()
    assert server.error is None and not server._thread.is_alive()

  def wait_until_free(self, sampler) -> None:
    deadline = time.monotonic() + WAIT
    while sampler._accepted or any(slot.open for slot in sampler._driver.slots):
      assert time.monotonic() < deadline, sampler.describe()
      sampler.wake()
      time.sleep(0.01)

  def model(self, sampler, server, run=0, temperature=1.0, limit=RESPONSE) -> Model:
    model = Model(
      sampler, self.tokenizer, ExperienceId(1, 0, run, 0), 0,
      SamplingParams(temperature, limit), PROMPT,
    )  # fmt: skip
    model.server = server
    return model

  def score(self, params, tokens) -> np.ndarray:
    """Log-probs f32[L] of tokens i32[L] by one forward pass over all of them; 0 for the first."""
    n, T = len(tokens), PROMPT + RESPONSE
    padded = jnp.zeros((1, T), jnp.int32).at[0, :n].set(np.asarray(tokens))
    at = jnp.arange(T)[None]
    scores = self._scores(params, padded, at, (at < n).astype(jnp.int32))
    return np.asarray(scores)[:n]

  @functools.cached_property
  def _scores(self):
    def scores(params, tokens, positions, segments):
      hidden = transformer.forward(params, self.config, tokens, positions, segments)
      logp = jax.nn.log_softmax(transformer.logits(params, self.config, hidden)[0])
      chosen = jnp.take_along_axis(logp[:-1], tokens[0, 1:, None], axis=-1)[:, 0]
      return jnp.concatenate([jnp.zeros(1), chosen])

    return jax.jit(scores)

  def run(self, sampler, talk):
    """Runs `await talk()` as a run, on a loop that is not the server's."""

    async def go():
      assert threading.current_thread().name != "openai-server"
      sampler.enter()
      try:
        async with asyncio.timeout(WAIT):
          return await talk()
      finally:
        sampler.leave()

    return asyncio.run(go())


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Served:
  return Served(tmp_path_factory.mktemp("served"))
