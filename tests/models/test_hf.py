"""HF folders: what is saved loads here and in transformers; what does not fit is listed."""

from __future__ import annotations

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trinity_jax.errors import UserError
from trinity_jax.models import hf, sharding, transformer
from trinity_jax.models.presets import ModelConfig

_QUICK = {"xla_backend_optimization_level": 0}  # halves the compile time, which is the test's
SIZES = (64, 32, 2, 4, 2, 16, 48)  # vocabulary, width, layers, heads, kv heads, head dim, mlp
CONFIGS = {
  "tied": ModelConfig("qwen2", *SIZES, qkv_bias=True, tie_word_embeddings=True),
  "untied": ModelConfig("qwen3", *SIZES, qk_norm=True),
}


def _params(config, dtype=jnp.float32):
  """Random, every leaf away from its initial value."""
  rng = np.random.default_rng(0)

  def draw(spec):
    return jnp.asarray(rng.normal(size=spec.shape).astype(np.float32) * 0.1, dtype)

  return jax.tree.map(draw, transformer.abstract(config))


def _assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_in_one_file_and_in_shards(name, dtype, tmp_path):
  config, params = CONFIGS[name], _params(CONFIGS[name], dtype)
  hf.save(tmp_path / "one", params, config)
  hf.save(tmp_path / "many", params, config, max_shard_bytes=20_000)
  assert (tmp_path / "one" / "model.safetensors").is_file()
  index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
  assert len(set(index["weight_map"].values())) > 2
  assert not list((tmp_path / "many").glob("part-*"))
  total = index["metadata"]["total_size"]
  assert total == sum(x.nbytes for x in jax.tree.leaves(params))
  for folder in ("one", "many"):
    loaded, loaded_config = hf.load(tmp_path / folder, dtype=dtype)
    assert loaded_config == config
    _assert_equal(loaded, params)
  names = list(load_file(tmp_path / "one" / "model.safetensors"))
  assert ("lm_head.weight" in names) == (not config.tie_word_embeddings)


def test_load_casts_to_the_dtype_asked_for(tmp_path):
  params = _params(CONFIGS["tied"])
  hf.save(tmp_path / "m", params, CONFIGS["tied"])
  loaded, _ = hf.load(tmp_path / "m", dtype=jnp.bfloat16)
  _assert_equal(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_what_we_save(name, tmp_path):
  torch = pytest.importorskip("torch")
  import transformers

  config, params = CONFIGS[name], _params(CONFIGS[name])
  hf.save(tmp_path / "m", params, config, max_shard_bytes=20_000)
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    str(tmp_path / "m"), output_loading_info=True, local_files_only=True
  )
  assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  tokens = np.arange(20).reshape(2, 10)
  with torch.no_grad():
    want = model(torch.tensor(tokens)).logits.numpy()
  positions = jnp.broadcast_to(jnp.arange(10)[None], (2, 10))

  @functools.partial(jax.jit, compiler_options=_QUICK)
  def run(params):
    hidden = transformer.forward(params, config, tokens, positions, jnp.ones_like(positions))
    return transformer.logits(params, config, hidden)

  assert np.abs(run(params) - want).max() <= 1e-4


def test_load_places_each_shard(tmp_path):
  config, params = CONFIGS["untied"], _params(CONFIGS["untied"])
  hf.save(tmp_path / "m", params, config, max_shard_bytes=20_000)
  shardings = sharding.param_shardings(config, sharding.make_mesh(2, 2, 2))
  loaded, _ = hf.load(tmp_path / "m", shardings=shardings)
  _assert_equal(loaded, params)
  for leaf, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(shardings)):
    assert leaf.sharding == want


