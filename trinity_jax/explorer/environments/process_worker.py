"""The process that an environment lives in: started by `process` as a script.

Requests and replies are JSON lines on the pipes that were stdin and stdout; what the environment
prints goes nowhere. It ends with its stdin.

  -> {"make": "module:factory", "args": {...}, "path": [sys.path]} | {"reset": []} |
     {"step": [action]} | {"close": []}
  <- {"value": text, Step's fields, or null} | {"raised": class, "text", "traceback"}
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import traceback
from typing import Any


def answer(request: dict, environment: Any) -> tuple[Any, Any]:
  """Returns (value, environment)."""
  if "make" in request:
    sys.path[:] = request["path"]
    module, _, name = request["make"].partition(":")
    return None, getattr(importlib.import_module(module), name)(**request["args"])
  ((function, args),) = request.items()
  if environment is None and function == "close":  # it could not be made
    return None, None
  value = getattr(environment, function)(*args)
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    value = dataclasses.asdict(value)
  return value, environment


def main() -> None:
  source, sink = os.dup(0), os.dup(1)
  null = os.open(os.devnull, os.O_RDWR)
  for number in (0, 1, 2):
    os.dup2(null, number)
  environment = None
  with open(source, encoding="utf-8") as lines, open(sink, "w", encoding="utf-8") as out:
    for line in lines:
      try:
        request = json.loads(line)
        environment = None if "make" in request else environment
        value, environment = answer(request, environment)
        reply = json.dumps({"value": value})
      except Exception as e:  # told to whoever asked, where it is raised
        told = traceback.format_exc()[-3000:]
        reply = json.dumps({"raised": type(e).__name__, "text": str(e), "traceback": told})
      out.write(reply + "\n")
      out.flush()


if __name__ == "__main__":
  main()
