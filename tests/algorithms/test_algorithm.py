"""The table: what `make` builds, what it needs, user functions, invariance of a whole step."""

from __future__ import annotations

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trinity_jax import algorithms
from trinity_jax.algorithms import aggregation, stats
from trinity_jax.algorithms.algorithm import POLICY_LOSSES, Row
from trinity_jax.config import AlgorithmConfig
from trinity_jax.errors import UserError


def test_defaults_of_the_table():
  grpo = algorithms.make(AlgorithmConfig())
  assert (grpo.name, grpo.kl.name, grpo.kl_coef, grpo.aggregation) == (
    "grpo", "k2", 0.001, "token-mean"
  )  # fmt: skip
  assert grpo.needs_reference and grpo.needs_group and grpo.uses_ratio and not grpo.supervised
  assert grpo.schema == set()
  sft = algorithms.make("sft")
  assert sft.supervised
  assert not (sft.needs_reference or sft.needs_group or sft.uses_ratio)


def test_config_overrides():
  a = algorithms.make(
    "grpo", kl_coef=0.0, aggregation="token-sum", entropy_coef=0.5,
    policy_loss_args={"clip_high": 0.28}, advantage_args={"std": False},
  )  # fmt: skip
  assert not a.needs_reference  # no KL term, no reference model
  assert (a.aggregation, a.entropy_coef) == ("token-sum", 0.5)
  assert a.policy_loss.options == {"clip_high": 0.28}
  assert a.advantage.options == {"std": False}
  assert not algorithms.make("grpo", kl="none").needs_reference
  assert algorithms.make("grpo", kl="k3").kl.name == "k3"
  sft_loss = algorithms.make("grpo", policy_loss="sft")  # reward-weighted choices mix freely
  assert sft_loss.policy_loss.name == "sft" and not sft_loss.uses_ratio


@pytest.mark.parametrize(
  "make,message",
  [
    (lambda: algorithms.make("grop"), "algorithm 'grop' does not exist; did you mean 'grpo'"),
    (lambda: algorithms.make("grpo", kl="k9"), "kl 'k9' does not exist"),
    (lambda: algorithms.make("grpo", klcoef=1.0), "no key 'klcoef'; did you mean 'kl_coef'"),
    (lambda: algorithms.make("grpo", policy_loss="nowhere:f"), "there is no module 'nowhere'"),
    (lambda: algorithms.make("grpo", policy_loss="math:sinn"), "no function 'sinn'; did you mean"),
    (lambda: algorithms.make("grpo", aggregation="mean"), "aggregation 'mean' does not exist"),
    (lambda: algorithms.make("grpo", advantage_args={"std": 1}), "std = 1: expected True or False"),
    (lambda: algorithms.make("sft", policy_loss_args={"x": 1}), "no option 'x'; it has none"),
  ],
)
def test_errors(make, message):
  with pytest.raises(UserError, match=message):
    make()


@pytest.fixture
def user_module(monkeypatch):
  """A module as a user would write it."""
  module = types.ModuleType("my_losses")
  monkeypatch.setitem(sys.modules, "my_losses", module)

  def weighted(logprob, advantages, mask, expert_weight, step, *, power=1.0):
    loss = -jnp.where(mask, logprob * advantages * expert_weight**power, 0) * (step + 1)
    return loss, {"my/weight": stats.mean(expert_weight, mask)}

  module.weighted = weighted
  module.greedy = lambda *args: args
  module.averaged = lambda logprob, mask: (jnp.mean(logprob), {})
  module.no_stats = lambda logprob, mask: -logprob
  module.bare_metric = lambda logprob, mask: (-logprob, {"m": jnp.sum(logprob)})
  module.doubled = lambda rewards, valid: (jnp.where(valid, 2 * rewards, 0), {})

  def row():
    return Row(
      formula="-w A log p", paper="-", policy_loss="my_losses:weighted",
      advantage="my_losses:doubled", prepare=module.with_step,
    )  # fmt: skip

  module.with_step = lambda arrays: {**arrays, "step": 1}
  module.row = row
  return module


