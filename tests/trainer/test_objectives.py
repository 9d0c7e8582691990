"""What objectives beyond GRPO ask of the trainer: critic, frozen models, scores, updates, pairs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trinity_jax.algorithms import stats
from trinity_jax.algorithms.algorithm import Algorithm, make
from trinity_jax.config import base_config, resolve
from trinity_jax.errors import UserError
from trinity_jax.experience import Experience, ExperienceId, Source
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import hf
from trinity_jax.monitor.metrics import undocumented
from trinity_jax.trainer import arrays
from trinity_jax.trainer import step as train
from trinity_jax.trainer.extras import extras_of, state_ids, step_rewards, token_rewards
from trinity_jax.trainer.minibatches import joined, minibatches
from trinity_jax.trainer.packing import PackSpec, assign_rows, pack
from trinity_jax.trainer.state import HOST
from trinity_jax.trainer.trainer import Trainer, pack_spec


@pytest.fixture(autouse=True)
def quick_compilation(monkeypatch):
  """Half the compile time; what LLVM makes of a program is not looked at here."""
  full = jax.stages.Lowered.compile
  options = {"xla_backend_optimization_level": 0}
  monkeypatch.setattr(jax.stages.Lowered, "compile", lambda x: full(x, compiler_options=options))


def make_trainer(tools, algorithm, mesh=(1, 1, 1), **sets):
  c = base_config()
  c.model.tiny = dict(hidden=32)
  c.taskset.generate = "anything:else"
  c.sampler.max_prompt_length, c.sampler.max_response_length = 4, 12
  c.explorer.batch_size, c.explorer.group_size = 4, 3
  c.trainer.row_lengths, c.trainer.rows_per_micro = (48,), 2
  c.optimizer.learning_rate = 1e-2
  c.algorithm.name = algorithm
  for path, value in sets.items():
    group, _, key = path.partition("__")
    c[group][key] = value
  config = resolve(c)
  mesh = tools.mesh_of(*mesh)
  return Trainer(
    config, make(config.algorithm), tools.POLICY, tools.params_on(mesh), mesh, LaunchOrder(mesh)
  )


def leaves(tree):
  return [np.asarray(x) for x in jax.tree.leaves(tree)]


def same(a, b):
  return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


# --- critic ---------------------------------------------------------------------------------------


def test_critic_learns_while_the_policy_waits(tools):
  trainer = make_trainer(tools, "ppo", mesh=(2, 1, 1), critic__warmup=12,
                         critic__learning_rate=1e-2, optimizer__warmup_steps=4)  # fmt: skip
  start, experiences = tools.base_params(), tools.make_experiences()
  rows = [trainer.step(experiences) for _ in range(13)]
  assert all(undocumented(r) == [] for r in rows)
  assert rows[0]["critic/values_mean"] == 0  # the head starts at zero
  assert rows[11]["vf_loss"] < 0.3 * rows[0]["vf_loss"]
  assert rows[12]["critic/explained_variance"] > 0.5
  assert [r["update_norm"] == 0 for r in rows] == [True] * 12 + [False]
  assert not same(trainer.state.params, start) and trainer.step_number == 13
  # The policy's schedule has not begun.
  assert [r["lr"] for r in rows] == pytest.approx([1e-2 / 4] * 13)


@pytest.mark.slow
def test_a_critic_whose_moments_are_in_host_memory(tools):
  experiences = tools.make_experiences()
  here, there = (
    make_trainer(tools, "ppo", mesh=(1, 2, 1), trainer__offload=where)
    for where in ("none", "optimizer")
  )
  for _ in range(3):
    assert here.step(experiences) == there.step(experiences)
  assert same(here.state, there.state)
  moments = [x for x in jax.tree.leaves(there.state.critic.opt_state) if x.ndim]
  assert {x.sharding.memory_kind for x in moments} == {HOST}
  assert {x.sharding.memory_kind for x in jax.tree.leaves(there.state.critic.params)} == {"device"}


def test_value_targets_by_hand():
  """Two sequences in one row, an observation in the first; gamma 1, lambda 1: rewards to go."""
  algorithm = make("ppo", kl_in="reward", kl="k1", kl_coef=0.5)
  mask = np.array([[False, True, False, True, False, True, True]])
  index = np.array([[0, 0, 0, 0, 1, 1, 1]])
  rewards = np.array([[0, 0, 0, 1.0, 0, 0, 2.0]], np.float32)
  old = np.zeros((1, 7), np.float32)
  ref = np.array([[0, -1.0, 0, 0, 0, 0, 0]], np.float32)  # k1 = old - ref = 1 at one token
  targets, _ = algorithm.value_targets(
    token_rewards=rewards, values=np.full((1, 7), 0.25, np.float32), mask=mask,
    sequence_index=index, num_sequences=2, valid=np.array([True, True]), old_logprob=old,
    ref_logprob=ref, rewards=np.array([1.0, 2.0], np.float32),
  )  # fmt: skip
  # The penalty of 0.5 x 1 is paid at the first action of sequence 0.
  np.testing.assert_allclose(targets[mask], [0.5, 1, 2, 2], rtol=1e-6)


# --- reference and teacher ------------------------------------------------------------------------


def test_reference_and_teacher_from_folders(tools, tmp_path):
  other = jax.tree.map(lambda x: 0.5 * x, tools.base_params())
  hf.save(tmp_path / "other", jax.tree.map(jnp.asarray, other), tools.MODEL)
  folder, experiences = str(tmp_path / "other"), tools.make_experiences()
  plain = make_trainer(tools, "grpo", algorithm__reference=folder, algorithm__kl_coef=0.1)
  moved = make_trainer(tools, "grpo", algorithm__reference=folder, algorithm__kl_coef=0.1,
                       algorithm__offload=True)  # fmt: skip
  a, b = plain.step(experiences), moved.step(experiences)
  assert a["kl"] > 1e-3 and a == b and same(plain.state.params, moved.state.params)
  teacher = make_trainer(tools, "on_policy_distill", algorithm__teacher=folder)
  metrics = teacher.step(experiences)
  assert metrics["teacher_kl"] != 0 and undocumented(metrics) == []
  # Without a model the experiences bring the teacher's log-probs.
  silent = make_trainer(tools, "on_policy_distill")
  with pytest.raises(UserError, match="'teacher_logprob'.*set algorithm.teacher"):
    silent.step(experiences)
  for e in experiences:
    e.extras["teacher_logprob"] = 0.5 * e.logprobs
  assert silent.step(experiences)["teacher_kl"] != 0
  with pytest.raises(UserError, match="config.algorithm.teacher = 'nowhere': no such folder"):
    make_trainer(tools, "jsd", algorithm__teacher="nowhere")
  small = dataclasses.replace(tools.MODEL, vocab_size=32)
  from trinity_jax.models import params as params_lib

  hf.save(tmp_path / "small", params_lib.init(jax.random.key(0), small), small)
  with pytest.raises(UserError, match="its vocabulary has 32 tokens, the policy's 64"):
    make_trainer(tools, "jsd", algorithm__teacher=str(tmp_path / "small"))


# --- scores of the whole step, updates of parts of it ---------------------------------------------


def test_scores_are_those_of_the_policy_as_the_step_begins(tools):
  trainer = make_trainer(tools, "clipv")
  experiences = tools.make_experiences()
  packed, batch, programs, *_ = trainer._prepared(experiences)
  scores = {k: np.asarray(batch.extras[k]) for k in trainer._scores}
  mask = packed.action_mask
  whole = tools.whole_step(experiences, PackSpec((48,), 2, 12))
  assert np.array_equal(whole.packed.tokens, packed.tokens)
  np.testing.assert_allclose(scores["prox_logprob"], whole.logprobs, atol=2e-6)
  assert (scores["prox_entropy"][mask] > 0).all() and not scores["prox_entropy"][~mask].any()
  # E_p[p (H + log p)] is positive for any distribution that is not uniform.
  assert (scores["expected_score"][mask] > 0).all()
  assert undocumented(trainer.step(experiences)) == []


def test_minibatches_are_steps_of_their_own(tools):
  """Two updates on halves = two steps on the halves, up to the number of the step."""
  experiences = tools.make_experiences()
  halves = minibatches(experiences, 2)
  assert [len(h) for h in halves] == [6, 6]
  assert {e.id.group for e in halves[0]}.isdisjoint(e.id.group for e in halves[1])
  two = make_trainer(tools, "grpo", trainer__minibatches=2, algorithm__kl_coef=0.0)
  metrics = two.step(experiences)
  one = make_trainer(tools, "grpo", explorer__batch_size=2, algorithm__kl_coef=0.0)
  each = [one.step(half) for half in halves]
  assert same(two.state.params, one.state.params)
  assert (two.step_number, one.step_number) == (1, 2)
  assert metrics["loss"] == pytest.approx((each[0]["loss"] + each[1]["loss"]) / 2)
  assert metrics["ratio/max"] == max(m["ratio/max"] for m in each)
  assert metrics["packing/rows"] == each[0]["packing/rows"] + each[1]["packing/rows"]
  # Sampler and trainer are compared under the weights that sampled, not after the first update.
  assert "logprob_diff/max" in metrics and undocumented(metrics) == []


def test_experts_are_dealt_out_among_minibatches():
  none = np.zeros(0)
  def one(task, run, source):
    id = ExperienceId(1, task, run, 0)
    return Experience(none, none, none, none, id, source=source)

  every = [one(t, r, Source.ROLLOUT) for t in range(4) for r in range(2)]
  every += [one(9 + i, 0, Source.EXPERT) for i in range(2)]
  parts = minibatches(every, 2)
  assert [[(e.id.task, e.id.run) for e in p] for p in parts] == [
    [(0, 0), (0, 1), (2, 0), (2, 1), (9, 0)], [(1, 0), (1, 1), (3, 0), (3, 1), (10, 0)]
  ]  # fmt: skip
  one = {"a/max": 1.0, "b/min": 2.0, "c": 3.0, "packing/rows": 1.0, "nonfinite_steps": 1.0}
  two = {"a/max": 4.0, "b/min": 1.0, "c": 5.0, "packing/rows": 2.0, "nonfinite_steps": 2.0}
  assert joined([one, two]) == {
    "a/max": 4.0, "b/min": 1.0, "c": 4.0, "packing/rows": 3.0, "nonfinite_steps": 2.0
  }  # fmt: skip


def test_the_fused_loss_is_the_loss(tools, monkeypatch):
  """Losses of single tokens take a shorter way to the same value and gradient."""
  experiences, spec = tools.make_experiences(), PackSpec((48,), 2, 12)
  short = tools.whole_step(experiences, spec)
  monkeypatch.setattr(Algorithm, "token_level", property(lambda self: False))
  tools.grads_program.cache_clear()
  long = tools.whole_step(experiences, spec)
  tools.grads_program.cache_clear()
  assert short.loss == pytest.approx(long.loss, rel=1e-6)
  np.testing.assert_allclose(short.logprobs, long.logprobs, atol=1e-6)
  for a, b in zip(leaves(short.grads), leaves(long.grads), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
  one, two = (jax.device_get(stats.finish(x.stats)) for x in (short, long))
  for name in two:
    np.testing.assert_allclose(one[name], two[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_kl_coef_follows_its_target(tools):
  sets = dict(algorithm__kl_coef=0.1, algorithm__kl="k3", algorithm__kl_horizon=60)
  high = make_trainer(tools, "grpo", algorithm__kl_target=1e-6, **sets)
  experiences = tools.make_experiences()
  # The first step has no KL: error -0.2; later it is far above the target: error 0.2. 11 sequences.
  coefs = [high.step(experiences)["kl_coef"] for _ in range(3)]
  low, up = 1 - 0.2 * 11 / 60, 1 + 0.2 * 11 / 60
  np.testing.assert_allclose(coefs, [0.1, 0.1 * low, 0.1 * low * up], rtol=1e-5)
  with pytest.raises(KeyError):  # a fixed weight is no metric
    make_trainer(tools, "grpo", **sets).step(experiences)["kl_coef"]


# --- preference pairs, extras ---------------------------------------------------------------------


def test_pairs_share_a_row():
  lengths, pairs = [4, 5, 3, 3, 0, 6, 2, 2], [0, 0, 1, 1, 2, 2, -1, -1]
  rows = assign_rows(lengths, 10, pairs)
  where = {i: r for r, row in enumerate(rows) for i in row}
  assert where[0] == where[1] and where[2] == where[3]
  assert sorted(where) == [0, 1, 2, 3, 5, 6, 7]  # the one without tokens has no place
  assert all(sum(lengths[i] for i in row) <= 10 for row in rows)
  with pytest.raises(UserError, match=r"pair \[0, 1\] has 9 tokens, more than the row length 8"):
    assign_rows(lengths, 8, pairs)


def test_dpo_through_the_trainer(tools):
  """Margins rise, the loss falls, and it is the mean over pairs of -log sigmoid of the margins."""
  rng = np.random.default_rng(0)
  pairs = []
  for task in range(6):
    for run, reward in enumerate((1.0, 0.0)):
      e = tools.make_experience(rng, int(rng.integers(6, 14)), 3, id=(1, task, run, 0))
      pairs.append(dataclasses.replace(e, reward=reward, source=Source.EXPERT))
  trainer = make_trainer(tools, "dpo", trainer__row_lengths=(30,), eval__texts={"path": "x"})
  held_out = trainer.held_out_loss(pairs)["eval/loss"]
  rows = [trainer.step(pairs) for _ in range(4)]
  assert rows[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)  # the policy is its reference
  assert held_out == pytest.approx(rows[0]["loss"], rel=1e-5)
  assert rows[-1]["loss"] < 0.7 * rows[0]["loss"] and rows[-1]["dpo/accuracy"] == 1
  assert all(undocumented(r) == [] for r in rows)
  # In two parts, of which the second is not full: the same mean over pairs.
  many = pairs + [dataclasses.replace(e, id=e.id._replace(task=e.id.task + 6)) for e in pairs[:4]]
  whole = [trainer.held_out_loss(p)["eval/loss"] for p in (pairs, pairs[:4], many)]
  assert whole[2] == pytest.approx((6 * whole[0] + 2 * whole[1]) / 8, rel=1e-5)
  with pytest.raises(UserError, match="a preference pair of .* tokens does not fit"):
    pack(pairs, PackSpec((13,), 2, 12), [e.id.task for e in pairs])


def test_rewards_of_tokens_and_turns():
  def one(run, step, reward, **info):
    tokens = np.zeros(4)
    mask = np.array([False, True, True, False])
    return Experience(tokens, mask, tokens, tokens, ExperienceId(1, 0, run, step), reward=reward,
                      info=info)  # fmt: skip

  e = one(0, 0, 2.0)
  assert token_rewards(e).tolist() == [0, 0, 2, 0]
  own = dataclasses.replace(e, token_rewards=np.arange(4.0))
  assert token_rewards(own).tolist() == [0, 1, 2, 3]
  turns = [one(0, 0, 1.0, env_state="a"), one(0, 1, 1.0, env_state="b"),
           one(1, 0, 0.5, env_state="a", step_reward=3.0)]  # fmt: skip
  assert state_ids(turns, 5).tolist() == [0, 1, 0, -1, -1]
  assert step_rewards(turns, 4).tolist() == [0, 1, 3, 0]


def test_extras_of_a_user(tools, monkeypatch):
  """What a user's functions read by name comes from the experiences' extras."""
  import sys
  import types

  from trinity_jax.algorithms import per_sequence

  module = types.ModuleType("my_extras")
  monkeypatch.setitem(sys.modules, "my_extras", module)

  @per_sequence("difficulty")
  def adv(rewards, valid, difficulty):
    return jnp.where(valid, rewards * difficulty, 0), {}

  module.adv = adv
  module.loss = lambda logprob, advantages, mask, importance: (
    jnp.where(mask, -importance * advantages * logprob, 0), {}
  )  # fmt: skip
  algorithm = make("grpo", advantage="my_extras:adv", policy_loss="my_extras:loss", kl_coef=0.0)
  assert algorithm.schema == {"difficulty", "importance"}
  assert algorithm.per_sequence == {"difficulty"}
  extras = extras_of(algorithm)
  experiences = tools.make_experiences()
  for i, e in enumerate(experiences):
    e.extras |= {"difficulty": np.float32(i), "importance": np.full(len(e.tokens), 0.5)}
  batch = pack(experiences, PackSpec((48,), 2, 12), extras=extras)
  assert batch.extras["difficulty"].tolist() == [0 if i == 5 else i for i in range(12)]
  assert np.array_equal(batch.extras["importance"] == 0.5, batch.segment_ids > 0)
  batch, whole, _ = train.prepare(algorithm, batch, num_groups=12, max_response=12)
  one = batch.action_mask & (batch.sequence_index == 3)
  np.testing.assert_allclose(whole["advantages"][one], 3 * experiences[3].reward)
  x = arrays.of_micro_batch(batch, whole, 0)
  assert x["importance"].shape == (2, 48) and x["difficulty"].shape == (12,)
  experiences[0].extras["importance"] = np.zeros(3)
  with pytest.raises(UserError, match=r"extras\['importance'\] has shape \(3,\)"):
    pack(experiences, PackSpec((48,), 2, 12), extras=extras)
  del experiences[0].extras["importance"]
  with pytest.raises(UserError, match="reads 'importance', which its extras do not hold"):
    pack(experiences, PackSpec((48,), 2, 12), extras=extras)


def test_greedy_baselines():
  spec = PackSpec((8,), 1, 6)
  def one(task, run, reward):
    tokens = np.arange(3)
    return Experience(tokens, tokens > 0, tokens, tokens, ExperienceId(1, task, run, 0),
                      reward=reward)  # fmt: skip

  batch = pack([one(0, 0, 1.0), one(0, 1, 3.0), one(1, 1, 5.0), one(1, 2, 6.0)], spec)
  # Group 1 has lost its greedy run: its members are their own baselines and teach nothing.
  assert arrays.greedy_rewards(batch, 6)[:4].tolist() == [1, 1, 5, 6]


def test_shapes_of_a_config():
  c = base_config()
  c.model.tiny, c.taskset.generate = dict(hidden=32), "anything:else"
  c.sampler.max_prompt_length, c.sampler.max_response_length = 4, 12
  c.explorer.batch_size, c.explorer.group_size, c.trainer.rows_per_micro = 4, 3, 2
  c.experts.batch_size = 2
  config = resolve(c)
  assert pack_spec(config, make("mix")) == PackSpec((16,), 2, 14)
  assert pack_spec(config, make("grpo")) == PackSpec((16,), 2, 12)
  assert pack_spec(config, make("dpo")) == PackSpec((32,), 2, 12)  # a pair shares a row


def test_a_critic_survives_a_checkpoint(tools, tmp_path):
  from trinity_jax.trainer.checkpoint import Checkpointer

  trainer, experiences = make_trainer(tools, "ppo"), tools.make_experiences()
  trainer.step(experiences)
  checkpoints = Checkpointer(tmp_path, keep=1)
  checkpoints.save(1, trainer.state, {})
  trainer.step(experiences)
  after = jax.device_get(trainer.state)
  restored, _ = checkpoints.restore(1, trainer.state)
  trainer.load_state(restored)
  trainer.step(experiences)
  assert same(trainer.state, after) and trainer.step_number == 2
