"""The configuration's keys by their dotted names: to walk, to check, to describe for people."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from trinity_jax.config_schema import Config
from trinity_jax.errors import UserError, suggestion


def _default(field: dataclasses.Field) -> Any:
  factory: Any = field.default_factory
  return field.default if factory is dataclasses.MISSING else factory()


def walk(cls: Any = Config, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any], Any]]:
  """Yields (dotted path, metadata, default) of every leaf key."""
  for f in dataclasses.fields(cls):
    default = _default(f)
    if dataclasses.is_dataclass(default):
      yield from walk(type(default), f"{prefix}{f.name}.")
    else:
      yield f"{prefix}{f.name}", f.metadata, default


def defaults(cls: Any = Config) -> dict[str, Any]:
  """Nested dict of every key's default."""
  out = {}
  for f in dataclasses.fields(cls):
    default = _default(f)
    out[f.name] = defaults(type(default)) if dataclasses.is_dataclass(default) else default
  return out


_LIMITS = {"low": ">=", "above": ">", "high": "<="}


def check_key(path: str) -> None:
  """Raises UserError, with a suggestion, when no config key has this dotted name."""
  cls: Any = Config
  done = ""
  for part in path.split("."):
    hints = typing.get_type_hints(cls)
    if part not in hints:
      raise UserError(f"config.{done}{part}: unknown key{suggestion(part, hints)}")
    done, cls = f"{done}{part}.", hints[part]
    if cls is dict:  # arguments: whoever takes them checks their names
      return
    if not dataclasses.is_dataclass(cls) and f"{path}." != done:
      raise UserError(f"config.{path}: unknown key; config.{done[:-1]} is one value")


def describe(path: str) -> str:
  """What a key takes and means, in one line; "" for a name that is no key."""
  for name, meta, default in walk():
    if name == path:
      return f"{_kind(default, meta)}; {meta['doc']}"
    if name.startswith(f"{path}."):
      return f"a group of keys; set them one by one, as --config.{name}=..."
  return ""


def _kind(default: Any, meta) -> str:
  limits = [f"{sign} {meta[k]}" for k, sign in _LIMITS.items() if meta[k] is not None]
  if meta["choices"]:
    return "one of " + ", ".join(map(repr, meta["choices"]))
  of = f" of {meta['each'].__name__}" if meta["each"] else ""
  return " ".join([type(default).__name__ + of, *([" and ".join(limits)] if limits else [])])


def render_keys() -> str:
  """Every key, its default, what it takes and what it means, as text of 100 columns."""
  out = []
  for path, meta, default in walk():
    out.append(f"config.{path} = {default!r}  ({_kind(default, meta)})")
    out += textwrap.wrap(meta["doc"], 96, initial_indent="    ", subsequent_indent="    ")
  return "\n".join(out)
