"""How a batch is split changes neither loss nor gradient nor the updated parameters."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trinity_jax.algorithms import MODES
from trinity_jax.config import OptimizerConfig
from trinity_jax.models import params as params_lib
from trinity_jax.trainer import step as train
from trinity_jax.trainer.optimizer import make_optimizer
from trinity_jax.trainer.state import init_state

# name: (row lengths, rows per micro-batch, sequences, mesh, order); the reference has 4 rows of 16.
# A mesh is data, fsdp, tensor and context.
ONE = (1, 1, 1, 1)
SPLITS = {
  "packed": ((48,), 2, 12, ONE, "as is"),
  "packed, reversed": ((48,), 2, 12, ONE, "reversed"),
  "padded": ((21,), 4, 31, ONE, "shuffled"),
  "8 devices": ((16,), 8, 12, (8, 1, 1, 1), "as is"),
  "2 x 2 x 2 devices": ((48,), 4, 12, (2, 2, 2, 1), "shuffled"),
  "4 x 2 devices": ((16,), 16, 12, (1, 4, 2, 1), "as is"),
  # Rows of 48 in two, four and eight parts: segments begin, end and lie across them.
  "2 x 2 devices, context 2": ((48,), 4, 12, (1, 2, 2, 2), "shuffled"),
  "2 devices, context 4": ((48,), 4, 12, (2, 1, 1, 4), "as is"),
  "context 8": ((48,), 2, 12, (1, 1, 1, 8), "reversed"),
}
# The supervised loss has no term that the other lacks: fewer splits.
SFT_SPLITS = ("2 x 2 x 2 devices",)
SLOW = {"2 devices, context 4": pytest.mark.slow, "context 8": pytest.mark.nightly}


def per_token(batch, whole, name, logprobs, entropies):
  """The step's terms weight * token loss in float64, from their definitions alone."""
  mask, weights = batch.action_mask, whole["weights"]
  lp, old, ref = (np.where(mask, x, 0).astype(np.float64)
                  for x in (logprobs, batch.logprobs, batch.ref_logprobs))  # fmt: skip
  if name == "sft":
    terms = -lp
  else:
    a = np.where(mask, whole["advantages"], 0).astype(np.float64)
    ratio = np.exp(np.clip(lp - old, -20, 20))
    policy = np.maximum(-a * ratio, -a * np.clip(ratio, 0.8, 1.2))
    policy = np.where(a < 0, np.minimum(policy, -a * 3.0), policy)
    d = lp - ref
    terms = policy + 0.1 * (np.exp(-d) - 1 + d) - 0.02 * entropies
  return np.where(mask, weights * terms, 0)


def assert_same_grads(ours, reference):
  """Per tensor |dg| <= 1e-5 |g|, with a floor of 1e-7 of the whole gradient's norm."""
  flat = jax.tree_util.tree_leaves_with_path
  whole = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for _, g in flat(reference)))
  for (path, a), (_, b) in zip(flat(ours), flat(reference), strict=True):
    norm = np.linalg.norm(np.asarray(b, np.float64))
    difference = np.linalg.norm(np.asarray(a, np.float64) - b)
    assert norm > 0, path
    assert difference <= max(1e-5 * norm, 1e-7 * whole), (path, difference / norm)


@functools.cache
def _reference(tools, name, aggregation):
  """Four rows of 16: one sequence per row, three micro-batches."""
  return tools.whole_step(
    tools.make_experiences(), tools.PackSpec((16,), 4, 12), name=name, aggregation=aggregation
  )


def _ordered(experiences, order):
  if order == "reversed":
    return experiences[::-1]
  if order == "shuffled":
    return [experiences[i] for i in np.random.default_rng(3).permutation(len(experiences))]
  return experiences


@pytest.fixture
def reference(tools):
  """Hashable stand-in for the tools namespace, so that results are cached over tests."""
  return functools.partial(_reference, _Hashable(tools))


class _Hashable:
  def __init__(self, tools):
    self._tools = tools

  def __getattr__(self, name):
    return getattr(self._tools, name)

  def __hash__(self):
    return 0

  def __eq__(self, other):
    return isinstance(other, _Hashable)