def test_user_functions(user_module):
  a = algorithms.make("my_losses:row", policy_loss_args={"power": 2.0})
  assert a.schema == {"expert_weight"}  # what the batch must bring; step is always there
  assert a.prepare({"x": 0}) == {"x": 0, "step": 1}
  rewards, valid = jnp.array([1.0, 2.0]), jnp.array([True, False])
  values, _ = a.advantage(rewards=rewards, valid=valid, group_ids=0)  # it names no group_ids
  np.testing.assert_array_equal(values, [2, 0])
  mask = jnp.ones((1, 2), bool)
  inputs = dict(logprob=jnp.full((1, 2), -1.0), advantages=jnp.ones((1, 2)), mask=mask,
                expert_weight=jnp.full((1, 2), 3.0), step=1)  # fmt: skip
  loss, out = a.loss(jnp.full((1, 2), 0.5), **inputs)
  assert loss == 18  # (3^2 * 1 * 1) * (1 + 1), mean of two equal tokens
  assert stats.finish(out)["my/weight"] == 3
  with pytest.raises(UserError, match="reads expert_weight, which was not given"):
    a.loss(jnp.ones((1, 2)), **{**inputs, "expert_weight": None})


@pytest.mark.parametrize(
  "name,message",
  [
    ("greedy", "must be named and passable by keyword"),
    ("averaged", "expected one number per token"),
    ("no_stats", r"must return \(loss per token, dict of stats\)"),
    ("bare_metric", "metric 'm' is no Stat"),
  ],
)
def test_user_functions_that_break_the_rules(user_module, name, message):
  x, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
  with pytest.raises(UserError, match=message):
    algorithms.make("grpo", policy_loss=f"my_losses:{name}", kl_coef=0.0).loss(
      x, logprob=x, mask=mask
    )


def test_loss_is_the_weighted_sum_of_its_terms():
  # One token, ratio 1, A = 2: pg -2; k2 of d = 0.5: 0.125 * 0.1; entropy 0.7 * 0.01.
  a = algorithms.make("grpo", kl_coef=0.1, entropy_coef=0.01)
  one = jnp.ones((1, 1))
  loss, out = a.loss(
    one, logprob=-one, old_logprob=-one, ref_logprob=-1.5 * one, advantages=2 * one,
    entropy=0.7 * one, mask=jnp.ones((1, 1), bool),
  )  # fmt: skip
  np.testing.assert_allclose(loss, -2 + 0.0125 - 0.007, rtol=1e-6)
  out = stats.finish(out)
  for name, value in {
    "loss": -1.9945, "pg_loss": -2, "kl_loss": 0.0125, "entropy_loss": -0.007, "kl": 0.125,
    "entropy": 0.7, "ratio/mean": 1, "pg_clipfrac": 0,
  }.items():  # fmt: skip
    np.testing.assert_allclose(out[name], value, rtol=1e-6, err_msg=name)


def step_inputs(seed=0):
  """Eight sequences of 0-5 tokens in three groups, as padded rows [8, 6]."""
  rng = np.random.default_rng(seed)
  lengths = np.array([5, 0, 3, 1, 4, 2, 5, 0])
  token = lambda: rng.normal(size=(8, 6)) * 0.3
  tokens = {"logprob": token() - 1, "old_logprob": token() - 1, "ref_logprob": token() - 1,
            "entropy": np.abs(token())}  # fmt: skip
  mask = np.arange(6)[None] < lengths[:, None]
  sequences = {"rewards": rng.integers(0, 3, 8) * 0.5, "valid": np.arange(8) != 6,
               "group_ids": np.array([0, 0, 0, 1, 1, 1, 2, 2], np.int32)}  # fmt: skip
  return tokens, mask, sequences


