"""Dialogues with tools and reasoning in the formats of published models: one log, nothing lost."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from chat_templates import FORMATS, Format, write_tokenizer

from trinity_jax.experience import StopReason
from trinity_jax.explorer import tool_calls
from trinity_jax.explorer.dialogue import Dialogue
from trinity_jax.explorer.reasoning import Splitter, goes_on, split
from trinity_jax.explorer.replies import Reply
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.sampler.request import Completion

TOOLS = [
  {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
  for name in ("add", "ask")
]


class Chat:
  """A dialogue whose replies the test writes, with a client that keeps what it gets."""

  def __init__(self, folder, format: Format):
    write_tokenizer(folder, format)
    self.format, self.tokenizer = format, Tokenizer.load(folder)
    self.log = Dialogue(self.tokenizer)
    self.messages: list[dict] = [{"role": "system", "content": "s"}]

  def text(self, ids) -> str:
    return self.tokenizer.decode(ids, skip_special_tokens=False)

  def user(self, content):
    self.messages.append({"role": "user", "content": content})

  def answer(self, *contents):
    """Of the tools that the last message calls."""
    for call, content in zip(self.messages[-1]["tool_calls"], contents, strict=True):
      message = {"role": "tool", "tool_call_id": call["id"], "content": content}
      self.messages = [*self.messages, message]

  def reply(self, text, end=None, keep=lambda m: m):
    """The policy's turn; `keep` is what the client does to the message; "" as end: it was cut."""
    end = self.format.end if end is None else end
    if self.log.turns:
      assert self.log.extended_by(self.messages, TOOLS) == len(self.log.turns), "a fork"
    before = list(self.log.tokens)
    prompt = self.log.prompt(self.messages, TOOLS)
    assert prompt[: len(before)] == before
    assert self.text(prompt).endswith(self.format.open)
    ids = self.tokenizer.encode(text + end)
    n = len(ids)
    completion = Completion(
      np.array(ids, np.int32), np.full(n, -0.5, np.float32), np.zeros(n, np.int32),
      np.zeros(n, bool), StopReason.STOP if end else StopReason.LENGTH,
    )  # fmt: skip
    whole = Reply(completion, text, goes_on(self.text(prompt))).whole
    parsed = tool_calls.parse(whole, TOOLS)
    said = tool_calls.message(parsed, [f"id{i}" for i in range(len(parsed.calls))])
    self.log.record(prompt, completion, [*self.messages, said], TOOLS)
    self.messages = [*self.messages, keep(dict(said))]
    return said

  def call(self, *arguments: dict) -> str:
    """Calls of `add` as the template itself writes them."""
    calls = [{"function": {"name": "add", "arguments": a}} for a in arguments]
    rendered = self.tokenizer.chat_text(
      [{"role": "user", "content": "q"},
       {"role": "assistant", "content": "", "reasoning_content": "t", "tool_calls": calls}],
      add_generation_prompt=False,
    )  # fmt: skip
    header = "<|end_header_id|>\n\n" if "header" in self.format.template else "</think>\n\n"
    header = header if header in rendered else "<|im_start|>assistant\n"
    return rendered.rpartition(header)[2].partition(self.format.end)[0]


@pytest.fixture(params=FORMATS)
def chat(request, tmp_path) -> Chat:
  return Chat(tmp_path, FORMATS[request.param])


def without_reasoning(text: str) -> str:
  return re.sub(r"<think>.*?</think>\n\n", "", text, flags=re.DOTALL)


def whole_dialogue(chat: Chat) -> tuple[str, str]:
  """(what the log and the next prompt say, what the template makes of all the messages)."""
  messages = [tool_calls.for_template(m) for m in chat.messages]
  theirs = chat.tokenizer.chat_text(messages, add_generation_prompt=True, tools=TOOLS)
  return chat.text(chat.log.prompt(chat.messages, TOOLS)), theirs


def test_a_dialogue_with_tools_is_one_log_that_says_what_the_template_says(chat):
  thought = "hm\n</think>\n\n" if chat.format.open else ""
  for turn in range(3):
    chat.user(f"question {turn}")
    said = chat.reply(thought + chat.call({"a": 1, "b": turn}))
    assert json.loads(said["tool_calls"][0]["function"]["arguments"]) == {"a": 1, "b": turn}
    chat.answer("3")
    assert chat.reply(thought + f"It is {turn}.")["content"] == f"It is {turn}."
  chat.user("and?")
  ours, theirs = map(without_reasoning, whole_dialogue(chat))
  assert ours == theirs and chat.log.recorded == 6


