"""Functions that a config names as "module:function"."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from trinity_jax.errors import UserError, suggestion


def load(reference: str, kind: str) -> Callable[..., Any]:
  """Returns the function that "module:function" names.

  Args:
    reference: dotted module, a colon, the function's name in it.
    kind: what the function is for, as the error says it ("reward", "taskset.generate").

  Raises:
    UserError: no such module or function. An error inside the module is not caught.
  """
  module_name, _, name = reference.partition(":")
  if not module_name or module_name.startswith("."):
    raise UserError(f"{kind} {reference!r}: expected 'module:function' with a full module name")
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as e:
    if e.name is None or not f"{module_name}.".startswith(f"{e.name}."):
      raise  # the module exists; something that it imports does not
    raise UserError(
      f"{kind} {reference!r}: there is no module {module_name!r}; put its folder on PYTHONPATH"
    ) from e
  function = getattr(module, name, None)
  if not callable(function):
    public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
    raise UserError(
      f"{kind} {reference!r}: module {module_name!r} has no function {name!r}"
      f"{suggestion(name, public)}"
    )
  return function
