"""Rows of a file, what they mean, and what is said about bad ones."""

from __future__ import annotations

import json

import pytest

from trinity_jax.config import TasksetConfig
from trinity_jax.errors import UserError
from trinity_jax.tasks.formats import Row, read_rows, to_task


def task(data, is_eval=False, **config):
  return to_task(Row("rows.jsonl:7", data), 3, TasksetConfig(**config), is_eval=is_eval)


def test_reads_rows_with_their_lines(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_bytes('\ufeff{"a": 1}\n\n  \n{"a": "\u00e9\u2028"}\r\n{"a": 3}'.encode())
  rows = read_rows(path)
  assert [r.data for r in rows] == [{"a": 1}, {"a": "\u00e9\u2028"}, {"a": 3}]
  assert [r.where for r in rows] == [f"{path}:1", f"{path}:4", f"{path}:5"]


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "rows.jsonl has no rows; expected one JSON object a line"),
    (b"\n \n", "rows.jsonl has no rows"),
    (b'{"a": 1}\n{"a": \n', r"rows.jsonl:2: not JSON \(Expecting value at column \d+\): '{\"a\":'"),
    (b'{"a": 1}\n{"a": 1} x\n', r"rows.jsonl:2: not JSON \(Extra data at column 10\)"),
    (b'{"a": NaN}\n', r"rows.jsonl:1: not JSON \(NaN is not a JSON number\)"),
    (b'["a"]\n', r"rows.jsonl:1: expected a JSON object with named fields, got list: \['a'\]"),
    (b'{"a": "\xff"}\n', "rows.jsonl:1: byte 7 is not UTF-8"),
    (b"PAR1\x15\x04\xff\n\n", "rows.jsonl is a Parquet file; expected JSON lines"),
    (b"[" * 100_000 + b"\n", "rows.jsonl:1: not JSON"),
  ],
)
def test_bad_files_are_named_with_the_line(tmp_path, content, message):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(content)
  with pytest.raises(UserError, match=message) as e:
    read_rows(path)
  assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_missing_files_and_folders(tmp_path):
  with pytest.raises(UserError, match="missing.jsonl does not exist.*set taskset.path"):
    read_rows(tmp_path / "missing.jsonl")
  with pytest.raises(UserError, match="is a folder, not a file"):
    read_rows(tmp_path)


def test_a_prompt_becomes_a_user_message():
  got = task({"prompt": "2+2=", "answer": 4, "more": [1]}, name="sums", is_eval=True)
  assert got.messages == ({"role": "user", "content": "2+2="},)
  assert (got.index, got.truth, got.response, got.taskset) == (3, "4", None, "sums")
  assert got.is_eval
  assert got.raw == {"prompt": "2+2=", "answer": 4, "more": [1]}


def test_gsm8k_rows():
  row = {"question": "How many?", "answer": "2+2=4\n#### 4"}
  got = task(row, prompt_key="question", response_key="answer", system_prompt="Think.")
  assert [m["role"] for m in got.messages] == ["system", "user"]
  assert got.messages[0]["content"] == "Think."
  assert got.truth == got.response == "2+2=4\n#### 4"


def test_messages_go_through_whole():
  messages = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]},
    {"role": "tool", "content": "b", "tool_call_id": "1"},
  ]
  got = task({"chat": messages, "prompt": 5}, messages_key="chat", system_prompt="s")
  assert list(got.messages) == [{"role": "system", "content": "s"}, *messages]


def test_structured_truths_are_json():
  got = task({"prompt": "p", "puzzle": {"numbers": [1, 2], "target": 3}}, truth_key="puzzle")
  assert json.loads(got.truth) == {"numbers": [1, 2], "target": 3}
  assert task({"prompt": "p"}).truth == ""


@pytest.mark.parametrize(
  "data, config, message",
  [
    ({"promt": "x"}, {}, "no field 'prompt'; did you mean 'promt'.*set taskset.prompt_key"),
    ({"question": "x", "answer": "y"}, {}, "no field 'prompt'; known: answer, question"),
    ({"prompt": ""}, {}, "prompt = '': expected a non-empty text"),
    ({"prompt": 3}, {}, "prompt = 3: expected a non-empty text"),
    ({"prompt": "x", "response": 3}, {}, "response = 3: expected text"),
    ({"m": []}, {"messages_key": "m"}, r"m = \[\]: expected a non-empty list"),
    ({"m": "hello"}, {"messages_key": "m"}, "m = 'hello': expected a non-empty list"),
    ({"m": [{"role": "user"}]}, {"messages_key": "m"}, r"m\[0\] = .*expected {\"role\""),
    ({"m": [{"role": "boss", "content": ""}]}, {"messages_key": "m"}, r"m\[0\].role = 'boss'"),
    (
      {"m": [{"role": "system", "content": "x"}]},
      {"messages_key": "m", "system_prompt": "y"},
      "starts with a system message and taskset.system_prompt is set",
    ),
  ],
)
def test_bad_rows_are_named(data, config, message):
  with pytest.raises(UserError, match="rows.jsonl:7: .*" + message):
    task(data, **config)


def test_long_values_are_cut_in_messages():
  with pytest.raises(UserError) as e:
    task({"prompt": ["x" * 10_000]})
  assert len(str(e.value)) < 400
