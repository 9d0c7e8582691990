"""Dialogues as token logs: continuation token for token, branches, tool calls, stop strings."""

from __future__ import annotations

import json

import numpy as np
import pytest

from trinity_jax.errors import UserError
from trinity_jax.experience import ExperienceId, StopReason
from trinity_jax.explorer import tool_calls
from trinity_jax.explorer.dialogue import Dialogue
from trinity_jax.explorer.replies import Reader
from trinity_jax.explorer.rewards import Score
from trinity_jax.models import tokenizer as tokenizer_lib
from trinity_jax.models.tokenizer import END, Tokenizer
from trinity_jax.sampler.request import Completion

# Strips the reasoning of replies before the last user message, as Qwen3's does.
THINKING = (
  "{% if tools %}<|system|>{{ tools | tojson }}<|end|>\n{% endif %}"
  "{% set ns = namespace(last=0) %}"
  "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
  "{% endfor %}"
  "{% for m in messages %}{% set c = m.content %}"
  "{% if m.role == 'assistant' and '</think>' in c and loop.index0 < ns.last %}"
  "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
  "<|{{ m.role }}|>{{ c }}"
  "{% for t in m.tool_calls or [] %}<tool_call>{{ t.function | tojson }}</tool_call>{% endfor %}"
  "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = {"plain": tokenizer_lib.CHAT_TEMPLATE, "thinking": THINKING}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module", params=TEMPLATES)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
  path = tmp_path_factory.mktemp("tokenizer")
  tokenizer_lib.write_byte_tokenizer(path, vocab_size=320, max_length=4096)
  (path / "chat_template.jinja").write_text(TEMPLATES[request.param])
  return Tokenizer.load(path)


def user(text):
  return {"role": "user", "content": text}


def assistant(text):
  return {"role": "assistant", "content": text}


def reply(tokenizer, text, *, stop=True) -> Completion:
  ids = tokenizer.encode(text + (END if stop else ""))
  n = len(ids)
  reason = StopReason.STOP if stop else StopReason.LENGTH
  return Completion(
    np.array(ids, np.int32), np.full(n, -0.5, np.float32), np.zeros(n, np.int32),
    np.zeros(n, bool), reason,
  )  # fmt: skip


def say(log, tokenizer, messages, text, *, tools=(), stop=True):
  """One turn; returns (its prompt, the messages after it)."""
  prompt = log.prompt(messages, tools)
  after = [*messages, assistant(text)]
  log.record(prompt, reply(tokenizer, text, stop=stop), after, tools)
  return prompt, after


def test_ten_turns_continue_one_log(tokenizer):
  log, messages, last = Dialogue(tokenizer), [{"role": "system", "content": "s"}], []
  whole = "<|system|>s<|end|>"
  newline = "\n" if "namespace" in tokenizer._inner.chat_template else ""
  for turn in range(10):
    messages = [*messages, user(f"q{turn}")]
    text = f"<think>\nhm {turn}\n</think>\n\n a{turn}"
    prompt, messages = say(log, tokenizer, messages, text, stop=turn % 3 != 2)
    assert prompt[: len(last)] == last
    last = list(log.tokens)
    whole += f"{newline}<|user|>q{turn}<|end|>{newline}<|assistant|>{text}<|end|>"
  # A reply that was cut gets its end of turn from the template, as prompt.
  assert tokenizer.decode(log.tokens, skip_special_tokens=False) == whole
  c = log.columns()
  written = tokenizer.decode(c["tokens"][c["action_mask"]], skip_special_tokens=False)
  assert written.count(END) == 7 and written.count("<think>") == 10
  assert (c["logprobs"][~c["action_mask"]] == 0).all() and "<|user|>" not in written


