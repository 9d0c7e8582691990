"""Logits and gradients equal those of `transformers` on torch, tensor by tensor, for each family.

Every parameter is drawn away from its initial value (norm weights and biases too), so leaving one
out shows. torch runs each segment alone; we run them packed two rows deep, with padding.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trinity_jax.models import hf, transformer

torch = pytest.importorskip("torch")

_QUICK = {"xla_backend_optimization_level": 0}  # halves the compile time, which is the test's

_SIZES = dict(
  vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
  num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=1,
  pad_token_id=None,  # torch gives the embedding of a pad id no gradient; we do not look at ids
)  # fmt: skip
_LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=64)  # fmt: skip
_YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)

# name -> (model type, rope_parameters, other keys, position of each segment's first token)
CASES = {
  "qwen2": ("qwen2", dict(rope_theta=1e6), dict(tie_word_embeddings=True), 0),
  "qwen2-window": (
    "qwen2",
    dict(rope_theta=1e4),
    dict(use_sliding_window=True, sliding_window=3, max_window_layers=0),
    0,
  ),
  "qwen3": ("qwen3", dict(rope_theta=1e6), dict(head_dim=16), 0),
  "qwen3-yarn-tied": ("qwen3", _YARN, dict(head_dim=16, tie_word_embeddings=True), 150),
  "llama-llama3": ("llama", dict(**_LLAMA3, rope_theta=5e5), {}, 0),
  "llama-llama3-long": ("llama", dict(**_LLAMA3, rope_theta=5e5), dict(head_dim=32), 16000),
  "llama-linear": ("llama", dict(rope_type="linear", factor=4.0, rope_theta=2e4), {}, 200),
  "llama-yarn-mscale": (
    "llama",
    dict(**_YARN, rope_theta=3e4, mscale=0.8, mscale_all_dim=0.4, beta_fast=16.0, truncate=False),
    dict(head_dim=24),
    3000,
  ),
  "llama-long": ("llama", dict(rope_theta=5e5), dict(num_key_value_heads=4), 30000),
  "mistral-window": ("mistral", dict(rope_theta=1e4), dict(sliding_window=4), 0),
}

_LENGTHS = ((9, 6), (4, 1, 7))  # segments of each row; the rest of a row is padding
_T = 16


def _segments():
  """Yields (row, start, tokens) per segment; ids avoid none of the vocabulary."""
  rng = np.random.default_rng(7)
  for row, lengths in enumerate(_LENGTHS):
    start = 0
    for n in lengths:
      yield row, start, rng.integers(0, _SIZES["vocab_size"], n)
      start += n


def _packed(offset: int):
  shape = (len(_LENGTHS), _T)
  tokens, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
  tokens += 5  # what stands in the padding must not matter
  for i, (row, start, ids) in enumerate(_segments()):
    at = np.s_[row, start : start + len(ids)]
    tokens[at], positions[at] = ids, offset + np.arange(len(ids))
    segment_ids[at] = i + 1
  return tokens, positions, segment_ids


def _cotangent():
  """A fixed random weight per logit: the loss is their weighted sum, so no gradient cancels."""
  shape = (len(_LENGTHS), _T, _SIZES["vocab_size"])
  return np.random.default_rng(3).normal(size=shape).astype(np.float32) / 30


def _torch_model(name: str):
  import transformers

  kind, rope, more, _ = CASES[name]
  rope = {"rope_type": "default", **rope}
  rope.setdefault("rope_theta", 1e4)
  config = transformers.AutoConfig.for_model(kind, **{**_SIZES, **more}, rope_parameters=rope)
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for key, value in model.named_parameters():
      noise = torch.randn(value.shape, generator=generator)
      value.copy_(1 + 0.3 * noise if "norm" in key else 0.2 * noise)
  return model.eval()


def _torch_logits_and_grads(model, offset: int):
  out = np.zeros(_cotangent().shape, np.float32)
  for row, start, ids in _segments():
    at = np.s_[row, start : start + len(ids)]
    position_ids = offset + torch.arange(len(ids))[None]
    logits = model(torch.tensor(ids)[None], position_ids=position_ids, use_cache=False).logits[0]
    (logits * torch.tensor(_cotangent()[at])).sum().backward()
    out[at] = logits.detach().numpy()
  return out, {key: value.grad.numpy() for key, value in model.named_parameters()}


@functools.partial(jax.jit, static_argnames=("config",), compiler_options=_QUICK)
def _our_logits_and_grads(params, config, tokens, positions, segment_ids, cotangent):
  def loss(params):
    hidden = transformer.forward(params, config, tokens, positions, segment_ids)
    logits = transformer.logits(params, config, hidden)
    real = (segment_ids > 0)[..., None]
    return jnp.sum(jnp.where(real, logits * cotangent, 0)), jnp.where(real, logits, 0)

  (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
  return logits, grads


_SLOW = ("qwen2-window", "qwen3", "llama-llama3", "llama-long")  # near twins of the others


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=pytest.mark.slow) if n in _SLOW else n for n in CASES]
)
def test_logits_and_gradients_equal_transformers(name, tmp_path):
  offset = CASES[name][3]
  model = _torch_model(name)
  model.save_pretrained(tmp_path)
  params, config = hf.load(tmp_path)

  logits, grads = _our_logits_and_grads(params, config, *_packed(offset), _cotangent())
  want_logits, want_grads = _torch_logits_and_grads(model, offset)

  assert want_logits.std() > 0.3
  difference = np.abs(np.asarray(logits) - want_logits).max()
  got = dict(hf.to_tensors(grads, config))
  assert set(got) == set(want_grads)
  norms = {key: np.linalg.norm(want) for key, want in want_grads.items()}
  worst = {key: np.linalg.norm(got[key] - want) / norms[key] for key, want in want_grads.items()}
  print(f"PARITY {name}: logits {difference:.2e}, gradients {max(worst.values()):.2e}")
  assert difference <= 1e-4
  assert min(norms.values()) > 1e-3, norms  # each parameter really takes part
  assert max(worst.values()) <= 1e-4, worst
  absolute = max(np.abs(got[key] - want).max() for key, want in want_grads.items())
  assert absolute <= 1e-4


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
  path = tmp_path_factory.mktemp("llama")
  _torch_model("llama-llama3").save_pretrained(path)
  return hf.load(path)


def test_padding_and_neighbours_do_not_leak(llama):
  """Other tokens in the padding, or in another segment, change no bit of a segment's logits."""
  params, config = llama
  tokens, positions, segment_ids = _packed(0)
  other = np.where(segment_ids == 2, tokens, (tokens + 11) % 96)
  run = functools.partial(_our_logits_and_grads, params, config)
  a, _ = run(tokens, positions, segment_ids, _cotangent())
  b, _ = run(other, positions, segment_ids, _cotangent())
  same = segment_ids == 2
  np.testing.assert_array_equal(np.asarray(a)[same], np.asarray(b)[same])
  assert np.abs(np.asarray(a - b))[segment_ids == 1].max() > 0.1