def step(algorithm, tokens, mask, index, sequences):
  """What a trainer does, on [M, B, T] arrays; returns loss, its gradient per token, metrics."""
  advantage, out = algorithm.advantage(**sequences, num_groups=4)
  mask = mask & sequences["valid"][jnp.where(mask, index, 0)]
  advantages = algorithms.to_tokens(advantage, mask, index)
  weight = aggregation.weights(
    mask, index, 8, algorithm.aggregation, 10, valid=sequences["valid"]
  )

  def micro(logprob, i):
    arrays = {k: v[i] for k, v in tokens.items() if k != "logprob"}
    return algorithm.loss(
      weight[i], logprob=logprob, advantages=advantages[i], mask=mask[i], sequence_index=index[i],
      num_sequences=8, **arrays,
    )  # fmt: skip

  def body(i, carry):
    loss, grads, merged = carry
    (value, new), grad = jax.value_and_grad(micro, has_aux=True)(tokens["logprob"][i], i)
    return loss + value, grads.at[i].set(grad), stats.merge(merged, new)

  shapes = jax.eval_shape(lambda: micro(tokens["logprob"][0], 0)[1])
  zero = (jnp.zeros(()), jnp.zeros_like(tokens["logprob"]), stats.neutral(shapes))
  loss, grads, merged = jax.lax.fori_loop(0, mask.shape[0], body, zero)
  return loss, grads, stats.finish({**out, **merged})


def pack(x, lengths, order, shape, fill):
  """Sequences `order` one after the other into rows of `shape` [M, B, T]; none is cut."""
  out = np.full(shape, fill, x.dtype)
  rows = out.reshape(-1, shape[-1])
  row, at = 0, 1  # start anywhere
  for i in order:
    if at + lengths[i] > shape[-1]:
      row, at = row + 1, 0
    rows[row, at : at + lengths[i]] = x[i, : lengths[i]]
    at += lengths[i]
  return out


@pytest.mark.parametrize(
  "name,mode", [*(("grpo", mode) for mode in algorithms.MODES), ("sft", "token-mean")]
)
def test_a_step_does_not_depend_on_how_it_is_split(name, mode):
  tokens, mask, sequences = step_inputs()
  lengths = mask.sum(1)
  index = np.broadcast_to(np.arange(8, dtype=np.int32)[:, None], mask.shape)
  algorithm = algorithms.make(
    name, aggregation=mode, entropy_coef=0.01, kl="k3", kl_coef=0.2,
    policy_loss_args={"clip_high": 0.1} if name == "grpo" else {},
  )  # fmt: skip
  with jax.enable_x64(True):
    run = jax.jit(lambda *args: step(algorithm, *args))
    one = {k: v[None] for k, v in tokens.items()}
    loss, grad, metrics = run(one, mask[None], index[None], sequences)
    assert np.isfinite(loss) and np.any(grad)
    assert not np.any(grad[0][6]) and not np.any(grad[0][~mask])  # sequence 6 is not valid
    shape = (3, 2, 9)  # one shape, three contents: four or five rows live, one micro-batch empty
    for order in [list(range(8)), [6, 3, 1, 0, 7, 2, 5, 4], list(range(7, -1, -1))]:
      packed = {k: pack(v, lengths, order, shape, np.nan) for k, v in tokens.items()}
      where = pack(index, lengths, order, shape, -1)
      loss_2, grad_2, metrics_2 = run(packed, where >= 0, where, sequences)
      np.testing.assert_allclose(loss_2, loss, rtol=1e-12)
      expected = pack(np.asarray(grad[0]), lengths, order, shape, 0)
      np.testing.assert_allclose(grad_2, expected, rtol=1e-12, atol=1e-15)
      for k in metrics:
        np.testing.assert_allclose(metrics_2[k], metrics[k], rtol=1e-12, err_msg=k)


