"""Arrays and what JSON can hold as one blob of bytes: safetensors, the JSON text in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np


def pack(name: str, header: Any, arrays: Mapping[str, np.ndarray]) -> bytes:
  """One blob.

  Args:
    name: of the header, for `unpack`.
    header: anything JSON can hold; numpy's scalars are numbers too.
  """
  from safetensors.numpy import save

  # safetensors writes the memory behind a view; ascontiguousarray would turn scalars into vectors.
  whole = {k: np.asarray(v, order="C") for k, v in arrays.items()}
  return save(whole, metadata={name: json.dumps(header, default=float), "format": "1"})


def unpack(name: str, data: bytes) -> tuple[Any, dict[str, np.ndarray]]:
  """(header, arrays) of `pack`.

  Raises:
    ValueError, LookupError, TypeError, SafetensorError: damaged, or of another name.
  """
  from safetensors.numpy import load

  size = int.from_bytes(data[:8], "little")
  return json.loads(json.loads(data[8 : 8 + size])["__metadata__"][name]), load(data)
