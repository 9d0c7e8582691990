"""Tokenizers and chat templates, through `transformers` (imported when a tokenizer is loaded).

Text is tokenised once; what is trained on is always the ids that were sampled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trinity_jax.errors import UserError

# The byte-level tokenizer: ids of the specials follow their order here.
SPECIALS = (
  "<|pad|>", "<|end|>", "<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>",
)  # fmt: skip
PAD, END, BEGIN = SPECIALS[:3]
BYTE_VOCAB = len(SPECIALS) + 256

CHAT_TEMPLATE = (
  "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
  "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
  "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Tokenizer:
  """Text to ids and back. `load` builds one from an HF folder."""

  def __init__(self, inner: Any, stop_ids: tuple[int, ...]):
    self._inner = inner
    # What transformers calls, without its looks at every text and id.
    self._backend = getattr(inner, "backend_tokenizer", None)
    if self._backend is not None:  # a folder may ask for either
      self._backend.no_truncation()
      self._backend.no_padding()
    self.stop_ids = stop_ids  # any of these ends a reply
    self.pad_id: int = inner.pad_token_id
    self.bos_id: int | None = inner.bos_token_id
    self.vocab_size: int = len(inner)

  @staticmethod
  def load(path: str | Path) -> Tokenizer:
    return load(path)

  def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Returns the ids of `text`, as it is unless special tokens are asked for."""
    if self._backend is not None:
      return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
    return list(self._inner.encode(text, add_special_tokens=add_special_tokens))

  def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
    plain = [int(i) for i in ids]
    if self._backend is not None:
      return self._backend.decode(plain, skip_special_tokens=skip_special_tokens)
    return self._inner.decode(
      plain, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )

  def token_name(self, token: int) -> str:
    """How the vocabulary writes a token, "" for one that it has not."""
    return self._inner.convert_ids_to_tokens(token) or ""

  def apply_chat_template(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
  ) -> list[int]:
    """Returns the ids of a dialogue, ready for the next reply if `add_generation_prompt`.

    Raises:
      UserError: no messages, no chat template, or the template refuses the messages.
    """
    ids = self._chat(messages, add_generation_prompt, tools, tokenize=True)
    return [int(i) for i in ids]

  def chat_text(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
  ) -> str:
    """What `apply_chat_template` tokenises, as text.

    Raises:
      UserError: as apply_chat_template.
    """
    return self._chat(messages, add_generation_prompt, tools, tokenize=False)

  def _chat(self, messages, add_generation_prompt: bool, tools, tokenize: bool) -> Any:
    import jinja2

    if not messages:
      raise UserError("apply_chat_template: no messages; expected at least one")
    if not self._inner.chat_template:
      raise UserError("this tokenizer has no chat template; add chat_template.jinja to its folder")
    try:
      return self._inner.apply_chat_template(
        [dict(message) for message in messages],
        add_generation_prompt=add_generation_prompt,
        tools=None if tools is None else [dict(tool) for tool in tools],
        tokenize=tokenize,
        return_dict=False,
      )
    except (
      jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError
    ) as error:  # a template is a program: it may add text to a list, or divide by nothing
      raise UserError(f"the chat template refuses the messages: {error}") from error


def load(path: str | Path) -> Tokenizer:
  """Loads the tokenizer of an HF folder; never runs code that comes with it.

  Raises:
    UserError: the folder or the tokenizer in it is missing or unreadable, or no stop id is known.
  """
  # That there is no PyTorch is as it should be; transformers would warn of it.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  from transformers import AutoTokenizer

  path = Path(path)
  if not (path / "tokenizer_config.json").is_file():
    raise UserError(f"{path}: no tokenizer_config.json; expected an HF model folder")
  try:
    inner = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
  except (OSError, ValueError, KeyError) as error:
    raise UserError(f"{path}: unreadable tokenizer: {error}") from error
  stop_ids = _stop_ids(inner.eos_token_id, path / "generation_config.json")
  if not stop_ids:
    raise UserError(f"{path}: neither the tokenizer nor generation_config.json names an eos token")
  if inner.pad_token_id is None:
    inner.pad_token_id = stop_ids[0]  # lengths travel beside the tokens: the value is never read
  return Tokenizer(inner, stop_ids)


def _stop_ids(eos: int | None, generation_config: Path) -> tuple[int, ...]:
  ids = [] if eos is None else [eos]
  if generation_config.is_file():
    try:
      more = json.loads(generation_config.read_text()).get("eos_token_id")
    except (json.JSONDecodeError, AttributeError) as error:
      raise UserError(f"{generation_config}: not a JSON object: {error}") from error
    ids += more if isinstance(more, list) else [] if more is None else [more]
  return tuple(dict.fromkeys(int(i) for i in ids))


def write_byte_tokenizer(
  path: Path, *, vocab_size: int, max_length: int, words: Sequence[str] = ()
) -> None:
  """Writes a complete byte-level HF tokenizer: specials, 256 bytes, `words`, then unused ids.

  Args:
    words: texts of two characters or more that are one token each, wherever they occur.

  Raises:
    UserError: `vocab_size` is below BYTE_VOCAB + words, or a word cannot be one.
  """
  from tokenizers import AddedToken, decoders, models, pre_tokenizers
  from tokenizers import Tokenizer as Backend

  for word in words:
    if not isinstance(word, str) or len(word) < 2 or "<|" in word or words.count(word) > 1:
      raise UserError(f"words: {word!r}: expected different texts of two characters or more")
  if vocab_size < BYTE_VOCAB + len(words):
    raise UserError(
      f"vocab_size = {vocab_size}: a byte tokenizer with {len(words)} words needs at least "
      f"{BYTE_VOCAB + len(words)}"
    )
  names = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words]
  names += [f"<|unused_{i}|>" for i in range(vocab_size - len(names))]
  backend = Backend(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.decoder = decoders.ByteLevel()
  special = [name for name in names if name.startswith("<|")]
  backend.add_special_tokens([AddedToken(n, normalized=False, special=True) for n in special])
  backend.add_tokens([AddedToken(word, normalized=False) for word in words])
  backend.save(str(path / "tokenizer.json"))
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": PAD,
    "eos_token": END,
    "bos_token": BEGIN,
    "model_max_length": max_length,
    "clean_up_tokenization_spaces": False,
  }
  (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
  (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
