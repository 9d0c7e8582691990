"""Log-probs of given tokens: the full forward's numbers, whatever else the sampler does."""

from __future__ import annotations

import asyncio
import functools
import threading

import fake_engine
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_engine

from trinity_jax.errors import RunFailed, UserError
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import sharding, transformer
from trinity_jax.sampler import scoring
from trinity_jax.sampler.engine import EngineSpec
from trinity_jax.sampler.programs import Programs
from trinity_jax.sampler.request import Request
from trinity_jax.sampler.sampling import request_key
from trinity_jax.sampler.scheduler import Sampler

MODEL = tiny_engine.MODEL
SPEC = EngineSpec(MODEL, slots=2, live_lengths=(1024,), max_response=8)


def make(mesh_shape, spec=SPEC):
  mesh = sharding.make_mesh(*mesh_shape, jax.devices()[: int(np.prod(mesh_shape))])
  layout = sharding.param_shardings(MODEL, mesh)
  return Programs(
    spec._replace(slots=2 * mesh_shape[0] * mesh_shape[1]), mesh, layout, LaunchOrder(mesh),
    prompt_lengths=(8,), prompt_counts=(1,), scores=True,
  )  # fmt: skip


@pytest.fixture(scope="module")
def params():
  return jax.device_get(transformer.init(jax.random.key(3), MODEL))


@pytest.fixture(scope="module")
def programs(params):
  programs = make((1, 1, 1))
  programs.warmup(params)
  return programs


@pytest.fixture
def sampler(programs, params):
  sampler = Sampler(programs, steps_per_dispatch=4, refill_fraction=0.1, deterministic=True)
  sampler.start()
  sampler.set_params(0, jax.device_put(params, programs._published))
  yield sampler
  sampler.close()


@jax.jit
def _logits(params, row):
  positions = jnp.arange(row.shape[1], dtype=jnp.int32)[None]
  hidden = transformer.forward(params, MODEL, row, positions, jnp.ones_like(row))
  return transformer.logits(params, MODEL, hidden)[0]


def truth(params, tokens, temperature):
  """By the model's plain forward pass over a row of 1,024, and log-softmax in float64."""
  row = np.zeros((1, 1024), np.int32)
  row[0, : len(tokens)] = tokens
  logits = np.asarray(_logits(params, row), np.float64)[: len(tokens) - 1] / temperature
  logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  return np.concatenate([[0.0], logprobs[np.arange(len(tokens) - 1), tokens[1:]]])


def texts(*lengths):
  rng = np.random.default_rng(0)
  return [rng.integers(0, MODEL.vocab_size, n).tolist() for n in lengths]


async def _within(coroutine, seconds=60):
  async with asyncio.timeout(seconds):
    return await coroutine


def ask_all(sampler, tokens, temperature=1.0):
  async def all_():
    return await asyncio.gather(*(sampler.logprobs(t, temperature) for t in tokens))

  return asyncio.run(_within(all_()))


def test_shapes():
  assert scoring.lengths(SPEC) == (256, 1024)
  assert [scoring.rows(SPEC, T, 2) for T in (256, 1024)] == [8, 2]
  assert scoring.lengths(SPEC._replace(live_lengths=(60,))) == (60,)
  assert scoring.lengths(SPEC._replace(live_lengths=(16384,))) == (256, 1024, 4096, 16384)
  assert scoring.rows(SPEC._replace(live_lengths=(16384,)), 256, 1) == 8


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_the_full_forward(sampler, params, temperature):
  tokens = texts(1, 2, 3, 77, 255, 256, 257, 1024)
  found = ask_all(sampler, tokens, temperature)
  for t, got in zip(tokens, found):
    assert got.shape == (len(t),) and got.dtype == np.float32
    np.testing.assert_allclose(got, truth(params, t, temperature), atol=2e-5)
  assert sampler.stats["scored_tokens"] == sum(map(len, tokens))


def test_what_is_beside_it_changes_no_bit(sampler):
  tokens = texts(*[40 + n for n in range(9)])
  alone = [ask_all(sampler, [t])[0] for t in tokens]
  together = ask_all(sampler, tokens[::-1])[::-1]
  for a, b in zip(alone, together):
    assert a.tobytes() == b.tobytes()


