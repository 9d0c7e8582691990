"""Byte tokenizer, chat template and stop ids of the tiny checkpoint; errors of a bad folder."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_jax.errors import UserError
from trinity_jax.models import hf, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("tiny") / "model"
  return hf.write_tiny_checkpoint(path, hidden=32, intermediate=32, layers=1, head_dim=16)


@pytest.fixture(scope="module")
def tok(folder):
  return tokenizer.load(folder)


def test_every_id_of_the_model_has_a_token(tok, folder):
  config = hf.load_config(folder)
  assert tok.vocab_size == config.vocab_size == 320
  assert tok.pad_id == config.pad_token_id
  assert tok.stop_ids == config.eos_token_ids
  assert tok.decode([319], skip_special_tokens=False) == f"<|unused_{319 - 263}|>"


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40).filter(lambda s: "<|" not in s))
def test_text_survives_one_token_per_byte(tok, text):
  ids = tok.encode(text)
  assert len(ids) == len(text.encode())
  assert tok.decode(ids) == text


@pytest.mark.parametrize("skip", [True, False])
def test_text_is_what_transformers_decodes(tok, skip):
  for ids in ([], [1, 2, 300], list(range(tok.vocab_size)), [7 + 0xC3, 7 + 0xA9, 3]):
    theirs = tok._inner.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert tok.decode(ids, skip_special_tokens=skip) == theirs


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("text", ["", "a <|end|>é\U0001f600", "<|begin|>" * 3])
def test_ids_are_what_transformers_encodes(tok, text, special):
  theirs = tok._inner.encode(text, add_special_tokens=special)
  assert tok.encode(text, add_special_tokens=special) == theirs


def test_no_text_is_cut_or_padded(folder):
  inner = tokenizer.load(folder)._inner
  inner.backend_tokenizer.enable_truncation(max_length=4)
  inner.backend_tokenizer.enable_padding(length=16)
  assert len(tokenizer.Tokenizer(inner, (1,)).encode("twelve bytes")) == 12


def test_specials_are_single_tokens_and_left_out_of_text(tok):
  for i, name in enumerate(tokenizer.SPECIALS):
    assert tok.encode(name) == [i]
  ids = tok.encode("a <|end|>")
  assert tok.decode(ids) == "a "
  assert tok.decode(ids, skip_special_tokens=False) == "a <|end|>"


def test_chat_template(tok):
  messages = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "tool", "content": "ok"},
  ]
  text = "<|system|>s<|end|><|user|>1+1?<|end|><|assistant|>2<|end|><|tool|>ok<|end|>"
  ids = tok.apply_chat_template(messages, add_generation_prompt=False)
  assert ids == tok.encode(text)
  prompt = tok.apply_chat_template(messages[:2], add_generation_prompt=True)
  assert prompt == ids[: len(prompt)]  # a prompt is a prefix of the dialogue that follows
  with_tools = tok.apply_chat_template(messages[1:2], add_generation_prompt=True, tools=[{"a": 1}])
  assert tok.decode(with_tools, skip_special_tokens=False).startswith('<|system|>[{"a": 1}]<|end|>')


def test_transformers_loads_the_folder(folder):
  torch = pytest.importorskip("torch")
  import transformers

  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    str(folder), output_loading_info=True, local_files_only=True
  )
  assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  tok = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
  prompt = tok.apply_chat_template(
    [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
  )
  out = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
  assert out.shape[1] <= len(prompt) + 4
  assert model.generation_config.eos_token_id == [tok.eos_token_id]


def test_same_seed_same_bytes(folder, tmp_path):
  zero, one = (
    hf.write_tiny_checkpoint(
      tmp_path / str(seed), seed=seed, hidden=32, intermediate=32, layers=1, head_dim=16
    )
    for seed in (0, 1)
  )
  for file in folder.iterdir():
    same = (zero / file.name).read_bytes() == file.read_bytes()
    assert same, file.name
    differs = (one / file.name).read_bytes() != file.read_bytes()
    assert differs == (file.name == "model.safetensors"), file.name


@pytest.mark.parametrize("size", [256, 300])
def test_vocabulary_size_of_the_tiny_model(size, tmp_path):
  with pytest.raises(UserError, match=f"vocab_size = {size}, expected a multiple of 64 from 320"):
    hf.write_tiny_checkpoint(tmp_path, vocab_size=size)


def _copy(folder, tmp_path):
  return shutil.copytree(folder, tmp_path / "copy")


def test_stop_ids_join_both_sources(folder, tmp_path):
  copy = _copy(folder, tmp_path)
  (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1]}))
  assert tokenizer.load(copy).stop_ids == (1, 7)
  (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
  assert tokenizer.load(copy).stop_ids == (1, 9)


def test_bad_folders(folder, tmp_path):
  with pytest.raises(UserError, match="no tokenizer_config.json"):
    tokenizer.load(tmp_path / "nowhere")
  copy = _copy(folder, tmp_path)
  hello = [{"role": "user", "content": "hello"}]
  with pytest.raises(UserError, match="no messages"):
    tokenizer.load(copy).apply_chat_template([], add_generation_prompt=True)
  (copy / "chat_template.jinja").unlink()
  with pytest.raises(UserError, match="no chat template"):
    tokenizer.load(copy).apply_chat_template(hello, add_generation_prompt=True)
  (copy / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
  with pytest.raises(UserError, match="refuses the messages: roles must alternate"):
    tokenizer.load(copy).apply_chat_template(hello, add_generation_prompt=True)
  (copy / "generation_config.json").write_text("{")
  with pytest.raises(UserError, match="generation_config.json: not a JSON object"):
    tokenizer.load(copy)
  (copy / "tokenizer.json").write_text("{")
  with pytest.raises(UserError, match="unreadable tokenizer"):
    tokenizer.load(copy)


def test_words_are_one_token_each(tmp_path):
  words = ('{"name": "x y", "é": ', '"}}', "hi")
  sizes = dict(hidden=32, intermediate=32, layers=1, head_dim=16)
  tok = tokenizer.load(hf.write_tiny_checkpoint(tmp_path / "model", words=words, **sizes))
  assert tok.vocab_size == 320
  text = words[0] + "3*4" + words[1] + "<|end|>" + words[2]
  ids = tok.encode(text)
  first = tokenizer.BYTE_VOCAB
  assert [ids[0], ids[4], ids[6]] == [first, first + 1, first + 2] and len(ids) == 7
  assert tok.decode(ids) == text.replace("<|end|>", "")  # words are text, not special
  for wrong in (("a",), ("ab", "ab"), ("<|end|>",), (3,)):
    with pytest.raises(UserError, match="words: "):
      hf.write_tiny_checkpoint(tmp_path / "other", words=wrong, **sizes)
  with pytest.raises(UserError, match="with 58 words needs at least 321"):
    hf.write_tiny_checkpoint(tmp_path / "other", words=[f"w{i}" for i in range(58)], **sizes)
