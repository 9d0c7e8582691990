"""Chat templates in the forms in which folders hold them, and one BOS at most."""

from __future__ import annotations

import json

import pytest
from chat_templates import FORMATS, write_tokenizer

from trinity_jax.errors import UserError
from trinity_jax.explorer.dialogue import Dialogue
from trinity_jax.models import tokenizer

HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
GENERATION = (
  "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% generation %}"
  "{{ m.content }}<|end|>{% endgeneration %}{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>"
  "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SAID = "<|user|>hi<|end|><|assistant|>yes<|end|>"


class Folder:
  """A tokenizer's folder, without a template to begin with."""

  def __init__(self, path):
    self.path = path
    tokenizer.write_byte_tokenizer(path, vocab_size=320, max_length=4096)
    (path / "chat_template.jinja").unlink()

  def edit(self, name, **values):
    content = json.loads((self.path / name).read_text())
    (self.path / name).write_text(json.dumps({**content, **values}))

  def load(self):
    return tokenizer.load(self.path)

  def text(self, **more):
    return self.load().chat_text(HELLO, **{"add_generation_prompt": False, **more})


@pytest.fixture
def folder(tmp_path):
  return Folder(tmp_path)


def test_a_template_in_a_file_of_its_own_counts_more_than_the_configs(folder):
  folder.edit("tokenizer_config.json", chat_template="config")
  assert folder.text() == "config"
  (folder.path / "chat_template.jinja").write_text(PLAIN)
  assert folder.text() == SAID


def test_named_templates(folder):
  named = [
    {"name": "default", "template": PLAIN},
    {"name": "tool_use", "template": "{{ tools[0].function.name }}:" + PLAIN},
  ]
  folder.edit("tokenizer_config.json", chat_template=named)
  assert folder.text() == SAID and folder.text(tools=TOOLS) == f"f:{SAID}"
  folder.edit("tokenizer_config.json", chat_template=named[1:])
  assert folder.text(tools=TOOLS) == f"f:{SAID}"
  with pytest.raises(UserError, match=r"no default specified.*\['tool_use'\]"):
    folder.text()


def test_named_templates_in_files(folder):
  (folder.path / "chat_template.jinja").write_text(PLAIN)
  more = folder.path / "additional_chat_templates"
  more.mkdir()
  (more / "tool_use.jinja").write_text("tools:" + PLAIN)
  assert folder.text() == SAID and folder.text(tools=TOOLS) == f"tools:{SAID}"


def test_blocks_that_mark_what_the_model_wrote_change_nothing(folder):
  (folder.path / "chat_template.jinja").write_text(GENERATION)
  assert folder.text() == SAID
  prompt = Dialogue(folder.load()).prompt(HELLO[:1], ())
  assert folder.load().decode(prompt, skip_special_tokens=False) == "<|user|>hi<|end|><|assistant|>"


@pytest.mark.parametrize(
  "wrong", ["{{ 1 // 0 }}", "{{ [1].index(2) }}", "{{ 'a' + 1 }}", "{{ messages.x.y }}", "{% if %}"]
)
def test_a_template_that_fails_is_an_error_of_the_user(folder, wrong):
  (folder.path / "chat_template.jinja").write_text(wrong)
  with pytest.raises(UserError, match="the chat template refuses the messages: "):
    folder.text()


@pytest.mark.parametrize("template", ["{{ bos_token }}" + PLAIN, "<|begin|>" + PLAIN, PLAIN])
def test_where_both_the_template_and_the_tokenizer_write_a_bos_there_is_one(folder, template):
  """As published Llama tokenizers do: theirs adds one to every text, and the template writes it."""
  folder.edit(
    "tokenizer.json",
    post_processor={
      "type": "TemplateProcessing",
      "single": [
        {"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
      ],
      "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
      "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [2], "tokens": ["<|begin|>"]}},
    },
  )  # fmt: skip
  (folder.path / "chat_template.jinja").write_text(template)
  tok = folder.load()
  assert tok.encode("a", add_special_tokens=True)[0] == tok.bos_id == 2  # the tokenizer does
  written = 0 if template == PLAIN else 1  # the template has the say
  ids = tok.apply_chat_template(HELLO, add_generation_prompt=False)
  assert ids.count(2) == written and ids == tok.encode(folder.text())
  assert Dialogue(tok).prompt(HELLO, ()).count(2) == written


@pytest.mark.parametrize("name", FORMATS)
def test_published_formats_have_a_bos_where_they_have_one(tmp_path, name):
  write_tokenizer(tmp_path, FORMATS[name])
  text = tokenizer.load(tmp_path).chat_text(HELLO, add_generation_prompt=True)
  assert text.count("<|begin_of_text|>") == (name == "llama3.1")
  header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
  last = header if name == "llama3.1" else "<|im_start|>assistant\n"
  assert text.endswith(last + FORMATS[name].open)
