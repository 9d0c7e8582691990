"""Chat formats of published models, written anew from what their tokenizers render.

The format alone: role headers, ends of turns, tools and their answers, what becomes of earlier
reasoning. `write_tokenizer` makes a byte-level tokenizer that speaks one of them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from trinity_jax.models import tokenizer as tokenizer_lib

_HERMES_TOOLS = (
  "{% if tools %}<|im_start|>system\n{{ head }}\n\n# Tools\n\nYou may call one or more functions.\n"
  "<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>\n\n"
  'Answer {"name": <function-name>, "arguments": <args-json-object>} within <tool_call></tool_call>'
  " tags.<|im_end|>\n"
  "{% elif head %}<|im_start|>system\n{{ head }}<|im_end|>\n{% endif %}"
)
_HERMES_CALLS = (
  "{% for call in m.tool_calls %}{% if not loop.first or content %}\n{% endif %}<tool_call>\n"
  '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
  "</tool_call>{% endfor %}"
)
_HERMES_ANSWERS = (  # neighbouring answers of tools share one message of the user
  "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
  "\n<tool_response>\n{{ m.content }}\n</tool_response>"
  "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
)
_GENERATE = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

QWEN25 = (
  "{% set head = messages[0].content if messages[0].role == 'system' else 'You are Qwen.' %}"
  + _HERMES_TOOLS
  + "{% for m in messages %}{% set content = m.content %}"
  "{% if m.role == 'tool' %}" + _HERMES_ANSWERS + "{% elif m.tool_calls %}"
  "<|im_start|>assistant\n{{ content }}" + _HERMES_CALLS + "<|im_end|>\n"
  "{% elif not (loop.first and m.role == 'system') %}"
  "<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n{% endif %}{% endfor %}" + _GENERATE
)

# Reasoning stays only in what was said since the last question that is no answer of a tool.
QWEN3 = (
  "{% set head = messages[0].content if messages[0].role == 'system' else '' %}"
  + _HERMES_TOOLS
  + "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
  "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
  "{% for m in messages %}{% set content = m.content %}"
  "{% if m.role == 'tool' %}" + _HERMES_ANSWERS + "{% elif m.role == 'assistant' %}"
  "{% set thought = m.reasoning_content or '' %}"
  "{% if not thought and '</think>' in content %}"
  "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
  "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
  "<|im_start|>assistant\n"
  "{% if loop.index0 > ns.last and (loop.last or thought) %}"
  "<think>\n{{ thought }}\n</think>\n\n{% endif %}"
  "{{ content }}{% if m.tool_calls %}" + _HERMES_CALLS + "{% endif %}<|im_end|>\n"
  "{% elif not (loop.first and m.role == 'system') %}"
  "<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n{% endif %}{% endfor %}" + _GENERATE
)

# Opens the reasoning of every reply itself, as the models that always think have it.
QWEN3_THINKING = QWEN3.replace(
  "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
)

_HEADER = "<|start_header_id|>{{ role }}<|end_header_id|>\n\n"
LLAMA31 = (
  "<|begin_of_text|>"
  "{% set system = messages[0].content | trim if messages[0].role == 'system' else '' %}"
  "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}"
  "{% set role = 'system' %}"
  + _HEADER
  + "{% if tools %}Environment: ipython\n{% endif %}Today Date: 26 Jul 2024\n\n"
  "{{ system }}<|eot_id|>"
  "{% if tools %}{% set role = 'user' %}" + _HEADER + "Respond in the format "
  '{"name": function name, "parameters": dictionary of argument name and its value}.\n\n'
  "{% for tool in tools %}{{ tool | tojson(indent=4) }}\n\n{% endfor %}"
  "{{ messages[0].content | trim }}<|eot_id|>{% set messages = messages[1:] %}{% endif %}"
  "{% for m in messages %}"
  "{% if m.role == 'tool' %}{% set role = 'ipython' %}" + _HEADER + "{{ m.content | tojson }}"
  "{% elif m.tool_calls %}"
  "{% if m.tool_calls | length != 1 %}"
  "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
  "{% set role = 'assistant' %}" + _HEADER + "{% set call = m.tool_calls[0].function %}"
  '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}'
  "{% else %}{% set role = m.role %}" + _HEADER + "{{ m.content | trim }}{% endif %}"
  "<|eot_id|>{% endfor %}"
  "{% if add_generation_prompt %}{% set role = 'assistant' %}" + _HEADER + "{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Format:
  """A chat format.

  Attributes:
    specials: tokens of its own, the first of which ends a reply.
    stops: those that end a reply as well.
    open: what the template has begun a reply with.
  """

  template: str
  specials: tuple[str, ...]
  stops: tuple[str, ...] = ()
  open: str = ""

  @property
  def end(self) -> str:
    return self.specials[0]


_IM = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
FORMATS = {
  "qwen2.5": Format(QWEN25, _IM, ("<|endoftext|>",)),
  "qwen3": Format(QWEN3, (*_IM, "<think>", "</think>"), ("<|endoftext|>",)),
  "qwen3-thinking": Format(
    QWEN3_THINKING, (*_IM, "<think>", "</think>"), ("<|endoftext|>",), "<think>\n"
  ),
  "llama3.1": Format(
    LLAMA31,
    ("<|eot_id|>", "<|eom_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
     "<|python_tag|>", "<|end_of_text|>"),
    ("<|eom_id|>", "<|end_of_text|>"),
  ),
}  # fmt: skip
_PLAIN = ("<think>", "</think>")  # added tokens that are text all the same, as published


def write_tokenizer(path: Path, format: Format, *, max_length: int = 16_384) -> None:
  """A byte-level tokenizer of 320 ids with the format's specials and template."""
  tokenizer_lib.write_byte_tokenizer(path, vocab_size=320, max_length=max_length)
  content = json.loads((path / "tokenizer.json").read_text())
  ids: dict[str, int] = {}
  for i, name in enumerate(format.specials):
    old = f"<|unused_{i}|>"
    ids[name] = content["model"]["vocab"].pop(old)
    content["model"]["vocab"][name] = ids[name]
    for added in content["added_tokens"]:
      if added["content"] == old:
        added |= {"content": name, "special": name not in _PLAIN}
  (path / "tokenizer.json").write_text(json.dumps(content))
  config = json.loads((path / "tokenizer_config.json").read_text())
  (path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": format.end}))
  stops = [ids[name] for name in (format.end, *format.stops)]
  (path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
  # transformers' Jinja drops the newline after a block.
  (path / "chat_template.jinja").write_text(format.template.replace("%}\n", "%}{{ '\\n' }}"))