def test_a_step_over_eight_devices_equals_one():
  tokens, mask, sequences = step_inputs(1)
  index = np.broadcast_to(np.arange(8, dtype=np.int32)[:, None], mask.shape)
  algorithm = algorithms.make("grpo", aggregation="seq-mean-token-mean")
  args = ({k: v[None].astype(np.float32) for k, v in tokens.items()}, mask[None], index[None])
  sequences = {k: jnp.asarray(v) for k, v in sequences.items()}
  run = jax.jit(lambda tokens, mask, index: step(algorithm, tokens, mask, index, sequences))
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
  one, many = run(*args), run(*jax.device_put(args, sharding))
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many)):
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


def test_rendered_table_names_every_algorithm():
  text = algorithms.render_table()
  lines = text.splitlines()
  assert len(lines) == 2 + len(algorithms.TABLE)
  assert len({line.count("|") for line in lines}) == 1  # no formula breaks a cell
  for name in algorithms.TABLE:
    assert f"| {name} |" in text
  assert "clip_high=0.28" in text and "groups, reference" in text
  pieces = algorithms.render_pieces()
  assert "| policy loss | ppo | clip_low=0.2, clip_high=0.2" in pieces
  assert "| correction | icepop |" in pieces and "| kl | k1 | - |" in pieces


def test_registries_are_documented_functions():
  for name, f in POLICY_LOSSES.items():
    assert f.__doc__, name


def packed_step(**more):
  """One row of two sequences: [1, 1, 4]."""
  arrays = {
    "mask": np.array([[[True, True, True, False]]]), "sequence_index": np.array([[[0, 0, 1, 0]]]),
    "num_sequences": 2, "valid": np.array([True, True]), "group_ids": np.array([0, 0]),
    "rewards": np.array([1.0, 2.0]), "step": 3, "key": jax.random.key(0),
    "old_logprob": np.array([[[-1.0, -2.0, -1.5, np.nan]]]),
    "ref_logprob": np.array([[[-1.5, -2.0, -0.5, np.inf]]]),
  }  # fmt: skip
  return arrays | more


def test_kl_in_the_reward():
  """k1 = old - ref: 0.5, 0, -1; coefficient 0.1: rewards 1 - 0.05 and 2 + 0.1."""
  a = algorithms.make("rloo", kl="k1", kl_coef=0.1, kl_in="reward")
  whole, out = a.before_split(num_groups=2, max_length=4, **packed_step())
  np.testing.assert_allclose(whole["advantages"], [[[-1.15, -1.15, 1.15, 0]]], rtol=1e-5)
  np.testing.assert_allclose(stats.finish(out)["kl"], -0.5 / 3, rtol=1e-5)
  tripled, _ = a.before_split(num_groups=2, max_length=4, kl_coef=0.3, **packed_step())
  np.testing.assert_allclose(tripled["advantages"][0, 0, 2], 1.45, rtol=1e-5)
  # What is in the reward is not in the loss as well.
  x = jnp.zeros((1, 2))
  _, terms, _ = a.token_loss(logprob=x, old_logprob=x, ref_logprob=x, advantages=x,
                             mask=jnp.ones((1, 2), bool), sequence_index=jnp.zeros((1, 2), int),
                             num_sequences=1)  # fmt: skip
  assert terms.keys() == {"pg_loss"}
  tokens = algorithms.make("reinforceplusplus", kl_coef=0.1)
  rewards = np.array([[[0.0, 1.0, 2.0, np.nan]]])
  whole, _ = tokens.before_split(num_groups=2, max_length=4, **packed_step(token_rewards=rewards))
  returns = np.array([0.95, 1.0, 2.1])  # less 0.05 at the first, 0.1 more at the last
  np.testing.assert_allclose(
    whole["advantages"][0, 0, :3], (returns - returns.mean()) / returns.std(ddof=1), rtol=1e-4
  )


