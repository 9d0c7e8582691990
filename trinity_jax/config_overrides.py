"""Keys of a config from a command line: --config.a.b=VALUE, --config.stages.NAME.a.b=VALUE."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from trinity_jax import config_keys
from trinity_jax.errors import UserError

_KEY = re.compile(r"--?(no)?config\.([^=\s]*)")


def override(values: ConfigDict, args: Sequence[str]) -> tuple[ConfigDict, list[str]]:
  """Returns the config with the keys that `args` set, and the arguments that are none of its keys.

  Raises:
    UserError: an unknown key or stage, a key that a stage sets, too.
    flags.Error: a value that cannot be read.
  """
  whole = [arg for arg in args if not _of_stage(arg)]
  names = keys_of(whole)
  for name in names:
    config_keys.check_key(name)
  values, rest = _read(values, whole)
  given: Any = values.stages
  stages = [dict(stage) for stage in given if isinstance(stage, Mapping)]
  if len(stages) < len(given):  # `resolve` will say that they are no stages
    return values, rest
  for arg in args:
    if _of_stage(arg):
      stage, key = _stage(stages, arg)
      (name,) = keys_of([key])
      config_keys.check_key(name)
      stage[name] = _get(_read(_with(values, stage), [key])[0], name)
  for name in names:
    if setting := [stage.get("name") for stage in stages if _sets(stage, name)]:
      raise UserError(
        f"config.{name}: {' and '.join(map(repr, setting))} of config.stages set it, and stages "
        f"have the last word; name the one: --config.stages.{setting[-1]}.{name}=..."
      )
  values.stages = tuple(stages)
  return values, rest


def keys_of(args: Sequence[str]) -> list[str]:
  """The names of the keys that arguments set."""
  return [m[2] for arg in args if (m := _KEY.match(arg))]


def _read(values: ConfigDict, args: Sequence[str]) -> tuple[ConfigDict, list[str]]:
  keys = flags.FlagValues()
  keys.set_gnu_getopt(True)
  # New attributes are for arguments such as policy_loss_args.clip_high; check_key has refused
  # every other new name. A file may have locked them (`with c.unlocked()` does, at its end).
  values.unlock()
  config_flags.DEFINE_config_dict(
    "config", values, flag_values=keys, sys_argv=["", *args], lock_config=False,
    accept_new_attributes=True,
  )  # fmt: skip
  rest = keys(["", *args])[1:]
  read: Any = keys["config"].value
  return read, rest


def _of_stage(arg: str) -> bool:
  match = _KEY.match(arg)
  return match is not None and match[2].startswith("stages.")


def _stage(stages: list[dict[str, Any]], arg: str) -> tuple[dict[str, Any], str]:
  """The stage that an argument is for, and the argument without it.

  Raises:
    UserError: there is none of that name.
  """
  match = _KEY.match(arg)
  assert match is not None
  path = match[2].removeprefix("stages.")
  for stage in stages:
    if path.startswith(f"{stage.get('name')}."):
      rest = arg[match.start(2) :].removeprefix(f"stages.{stage['name']}.")
      return stage, f"--{match[1] or ''}config.{rest}"
  names = ", ".join(str(stage.get("name")) for stage in stages) or "none"
  raise UserError(f"config.stages.{path}: no stage of that name; the config's stages: {names}")


def _with(values: ConfigDict, stage: Mapping[str, Any]) -> ConfigDict:
  """The config with what a stage sets, so that its arguments have their types."""
  out = copy.deepcopy(values)
  out.unlock()
  out.update_from_flattened_dict(dict(_leaves(stage)))
  return out


def _get(values: ConfigDict, name: str) -> Any:
  found: Any = values
  for part in name.split("."):
    found = found[part]
  return found.to_dict() if isinstance(found, ConfigDict) else found


def _sets(stage: Mapping[str, Any], name: str) -> bool:
  """Whether a stage sets this key, some of it, or what it is part of."""
  return any(f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}.")
             for key, _ in _leaves(stage))  # fmt: skip


def _leaves(stage: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
  """(key, value) of what a stage sets; groups of keys may be nested."""
  keys = {path for path, _, _ in config_keys.walk()}
  out = []
  for name, value in stage.items():
    path = prefix + name
    group = path not in keys and any(key.startswith(f"{path}.") for key in keys)
    if group and isinstance(value, Mapping):
      out += _leaves(value, f"{path}.")
    elif path != "name":
      out.append((path, value))
  return out