def test_save_replaces_a_folder_and_copies_the_tokenizer(tmp_path):
  config = CONFIGS["untied"]
  tiny = hf.write_tiny_checkpoint(tmp_path / "tiny", hidden=32, intermediate=32, head_dim=16)
  (tiny / "additional_chat_templates").mkdir()
  (tiny / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
  hf.save(tmp_path / "out", _params(config), config, max_shard_bytes=20_000)
  params, config = hf.load(tiny)
  hf.save(tmp_path / "out", params, config, tiny)
  files = [sorted(str(p.relative_to(d)) for p in d.rglob("*")) for d in (tmp_path / "out", tiny)]
  assert files[0] == files[1] and "additional_chat_templates/tool_use.jinja" in files[0]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tiny"]
  _assert_equal(hf.load(tmp_path / "out")[0], params)


@pytest.fixture
def saved(tmp_path):
  path = tmp_path / "m"
  hf.save(path, _params(CONFIGS["untied"]), CONFIGS["untied"])
  return path


def _edit(path, change):
  file = path / "model.safetensors"
  tensors = load_file(file)
  change(tensors)
  save_file(tensors, file)


def test_tensors_that_do_not_fit_are_all_listed(saved):
  def change(tensors):
    del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.q_norm.weight"]
    tensors["model.layers.1.extra"] = np.zeros(2, np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((48, 31), np.float32)
    tensors["model.layers.0.mlp.gate_proj.weight"] = np.zeros((48, 32), np.int32)

  _edit(saved, change)
  with pytest.raises(UserError) as error:
    hf.load(saved)
  for part in (
    "2 missing: ", "model.norm.weight", "model.layers.1.self_attn.q_norm.weight",
    "1 unexpected: model.layers.1.extra",
    "model.layers.0.mlp.up_proj.weight is (48, 31), expected (48, 32)",
    "model.layers.0.mlp.gate_proj.weight I32",
  ):  # fmt: skip
    assert part in str(error.value)
  assert "\n" not in str(error.value)


def test_a_tied_checkpoint_may_repeat_the_matrix_but_not_contradict_it(tmp_path):
  path = hf.save(tmp_path / "m", _params(CONFIGS["tied"]), CONFIGS["tied"])
  _edit(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
  hf.load(path)
  _edit(path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
  with pytest.raises(UserError, match="lm_head.weight differs from the embedding"):
    hf.load(path)


def test_checkpoint_of_another_shape(saved):
  with pytest.raises(UserError, match="embed_tokens.weight is .64, 32., expected .64, 16."):
    hf.load(saved, ModelConfig("qwen3", 64, 16, *SIZES[2:], qk_norm=True))


@pytest.mark.parametrize("keep", [0.9, 0.01, 0.0])
def test_truncated_file_is_named(saved, keep):
  file = saved / "model.safetensors"
  data = file.read_bytes()
  file.write_bytes(data[: int(keep * len(data))])
  with pytest.raises(UserError, match="model.safetensors: truncated or not safetensors"):
    hf.load(saved)


def test_missing_and_broken_files_are_named(saved, tmp_path):
  with pytest.raises(UserError, match="nowhere/config.json: no such file"):
    hf.load(tmp_path / "nowhere")
  shutil.move(saved / "model.safetensors", tmp_path / "elsewhere")
  with pytest.raises(UserError, match="neither model.safetensors nor .*only safetensors are read"):
    hf.load(saved)
  index = saved / "model.safetensors.index.json"
  index.write_text('{"weight_map": {"model.norm.weight": "model-1.safetensors"}}')
  with pytest.raises(UserError, match="model-1.safetensors: no such file, but .*index.json names"):
    hf.load(saved)
  save_file({"other": np.zeros(1, np.float32)}, saved / "model-1.safetensors")
  with pytest.raises(UserError, match="not in the file it names: model.norm.weight"):
    hf.load(saved)
  index.write_text("[]")
  with pytest.raises(UserError, match="expected a JSON object"):
    hf.load(saved)
  (saved / "config.json").write_text("{")
  with pytest.raises(UserError, match="config.json: not valid JSON"):
    hf.load(saved)


def test_save_refuses_parameters_of_another_model_and_bad_folders(saved, tmp_path):
  params = _params(CONFIGS["untied"])
  del params["lm_head"]
  params["final_norm"] = jnp.ones(3)
  with pytest.raises(UserError, match=r"missing lm_head \(32, 64\); final_norm is \(3,\)"):
    hf.save(tmp_path / "x", params, CONFIGS["untied"])
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot be written"):
    hf.save(tmp_path / "file" / "x", _params(CONFIGS["untied"]), CONFIGS["untied"])


def test_init_of_a_leaf_does_not_depend_on_the_others():
  tied = CONFIGS["tied"]
  untied = ModelConfig("llama", *SIZES)
  init = jax.jit(transformer.init, static_argnums=1, compiler_options=_QUICK)
  a, b = init(jax.random.key(3), tied), init(jax.random.key(3), untied)
  np.testing.assert_array_equal(a["layers"]["wq"], b["layers"]["wq"])
  np.testing.assert_array_equal(a["embed"], b["embed"])
  assert not np.array_equal(a["layers"]["w_gate"], a["layers"]["w_up"])
  spec = transformer.abstract(tied)["layers"]["w_down"]
  np.testing.assert_allclose(np.std(a["layers"]["w_down"]), spec.init, rtol=0.1)
