"""extend, copy, start and generate against the full forward and the trainer's log-probs."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trinity_jax.experience import StopReason
from trinity_jax.models import sharding, transformer
from trinity_jax.monitor.compiles import CompileCounter
from trinity_jax.sampler import engine as engine_lib
from trinity_jax.sampler.programs import state_shardings
from trinity_jax.trainer.step import Policy, token_logprobs

_QUICK = {"xla_backend_optimization_level": 0}
PROMPTS = [(3, 9, 27, 17, 51), (60, 2, 2), (5,), (8, 7, 6, 5, 4, 3, 2, 1)]


@functools.cache
def _score(model, shape):
  """The trainer's token log-probs for rows of one shape."""
  B, T = shape
  positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))

  def score(params, tokens, segments, mask, temperature):
    return token_logprobs(
      params, Policy(model), tokens, positions, segments, mask, temperature
    )[0]  # fmt: skip

  return jax.jit(score, compiler_options=_QUICK)


def rows(tools, asks, answers):
  """tokens, segment ids, action mask, temperature of each slot's sequence, [S, C] right-padded."""
  shape = (tools.spec.slots, tools.spec.cache_length)
  tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  mask, temperature = np.zeros(shape, bool), np.ones(shape, np.float32)
  for slot, a in asks.items():
    whole = [*a.prompt, *answers[slot].tokens]
    tokens[slot, : len(whole)], segments[slot, : len(whole)] = whole, 1
    mask[slot, len(a.prompt) : len(whole)] = True
    temperature[slot] = a.temperature or 1.0
  return tokens, segments, mask, temperature


@pytest.fixture(scope="module")
def mixed(tools, engine):
  """Eight requests of every kind decoded together, and their answers."""
  asks = {
    0: tools.ask(PROMPTS[0], key=0, temperature=0.0),
    1: tools.ask(PROMPTS[1], key=1, temperature=0.0),
    2: tools.ask(PROMPTS[2], key=2, temperature=0.0),
    3: tools.ask(PROMPTS[3], key=3, temperature=0.0),
    4: tools.ask(PROMPTS[0], key=4, temperature=1.0),
    5: tools.ask(PROMPTS[1], key=5, temperature=0.7, limit=5),
    6: tools.ask(PROMPTS[2], key=6, temperature=1.6),
    7: tools.ask(PROMPTS[3], key=7, temperature=1.0, limit=1),
  }
  return asks, tools.run(engine, asks)


def test_every_token_is_the_argmax_of_the_perturbed_full_forward(tools, params, mixed):
  asks, answers = mixed
  agreement = tools.agreement()
  tokens = [answers[s].tokens for s in asks]
  length = tools.spec.cache_length
  scores = tools.perturbed(tools.model, params, list(asks.values()), tokens, length)
  for own, chosen in zip(scores, tokens):
    agreement.chosen(own, chosen)
  agreement.check(at_least=70)


def test_recorded_log_probs_are_the_trainers(tools, params, mixed):
  asks, answers = mixed
  tokens, segments, mask, temperature = rows(tools, asks, answers)
  want = np.asarray(_score(tools.model, tokens.shape)(params, tokens, segments, mask, temperature))
  for slot, answer in answers.items():
    np.testing.assert_allclose(answer.logprobs, want[slot][mask[slot]], atol=1e-5, rtol=0)
    assert len(answer.logprobs) == len(answer.tokens)


def test_limits_and_stop_tokens(tools, engine, mixed):
  asks, answers = mixed
  assert [len(answers[s].tokens) for s in (4, 5, 6, 7)] == [12, 5, 12, 1]
  assert {a.reason for a in answers.values()} == {StopReason.LENGTH}
  stopped, cut = {}, {}
  for slot in (0, 4, 6):
    for at, offset in ((0, 0), (7, 1)):  # the first token, and a later one
      token = answers[slot].tokens[at]
      cut[slot + offset] = answers[slot].tokens[: answers[slot].tokens.index(token) + 1]
      ask = tools.ask(**{**vars(asks[slot]), "stop_ids": (63 if token != 63 else 62, token)})
      stopped[slot + offset] = ask
  # Stop token and limit at once: it stopped.
  n = len(cut[1])
  stopped[2] = tools.ask(**{**vars(stopped[1]), "limit": n})
  cut[2] = cut[1]
  got = tools.run(engine, stopped)
  for slot, ask in stopped.items():
    if set(ask.stop_ids[:1]) & set(cut[slot][:-1]):
      continue  # the other stop token came first
    assert got[slot].tokens == cut[slot]
    assert got[slot].reason is StopReason.STOP
    assert len(got[slot].logprobs) == len(got[slot].versions) == len(cut[slot])