@pytest.mark.parametrize(
  "name, split",
  [("grpo", s) for s in SPLITS if s not in SLOW]
  + [("sft", s) for s in SFT_SPLITS]
  + [pytest.param("grpo", s, marks=mark) for s, mark in SLOW.items()]
)
def test_splits(tools, reference, name, split):
  lengths, rows, sequences, mesh, order = SPLITS[split]
  experiences = _ordered(tools.make_experiences(), order)
  spec = tools.PackSpec(lengths, rows, sequences)
  for aggregation in MODES:
    a = reference(name, aggregation)
    b = tools.whole_step(
      experiences, spec, name=name, aggregation=aggregation, mesh=tools.mesh_of(*mesh)
    )
    scale = np.abs(per_token(a.batch, a.whole, name, a.logprobs, 4.2)).sum()
    assert abs(a.loss - b.loss) <= 1e-5 * scale, aggregation
    assert_same_grads(b.grads, a.grads)
    stats_a, stats_b = (jax.device_get(train.stats.finish(x.stats)) for x in (a, b))
    for key in stats_a:
      np.testing.assert_allclose(stats_a[key], stats_b[key], rtol=1e-4, atol=1e-6, err_msg=key)


def test_the_splits_differ(tools):
  """The comparison above is between really different batches."""
  def packed(split):
    lengths, rows, sequences, _, order = SPLITS[split]
    experiences = _ordered(tools.make_experiences(), order)
    return tools.pack_with_reference(experiences, tools.PackSpec(lengths, rows, sequences))

  assert int(packed("8 devices").num_micro) == 2
  assert int(packed("4 x 2 devices").num_micro) == 1
  assert packed("packed").segment_ids.max() == 4
  assert packed("8 devices").segment_ids.max() == 1
  assert packed("padded").tokens.shape[0] == 8 and int(packed("padded").num_micro) == 3
  assert packed("packed").action_mask.sum() == packed("padded").action_mask.sum()


@pytest.mark.parametrize("aggregation", MODES)
def test_loss_from_its_definition(tools, reference, aggregation):
  """Float64 numpy: log-probs and entropies from logits, weights from the formulas, then the sum."""
  from trinity_jax.models import transformer

  experiences = tools.make_experiences()
  x = reference("grpo", aggregation)
  good = [e for e in experiences if e.num_actions]
  length = {i: e.num_actions for i, e in enumerate(experiences)}
  n_tokens, n = sum(length.values()), len(good)
  advantages = np.zeros(len(experiences))
  for g in range(4):
    members = [i for i, e in enumerate(experiences) if e.id.task == g and e.num_actions]
    r = np.array([experiences[i].reward for i in members])
    deviation = r.std(ddof=1)
    advantages[members] = 0 if deviation == 0 else (r - r.mean()) / (deviation + 1e-6)
  assert 0 < np.count_nonzero(advantages) and len(good) == 11

  total = 0.0
  params = tools.base_params()
  for i, e in enumerate(experiences):
    if not e.num_actions:
      continue
    T = len(e.tokens)
    padded = np.zeros((1, 16), np.int32)
    padded[0, :T] = e.tokens
    hidden = _forward(tools.MODEL)(params, padded, (np.arange(16) < T)[None].astype(np.int32))
    logits = np.asarray(transformer.logits(params, tools.MODEL, hidden), np.float64)[0]
    logits = logits[: T - 1] / e.temperature
    peak = logits.max(-1, keepdims=True)
    log_p = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
    at = np.flatnonzero(e.action_mask)
    lp = log_p[at - 1, e.tokens[at]]
    entropy = -(np.exp(log_p) * log_p).sum(-1)[at - 1]
    old = e.logprobs[at].astype(np.float64)
    ref = (np.float32(0.9) * e.logprobs[at] - np.float32(0.3)).astype(np.float64)
    ratio, a = np.exp(lp - old), advantages[i]
    policy = np.maximum(-a * ratio, -a * np.clip(ratio, 0.8, 1.2))
    if a < 0:
      policy = np.minimum(policy, -a * 3.0)
    kl = np.exp(ref - lp) - 1 + lp - ref
    loss = policy + 0.1 * kl - 0.02 * entropy
    total += {
      "token-mean": loss.sum() / n_tokens,
      "seq-mean-token-sum": loss.sum() / n,
      "seq-mean-token-mean": loss.mean() / n,
      "seq-mean-token-sum-norm": loss.sum() / tools.MAX_RESPONSE,
      "token-sum": loss.sum(),
    }[aggregation]
  scale = np.abs(per_token(x.batch, x.whole, "grpo", x.logprobs, 4.2)).sum()
  assert abs(x.loss - total) <= 1e-5 * scale