def test_several_calls_at_once(chat):
  """Also where the template writes only one per message: it is never asked to write ours."""
  calls = [chat.call({"a": i}) for i in range(2)]
  joined = "; ".join(calls) if "ipython" in chat.format.template else "\n".join(calls)
  thought = "hm\n</think>\n\n" if chat.format.open else ""
  chat.user("two things")
  said = chat.reply(thought + joined)
  assert [c["function"]["name"] for c in said["tool_calls"]] == ["add", "add"]
  chat.answer("first", "second")
  chat.reply(thought + "done")
  chat.user("more")
  chat.reply(thought + calls[0])
  text = chat.text(chat.log.tokens)
  assert joined in text and text.index("first") < text.index("second")
  if chat.format.end == "<|im_end|>":
    assert text.count("<tool_response>") == 2
    assert text.count("<|im_start|>user\n<tool_response>") == 1


@pytest.mark.parametrize("name", ["qwen3", "qwen3-thinking"])
@pytest.mark.parametrize("client", ["keeps all", "drops reasoning", "joins them"])
def test_reasoning_comes_back_in_any_form(tmp_path, name, client):
  chat = Chat(tmp_path, FORMATS[name])

  def keep(message):
    thought = message.pop("reasoning_content")
    if client == "keeps all":
      return {**message, "reasoning_content": thought}
    if client == "joins them":
      message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
    return message

  written = []
  for turn in range(4):
    chat.user(f"question {turn}")
    text = f"<think>\nlet me see {turn}\n</think>\n\n"[len(chat.format.open) :]
    for body in (chat.call({"a": turn}), f"It is {turn}."):
      said = chat.reply(text + body, keep=keep)
      assert said["reasoning_content"] == f"let me see {turn}"
      if "tool_calls" in said:
        assert said["content"] == ""
        chat.answer("3")
      written.append(text + body)
  assert chat.log.recorded == 8 and said["content"] == "It is 3."
  columns = chat.log.columns()
  mine = chat.text(columns["tokens"][columns["action_mask"]])
  assert mine == "".join(text + chat.format.end for text in written)  # earlier reasoning too
  changed = [
    {**m, "reasoning_content": "no"} if m["role"] == "assistant" else m for m in chat.messages
  ]
  assert chat.log.extended_by(changed, TOOLS) == 0


def test_reasoning_that_was_cut_is_all_there_is(tmp_path):
  chat = Chat(tmp_path, FORMATS["qwen3"])
  chat.user("q")
  said = chat.reply("<think>\nhm, maybe <tool_call>{", end="")
  assert said == {
    "role": "assistant", "content": "", "reasoning_content": "hm, maybe <tool_call>{"
  }  # fmt: skip
  chat.user("go on")
  chat.reply("<think>\n\n</think>\n\nyes")
  assert chat.messages[-1] == {"role": "assistant", "content": "yes"}


def test_other_stop_tokens_continue_as_well(tmp_path):
  chat = Chat(tmp_path, FORMATS["llama3.1"])
  chat.user("q")
  chat.reply(chat.call({"a": 1}), end="<|eom_id|>")
  chat.answer("1")
  chat.reply("ok")
  text = chat.text(chat.log.tokens)
  assert "}}<|eom_id|><|start_header_id|>ipython" in text  # no end of turn after the end of turn


CASES = [
  ("", "", ""),
  ("plain", "", "plain"),
  ("  plain <think>x</think>", "", "  plain <think>x</think>"),
  ("<think>a</think>b", "a", "b"),
  ("\n <think>\n\na\nb\n\n</think>\n\nc\n</think>d\n", "a\nb", "c\n</think>d\n"),
  ("<think>\n\n</think>\n\nb", "", "b"),
  ("<think>a</thinkb", "a</thinkb", ""),
  ("<thin", "", "<thin"),
  ("<think>", "", ""),
  ("<think>a\n</th\n", "a\n</th", ""),
]


@pytest.mark.parametrize("text, thought, answer", CASES)
def test_reasoning_is_split_alike_however_the_text_comes(text, thought, answer):
  assert split(text) == (thought, answer)
  for size in (1, 2, 3, 7):
    splitter, got = Splitter(), ["", ""]
    for i in range(0, len(text), size):
      for j, piece in enumerate(splitter.push(text[i : i + size])):
        got[j] += piece
    for j, piece in enumerate(splitter.push("", last=True)):
      got[j] += piece
    assert got == [thought, answer], size