def test_versions_are_those_of_the_dispatch(tools, engine, mixed):
  asks, answers = mixed
  drive = tools.drive(engine)
  drive.admit({3: asks[4]}, version=5)
  drive.decode(4, version=6).decode(2, version=9).decode(99, version=11)
  assert drive.answer(3).versions == [5] + 4 * [6] + 2 * [9] + 5 * [11]
  assert drive.answer(3).tokens == answers[4].tokens


def test_slot_neighbours_prefill_batch_and_live_length_change_no_token(tools, engine, mixed):
  asks, answers = mixed
  alone = tools.drive(engine)
  alone.admit({6: asks[4]}, rows=1)
  alone.decode(6, live=12).decode()  # attends to 12 entries, then to 40
  assert alone.answer(6).tokens == answers[4].tokens
  padded = tools.drive(engine)
  padded.admit({1: asks[4]}, rows=4)
  padded.decode()
  assert padded.answer(1).tokens == answers[4].tokens
  # It arrives while others decode, and they end while it decodes.
  crowd = tools.drive(engine)
  crowd.admit({0: asks[5], 7: asks[6]})
  crowd.decode(3)
  crowd.admit({2: asks[4], 3: asks[0]})
  crowd.decode()
  for slot, same in ((0, 5), (7, 6), (2, 4), (3, 0)):
    assert crowd.answer(slot).tokens == answers[same].tokens
    np.testing.assert_allclose(crowd.answer(slot).logprobs, answers[same].logprobs, atol=1e-5)


def test_runs_of_a_group_share_a_prefill_and_differ_by_key(tools, engine):
  group = {s: tools.ask(PROMPTS[0], key=s) for s in range(8)}
  got = tools.run(engine, group, rows=1)  # one row for all eight
  assert len({tuple(a.tokens) for a in got.values()}) == 8
  for slot in (0, 5):
    assert tools.run(engine, {0: group[slot]})[0].tokens == got[slot].tokens


def test_a_start_leaves_other_slots_as_they_were(tools, engine, mixed):
  asks, _ = mixed
  drive = tools.drive(engine)
  drive.admit({s: asks[s] for s in (0, 4, 6)})
  drive.decode(3)
  before = jax.device_get(drive.state)
  drive.admit({1: asks[1], 4: asks[5]})  # 4 is taken over
  after = jax.device_get(drive.state)
  kept = np.delete(np.arange(tools.spec.slots), [1, 4])
  for (path, old), new in zip(
    jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
  ):
    np.testing.assert_array_equal(new[kept], old[kept], err_msg=jax.tree_util.keystr(path))
  assert after.generated[[1, 4]].tolist() == [1, 1] and before.generated[4] == 4


def test_an_aborted_slot_is_free_and_the_rest_goes_on(tools, engine, mixed):
  asks, answers = mixed
  drive = tools.drive(engine)
  drive.admit({0: asks[4], 1: asks[6]})
  drive.decode(3)
  drive.release(0)
  assert drive.active() == [1]
  assert drive.answer(0).reason is StopReason.ABORTED
  drive.admit({0: asks[0]})
  drive.decode()
  assert drive.answer(0).tokens == answers[0].tokens
  assert drive.answer(0).reason is StopReason.LENGTH
  assert drive.answer(1).tokens == answers[6].tokens


def test_generate_returns_when_enough_slots_are_free(tools, engine):
  drive = tools.drive(engine)
  drive.admit({s: tools.ask((s + 1,), key=s, limit=2 + s) for s in range(4)})
  drive.decode(enough=6)  # four are free already; the second to end makes six
  assert drive.active() == [2, 3]
  drive.decode(enough=6)  # enough are: nothing to do
  assert [len(drive.answer(s).tokens) for s in (2, 3)] == [3, 3]
  drive.decode(1)
  assert drive.active() == [3]