def test_what_extends_and_what_rewrites(tokenizer):
  log = Dialogue(tokenizer)
  _, one = say(log, tokenizer, [user("a")], "b")
  _, two = say(log, tokenizer, [*one, user("c")], "d")
  assert log.extended_by([*two, user("e")], ()) == 2
  assert log.extended_by(two, ()) == 2  # the reply may go on
  assert log.extended_by([*one, user("other")], ()) == 1
  assert log.extended_by([user("a"), assistant("B"), user("c")], ()) == 0
  assert log.extended_by([user("a")], ()) == 0
  assert log.extended_by([*two, user("e")], TOOLS) == 0  # the head of the prompt would change
  # What client libraries add and leave out says the same.
  same = [
    {"role": "user", "content": [{"type": "text", "text": "a"}], "name": None},
    {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None, "audio": None},
    user("c"), {**assistant("d"), "annotations": []}, user("e"),
  ]  # fmt: skip
  assert log.extended_by(same, ()) == 2
  assert log.prompt(same, ()) == log.prompt([*two, user("e")], ())


def test_a_branch_keeps_tokens_and_trains_none_of_them(tokenizer):
  log = Dialogue(tokenizer)
  _, one = say(log, tokenizer, [user("a")], "b")
  first = list(log.tokens)
  say(log, tokenizer, [*one, user("c")], "d")
  before = list(log.tokens)
  twig = log.branch(1, 1)
  prompt, _ = say(twig, tokenizer, [*one, user("x")], "y")
  assert prompt[: len(first)] == first and log.tokens == before
  e = twig.experience(ExperienceId(1, 0, 0, 1), Score(1.0, {}), 1.0, {})
  assert tokenizer.decode(e.tokens[e.action_mask]) == "y" and e.metrics["num_turns"] == 1


def test_rewards_of_turns_sit_on_their_last_tokens(tokenizer):
  log = Dialogue(tokenizer)
  _, one = say(log, tokenizer, [user("a")], "b")
  end = len(log.tokens) - 1
  say(log, tokenizer, [*one, user("c")], "d")
  assert log.token_rewards(1.0) is None
  log.turns[0].reward = 0.25
  e = log.experience(ExperienceId(1, 0, 0, 0), Score(1.0, {}), 1.0, {})
  assert e.token_rewards is not None and e.reward == 1.25
  assert e.token_rewards[end] == 0.25 and e.token_rewards[-1] == 1.0
  assert e.token_rewards.sum() == e.reward


def test_tool_calls_and_results_continue_the_log(tokenizer):
  log, ask = Dialogue(tokenizer), [user("1+2?")]
  text = 'Let me see.\n<tool_call>{"name": "add",  "arguments": {"a": 1, "b": 2}}</tool_call>'
  parsed = tool_calls.parse(text, TOOLS)
  said = tool_calls.message(parsed, ["abc"])
  prompt = log.prompt(ask, TOOLS)
  assert "add" in tokenizer.decode(prompt)
  log.record(prompt, reply(tokenizer, text), [*ask, said], TOOLS)
  result = {"role": "tool", "tool_call_id": "abc", "content": "3"}
  after = log.prompt([*ask, said, result], TOOLS)
  shown = tokenizer.decode(after, skip_special_tokens=False)
  assert text in shown  # as it was written, not as the template would write it
  assert shown.rstrip().endswith("<|assistant|>") and "<|tool|>3<|end|>" in shown
  assert shown.count("<tool_call>") == 1
  changed = json.loads(json.dumps(said))
  changed["tool_calls"][0]["function"]["arguments"] = '{"b": 2, "a": 1}'
  assert log.extended_by([*ask, changed, result], TOOLS) == 1  # the same object
  changed["tool_calls"][0]["function"]["arguments"] = '{"b": 2, "a": 9}'
  assert log.extended_by([*ask, changed, result], TOOLS) == 0


