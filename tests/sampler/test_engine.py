"""prefill / insert / generate against the full forward pass and the trainer's log-probs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trinity_jax.experience import StopReason
from trinity_jax.models import transformer
from trinity_jax.monitor.compiles import CompileCounter
from trinity_jax.sampler import engine as engine_lib
from trinity_jax.trainer.step import Policy, token_logprobs

_QUICK = {"xla_backend_optimization_level": 0}
PROMPTS = [(3, 9, 27, 17, 51), (60, 2, 2), (5,), (8, 7, 6, 5, 4, 3, 2, 1)]


@functools.cache
def _programs_of_the_trainer(model, shape):
  """(logits [B, T, V] of the full forward, the trainer's token log-probs) for rows of one shape."""
  B, T = shape
  positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))

  def forward(params, tokens, segments):
    hidden = transformer.forward(params, model, tokens, positions, segments)
    return transformer.logits(params, model, hidden)

  def score(params, tokens, segments, mask, temperature):
    return token_logprobs(
      params, Policy(model), tokens, positions, segments, mask, temperature
    )[0]  # fmt: skip

  return (jax.jit(forward, compiler_options=_QUICK), jax.jit(score, compiler_options=_QUICK))


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


def test_greedy_decoding_is_the_argmax_of_the_full_forward(tools, params, mixed):
  asks, answers = mixed
  tokens, segments, mask, _ = rows(tools, asks, answers)
  forward, _ = _programs_of_the_trainer(tools.model, tokens.shape)
  logits = np.asarray(forward(params, tokens, segments))
  checked = 0
  for slot in range(4):
    for t in np.flatnonzero(mask[slot]):
      top2 = np.sort(logits[slot, t - 1])[-2:]
      if top2[1] - top2[0] >= 1e-4:
        assert tokens[slot, t] == logits[slot, t - 1].argmax(), (slot, t)
        checked += 1
  assert checked >= 40, "the model is too uniform for this test to say anything"


def test_recorded_log_probs_are_the_trainers(tools, params, mixed):
  asks, answers = mixed
  tokens, segments, mask, temperature = rows(tools, asks, answers)
  _, score = _programs_of_the_trainer(tools.model, tokens.shape)
  want = np.asarray(score(params, tokens, segments, mask, temperature))
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
  alone.decode(6, live=12).decode()  # attends to 12 entries, then to 20
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


def test_insert_leaves_other_slots_as_they_were(tools, engine, mixed):
  asks, _ = mixed
  drive = tools.drive(engine)
  drive.admit({s: asks[s] for s in (0, 4, 6)})
  drive.decode(3)
  before = jax.device_get(drive.state)
  drive.admit({1: asks[1], 4: asks[5]})  # 4 is taken over
  after = jax.device_get(drive.state)
  for path, old in jax.tree_util.tree_leaves_with_path(before):
    new = functools.reduce(_child, path, after)
    axis = 1 if old.ndim == 5 else 0
    kept = np.delete(np.arange(tools.spec.slots), [1, 4])
    np.testing.assert_array_equal(
      np.take(new, kept, axis), np.take(old, kept, axis), err_msg=jax.tree_util.keystr(path)
    )
  assert after.generated[[1, 4]].tolist() == [1, 1] and before.generated[4] == 4


def _child(node, key):
  return getattr(node, key.name)


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
  with CompileCounter() as compiles:
    for i in range(4):
      asks = {
        s: tools.ask(
          PROMPTS[(s + i) % 4], key=s, limit=1 + (s + i) % 12, temperature=0.3 * ((s + i) % 4),
          top_p=1.0 - 0.1 * (i % 3), top_k=s % 3 * i, min_p=0.05 * (i % 2),
          stop_ids=tuple(range(s + 1))[: engine_lib.STOP_IDS],
        )
        for s in range(0, 8, 1 + i % 2)
      }  # fmt: skip
      tools.run(engine, asks, version=i)
    drive = tools.drive(engine)
    drive.admit({0: tools.ask((1,))}, rows=1)
    drive.decode(5, version=3, live=12)
    drive.release(0)
    assert compiles.count == 0, compiles.count
    jax.jit(lambda x: x + 17)(np.arange(3))
    assert compiles.count > 0, "the counter would have noticed"


@pytest.mark.parametrize("sizes", [(4, 1, 2), (2, 2, 2)], ids=["data4_tensor2", "fsdp2"])
def test_eight_devices_give_the_tokens_of_one(tools, engine, meshed, mixed, sizes):
  asks, answers = mixed
  other = meshed(sizes)
  got = tools.run(other, asks)
  for slot, answer in answers.items():
    assert got[slot].tokens == answer.tokens
    np.testing.assert_allclose(got[slot].logprobs, answer.logprobs, atol=1e-5)


def test_slots_and_heads_must_divide_over_the_mesh(tools, engine):
  from trinity_jax.models import sharding
  from trinity_jax.sampler.programs import state_shardings

  mesh = sharding.make_mesh(8, 1, 1)
  with pytest.raises(ValueError, match=r"config\.sampler\.slots = 12: .* 8 devices .* use 16"):
    state_shardings(tools.spec._replace(slots=12), mesh)
  with pytest.raises(ValueError, match=r"config\.mesh\.tensor = 8: .* 2 kv heads"):
    state_shardings(tools.spec, sharding.make_mesh(1, 1, 8))


def test_the_decode_state_is_updated_in_place(tools, engine):
  """Donation: insert and generate write to the buffers they were given."""
  drive = tools.drive(engine)
  pointer = drive.state.k.unsafe_buffer_pointer()
  old = drive.state
  drive.admit({0: tools.ask((1, 2))})
  assert old.k.is_deleted()
  drive.decode(3)
  assert drive.state.k.unsafe_buffer_pointer() == pointer


def test_an_empty_state_has_every_slot_free(tools):
  state = jax.eval_shape(lambda: engine_lib.init_state(tools.spec))
  assert state.k.shape == (2, 8, 2, 20, 16) and state.k.dtype == jnp.float32
  assert state.tokens.shape == state.logprobs.shape == state.versions.shape == (8, 12)