def test_no_request_recompiles(tools, engine):
  programs = engine.programs
  assert programs.count == len(programs._compiled)
  drive = tools.drive(engine)  # `prepare` has run
  drive.admit({0: tools.ask((1,))})
  with CompileCounter() as compiles:
    for i in range(6):
      asks = {
        s: tools.ask(
          PROMPTS[(s + i) % 4] * (1 + i % 2), key=s, limit=1 + (s + i) % 12,
          temperature=0.3 * ((s + i) % 4), top_p=1.0 - 0.1 * (i % 3), top_k=s % 3 * i,
          min_p=0.05 * (i % 2), stop_ids=tuple(range(s + 1))[: engine_lib.STOP_IDS],
        )
        for s in range(0, 8, 1 + i % 2)
      }  # fmt: skip
      tools.run(engine, asks, version=i, split=(3,) * (i % 3))
    for rows in programs.prompt_counts:
      for live in programs.live_lengths:
        drive.admit({0: tools.ask((1,), temperature=0.0)}, rows=rows)
        drive.decode(5, version=3, live=live)
        drive.copy([(0, 1), (1, 2)], live=live)
        drive.extend({2: (6, (1, 2, 3))}, rows=rows)
        drive.release(0)
    engine.programs.prepare(engine.params)
    assert compiles.count == 0, compiles.count
    jax.jit(lambda x: x + 17)(np.arange(3))
    assert compiles.count > 0, "the counter would have noticed"


def test_slots_and_heads_must_divide_over_the_mesh(tools):
  mesh = sharding.make_mesh(8, 1, 1)
  with pytest.raises(ValueError, match=r"config\.sampler\.slots = 12: .* 8 devices .* use 16"):
    state_shardings(tools.spec._replace(slots=12), mesh)
  with pytest.raises(ValueError, match=r"slots = 12: must be a multiple of the 8 devices"):
    state_shardings(tools.spec._replace(slots=12), sharding.make_mesh(1, 2, 1, context=4))
  with pytest.raises(ValueError, match=r"config\.mesh\.tensor = 8: .* 2 kv heads"):
    state_shardings(tools.spec, sharding.make_mesh(1, 1, 8))


def test_the_decode_state_is_updated_in_place(tools, engine):
  """Donation: every program writes to the buffers it was given."""
  drive = tools.drive(engine)
  pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(drive.state.cache)]
  old = drive.state
  drive.admit({0: tools.ask((1, 2)), 1: tools.ask((1, 2))})  # extend, copy, start
  assert all(x.is_deleted() for x in jax.tree.leaves(old))
  drive.decode(3).release(0)
  assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(drive.state.cache)] == pointers


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_programs_alias_a_large_cache_and_copy_none_of_it(tools, dtype):
  # Of many slots: an extend holds a few slots' rows while it writes to them.
  spec = tools.spec._replace(
    slots=64, live_lengths=(64, 2048), cache_dtype=dtype and jnp.dtype(dtype)
  )
  programs = tools.jitted(spec, (4,), (8,))
  params = jax.eval_shape(
    functools.partial(transformer.init, config=tools.model), jax.random.key(0)
  )
  params = jax.eval_shape(programs.prepare, params)
  state = jax.eval_shape(programs.init_state)
  size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state.cache))
  ints = lambda *s: jax.ShapeDtypeStruct(s, jnp.int32)
  one, S = ints(), spec.slots
  lowered = {
    "extend": programs.extend.lower(params, state, ints(4, 8), ints(4), ints(4), ints(4)),
    "copy": programs._copy.lower(state, ints(S), ints(S), ints(1), live=64),
  }
  for live in spec.live_lengths:
    lowered[f"generate {live}"] = programs._generate.lower(params, state, one, one, one, live=live)
  for name, program in lowered.items():
    memory = program.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size, name
    # Decoding int8 over everything converts one layer's keys and values for its products.
    share = 8 if (name, dtype) != ("generate 2048", "int8") else 0.5
    assert memory.temp_size_in_bytes < size / share, f"{name}: the cache is copied"


def test_an_empty_state_has_every_slot_free(tools):
  state = jax.eval_shape(lambda: engine_lib.init_state(tools.spec))
  assert len(state.cache) == 2
  for layer in state.cache:
    assert [x.k.shape for x in layer] == [(8, 2, 16, 12), (8, 2, 16, 28)]
    assert [x.v.shape for x in layer] == [(8, 2, 12, 16), (8, 2, 28, 16)]
    assert {x.k.dtype for x in layer} == {jnp.dtype("float32")}
    assert all(x.k_scale is None and x.v_scale is None for x in layer)
  assert state.tokens.shape == state.logprobs.shape == state.versions.shape == (8, 12)