def test_unrolling_and_remat_change_nothing(llama):
  params, config = llama
  batch = _packed(0)

  def run(**option):
    def loss(params):
      hidden = transformer.forward(params, config, *batch, **option)
      return jnp.sum(hidden[0, :9] ** 2)

    return jax.jit(jax.value_and_grad(loss), compiler_options=_QUICK)(params)

  value, grads = run()
  for option in ({"unroll": 2}, {"remat": "full"}, {"remat": "dots"}):
    other, other_grads = run(**option)
    np.testing.assert_allclose(value, other, rtol=1e-6, err_msg=str(option))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads)):
      np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(a).max()), err_msg=str(option))


def test_bfloat16_computes_norms_and_logits_in_float32(llama):
  params, config = llama
  batch = _packed(0)
  real = batch[2] > 0

  @functools.partial(jax.jit, static_argnums=0, compiler_options=_QUICK)
  def run(dtype):
    hidden = transformer.forward(params, config, *batch, dtype=dtype)
    return transformer.logits(params, config, hidden)

  exact, rounded = run(None), run(jnp.bfloat16)
  assert rounded.dtype == jnp.float32
  error = np.abs(np.asarray(exact - rounded))[real]
  assert 0 < error.max() < 0.05 * float(np.asarray(exact)[real].std()) * 4
  # Logits rounded to bfloat16 would all be representable in it.
  assert np.any(np.asarray(rounded) != np.asarray(rounded.astype(jnp.bfloat16), np.float32))


def test_unknown_remat_is_an_error(llama):
  params, config = llama
  with pytest.raises(ValueError, match="remat = 'some'"):
    transformer.forward(params, config, *_packed(0), remat="some")