@functools.cache
def _forward(model):
  from trinity_jax.models import transformer

  def run(params, tokens, segments):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return transformer.forward(params, model, tokens, positions, segments, unroll=1)

  return jax.jit(run)


def test_gradient_against_torch(tools, tmp_path):
  """Autograd through transformers' Qwen3 in float64, sequence by sequence, for one packed batch."""
  torch = pytest.importorskip("torch")
  import transformers

  from trinity_jax.models import hf

  experiences = tools.make_experiences()
  x = tools.whole_step(experiences, tools.PackSpec((48,), 2, 12))
  hf.save(tmp_path / "hf", jax.tree.map(jnp.asarray, tools.base_params()), tools.MODEL)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "hf", attn_implementation="eager", dtype=torch.float64
  )
  advantage = {
    int(i): float(a) for i, a in zip(x.batch.sequence_index[x.batch.action_mask],
                                     x.whole["advantages"][x.batch.action_mask])
  }  # fmt: skip
  tokens = sum(e.num_actions for e in experiences)
  loss = torch.zeros((), dtype=torch.float64)
  for i, e in enumerate(experiences):
    if not e.num_actions:
      continue
    at = torch.tensor(np.flatnonzero(e.action_mask))
    ids = torch.tensor(e.tokens, dtype=torch.long)
    log_p = torch.log_softmax(model(ids[None]).logits[0] / e.temperature, -1)[at - 1]
    lp = log_p.gather(1, ids[at][:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    old = torch.tensor(e.logprobs, dtype=torch.float64)[at]
    ref = torch.tensor(np.float32(0.9) * e.logprobs - np.float32(0.3), dtype=torch.float64)[at]
    ratio, a = (lp - old).exp(), advantage[i]
    policy = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
    if a < 0:
      policy = policy.clamp(max=-3.0 * a)
    kl = (ref - lp).exp() - 1 + lp - ref
    loss = loss + (policy + 0.1 * kl - 0.02 * entropy).sum() / tokens
  loss.backward()
  assert abs(loss.item() - x.loss) <= 1e-5 * np.abs(
    per_token(x.batch, x.whole, "grpo", x.logprobs, 4.2)
  ).sum()
  want = {name: p.grad.numpy() for name, p in model.named_parameters()}
  whole = np.sqrt(sum(np.sum(g**2) for g in want.values()))
  have = dict(hf.to_tensors(x.grads, tools.MODEL))
  assert have.keys() == want.keys() and len(have) > 20
  for key, g in want.items():
    difference = np.linalg.norm(have[key] - g)
    assert difference <= max(1e-4 * np.linalg.norm(g), 1e-6 * whole), key


# --- updated parameters ---------------------------------------------------------------------------


def _stepped(tools, spec, mesh, optimizer):
  mesh = tools.mesh_of(*mesh)
  state = init_state(tools.params_on(mesh), optimizer, mesh)
  packed = tools.pack_with_reference(tools.make_experiences(), spec)
  program = train.compile_step(
    mesh,
    jax.tree.map(lambda x: x.sharding, state),
    packed,
    policy=tools.POLICY,
    algorithm=tools.algorithm_of("grpo"),
    optimizer=optimizer,
    num_groups=8,
    max_response=tools.MAX_RESPONSE,
  )
  batch = jax.device_put(packed, train.batch_shardings(packed, mesh))
  with jax.set_mesh(mesh):  # as the trainer does
    return program(state, batch, np.int32(1))


@pytest.mark.parametrize(
  "mesh", [(2, 2, 2, 1), pytest.param((1, 2, 2, 2), marks=pytest.mark.slow)], ids=str
)
def test_parameters_after_a_step_of_sgd(tools, mesh):
  optimizer = optax.sgd(0.5)  # the update is the gradient, so its tolerance is too
  before = tools.base_params()
  one, metrics_one = _stepped(tools, tools.PackSpec((16,), 4, 12), ONE, optimizer)
  many, metrics_many = _stepped(tools, tools.PackSpec((48,), 4, 12), mesh, optimizer)
  change = lambda s: jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b,
                                  jax.device_get(s.params), before)  # fmt: skip
  flat = jax.tree_util.tree_leaves_with_path
  for (path, a), (_, b), p in zip(flat(change(one)), flat(change(many)), jax.tree.leaves(before)):
    # Parameters are stored in float32: half a unit in the last place on both sides.
    rounding = np.linalg.norm(np.spacing(np.abs(p)))
    assert np.linalg.norm(a) > 100 * rounding, path
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a) + rounding, path
  assert int(one.step) == int(many.step) == 1
  for key, value in metrics_one["metrics"].items():
    np.testing.assert_allclose(
      value, metrics_many["metrics"][key], rtol=1e-4, atol=1e-6, err_msg=key
    )
  lengths = {k: v.sharding.spec for k, v in many.params["layers"].items()}
  assert any(any(axis for axis in spec) for spec in lengths.values()), "nothing was sharded"


