"""Rows of a file, and what a row means as a Task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trinity_jax.config import TasksetConfig
from trinity_jax.errors import UserError, suggestion
from trinity_jax.experience import Task

_ROLES = ("system", "user", "assistant", "tool")
_SHOWN = 80  # characters of a bad value in a message


class Row(NamedTuple):
  """One record as read.

  Attributes:
    where: "file:line", or whatever tells people where it came from.
    data: the record.
  """

  where: str
  data: dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
  """Reads a JSONL file: one JSON object a line, UTF-8, blank lines skipped.

  Raises:
    UserError: no such file, a line that is not a JSON object, or no rows at all.
  """
  path = Path(path)
  if not path.is_file():
    problem = "is a folder, not a file" if path.is_dir() else "does not exist"
    raise UserError(
      f"taskset file {path} {problem} (looked in {Path.cwd()}); set taskset.path to a JSONL file"
    )
  rows = []
  try:
    with path.open("rb") as lines:
      for number, line in enumerate(lines, 1):
        if line.strip():
          rows.append(Row(f"{path}:{number}", _parse(line, f"{path}:{number}")))
  except OSError as e:
    raise UserError(f"taskset file {path} cannot be read: {e.strerror}") from e
  if not rows:
    raise UserError(f"taskset file {path} has no rows; expected one JSON object a line")
  return rows


def _parse(line: bytes, where: str) -> dict[str, Any]:
  try:
    row = json.loads(line.decode("utf-8-sig"), parse_constant=_not_json)
  except UnicodeDecodeError as e:
    if line.startswith(b"PAR1"):
      raise UserError(
        f"{where.rpartition(':')[0]} is a Parquet file; expected JSON lines, which "
        "pandas.read_parquet(...).to_json('rows.jsonl', orient='records', lines=True) makes"
      ) from e
    raise UserError(f"{where}: byte {e.start} is not UTF-8; save the file as UTF-8") from e
  except (ValueError, RecursionError) as e:
    shown = line.decode(errors="replace").strip()[:_SHOWN]
    problem = f"{e.msg} at column {e.colno}" if isinstance(e, json.JSONDecodeError) else str(e)
    raise UserError(f"{where}: not JSON ({problem}): {shown!r}; fix or remove the line") from e
  if not isinstance(row, dict):
    raise UserError(
      f"{where}: expected a JSON object with named fields, got {type(row).__name__}: "
      f"{_short(row)}; write {{\"prompt\": ...}}"
    )
  return row


def _not_json(name: str) -> None:
  raise ValueError(f"{name} is not a JSON number")


def to_task(row: Row, index: int, config: TasksetConfig, *, is_eval: bool = False) -> Task:
  """Reads a row as the config says: prompt or messages, truth, demonstration.

  Args:
    row: the record.
    index: its place in the taskset, the task's identity.
    config: names of the fields (`prompt_key`, ...), system prompt.
    is_eval: the task is evaluated, never trained on.

  Raises:
    UserError: a field is missing or not what it should be; names file, line, field and fix.
  """
  return Task(
    index=index,
    messages=() if config.text_key else _messages(row, config),
    truth=_truth(row, config.truth_key),
    response=_text(row, config.response_key, "response_key"),
    chosen=_text(row, config.chosen_key, "chosen_key"),
    rejected=_text(row, config.rejected_key, "rejected_key"),
    text=_text(row, config.text_key, "text_key") if config.text_key else None,
    taskset=config.name,
    is_eval=is_eval,
    raw=row.data,
  )


def _messages(row: Row, config: TasksetConfig) -> tuple[dict[str, Any], ...]:
  if config.messages_key:
    messages = _field(row, config.messages_key, "taskset.messages_key")
    if not isinstance(messages, list) or not messages:
      raise UserError(
        f"{row.where}: {config.messages_key} = {_short(messages)}: expected a non-empty list of "
        '{"role": ..., "content": ...}'
      )
    messages = tuple(_message(row, config.messages_key, i, m) for i, m in enumerate(messages))
  else:
    prompt = _field(row, config.prompt_key, "taskset.prompt_key")
    if not isinstance(prompt, str) or not prompt:
      raise UserError(
        f"{row.where}: {config.prompt_key} = {_short(prompt)}: expected a non-empty text "
        "(taskset.prompt_key names the field; chat messages go by taskset.messages_key)"
      )
    messages = ({"role": "user", "content": prompt},)
  if not config.system_prompt:
    return messages
  if messages[0]["role"] == "system":
    raise UserError(
      f"{row.where}: {config.messages_key} starts with a system message and "
      "taskset.system_prompt is set; remove one of them"
    )
  return ({"role": "system", "content": config.system_prompt}, *messages)


def _message(row: Row, key: str, i: int, message: Any) -> dict[str, Any]:
  if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
    raise UserError(
      f'{row.where}: {key}[{i}] = {_short(message)}: expected {{"role": ..., "content": text}}'
    )
  if message.get("role") not in _ROLES:
    raise UserError(
      f"{row.where}: {key}[{i}].role = {message.get('role')!r}: expected one of {', '.join(_ROLES)}"
    )
  return dict(message)


def _truth(row: Row, key: str) -> str:
  """Text as it is; numbers, lists and objects as JSON (countdown's puzzle); absent as ""."""
  value = row.data.get(key)
  if value is None:
    return ""
  return value if isinstance(value, str) else json.dumps(value)


def _text(row: Row, key: str, name: str) -> str | None:
  value = row.data.get(key)
  if value is None or isinstance(value, str):
    return value
  raise UserError(
    f"{row.where}: {key} = {_short(value)}: expected text (taskset.{name} names the field)"
  )


def _field(row: Row, key: str, config_key: str) -> Any:
  if key not in row.data:
    raise UserError(
      f"{row.where}: no field {key!r}{suggestion(key, row.data)}; set {config_key} to the field "
      "that holds it"
    )
  return row.data[key]


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