def test_sign_turned():
  a, b = (algorithms.make("grpo", flip_advantages=flip) for flip in (False, True))
  x, y = (f.before_split(num_groups=2, max_length=4, **packed_step())[0] for f in (a, b))
  assert np.any(x["advantages"]) and np.array_equal(x["advantages"], -y["advantages"])


@pytest.mark.parametrize("proximal", ["recompute", "loglinear"])
def test_ratios_against_a_policy_between(proximal):
  """Staleness 4: loglinear prox = old + 3/4 (p - old); weight prox / old; ratio p / prox."""
  a = algorithms.make("a3po", proximal=proximal, correction_args={"cap": 1.5})
  old = jnp.array([[-1.0, -1.0]])
  new = old + jnp.array([[0.4, 0.8]])
  share = {"recompute": 1.0, "loglinear": 0.75}[proximal]
  inputs = dict(
    old_logprob=old, advantages=jnp.ones((1, 2)), mask=jnp.ones((1, 2), bool),
    versions=jnp.array([[1, 1]]), step=5, sequence_index=jnp.zeros((1, 2), int), num_sequences=1,
  )  # fmt: skip
  loss, vjp = jax.vjp(lambda x: a.token_loss(logprob=x, **inputs)[0], new)
  weight = np.minimum(np.exp(share * (new - old)), 1.5)
  ratio = np.exp((1 - share) * (new - old))
  assert (ratio < 1.2218).all()
  clipped = np.minimum(ratio, 1.2)
  np.testing.assert_allclose(loss, -weight * clipped, rtol=1e-5)
  np.testing.assert_allclose(
    vjp(jnp.ones((1, 2)))[0], np.where(ratio <= 1.2, -weight * ratio, 0), rtol=1e-5
  )
  # Of several updates the later ones are compared with the policy before the first.
  if proximal == "recompute":
    moved = a.token_loss(logprob=new, prox_logprob=old, **inputs)[0]
    np.testing.assert_allclose(moved, -1.2 * np.ones((1, 2)), rtol=1e-5)


def test_a_correction_and_a_ratio_do_not_count_twice():
  assert algorithms.make("grpo", correction="token_tis").proximal == "recompute"
  assert algorithms.make("tis").proximal == "none"  # its loss has no ratio
  with pytest.raises(UserError, match="proximal = 'none' with correction 'token_tis'"):
    algorithms.make("grpo", correction="token_tis", proximal="none")
  assert algorithms.make("reinforce", correction="icepop").uses_ratio
  with pytest.raises(UserError, match="policy loss 'm2po' picks tokens by their ratio"):
    algorithms.make("m2po", correction="token_tis")


def test_experts_share():
  """mu = 0.25: the rollouts' mean has weight 0.75, the expert's 0.25, whatever their lengths."""
  a = algorithms.make("mix", blend_args={"mu": 0.25}, kl_coef=0.0)
  experts = np.array([False, True])
  arrays = packed_step(experts=experts, is_expert=np.array([[[False, False, True, False]]]))
  whole, out = a.before_split(num_groups=2, max_length=4, **arrays)
  np.testing.assert_allclose(whole["weights"], [[[0.375, 0.375, 0.25, 0]]])
  # The expert is no member of its group: what remains is a group of one, with mean 0 and std 1.
  np.testing.assert_allclose(whole["advantages"], [[[1, 1, 0, 0]]], rtol=1e-5)
  assert stats.finish(out)["blend/mu"] == 0.25
  chord = algorithms.make("mix_chord", blend_args=dict(peak=0.8, valley=0.2, warmup=4, decay=4))
  shares = [float(chord.blend(step=jnp.asarray(s))) for s in (0, 2, 4, 6, 8, 99)]
  np.testing.assert_allclose(shares, [0, 0.4, 0.8, 0.5, 0.2, 0.2], atol=1e-6)
  with pytest.raises(UserError, match=r"blend: mu = 1.5: expected a share in \[0, 1\]"):
    algorithms.make("mix", blend_args={"mu": 1.5}).blend(step=jnp.asarray(0))