def test_agrees_with_what_was_sampled(sampler):
  """And a run that is busy elsewhere holds back samples, but no scores."""

  async def main():
    with sampler.participant():
      done = await sampler.generate(
        Request(np.arange(1, 7, dtype=np.int32), request_key(0, 1), (0,), 8, (), temperature=0.8)
      )
      tokens = [*range(1, 7), *done.tokens.tolist()]
      scored = await sampler.logprobs(tokens, 0.8)
      np.testing.assert_allclose(scored[6:], done.logprobs, atol=2e-5)

  asyncio.run(_within(main()))


def test_on_a_mesh(params):
  wide = make((2, 2, 2), SPEC._replace(live_lengths=(64,)))
  wide.warmup(params)
  sampler = Sampler(wide, steps_per_dispatch=4, refill_fraction=0.1, deterministic=True)
  sampler.start()
  sampler.set_params(0, jax.device_put(params, wide._published))
  tokens = texts(*[5 * n for n in range(1, 10)])
  found = ask_all(sampler, tokens)
  sampler.close()
  for t, got in zip(tokens, found):
    np.testing.assert_allclose(got, truth(params, t, 1.0), atol=2e-5)


@pytest.mark.parametrize(
  "tokens, temperature, message",
  [
    ([], 1.0, "logprobs of 0 tokens: .* allow 1 to 1024"),
    ([0] * 1025, 1.0, "logprobs of 1025 tokens"),
    ([1, 64], 1.0, "token 64: the vocabulary has ids 0 to 63"),
    ([1, -1], 1.0, "token -1"),
    ([1, 2], 0.0, "temperature 0.0: expected a number above 0"),
    ([1, 2], float("nan"), "temperature nan"),
  ],
)
def test_refused(sampler, tokens, temperature, message):
  with pytest.raises(UserError, match=message):
    asyncio.run(sampler.logprobs(tokens, temperature))


def test_refused_where_it_was_not_compiled():
  programs = fake_engine.FakePrograms()
  sampler = Sampler(programs, steps_per_dispatch=4, refill_fraction=0.1, deterministic=True)
  with pytest.raises(UserError, match="config.sampler.scores = True"):
    asyncio.run(sampler.logprobs([1, 2]))


def test_cancelled_paused_closed(sampler, programs):
  """One given up is not scored, a pause holds scores back, and a close fails what waits."""

  async def main():
    sampler.pause()
    gone, kept = (asyncio.create_task(sampler.logprobs(t)) for t in texts(9, 10))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait([gone], timeout=60)
    assert gone.cancelled() and not kept.done()
    sampler.resume()
    assert len(await _within(kept, 30)) == 10
    assert sampler.stats["scored_tokens"] == 10
    sampler.pause()
    left = asyncio.create_task(sampler.logprobs([1, 2]))
    await asyncio.sleep(0)
    await asyncio.to_thread(sampler.close)
    with pytest.raises(RunFailed, match="was closed"):
      await _within(left, 30)
    with pytest.raises(RunFailed, match="was closed"):
      await sampler.logprobs([1, 2])

  asyncio.run(main())


def test_a_dispatch_that_fails_ends_the_sampler(sampler, programs, monkeypatch):
  def fails(*_):
    raise FloatingPointError("no device")

  monkeypatch.setattr(programs, "score", fails)
  with pytest.raises(RunFailed, match="sampler thread has died: FloatingPointError: no device"):
    ask_all(sampler, texts(4))


def test_decoding_goes_on_beside_scores(programs, params):
  """A stream of scores does not starve the sequences under way, nor the other way round."""
  sampler = Sampler(programs, steps_per_dispatch=1, refill_fraction=0.1, deterministic=False)
  sampler.start()
  sampler.set_params(0, jax.device_put(params, programs._published))
  stop = threading.Event()

  async def main():
    async def scores():
      n = 0
      while not stop.is_set():
        await sampler.logprobs([1, 2, 3])
        n += 1
      return n

    scoring_ = asyncio.create_task(scores())
    make_ = functools.partial(Request, limit=8, stop_ids=())
    with sampler.participant():
      for i in range(10):
        done = await sampler.generate(
          make_(np.arange(1, 5, dtype=np.int32), request_key(0, i), order=(i,))
        )
        assert len(done.tokens) == 8
    stop.set()
    assert await scoring_ >= 10

  try:
    asyncio.run(_within(main()))
  finally:
    sampler.close()
