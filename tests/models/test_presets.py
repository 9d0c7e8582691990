"""config.json in and out; published sizes; what would change the result if ignored is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from trinity_jax.errors import UserError
from trinity_jax.models.presets import PRESETS, ModelConfig, RopeScaling

# Published parameter counts (safetensors metadata of each repository).
COUNTS = {
  "Qwen2.5-0.5B": 494_032_768,
  "Qwen2.5-1.5B": 1_543_714_304,
  "Qwen2.5-7B": 7_615_616_512,
  "Qwen3-0.6B": 596_049_920,
  "Qwen3-1.7B": 1_720_574_976,
  "Qwen3-8B": 8_190_735_360,
  "Llama-3.1-8B": 8_030_261_248,
  "Llama-3.1-70B": 70_553_706_496,
  "Llama-3.2-1B": 1_235_814_400,
  "Mistral-7B": 7_241_732_096,
}
BASE = PRESETS["Llama-3.1-8B"].to_hf()


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_published_size_and_survives_config_json(name):
  config = PRESETS[name]
  assert config.num_params() == COUNTS[name]
  assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen3-0.6B"])
def test_num_params_counts_the_abstract_leaves(name):
  import jax

  from trinity_jax.models.params import abstract

  for tied in (True, False):
    config = dataclasses.replace(PRESETS[name], tie_word_embeddings=tied)
    sizes = [jax.ShapeDtypeStruct(s.shape, "f4").size for s in jax.tree.leaves(abstract(config))]
    assert config.num_params() == sum(sizes)


def test_older_config_json_gives_the_same_model():
  """transformers 4 wrote rope_theta and rope_scaling, and the word "type"."""
  old = dict(BASE)
  rope = dict(old.pop("rope_parameters"))
  old["rope_theta"] = rope.pop("rope_theta")
  old["rope_scaling"] = rope
  assert ModelConfig.from_hf(old) == PRESETS["Llama-3.1-8B"]
  linear = dict(old, rope_scaling={"type": "linear", "factor": 2.0})
  assert ModelConfig.from_hf(linear).rope_scaling == RopeScaling("linear", 2.0)
  none = dict(old, rope_scaling=None)
  assert ModelConfig.from_hf(none).rope_scaling is None


@pytest.mark.parametrize("name", ["Qwen2.5-1.5B", "Qwen3-8B", "Llama-3.2-1B", "Mistral-7B"])
def test_transformers_reads_our_config_json_as_we_do(name):
  import transformers

  ours = PRESETS[name].to_hf()
  theirs = transformers.AutoConfig.for_model(**ours).to_dict()
  assert ModelConfig.from_hf(theirs) == PRESETS[name]


def test_sliding_window_of_qwen():
  hf = dict(PRESETS["Qwen2.5-0.5B"].to_hf(), sliding_window=64)
  assert ModelConfig.from_hf(hf).sliding_window is None
  hf.update(use_sliding_window=True, max_window_layers=24)
  assert ModelConfig.from_hf(hf).sliding_window is None
  hf.update(max_window_layers=0)
  assert ModelConfig.from_hf(hf).sliding_window == 64
  with pytest.raises(UserError, match="max_window_layers = 21 of 24"):
    ModelConfig.from_hf(dict(hf, max_window_layers=21))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "qwen33"}, "model_type = 'qwen33' is not supported; did you mean 'qwen3'"),
    ({"model_type": None}, "model_type = None"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported for llama; expected 'silu'"),
    ({"attention_bias": True}, "attention_bias = True"),
    ({"mlp_bias": True}, "mlp_bias = True"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": None}, "hidden_size = None, expected an integer"),
    ({"num_hidden_layers": "32"}, "num_hidden_layers = '32'"),
    ({"num_key_value_heads": 5}, "num_heads = 32 is not a multiple of num_kv_heads = 5"),
    ({"head_dim": 127}, "head_dim = 127 must be even"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    ({"rope_parameters": {"rope_type": "linear"}}, r"linear: missing \['factor'\]"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2, "x": 1}}, r"unknown \['x'\]"),
    ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta = 'big'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
  ],
)
def test_what_is_not_supported_is_refused(change, message):
  with pytest.raises(UserError, match=message):
    ModelConfig.from_hf({**BASE, **change})


def test_inconsistent_family_is_refused():
  with pytest.raises(UserError, match="qkv_bias belongs to qwen2"):
    dataclasses.replace(PRESETS["Llama-3.1-8B"], qkv_bias=True)
  with pytest.raises(UserError, match="model family 'gemma'"):
    dataclasses.replace(PRESETS["Llama-3.1-8B"], family="gemma")


def test_presets_import_neither_jax_nor_transformers():
  code = (
    "import sys, trinity_jax.models.presets;"
    "sys.exit(any(m in sys.modules for m in ('jax', 'transformers')))"
  )
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