def test_adamw_fed_equal_gradients(tools):
  """Three updates on 1 and on 8 devices; Adam amplifies rounding, so its input is made equal."""
  config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, warmup_steps=2)
  optimizer = make_optimizer(config, 10, params_lib.abstract(tools.MODEL))
  rng = np.random.default_rng(1)
  steps = [
    jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), tools.base_params())
    for _ in range(3)
  ]

  def run(mesh):
    mesh = tools.mesh_of(*mesh)
    state = init_state(tools.params_on(mesh), optimizer, mesh)

    def update(params, opt_state, grads):
      updates, opt_state = optimizer.update(grads, opt_state, params)
      return optax.apply_updates(params, updates), opt_state

    program = jax.jit(update)
    params, opt_state = state.params, state.opt_state
    for grads in steps:
      grads = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), grads, params)
      params, opt_state = program(params, opt_state, grads)
    return jax.device_get(params)

  for a, b in zip(jax.tree.leaves(run(ONE)), jax.tree.leaves(run((2, 2, 2))), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_half_a_batch_runs_half_the_loop(tools):
  """The loop's bound is the number of live micro-batches: what lies behind it is never read."""
  experiences = tools.make_experiences()
  spec = tools.PackSpec((48,), 2, 12)
  full = tools.pack_with_reference(experiences, spec)
  half = tools.pack_with_reference(experiences[:6], spec)  # 5 sequences: one run has failed
  assert full.tokens.shape == half.tokens.shape == (6, 2, 48)
  assert (int(full.num_micro), int(half.num_micro)) == (2, 1)
  clean = tools.whole_step(experiences[:6], spec)
  loss, grads = _with_garbage(tools, half)
  assert loss == clean.loss and np.isfinite(clean.loss)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(clean.grads), strict=True):
    np.testing.assert_array_equal(a, b)
  other = tools.whole_step(experiences[:6], tools.PackSpec((16,), 4, 12))
  assert abs(other.loss - clean.loss) <= 1e-6
  assert_same_grads(other.grads, clean.grads)


def _with_garbage(tools, batch):
  """Loss and gradient when every token of the dead micro-batches is a NaN that counts."""
  live, mesh = int(batch.num_micro), tools.mesh_of(1, 1, 1)
  clean, whole, _ = jax.device_get(tools.prepare_program("grpo", "token-mean")(batch))
  spoil = {}
  for name in ("logprobs", "ref_logprobs"):
    spoil[name] = np.array(getattr(clean, name))
    spoil[name][live:] = np.nan
  mask, whole = np.array(clean.action_mask), {k: np.array(v) for k, v in whole.items()}
  mask[live:] = True
  for array in whole.values():
    array[live:] = np.nan
  dirty = dataclasses.replace(clean, action_mask=mask, **spoil)
  dirty = jax.device_put(dirty, train.batch_shardings(dirty, mesh))
  loss, grads, *_ = tools.grads_program("grpo", mesh)(tools.params_on(mesh), dirty, whole)
  return float(loss), jax.device_get(grads)