@pytest.mark.parametrize(
  "text, content, calls",
  [
    ('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', "", [("add", {"a": 1})]),
    ('x <tool_call>\n{"name": "f"}\n</tool_call>\n<tool_call>{"name": "g", "arguments": "{}"}'
     "</tool_call>", "x", [("f", {}), ("g", {})]),
    ('{"name": "add", "parameters": {"a": 1}}', "", [("add", {"a": 1})]),
    ('<|python_tag|>{"name": "add", "parameters": {}}; {"name": "add", "arguments": {"b": 2}}', "",
     [("add", {}), ("add", {"b": 2})]),
    ('{"answer": 3}', '{"answer": 3}', []),
    ("no call", "no call", []),
  ],
)  # fmt: skip
def test_tool_call_forms(text, content, calls):
  parsed = tool_calls.parse(text, TOOLS)
  assert parsed.error == "" and parsed.content == content
  assert [(name, json.loads(a)) for name, a in parsed.calls] == calls
  assert tool_calls.parse(text, []) == tool_calls.Parsed(text)  # none was offered


@pytest.mark.parametrize(
  "text, reason",
  [
    ("<tool_call>{", "without </tool_call>"),
    ("<tool_call>{</tool_call>", "JSONDecodeError"),
    ("<tool_call>[]</tool_call>", "an object with a name"),
    ('<tool_call>{"name": 3}</tool_call>', "an object with a name"),
    ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "not an object"),
    ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "not JSON"),
    ('{"name": "rm", "parameters": {}}', "no tool is named 'rm'"),
    ('{"name": "add", "parameters": {}} and more', "text after the call"),
    ('{"name": "add", ', "JSONDecodeError"),
    ("<tool_call>" + "[" * 100_000 + "</tool_call>", "RecursionError"),
  ],
)
def test_malformed_tool_calls_stay_text_with_a_reason(text, reason):
  parsed = tool_calls.parse(text, TOOLS)
  assert not parsed.calls and parsed.content == text and reason in parsed.error


def test_a_template_that_drops_replies_is_refused_by_name(tmp_path):
  tokenizer_lib.write_byte_tokenizer(tmp_path, vocab_size=320, max_length=4096)
  (tmp_path / "chat_template.jinja").write_text("{{ messages[-1].content }}")
  tokenizer = Tokenizer.load(tmp_path)
  log = Dialogue(tokenizer)
  _, after = say(log, tokenizer, [user("a")], "b")
  with pytest.raises(UserError, match="leaves the reply of turn 0 out"):
    log.prompt([*after, user("c")], ())


def test_text_streams_in_whole_characters_up_to_a_stop_string(tokenizer):
  text = "héllo wörld 🎉 ab"
  reader, pieces = Reader(tokenizer), []
  for token in tokenizer.encode(text + END):
    assert not reader.push(token)
    pieces.append(reader.take())
  reader.finish()
  assert "".join([*pieces, reader.take()]) == text == reader.text
  assert all("\ufffd" not in p for p in pieces) and len([p for p in pieces if p]) == 16

  reader, pieces = Reader(tokenizer, ["wörx", "ld"]), []
  ids = tokenizer.encode(text)
  taken = 0
  for taken, token in enumerate(ids, start=1):  # noqa: B007
    done = reader.push(token)
    pieces.append(reader.take())
    if done:
      break
  assert tokenizer.decode(ids[:taken]).endswith("ld")
  assert "".join(pieces) == reader.text == "héllo wör"


@pytest.mark.parametrize("seed", range(5))
def test_text_of_any_bytes_is_what_decoding_the_whole_gives(tokenizer, seed):
  ids = np.random.default_rng(seed).integers(0, 300, 60).tolist()
  reader, pieces = Reader(tokenizer, ["\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd!"]), []
  stretches = [ids[i : i + seed + 1] for i in range(0, len(ids), seed + 1)]
  for tokens in stretches:
    reader.push(*tokens)
    pieces.append(reader.take())
  reader.finish()
  assert "".join([*pieces, reader.take()]) == tokenizer.decode(ids)
